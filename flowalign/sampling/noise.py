"""Counted noise: each number depends on a key that names its use and place, and not on earlier draws."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from flowalign.lazy import torch

# The first part of every key says what the numbers are used for, so that no two uses share a stream.
ROLLOUT, EVALUATION, PROMPTS, ITEMS, FORWARD, WINDOW, DATASET = range(7)


def _seed(key: Sequence[int]) -> int:
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch's seeds have 63 bits


def counted_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the integers of `key` alone."""
    return torch.Generator().manual_seed(_seed(key))


def counted_noise(keys: Sequence[Sequence[int]], shape: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Standard normal noise (B, *shape), float32; row i depends on keys[i] alone, not on the batch or the device.

    In rollouts a key is (use, seed, training step, prompt index, member, denoising step).
    """
    rows = [torch.randn(tuple(shape), generator=counted_generator(*key)) for key in keys]
    return torch.stack(rows).to(device)
