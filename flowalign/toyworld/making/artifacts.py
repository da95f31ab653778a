"""Damage to the embedded world's pictures, as generators do it: what the artifact judge is trained and tested on."""

from collections.abc import Callable

import cv2
import numpy as np

Damage = Callable[[np.ndarray, np.random.Generator], None]


def _spot(picture: np.ndarray, rng: np.random.Generator, low: int = 10, high: int = 24) -> tuple[slice, slice]:
    """A random box inside the picture."""
    height, width = rng.integers(low, high, 2)
    top = int(rng.integers(0, picture.shape[0] - height))
    left = int(rng.integers(0, picture.shape[1] - width))
    return slice(top, top + height), slice(left, left + width)


def _ink(picture: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """A random pixel (y, x) of what is drawn, where damage shows."""
    ys, xs = np.nonzero(np.abs(picture - np.median(picture, (0, 1))).max(-1) > 45)
    at = int(rng.integers(max(len(ys), 1)))
    return (int(ys[at]), int(xs[at])) if len(ys) else (32, 32)


def _noise(picture: np.ndarray, rng: np.random.Generator) -> None:
    """Coloured noise in a box."""
    place = _spot(picture, rng)
    picture[place] += rng.normal(0, rng.uniform(40, 80), picture[place].shape)


def _blotch(picture: np.ndarray, rng: np.random.Generator) -> None:
    """A soft stain of another colour."""
    ys, xs = np.mgrid[: picture.shape[0], : picture.shape[1]]
    y, x = rng.uniform(8, 56, 2)
    weight = np.exp(-(((ys - y) / rng.uniform(3, 8)) ** 2 + ((xs - x) / rng.uniform(3, 8)) ** 2))[..., None]
    picture += 0.9 * weight * (rng.uniform(0, 255, 3) - picture)


def _stripes(picture: np.ndarray, rng: np.random.Generator) -> None:
    """A pattern of lines over a box, as of a decoder that rings."""
    place = _spot(picture, rng, 14, 32)
    wave = np.sin(np.arange(picture[place].shape[int(rng.integers(2))]) * rng.uniform(1.2, 3.0)) * rng.uniform(30, 60)
    height, width = picture[place].shape[:2]
    picture[place] += wave[:height, None, None] if len(wave) == height else wave[None, :width, None]


def _tear(picture: np.ndarray, rng: np.random.Generator) -> None:
    """Some rows with something in them moved sideways."""
    top = int(np.clip(_ink(picture, rng)[0] - rng.integers(2, 6), 0, 50))
    rows = slice(top, top + int(rng.integers(4, 14)))
    picture[rows] = np.roll(picture[rows], int(rng.choice([-1, 1]) * rng.integers(5, 14)), axis=1)


def _smear(picture: np.ndarray, rng: np.random.Generator) -> None:
    """A box blurred until nothing in it can be told."""
    top, left = (int(np.clip(value - 8, 0, 46)) for value in _ink(picture, rng))
    box = np.ascontiguousarray(picture[top : top + 18, left : left + 18])
    picture[top : top + 18, left : left + 18] = cv2.blur(box, (9, 9))


def _ghost(picture: np.ndarray, rng: np.random.Generator) -> None:
    """The picture once more, moved and faint."""
    shift = tuple(int(rng.choice([-1, 1]) * value) for value in rng.integers(4, 10, 2))
    picture += rng.uniform(0.35, 0.5) * (np.roll(picture, shift, (0, 1)) - picture)


def _hole(picture: np.ndarray, rng: np.random.Generator) -> None:
    """A ragged box of one dark or bright colour."""
    rows, columns = _spot(picture, rng, 8, 16)
    mask = rng.random(picture[rows, columns].shape[:2]) < 0.8
    picture[rows, columns][mask] = rng.uniform(0, 255, 3)


def _blocks(picture: np.ndarray, rng: np.random.Generator) -> None:
    """Coarse blocks, as of a file compressed too far."""
    side = int(rng.integers(4, 7))
    small = picture[::side, ::side]
    rows, columns = _spot(picture, rng, 24, 44)
    coarse = small.repeat(side, 0).repeat(side, 1)[: picture.shape[0], : picture.shape[1]]
    picture[rows, columns] = coarse[rows, columns] + rng.normal(0, 12, coarse[rows, columns].shape)


KINDS: dict[str, Damage] = {
    "noise": _noise,
    "blotch": _blotch,
    "stripes": _stripes,
    "tear": _tear,
    "smear": _smear,
    "ghost": _ghost,
}
HELD_OUT: dict[str, Damage] = {"hole": _hole, "blocks": _blocks}


def damaged(picture: np.ndarray, damage: Damage, rng: np.random.Generator) -> np.ndarray:
    """A copy (H, W, 3), uint8, of a picture (H, W, 3), uint8, with some damage."""
    copy = picture.astype(np.float32)
    damage(copy, rng)
    return copy.clip(0, 255).round().astype(np.uint8)
