"""Draws the moving world's clips, frame by frame with the still world's brush, at quarters of a pixel."""

import numpy as np

from flowalign.toyworld.moving.grammar import FRAMES
from flowalign.toyworld.moving.scenes import Clip
from flowalign.toyworld.render import SUBPIXELS, as_pixels, coverage, gradient, paint


def render(clip: Clip) -> np.ndarray:
    """The frames of a clip, uint8 (9, 3, 64, 64)."""
    canvas = np.stack([gradient(clip.background, clip.angle)] * FRAMES)
    for mover in clip.movers:
        for frame, (x, y) in zip(canvas, mover.path, strict=True):
            (left, right), (top, down) = divmod(x, SUBPIXELS), divmod(y, SUBPIXELS)
            paint(frame, coverage(mover.shape, mover.size, (right, down)), mover.color, left, top)
    return np.ascontiguousarray(as_pixels(canvas).transpose(0, 3, 1, 2))
