"""What the commands share: where they print, on what they compute, and quiet libraries."""

import os

from rich.console import Console

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
