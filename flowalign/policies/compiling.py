"""torch.compile of a transformer's blocks: one compilation serves all that are alike."""

import importlib.util
import os
import shutil
from typing import Any

import torch

from flowalign.config.base import UserError

# A block is compiled once for each way that it is called in: with and without gradients and adapters, for one size of
# batches and then for any. At torch's own limit of 8 it would go on uncompiled without a word.
_WAYS = 64


def why_not_compiled(device: torch.device) -> str | None:
    """What is missing here to compile for a device; None where nothing is."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"there is no C++ compiler {compiler}"


def compile_blocks(transformer: Any, device: torch.device) -> None:
    """Compile each block of a diffusers transformer when it is first called, but not its embeddings and output.

    Raises UserError where nothing can be compiled here, and for a transformer that names no blocks.
    """
    if why := why_not_compiled(device):
        raise UserError(f"model.compile: {why}; install it or leave model.compile out")
    names = transformer._no_split_modules or ()
    blocks = [module for module in transformer.modules() if type(module).__name__ in names]
    if not blocks:
        raise UserError(f"model.compile: a {type(transformer).__name__} names no blocks to compile; leave it out")
    torch._dynamo.config.recompile_limit = max(_WAYS, torch._dynamo.config.recompile_limit)
    for block in blocks:
        block.compile()
