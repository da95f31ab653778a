"""Signs to read, drawn with the font that ships with matplotlib."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"


def draw_sign(
    lines: Sequence[str],
    *,
    size: int = 13,
    ink: tuple[int, int, int] = (30, 30, 90),
    background: tuple[int, int, int] = (240, 235, 220),
) -> torch.Tensor:
    """A picture (3, 64, 64) in [0, 1] of lines of capitals in cells of 12 px."""
    picture = Image.new("RGB", (64, 64), background)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.truetype(FONT, size)
    for row, line in enumerate(lines):
        top, left = 32 - 9 * len(lines) + 18 * row, 32 - 6 * len(line)
        for column, letter in enumerate(line):
            draw.text((left + 12 * column + (12 - draw.textlength(letter, font)) / 2, top), letter, ink, font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def draw_page(lines: Sequence[str], *, width: int = 320, height: int = 192, size: int = 32) -> torch.Tensor:
    """A picture (3, height, width) in [0, 1] of ordinary text."""
    picture = Image.new("RGB", (width, height), (225, 235, 245))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.truetype(FONT, size)
    for row, line in enumerate(lines):
        draw.text((10, 10 + row * size * 1.5), line, (40, 60, 20), font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


@pytest.fixture(scope="session")
def sign() -> Callable[..., torch.Tensor]:
    return draw_sign


@pytest.fixture(scope="session")
def page() -> Callable[..., torch.Tensor]:
    return draw_page
