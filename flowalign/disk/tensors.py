"""Tensors as safetensors files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from flowalign.disk.files import replaced_file


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, contended: bool = False) -> None:
    """Write tensors by their names, whole; OSError or SafetensorError when the disk does not take it.

    `contended` as of `replaced_file`.
    """
    with replaced_file(path, contended=contended) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
