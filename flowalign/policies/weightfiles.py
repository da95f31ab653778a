"""What is wrong with a file of weights, before anything is made of it."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_POINTER = b"version https://git-lfs"


def damage(path: Path) -> str | None:
    """Why a file is no whole safetensors file, as the end of a sentence that begins with its name; None: it is one.

    Reads the header alone, which says how long the file must be.
    """
    if path.suffix.lower() in PICKLES:
        return "is a pickle, which may run anything; save its tensors as safetensors"
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
        if start == _POINTER:
            return "is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
        if not start:
            return "is empty; fetch it again"
        with safe_open(path, "pt"):
            return None
    except SafetensorError as error:
        return f"is damaged or was not fetched to its end ({' '.join(str(error).split())[:120]}); fetch it again"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
