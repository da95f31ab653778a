"""The exact judge of the moving world: whether a clip shows the objects of its prompt, moving as it says.

The still world's detector finds the objects of each frame, and tracks join them. A clip is right if every frame shows
exactly the demanded objects, each with its colour and shape in every frame and of one size, and each moves as demanded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from flowalign.toyworld.detector import ExactDetector
from flowalign.toyworld.moving.grammar import FRAMES, STAY, Demand, demands
from flowalign.toyworld.moving.motion import motion, smoothness, speed
from flowalign.toyworld.moving.tracks import Detection, Track, follow, series
from flowalign.toyworld.render import SIZE
from rewards.errors import RewardError

SIZE_VARIATION = 0.15  # greatest standard deviation of an object's side over the frames, as a share of its mean


@dataclass(frozen=True)
class Verdict:
    """The judge's verdict on a clip.

    strict: whether it shows all that the prompt demands. soft: the mean of the parts' scores, in [0, 1]. motion: the
    graded amount of the demanded motion, in [0, 1], the mean over the objects. reason: what is wrong, a line for each
    fault; empty when `strict`.
    """

    strict: bool
    soft: float
    motion: float
    reason: str


class Part(NamedTuple):
    """A part of a judgement: its score in [0, 1], and what is wrong, or ""."""

    score: float
    fault: str = ""


def judge(media: torch.Tensor, metadata: Mapping[str, Any]) -> Verdict:
    """The verdict on a clip (9, 3, 64, 64) in [0, 1]. Raises RewardError for another shape or values not finite."""
    wanted = demands(metadata)
    if media.shape != (FRAMES, 3, SIZE, SIZE):
        raise RewardError(f"moving world: a clip is ({FRAMES}, 3, {SIZE}, {SIZE}), not {tuple(media.shape)}")
    if not media.isfinite().all():
        raise RewardError("moving world: the clip has values that are not finite")
    frames = ExactDetector()(media)
    tracks = follow(frames)
    count = _count(frames, len(wanted))
    objects = {demand: [_object(track, demand) for track in tracks] for demand in wanted}
    scores = np.array([[_score(one, count) for one in objects[demand]] for demand in wanted])
    rows, columns = linear_sum_assignment(scores.reshape(len(wanted), len(tracks)), maximize=True)
    # An object that is not there is in no pair, and so adds nothing to the sums.
    matched = [(wanted[row], objects[wanted[row]][column]) for row, column in zip(rows, columns, strict=True)]
    faults = [f"the {demand} {part.fault}" for demand, (parts, _) in matched for part in parts if part.fault]
    reason = "\n".join(dict.fromkeys([*filter(None, [count.fault]), *faults]))
    soft = sum(_score(one, count) for _, one in matched) / len(wanted)
    graded = sum(one[1] for _, one in matched) / len(wanted)
    return Verdict(not reason, soft, graded, reason)


def _score(judged: tuple[list[Part], float], count: Part) -> float:
    return float(np.mean([part.score for part in (count, *judged[0])]))


def _count(frames: Sequence[Sequence[Detection]], wanted: int) -> Part:
    """Whether each frame shows as many objects as are demanded."""
    found = [len(seen) for seen in frames]
    score = float(np.mean([max(0.0, 1 - abs(number - wanted) / wanted) for number in found]))
    wrong = [f"{number} in frame {index}" for index, number in enumerate(found) if number != wanted]
    return Part(score, f"expected {wanted} object{'s' * (wanted > 1)}, found {', '.join(wrong)}" if wrong else "")


def _object(track: Track, demand: Demand) -> tuple[list[Part], float]:
    """The parts of the judgement of one object, and its graded motion."""
    path, boxes, areas = (series(track, key) for key in ("center", "box", "area"))
    moved = motion(path, boxes, demand)
    parts = [
        _label(track, "class", demand.shape),
        _label(track, "color", demand.color),
        _size(np.sqrt(areas[:, 0])),
        Part(moved.score, moved.fault),
    ]
    if demand.speed is not None:
        parts.append(Part(*speed(path, demand.speed)))
    if demand.motion != STAY:
        parts.append(Part(smoothness(path, demand)))
    return parts, moved.graded


def _label(track: Track, key: str, wanted: str) -> Part:
    """Whether an object's class or colour is the demanded one in all frames."""
    seen = [(index, one[key]) for index, one in enumerate(track) if one is not None]
    wrong = [f"{name} in frame {index}" for index, name in seen if name != wanted]
    return Part(1 - len(wrong) / len(seen), f"is {', '.join(wrong)}" if wrong else "")


def _size(sides: np.ndarray) -> Part:
    """Whether an object's side (F,) hardly varies."""
    variation = float(sides.std() / sides.mean())
    score = min(1.0, SIZE_VARIATION / max(variation, 1e-6))
    return Part(score, "changes its size" if score < 1 else "")
