"""The rules of the moving world's judge about one object's path: whether it moves as demanded, how fast and smoothly.

Lengths are pixels of a frame of 64; a step is the way from one frame to the next. Of a path, `n` is its net
displacement and `step` the mean length of its steps. Smoothness counts in the soft score alone.
"""

from typing import NamedTuple

import numpy as np

from flowalign.toyworld.moving.grammar import BOUNCE, MOTIONS, SPEEDS, STAY, TURNING, Demand
from flowalign.toyworld.render import SIZE

STILL = 0.35  # an object with shorter steps stays
FAST = 2.2  # an object with steps at least so long is quick
STRAIGHT = 0.9  # least share of the path along the demanded axis that leads forward
SIDEWAYS = 0.2  # greatest range of places across that axis, as a share of the displacement along it
RESTING = 0.25  # greatest share of the steps in which a moving object may stand still
AT_WALL = 4.0  # greatest distance of a bouncing object's box from the wall when it turns
TURN = 2.0  # least way to the wall, and back from it


class Motion(NamedTuple):
    """How far a path is as demanded, in [0, 1], how much of the motion there is (graded), and what is wrong, or ""."""

    score: float
    graded: float
    fault: str


def motion(path: np.ndarray, boxes: np.ndarray, demand: Demand) -> Motion:
    """The verdict on the path (F, 2) of an object's centre and its boxes (F, 4)."""
    if demand.motion == STAY:
        score = min(1.0, STILL / max(mean_step(path), 1e-6))
        return Motion(score, score, "" if score == 1 else "moves")
    way = np.array(MOTIONS[demand.motion])
    along, across = path @ way, path @ way[::-1]
    if demand.motion.startswith(BOUNCE):
        return _bounce(path, along, across, boxes, demand.motion.removeprefix(BOUNCE))
    n = float(along[-1] - along[0])
    score = float(np.clip(n / _length(path), 0, 1))
    fault = _unsteady(path, along, across, n)
    main, net = _main_direction(path)
    if main != demand.motion and net >= _length(path) / 2:
        fault = f"moves {main}"
    slowest = min(min(speeds) for name, speeds in SPEEDS.items() if demand.speed in (name, None))
    return Motion(score, _graded(n, slowest * (len(path) - 1), path), fault)


def _bounce(path: np.ndarray, along: np.ndarray, across: np.ndarray, boxes: np.ndarray, wall: str) -> Motion:
    turn = int(along.argmax())
    there, back = float(along[turn] - along[0]), float(along[turn] - along[-1])
    left, top, right, bottom = (float(edge) for edge in boxes[turn])
    gap = {"left": left, "right": SIZE - right, "top": top, "bottom": SIZE - bottom}[wall]
    fault = _unsteady(path, along, across, there + back)
    if min(there, back) < TURN and mean_step(path) >= STILL:
        fault = f"does not move to the {wall} wall and back"
    elif gap > AT_WALL:
        fault = fault or f"turns {gap:.0f} pixels from the {wall} wall"
    least = TURNING / (len(path) - 1)  # of the path, that leads there or back
    turned = min(1.0, min(there, back) / (least * _length(path))) * min(1.0, AT_WALL / max(gap, 1e-6))
    return Motion(turned, _graded(min(there, back), min(SPEEDS["slowly"]) * TURNING, path), fault)


def _unsteady(path: np.ndarray, along: np.ndarray, across: np.ndarray, n: float) -> str:
    """What is wrong with a path that should lead by `n` in all along an axis."""
    resting = int((_steps(path) < STILL).sum())
    if mean_step(path) < STILL:
        return "does not move"
    if n < STRAIGHT * float(np.abs(np.diff(along)).sum()):
        return "goes back and forth"
    if np.ptp(across) > SIDEWAYS * n:
        return "drifts sideways"
    return f"stands still in {resting} of {len(path) - 1} steps" if resting > RESTING * (len(path) - 1) else ""


def speed(path: np.ndarray, wanted: str) -> tuple[float, str]:
    """How far the mean step of a path is "quickly" or "slowly", in [0, 1], and what is wrong, or ""."""
    step = mean_step(path)
    if wanted == "quickly":
        return min(1.0, step / FAST), "" if step >= FAST else "is too slow"
    slow = min(1.0, step / STILL, max(0.0, 2 - step / FAST))
    return slow, "" if step < FAST else "is too quick"


def smoothness(path: np.ndarray, demand: Demand) -> float:
    """1 - |second differences of the path| / step, at least 0: 1 for a constant velocity, 0 for an object that stays.

    A bounce's turn does not count.
    """
    bends = np.linalg.norm(np.diff(path, n=2, axis=0), axis=1)
    if demand.motion.startswith(BOUNCE):
        turn = int((path @ np.array(MOTIONS[demand.motion])).argmax())
        bends = np.delete(bends, np.clip(turn - 1, 0, len(bends) - 1))
    step = mean_step(path)
    return 0.0 if step < STILL else 1 - min(1.0, float(bends.mean()) / step)


def _steps(path: np.ndarray) -> np.ndarray:
    """The length of each step (F - 1,)."""
    lengths: np.ndarray = np.linalg.norm(np.diff(path, axis=0), axis=1)
    return lengths


def mean_step(path: np.ndarray) -> float:
    """The mean length of a path's steps."""
    return float(_steps(path).mean())


def _length(path: np.ndarray) -> float:
    """The length of a path; of one that stays, the least of one that moves, so that noise has no direction."""
    return max(mean_step(path), STILL) * (len(path) - 1)


def _graded(n: float, expected: float, path: np.ndarray) -> float:
    """T2V-CompBench's graded motion: 0 without motion in the direction, else .2 to 1 with its amount."""
    return 0.2 + 0.8 * min(1.0, n / expected) if n > 0 and mean_step(path) >= STILL else 0.0


def _main_direction(path: np.ndarray) -> tuple[str, float]:
    """The direction in which a path leads farthest, and how far."""
    x, y = path[-1] - path[0]
    name = ("right" if x > 0 else "left") if abs(x) >= abs(y) else ("down" if y > 0 else "up")
    return name, float(max(abs(x), abs(y)))
