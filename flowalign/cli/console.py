"""What the commands share: where they print, on what they compute, and quiet libraries."""

import errno
import os
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from flowalign.config.paths import expanded
from flowalign.terminal import plain_console

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes to the recipe")]
RewardOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="[REWARD.]KEY=VALUE",
        help="passed to a reward, whose name a single one needs not; VALUE is YAML or JSON; repeatable",
    ),
]

console = plain_console()


def device() -> str:
    """The device that is computed on, with its index."""
    from rewards.devices import chosen_device

    return str(chosen_device())


def quiet_libraries() -> None:
    """The loading bars and notices of the model libraries say nothing that a user of ours can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def disk_mistake(error: OSError) -> str | None:
    """One sentence for a path or a disk that does not give or take what was asked; None for a fault that is ours."""
    name = error.filename
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        mend = "mend that, then run it again (a training run with --resume)"
        return f"cannot write {name or 'to the disk'}: {error.strerror}; {mend}"
    if not isinstance(name, str | bytes | os.PathLike):
        return None
    path = Path(os.fsdecode(name))
    ours = (Path(__file__).parents[1], Path(sysconfig.get_path("purelib")))
    if any(path.absolute().is_relative_to(place) for place in ours):
        return None
    return f"{path}: {error.strerror or error}; give a path that can be read, or written where something is written"


def memory_mistake(error: Exception) -> str | None:
    """One sentence for more memory than there is, where no phase of a run says it; None for another error."""
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not full and "can't allocate memory" not in str(error):
        return None
    return f"out of memory ({' '.join(str(error).split())[:120]}); ask for smaller sizes, fewer at once or a lower rank"


def with_homes(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line with ~/ as the home folder also where shells leave it, as in --output=~/x."""
    parted = [re.fullmatch(r"(--[\w-]+=)?(~/.*)", argument, re.DOTALL) for argument in arguments]
    return [
        (found[1] or "") + expanded(found[2]) if found else argument
        for found, argument in zip(parted, arguments, strict=True)
    ]
