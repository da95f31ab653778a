"""The exact judge of the embedded world's signs: is the text right, and is there nothing else in the picture?

OCR alone reads through dirt: specks, stripes and letters of several colours cost it nothing. The world draws a sign as
one dark ink over a gradient that is linear in x and y, so whatever is neither can be counted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from flowalign.toyworld.render import Scene, render
from rewards.base import Golden
from rewards.media import as_levels
from rewards.ocr import OCR

LIGHTEST, DARKEST_GROUND, LIGHTEST_INK = 255.0, 220.0, 75.0  # 8-bit levels between which the world draws
INK = 45.0  # levels of the largest channel by which ink differs from the ground
SMOOTH = 16.0  # levels that the ground may lie off its gradient: the autoencoder's own error is below that
MIXED = 40.0  # levels that a letter's pixel may lie off a mixture of ink and ground
LOW, TALL = 8, 17  # pixels of a letter, which is 12 tall; letters may touch
MOST_FILLED = 0.85  # of a letter's box; an I fills 0.74 of it, a B 0.70
RIM = 2  # pixels around letters where they and the ground mix
TOLERATED = 0.06  # share of dirty pixels, about a fourth of a word's ink, at which a picture is worth nothing


def cleanliness(picture: np.ndarray) -> float:
    """How much a picture (64, 64, 3), 8-bit levels, is letters of one dark ink on a light gradient, in [0, 1].

    1 for the world's own signs; falls by the share of pixels that are neither, to 0 at TOLERATED.
    """
    levels = picture.astype(np.float64)
    ground = _ground(levels)
    off = np.abs(levels - ground).max(-1)
    letters = _letters(off)
    near = ndimage.binary_dilation(letters, np.ones((3, 3)), RIM)
    dirty = np.where(near, _unmixed(levels, ground, letters) > MIXED, off > SMOOTH)
    return max(0.0, 1 - float(dirty.mean()) / TOLERATED)


def _ground(levels: np.ndarray) -> np.ndarray:
    """The gradient (H, W, 3) under a picture: planes through the pixels that lie near them, as light as the world's."""
    height, width, _ = levels.shape
    ys, xs = np.mgrid[:height, :width]
    places = np.stack([np.ones(ys.size), xs.ravel() / width, ys.ravel() / height], axis=1)
    pixels = levels.reshape(-1, 3)
    border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    planes = np.broadcast_to(np.median(border, axis=0), pixels.shape)
    for limit in (INK, SMOOTH, SMOOTH):
        kept = np.abs(pixels - planes).max(-1) <= limit
        if kept.mean() < 0.1:  # no ground to speak of: what is there is judged against the median
            break
        planes = places @ np.linalg.lstsq(places[kept], pixels[kept], rcond=None)[0]
    return planes.reshape(levels.shape).clip(DARKEST_GROUND, LIGHTEST)


def _letters(off: np.ndarray) -> np.ndarray:
    """The connected parts of ink, (H, W) bool, that are as tall as letters and are no blocks; `off`: its contrast."""
    labels, _ = ndimage.label(off > INK, np.ones((3, 3)))
    chosen = []
    for index, box in enumerate(ndimage.find_objects(labels), 1):
        ink = np.where(labels[box] == index, off[box], 0)
        if LOW <= len(ink) <= TALL and ink.mean() <= MOST_FILLED * ink.max():
            chosen.append(index)
    return np.isin(labels, chosen)


def _unmixed(levels: np.ndarray, ground: np.ndarray, letters: np.ndarray) -> np.ndarray:
    """How far each pixel (H, W) is from the nearest mixture of ground and ink, the letters' median dark colour."""
    if not letters.any():
        return np.abs(levels - ground).max(-1)
    darkness = (ground - levels).mean(-1)
    core = letters & (darkness >= np.median(darkness[letters]))
    ink = np.median(levels[core], axis=0).clip(0, LIGHTEST_INK)
    span = ink - ground
    share = (((levels - ground) * span).sum(-1) / (span**2).sum(-1)).clip(0, 1)
    return np.abs(levels - ground - share[..., None] * span).max(-1)


class SignQuality(OCR):
    """Strict text score times `cleanliness`, in [0, 1]: 1 for exactly the quoted text, drawn as the world draws it."""

    name = "sign_quality"

    def __init__(self, threads: int | None = None):
        super().__init__(mode="lines", strict=True, threads=threads)

    def of_pictures(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        """Scores (N,) of images of 64 x 64 pixels; RewardError for a prompt that quotes no text."""
        levels = as_levels(images).permute(0, 2, 3, 1).float().cpu().numpy()
        clean = torch.tensor([cleanliness(picture) for picture in levels], dtype=torch.float32)
        return super().of_pictures(images, prompts, metadata) * clean

    def golden(self) -> Golden:
        """A true sign, and an empty picture."""
        pictures = np.stack([render(Scene(lines=("STONE",))), render(Scene())])
        media = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
        return Golden(media, ['a sign that says "STONE"'] * 2, [{}, {}], [1.0, 0.0])
