"""Tensors as safetensors files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from flowalign.disk.files import replaced_file


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write named tensors as one file, whole. Raises OSError or SafetensorError when the disk refuses it."""
    with replaced_file(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
