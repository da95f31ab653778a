"""What the commands share: where they print, on what they compute, and quiet libraries."""

import os
import re
from collections.abc import Sequence

from rich.console import Console

from flowalign.paths import expanded

console = Console(highlight=False)


def device() -> str:
    """The accelerator, or the processor without one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def quiet_libraries() -> None:
    """The loading bars and notices of the model libraries say nothing that a user of ours can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def with_homes(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line with ~/ as the home folder also where shells leave it, as in --output=~/x."""
    parted = [re.fullmatch(r"(--[\w-]+=)?(~/.*)", argument, re.DOTALL) for argument in arguments]
    return [
        (found[1] or "") + expanded(found[2]) if found else argument
        for found, argument in zip(parted, arguments, strict=True)
    ]
