"""Worse images for training the judges: spoilt as a whole, with a rating, or altered in a box."""

import numpy as np
import torch
from torch.nn import functional as F

from flowalign.toyworld.making.artifacts import KINDS, damaged
from flowalign.toyworld.making.examples import drawn, examples
from flowalign.toyworld.render import SIZE


def spoil(images: torch.Tensor, amount: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images (B, 3, H, W), made worse by `amount` (B,) in [0, 1]: in turn by noise, blur, blotches or washing out."""
    spoilt = []
    for index, (image, much) in enumerate(zip(images, amount.tolist(), strict=True)):
        kind = index % 4
        if kind == 0:
            image = image + 0.3 * much * torch.randn(image.shape, generator=generator)
        elif kind == 1:
            blurred = F.avg_pool2d(F.pad(image[None], (3, 3, 3, 3), mode="replicate"), 7, 1)[0]
            image = torch.lerp(image, blurred, much)
        elif kind == 2:
            coarse = torch.rand(1, 3, 8, 8, generator=generator)
            image = torch.lerp(image, F.interpolate(coarse, image.shape[-2:], mode="bicubic")[0], 0.6 * much)
        else:
            image = torch.lerp(image, torch.full_like(image, 0.8), 0.8 * much)
        spoilt.append(image.clamp(0, 1))
    return torch.stack(spoilt)


def rated(images: torch.Tensor, seed: int, stage: int, step: int, spoilt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The images, the first `spoilt` of them spoilt, and a synthetic rating (B,): 10 for a clean image, down to 1."""
    generator = torch.Generator().manual_seed(1_000_003 * (10 * seed + stage) + step)
    amount = torch.rand(len(images), generator=generator).where(torch.arange(len(images)) < spoilt, 0.0)
    return torch.cat([spoil(images[:spoilt], amount[:spoilt], generator), images[spoilt:]]), 10 - 9 * amount


def quality_examples(seed: int, step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` images, the first half of them spoilt, and their rating."""
    images = drawn([scene for _, scene in examples(seed, 2, step, count)])
    return rated(images, seed, 2, step, spoilt=count // 2)


def altered(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy of an image (64, 64, 3), uint8, with a box that does not belong: damage, or a piece of the other image."""
    kind = int(rng.integers(len(KINDS) + 3))
    if kind < len(KINDS):
        return damaged(image, list(KINDS.values())[kind], rng)
    copy = image.copy()
    height, width = rng.integers(8, 28, 2)
    top, left = int(rng.integers(0, SIZE - height)), int(rng.integers(0, SIZE - width))
    box = copy[top : top + height, left : left + width]
    if kind == len(KINDS):
        box[:] = other[top : top + height, left : left + width]
    elif kind == len(KINDS) + 1:
        box[:] = rng.permutation(box.reshape(-1, 3)).reshape(box.shape)
    else:
        box[:] = (box * rng.uniform(0.5, 1.1, 3) + rng.uniform(-40, 40, 3)).clip(0, 255)
    return copy
