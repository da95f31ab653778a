"""Clips that fulfil a prompt of the moving world: where each object is in each frame."""

from dataclasses import dataclass

import numpy as np

from flowalign.toyworld.grammar import MARGIN, apart, random_background
from flowalign.toyworld.moving.grammar import BOUNCE, FRAMES, MOTIONS, SPEEDS, STAY, TURNING, Demand, demands
from flowalign.toyworld.render import SIZE, SUBPIXELS, Background
from flowalign.toyworld.tasks import Metadata

_SMALLEST = 16  # pixels of an object's side; between pixels, a star of 14 is no longer always seen as one
_LARGEST = {1: 30, 2: 30, 3: 22, 4: 20}  # an object's greatest side in pixels, by the number of objects
_TRIES = 20  # places for an object before all are placed anew


@dataclass(frozen=True)
class Mover:
    """A shape, its side in pixels, and the path of its top left corner: one (x, y) a frame, in SUBPIXELS of a pixel."""

    shape: str
    color: str
    size: int
    path: tuple[tuple[int, int], ...]

    def box(self, frame: int) -> tuple[float, float, float, float]:
        """The box (x0, y0, x1, y1) in pixels."""
        x, y = (place / SUBPIXELS for place in self.path[frame])
        return (x, y, x + self.size, y + self.size)


@dataclass(frozen=True)
class Clip:
    """A clip to draw: moving shapes over a still gradient, as in the still world's scenes."""

    movers: tuple[Mover, ...]
    background: Background = ((240.0, 240.0, 240.0), (232.0, 232.0, 232.0))
    angle: float = 0.0


def random_clip(metadata: Metadata, rng: np.random.Generator) -> Clip:
    """A random clip that fulfils a row of `task_prompts`: objects stay whole in the frame and never come close.

    What the prompt leaves open varies: size, place, background, speed, and when a bounce meets its wall. Objects of
    one demand keep one speed.
    """
    wanted = demands(metadata)
    largest = _LARGEST[len(wanted)]
    while True:
        movers: list[Mover] = []
        distances = {demand: _distances(demand, rng) for demand in wanted}
        for demand in wanted:
            tries = (_mover(demand, distances[demand], largest, rng) for _ in range(_TRIES))
            mover = next((one for one in tries if all(_always_apart(one, other) for other in movers)), None)
            if mover is None:
                break
            movers.append(mover)
        if len(movers) == len(wanted):
            return Clip(movers=tuple(movers), **random_background(rng))


def _distances(demand: Demand, rng: np.random.Generator) -> np.ndarray:
    """How far an object is from its start in each frame (FRAMES,), in subpixels along the motion's first direction."""
    if demand.motion == STAY:
        return np.zeros(FRAMES, dtype=int)
    speed = demand.speed or str(rng.choice(list(SPEEDS)))
    step = round(float(rng.choice(SPEEDS[speed])) * SUBPIXELS)
    frames = np.arange(FRAMES)
    if demand.motion.startswith(BOUNCE):
        turn = int(rng.integers(TURNING, FRAMES - TURNING))
        return step * (turn - np.abs(frames - turn))
    return step * frames


def _mover(demand: Demand, distances: np.ndarray, largest: int, rng: np.random.Generator) -> Mover:
    size = int(rng.integers(_SMALLEST, largest + 1))
    way = np.array(MOTIONS[demand.motion])
    offsets = distances[:, None] * way
    first = MARGIN * SUBPIXELS - offsets.min(axis=0)
    last = (SIZE - size - MARGIN) * SUBPIXELS - offsets.max(axis=0)
    start = rng.integers(first, last + 1)
    if demand.motion.startswith(BOUNCE):  # the turn touches the wall
        start = np.where(way < 0, distances.max(), start)
        start = np.where(way > 0, (SIZE - size) * SUBPIXELS - distances.max(), start)
    path = tuple((int(x), int(y)) for x, y in start + offsets)
    return Mover(demand.shape, demand.color, size, path)


def _always_apart(a: Mover, b: Mover) -> bool:
    return all(apart(a.box(frame), b.box(frame)) for frame in range(FRAMES))
