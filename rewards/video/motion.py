"""T2V-CompBench's motion binding: does each object move the way the prompt says, as seen against the background.

Source: Sun et al., 2024 (2407.14505) and its code. What differs from the code: a change is that of points which are
visible at both ends, so that an object which is gradually hidden does not seem to move; without a background, or
without a visible point in the first frame, an object is undetected (there a score of 0.2, or garbage); and an object
keeps its own direction when the other one is undetected.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

Direction = Literal["left", "right", "up", "down"]
_AXES = {"left": (0, 1.0), "right": (0, -1.0), "up": (1, 1.0), "down": (1, -1.0)}


class MotionBinding(NamedTuple):
    """What the objects of a video do."""

    net: tuple[tuple[float, float] | None, ...]  # per object: pixels to the left and up, against the background
    raw: float  # the mean share of the frame that the objects move the right way; -1 if none was detected
    score: float  # in [0, 1]: 0 if none was detected, else 0.2 + 0.8 raw


def motion_binding(
    tracks: torch.Tensor,
    objects: Sequence[torch.Tensor | None],
    background: torch.Tensor | None,
    directions: Sequence[Direction],
    *,
    width: int = 856,
    height: int = 480,
) -> MotionBinding:
    """How far objects move in their directions, from dense tracks of a video of width x height.

    tracks: (T, h, w, 3), for each point of a grid in the first frame its x and y in pixels, and 1 where it is visible.
    objects: of each object the mask (h, w), bool, of its points in the first frame, None where it was not detected;
    background likewise. Motion across the direction costs nothing. Raises ValueError for another number of directions.
    """
    if len(objects) != len(directions) or not objects:
        raise ValueError(f"{len(objects)} objects have {len(directions)} directions; each needs one")
    if len(tracks) < 2:
        raise ValueError(f"motion_binding needs 2 frames or more, and the video has {len(tracks)}")
    rest = _change(tracks, background)
    changes = [_change(tracks, mask) for mask in objects]
    net = tuple(None if rest is None or own is None else tuple((rest - own).tolist()) for own in changes)
    if all(moved is None for moved in net):
        return MotionBinding(net, -1.0, 0.0)
    shares = []
    for moved, direction in zip(net, directions, strict=True):
        axis, sign = _AXES[direction]
        shares.append(0.0 if moved is None else max(0.0, sign * moved[axis]) / (width, height)[axis])
    raw = sum(shares) / len(shares)
    return MotionBinding(net, raw, 0.2 + 0.8 * raw)


def _change(tracks: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mean change (2,) of a mask's points from the first frame to the last that shows one of them."""
    if mask is None:
        return None
    points = tracks[:, mask].double()
    visible = (points[..., 2] > 0.5) & (points[0, :, 2] > 0.5)
    seen = visible.any(1).nonzero()
    if not len(seen):
        return None
    last = int(seen[-1])
    return (points[last] - points[0])[visible[last], :2].mean(0)
