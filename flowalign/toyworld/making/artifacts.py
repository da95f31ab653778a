"""Artificial damage to the embedded world's images, like that of generators: it trains and tests the artifact judge."""

from collections.abc import Callable

import cv2
import numpy as np

Damage = Callable[[np.ndarray, np.random.Generator], None]


def _spot(image: np.ndarray, rng: np.random.Generator, low: int = 10, high: int = 24) -> tuple[slice, slice]:
    """A random box inside the image."""
    height, width = rng.integers(low, high, 2)
    top = int(rng.integers(0, image.shape[0] - height))
    left = int(rng.integers(0, image.shape[1] - width))
    return slice(top, top + height), slice(left, left + width)


def _ink(image: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """A random pixel (y, x) of ink, where damage is visible; the centre if there is no ink."""
    ys, xs = np.nonzero(np.abs(image - np.median(image, (0, 1))).max(-1) > 45)
    at = int(rng.integers(max(len(ys), 1)))
    return (int(ys[at]), int(xs[at])) if len(ys) else (32, 32)


def _noise(image: np.ndarray, rng: np.random.Generator) -> None:
    """Coloured noise in a box."""
    place = _spot(image, rng)
    image[place] += rng.normal(0, rng.uniform(40, 80), image[place].shape)


def _blotch(image: np.ndarray, rng: np.random.Generator) -> None:
    """A soft stain of another colour."""
    ys, xs = np.mgrid[: image.shape[0], : image.shape[1]]
    y, x = rng.uniform(8, 56, 2)
    weight = np.exp(-(((ys - y) / rng.uniform(3, 8)) ** 2 + ((xs - x) / rng.uniform(3, 8)) ** 2))[..., None]
    image += 0.9 * weight * (rng.uniform(0, 255, 3) - image)


def _stripes(image: np.ndarray, rng: np.random.Generator) -> None:
    """A pattern of lines over a box, like the ringing of a decoder."""
    place = _spot(image, rng, 14, 32)
    wave = np.sin(np.arange(image[place].shape[int(rng.integers(2))]) * rng.uniform(1.2, 3.0)) * rng.uniform(30, 60)
    height, width = image[place].shape[:2]
    image[place] += wave[:height, None, None] if len(wave) == height else wave[None, :width, None]


def _tear(image: np.ndarray, rng: np.random.Generator) -> None:
    """Some rows with ink, moved sideways."""
    top = int(np.clip(_ink(image, rng)[0] - rng.integers(2, 6), 0, 50))
    rows = slice(top, top + int(rng.integers(4, 14)))
    image[rows] = np.roll(image[rows], int(rng.choice([-1, 1]) * rng.integers(5, 14)), axis=1)


def _smear(image: np.ndarray, rng: np.random.Generator) -> None:
    """A box, blurred until nothing in it can be recognised."""
    top, left = (int(np.clip(value - 8, 0, 46)) for value in _ink(image, rng))
    box = np.ascontiguousarray(image[top : top + 18, left : left + 18])
    image[top : top + 18, left : left + 18] = cv2.blur(box, (9, 9))


def _ghost(image: np.ndarray, rng: np.random.Generator) -> None:
    """A second, faint copy of the image, moved."""
    shift = tuple(int(rng.choice([-1, 1]) * value) for value in rng.integers(4, 10, 2))
    image += rng.uniform(0.35, 0.5) * (np.roll(image, shift, (0, 1)) - image)


def _hole(image: np.ndarray, rng: np.random.Generator) -> None:
    """A ragged box of one dark or bright colour."""
    rows, columns = _spot(image, rng, 8, 16)
    mask = rng.random(image[rows, columns].shape[:2]) < 0.8
    image[rows, columns][mask] = rng.uniform(0, 255, 3)


def _blocks(image: np.ndarray, rng: np.random.Generator) -> None:
    """Coarse blocks, like those of a file compressed too far."""
    side = int(rng.integers(4, 7))
    small = image[::side, ::side]
    rows, columns = _spot(image, rng, 24, 44)
    coarse = small.repeat(side, 0).repeat(side, 1)[: image.shape[0], : image.shape[1]]
    image[rows, columns] = coarse[rows, columns] + rng.normal(0, 12, coarse[rows, columns].shape)


KINDS: dict[str, Damage] = {
    "noise": _noise,
    "blotch": _blotch,
    "stripes": _stripes,
    "tear": _tear,
    "smear": _smear,
    "ghost": _ghost,
}
HELD_OUT: dict[str, Damage] = {"hole": _hole, "blocks": _blocks}


def damaged(image: np.ndarray, damage: Damage, rng: np.random.Generator) -> np.ndarray:
    """A damaged copy (H, W, 3), uint8, of an image (H, W, 3), uint8."""
    copy = image.astype(np.float32)
    damage(copy, rng)
    return copy.clip(0, 255).round().astype(np.uint8)
