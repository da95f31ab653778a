"""Conditions: what a row's velocity depends on beside its state and sigma, as named tensors.

Shape legend: B rows, ... a tensor's own dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Rows = torch.Tensor | slice | list[int]


@dataclass(frozen=True)
class Condition:
    """The condition of B rows: named tensors (B, ...), taken apart and put together by row."""

    tensors: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Rows) -> "Condition":
        return Condition({name: _taken(tensor, rows) for name, tensor in self.tensors.items()})

    def expand(self, rows: int) -> "Condition":
        """One row seen as many, in the memory of one."""
        return Condition({name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence["Condition"]) -> "Condition":
        """The rows of all parts, in order."""
        return Condition({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class Conditioning:
    """Both sides of guidance, of B rows each: what the velocity is drawn to, and what it is drawn away from.

    The negative side shares with the positive one what is not text, such as a reference image.
    """

    positive: Condition
    negative: Condition

    def __len__(self) -> int:
        return len(self.positive)

    def __getitem__(self, rows: Rows) -> "Conditioning":
        return Conditioning(self.positive[rows], self.negative[rows])

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """The rows of all parts, in order."""
        sides = ([part.positive for part in parts], [part.negative for part in parts])
        return Conditioning(*map(Condition.cat, sides))


def _taken(tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Some rows of a tensor (B, ...); of one row that is seen as many it is that row again, in the memory of one."""
    if tensor.stride(0):
        return tensor[rows]
    first = tensor.flatten(1)[:, 0] if tensor.ndim > 1 else tensor
    return tensor[:1].expand(len(first[rows]), *tensor.shape[1:])
