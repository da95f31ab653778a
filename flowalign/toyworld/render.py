"""Draws the embedded world's images: coloured shapes or dark words on a light, tinted gradient."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
PALETTE = {
    "red": (222, 40, 44),
    "orange": (246, 140, 24),
    "yellow": (240, 212, 36),
    "green": (38, 160, 72),
    "blue": (38, 92, 222),
    "purple": (146, 58, 186),
    "black": (28, 28, 32),
}
LINE_LENGTH = 5  # letters that fit on one line of a sign
CELL_WIDTH = 12  # pixels of a letter's width
LINE_HEIGHT = 22  # pixels
SUBPIXELS = 4  # samples of a pixel along each axis

Background = tuple[tuple[float, float, float], tuple[float, float, float]]  # the RGB at a gradient's two ends


@dataclass(frozen=True)
class Item:
    """One shape: its top left corner and side in pixels."""

    shape: str
    color: str
    x: int
    y: int
    size: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The box (x0, y0, x1, y1) in pixels."""
        return (self.x, self.y, self.x + self.size, self.y + self.size)


@dataclass(frozen=True)
class Scene:
    """An image to draw: shapes or lines of text, over a gradient from `background[0]` to `background[1]` (RGB)."""

    items: tuple[Item, ...] = ()
    lines: tuple[str, ...] = ()
    ink: tuple[int, int, int] = (20, 20, 30)
    offset: tuple[int, int] = (0, 0)
    background: Background = ((240.0, 240.0, 240.0), (232.0, 232.0, 232.0))
    angle: float = 0.0


def _polygon(shape: str) -> list[tuple[float, float]]:
    """The shape's corners in the unit box [0, 1] x [0, 1], with y pointing down."""
    if shape == "square":
        return [(0, 0), (1, 0), (1, 1), (0, 1)]
    if shape == "diamond":
        return [(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)]
    if shape == "triangle":
        return [(0.5, 0.04), (1.0, 0.94), (0.0, 0.94)]
    if shape == "cross":
        a, b = 0.34, 0.66
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    turns = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 0.525, 0.235)
    return [(0.5 + r * np.cos(t), 0.525 + r * np.sin(t)) for t, r in zip(turns, radii, strict=True)]


@functools.cache
def coverage(shape: str, size: int, shift: tuple[int, int] = (0, 0)) -> np.ndarray:
    """The share of each pixel of a (size, size) box that the shape covers, float32 in [0, 1].

    `shift` moves it right and down by that many of a pixel's SUBPIXELS; the box is then a pixel wider or higher.
    """
    full = size * SUBPIXELS
    mask = Image.new("L", (full, full))
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, full - 1, full - 1), fill=255)
        if shape == "ring":
            inset = round(0.26 * full)
            draw.ellipse((inset, inset, full - 1 - inset, full - 1 - inset), fill=0)
    else:
        draw.polygon([(x * (full - 1), y * (full - 1)) for x, y in _polygon(shape)], fill=255)
    width, height = (size + (part > 0) for part in shift)
    moved = Image.new("L", (width * SUBPIXELS, height * SUBPIXELS))
    moved.paste(mask, shift)
    return np.asarray(moved.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255


@functools.cache
def _glyph(letter: str) -> np.ndarray:
    """The coverage (LINE_HEIGHT, CELL_WIDTH) of one letter, which is condensed if it is wider than its cell."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    font = ImageFont.truetype(str(path), 16 * SUBPIXELS)
    left, _, right, _ = (int(v) for v in font.getbbox(letter, anchor="ls"))
    canvas = Image.new("L", (right - left, LINE_HEIGHT * SUBPIXELS))
    ImageDraw.Draw(canvas).text((-left, 17 * SUBPIXELS), letter, font=font, fill=255, anchor="ls")
    width = min(round((right - left) / SUBPIXELS), CELL_WIDTH - 1)
    small = canvas.resize((width, LINE_HEIGHT), Image.Resampling.BOX)
    cell = np.zeros((LINE_HEIGHT, CELL_WIDTH), dtype=np.float32)
    start = (CELL_WIDTH - width) // 2
    cell[:, start : start + width] = np.asarray(small, dtype=np.float32) / 255
    return cell


def letters(scene: Scene) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Each letter of a sign, with its box (x0, y0, x1, y1) in pixels."""
    top = (SIZE - LINE_HEIGHT * len(scene.lines)) // 2 + scene.offset[1]
    for row, line in enumerate(scene.lines):
        left = (SIZE - CELL_WIDTH * len(line)) // 2 + scene.offset[0]
        for column, letter in enumerate(line):
            x, y = left + column * CELL_WIDTH, top + row * LINE_HEIGHT
            yield letter, (x, y, x + CELL_WIDTH, y + LINE_HEIGHT)


def gradient(background: Background, angle: float) -> np.ndarray:
    """A canvas (64, 64, 3), float32, that goes from one colour to the other in the direction `angle` (radians)."""
    grid = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
    slope = 0.5 + (np.cos(angle) * grid[None, :] + np.sin(angle) * grid[:, None]) / 2**0.5
    first, second = (np.asarray(color, dtype=np.float32) for color in background)
    canvas: np.ndarray = first + slope[..., None] * (second - first)
    return canvas


def paint(canvas: np.ndarray, covered: np.ndarray, color: str, x: int, y: int) -> None:
    """Lays a colour of the palette over a canvas (H, W, 3), where `covered` (h, w) from the corner (x, y) says so."""
    alpha = covered[..., None]
    part = canvas[y : y + alpha.shape[0], x : x + alpha.shape[1]]
    part[:] = (1 - alpha) * part + alpha * np.asarray(PALETTE[color], dtype=np.float32)


def as_pixels(canvas: np.ndarray) -> np.ndarray:
    """A canvas (..., 3) of 8-bit levels, rounded to uint8."""
    return canvas.round().clip(0, 255).astype(np.uint8)


def render(scene: Scene) -> np.ndarray:
    """The image of a scene, uint8 (64, 64, 3)."""
    canvas = gradient(scene.background, scene.angle)
    for item in scene.items:
        paint(canvas, coverage(item.shape, item.size), item.color, item.x, item.y)
    if scene.lines:
        covered = np.zeros((SIZE, SIZE), dtype=np.float32)
        for letter, (x0, y0, x1, y1) in letters(scene):
            covered[y0:y1, x0:x1] += _glyph(letter)
        alpha = covered.clip(0, 1)[..., None]
        canvas = (1 - alpha) * canvas + alpha * np.asarray(scene.ink, dtype=np.float32)
    return as_pixels(canvas)
