"""What all commands share: the console, the compute device, quiet libraries, and sentences for system errors."""

import errno
import os
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowalign.config.paths import expanded
from flowalign.terminal import plain_console, table_of, verdict

if TYPE_CHECKING:
    from rewards.contract import Finding

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="changes to the recipe's settings, such as train.steps=100"),
]
RewardOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="[REWARD.]KEY=VALUE",
        help="an option of a reward; with a single reward its name may be left out; VALUE is YAML or JSON; repeatable",
    ),
]
ImagePrompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE[#COLUMN]",
        help="a prompt list with one row per image; default: the metadata.jsonl in the folder of images",
    ),
]

console = plain_console()


def device() -> str:
    """The compute device with its index, such as "cuda:0"."""
    from rewards.devices import chosen_device

    return str(chosen_device())


def quiet_libraries() -> None:
    """Silence the loading bars and notices of the model libraries: a user of a command cannot act on them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def show_findings(title: str, findings: "Sequence[Finding]") -> None:
    """Print the findings of a check as a table; the exit code is 1 if one failed."""
    rows = ((check, verdict(passed), detail) for check, passed, detail in findings)
    console.print(table_of(("check", "result", "detail"), rows, title=title))
    if any(finding.passed is False for finding in findings):
        raise typer.Exit(1)


def disk_mistake(error: OSError) -> str | None:
    """One sentence for an error of the disk or of a user's path; None for a defect of this package."""
    name = error.filename
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        remedy = "fix that, then run the command again (training with --resume)"
        return f"cannot write {name or 'to the disk'}: {error.strerror}; {remedy}"
    if not isinstance(name, str | bytes | os.PathLike):
        return None
    path = Path(os.fsdecode(name))
    ours = (Path(__file__).parents[1], Path(sysconfig.get_path("purelib")))
    if any(path.absolute().is_relative_to(place) for place in ours):
        return None
    return f"{path}: {error.strerror or error}; give an input that can be read and an output that can be written"


def memory_mistake(error: Exception) -> str | None:
    """One sentence for an out-of-memory error that no phase of a run has explained; None for another error."""
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not full and "can't allocate memory" not in str(error):
        return None
    return f"out of memory ({' '.join(str(error).split())[:120]}); use smaller images, smaller batches or a lower rank"


def with_homes(arguments: Sequence[str]) -> list[str]:
    """The arguments with ~/ replaced by the home folder, also where shells leave it alone, as in --output=~/x."""
    parted = [re.fullmatch(r"(--[\w-]+=)?(~/.*)", argument, re.DOTALL) for argument in arguments]
    return [
        (found[1] or "") + expanded(found[2]) if found else argument
        for found, argument in zip(parted, arguments, strict=True)
    ]
