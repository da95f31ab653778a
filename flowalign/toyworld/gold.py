"""The exact judge of the embedded world's signs: whether the text is right and the image shows nothing else.

OCR alone reads through dirt: specks, stripes and letters of several colours do not lower its score. The world draws a
sign in one dark ink over a gradient that is linear in x and y, so all other pixels can be counted as dirt.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from flowalign.toyworld.render import Scene, render
from rewards.base import Golden, Rows
from rewards.media import as_levels
from rewards.ocr import OCR

LIGHTEST, DARKEST_GROUND, LIGHTEST_INK = 255.0, 220.0, 75.0  # 8-bit limits of the world's grounds and inks
INK = 45.0  # ink differs from the ground by more than this many levels in its largest channel
SMOOTH = 16.0  # levels by which the ground may differ from its gradient; the autoencoder's own error is smaller
MIXED = 40.0  # levels by which a letter's pixel may differ from a mixture of ink and ground
LOW, TALL = 8, 17  # limits of a letter's height in pixels; a letter is 12 tall, and letters may touch
MOST_FILLED = 0.85  # largest filled share of a letter's box; an I fills 0.74 of it, a B 0.70
RIM = 2  # pixels around a letter in which ink and ground mix
TOLERATED = 0.06  # share of dirty pixels, about a fourth of a word's ink, at which the score falls to 0


def cleanliness(image: np.ndarray) -> float:
    """How far an image (64, 64, 3) of 8-bit levels shows only letters of one dark ink on a light gradient, in [0, 1].

    It is 1 for the world's own signs, and falls with the share of other pixels, to 0 at TOLERATED.
    """
    levels = image.astype(np.float64)
    ground = _ground(levels)
    off = np.abs(levels - ground).max(-1)
    letters = _letters(off)
    near = ndimage.binary_dilation(letters, np.ones((3, 3)), RIM)
    dirty = np.where(near, _unmixed(levels, ground, letters) > MIXED, off > SMOOTH)
    return max(0.0, 1 - float(dirty.mean()) / TOLERATED)


def _ground(levels: np.ndarray) -> np.ndarray:
    """The gradient (H, W, 3) of an image's ground: planes fitted to the pixels near them, within the world's levels."""
    height, width, _ = levels.shape
    ys, xs = np.mgrid[:height, :width]
    places = np.stack([np.ones(ys.size), xs.ravel() / width, ys.ravel() / height], axis=1)
    pixels = levels.reshape(-1, 3)
    border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    planes = np.broadcast_to(np.median(border, axis=0), pixels.shape)
    for limit in (INK, SMOOTH, SMOOTH):
        kept = np.abs(pixels - planes).max(-1) <= limit
        if kept.mean() < 0.1:  # too little ground for a better fit
            break
        planes = places @ np.linalg.lstsq(places[kept], pixels[kept], rcond=None)[0]
    return planes.reshape(levels.shape).clip(DARKEST_GROUND, LIGHTEST)


def _letters(off: np.ndarray) -> np.ndarray:
    """Mask (H, W) of the connected parts of ink that are as tall as letters and not solid blocks; `off`: contrast."""
    labels, _ = ndimage.label(off > INK, np.ones((3, 3)))
    chosen = []
    for index, box in enumerate(ndimage.find_objects(labels), 1):
        ink = np.where(labels[box] == index, off[box], 0)
        if LOW <= len(ink) <= TALL and ink.mean() <= MOST_FILLED * ink.max():
            chosen.append(index)
    return np.isin(labels, chosen)


def _unmixed(levels: np.ndarray, ground: np.ndarray, letters: np.ndarray) -> np.ndarray:
    """The distance (H, W) of each pixel from the nearest mixture of ground and ink, the letters' median dark colour."""
    if not letters.any():
        return np.abs(levels - ground).max(-1)
    darkness = (ground - levels).mean(-1)
    core = letters & (darkness >= np.median(darkness[letters]))
    ink = np.median(levels[core], axis=0).clip(0, LIGHTEST_INK)
    span = ink - ground
    share = (((levels - ground) * span).sum(-1) / (span**2).sum(-1)).clip(0, 1)
    return np.abs(levels - ground - share[..., None] * span).max(-1)


class SignQuality(OCR):
    """Strict text score times `cleanliness`, in [0, 1]; 1 for exactly the quoted text, drawn as the world draws it."""

    name = "sign_quality"

    def __init__(self, threads: int | None = None):
        super().__init__(mode="lines", strict=True, threads=threads)

    def of_images(self, images: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        """Scores (N,) of images of 64 x 64 pixels; RewardError for a prompt that quotes no text."""
        levels = as_levels(images).permute(0, 2, 3, 1).float().cpu().numpy()
        clean = torch.tensor([cleanliness(image) for image in levels], dtype=torch.float32)
        return super().of_images(images, prompts, metadata) * clean

    def golden(self) -> Golden:
        """A right sign, and an empty image."""
        images = np.stack([render(Scene(lines=("STONE",))), render(Scene())])
        media = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        return Golden(media, ['a sign that says "STONE"'] * 2, [{}, {}], [1.0, 0.0])
