"""Tensors as safetensors files, and the state of a training as PyTorch's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flowalign.disk.files import replaced_file


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, contended: bool = False) -> None:
    """Write named tensors as one file, whole. Raises OSError or SafetensorError when the disk refuses it.

    contended: other processes may write the file at the same time.
    """
    with replaced_file(path, contended=contended) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


def save_state(path: Path, state: Any) -> None:
    """Write what `torch.load` reads with `weights_only`, such as the state of an optimizer, whole."""
    with replaced_file(path) as partial:
        torch.save(state, partial)
