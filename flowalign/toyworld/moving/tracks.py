"""Which detection of each frame is the same object: tracks by Hungarian matching on distance and colour."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

Detection = Mapping[str, Any]
Track = list[Detection | None]  # one entry a frame; None where the object is missing

RECOLORED = 20.0  # pixels of distance that a change of colour counts as


def follow(frames: Sequence[Sequence[Detection]]) -> list[Track]:
    """The tracks of all objects in a clip's detections; a missing object is taken up again where it was last seen."""
    tracks: list[Track] = []
    for index, found in enumerate(frames):
        matched = _matches([_latest(track) for track in tracks], found)
        for place, track in enumerate(tracks):
            track.append(found[matched[place]] if place in matched else None)
        new = set(range(len(found))) - set(matched.values())
        tracks += [[*[None] * index, found[place]] for place in sorted(new)]
    return tracks


def _latest(track: Track) -> Detection:
    return next(seen for seen in reversed(track) if seen is not None)


def _matches(known: Sequence[Detection], found: Sequence[Detection]) -> dict[int, int]:
    """Of each known object that is found again, its place among those found; the sum of the costs is the least."""
    costs = np.array([[_cost(a, b) for b in found] for a in known]).reshape(len(known), len(found))
    return dict(zip(*(places.tolist() for places in linear_sum_assignment(costs)), strict=True))


def _cost(a: Detection, b: Detection) -> float:
    return float(np.hypot(*np.subtract(a["center"], b["center"]))) + RECOLORED * (a["color"] != b["color"])


def series(track: Track, key: str) -> np.ndarray:
    """A detection's numbers under a key, in each frame (F, K); between the neighbours' where the object is missing."""
    frames = [index for index, seen in enumerate(track) if seen is not None]
    values = np.array([np.ravel(seen[key]) for seen in track if seen is not None])
    return np.stack([np.interp(np.arange(len(track)), frames, column) for column in values.T], axis=1)
