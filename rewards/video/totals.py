"""VBench's totals: each dimension's score is brought to a scale, and the dimensions are averaged with weights.

Source: VBench's scripts/constant.py and cal_final_score.py. A missing dimension is an error; there it counts as a raw
score of 0, which may even be negative on the scale.
"""

from collections.abc import Mapping
from typing import NamedTuple

# For each dimension: the scores that become 0 and 1, and the weight.
QUALITY = {
    "subject consistency": (0.1462, 1.0, 1.0),
    "background consistency": (0.2615, 1.0, 1.0),
    "temporal flickering": (0.6293, 1.0, 1.0),
    "motion smoothness": (0.706, 0.9975, 1.0),
    "aesthetic quality": (0.0, 1.0, 1.0),
    "imaging quality": (0.0, 1.0, 1.0),
    "dynamic degree": (0.0, 1.0, 0.5),
}
SEMANTIC = {
    "object class": (0.0, 1.0, 1.0),
    "multiple objects": (0.0, 1.0, 1.0),
    "human action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance style": (0.0009, 0.2855, 1.0),
    "temporal style": (0.0, 0.364, 1.0),
    "overall consistency": (0.0, 0.364, 1.0),
}
I2V_QUALITY = {name: scale for name, scale in QUALITY.items() if name != "temporal flickering"}
I2V = {
    "video-text camera motion": (0.0, 1.0, 0.1),
    "video-image subject consistency": (0.1462, 1.0, 1.0),
    "video-image background consistency": (0.2615, 1.0, 1.0),
}


class VBenchTotal(NamedTuple):
    """The totals of text to video; not limited to [0, 1], as published."""

    quality: float
    semantic: float
    total: float


class VBenchI2VTotal(NamedTuple):
    """The totals of image to video."""

    quality: float
    i2v: float
    total: float


def vbench_total(scores: Mapping[str, float]) -> VBenchTotal:
    """The totals of the raw scores of VBench's 16 dimensions; total = (4 quality + semantic) / 5.

    Names are written with spaces or underscores, in any case. Raises ValueError unless the dimensions are the 16.
    """
    quality, semantic = _averages(scores, QUALITY, SEMANTIC)
    return VBenchTotal(quality, semantic, (4 * quality + semantic) / 5)


def vbench_i2v_total(scores: Mapping[str, float]) -> VBenchI2VTotal:
    """The totals of the raw scores of VBench's 9 dimensions of image to video; total = (quality + i2v) / 2."""
    quality, i2v = _averages(scores, I2V_QUALITY, I2V)
    return VBenchI2VTotal(quality, i2v, (quality + i2v) / 2)


def _averages(scores: Mapping[str, float], *tables: Mapping[str, tuple[float, float, float]]) -> list[float]:
    given = {name.lower().replace("_", " "): score for name, score in scores.items()}
    known = [name for table in tables for name in table]
    if missing := [name for name in known if name not in given]:
        raise ValueError(f"the totals need a score of every dimension; there is none of {', '.join(missing)}")
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"the totals have no dimension {', '.join(unknown)}")
    return [
        sum(weight * (given[name] - low) / (high - low) for name, (low, high, weight) in table.items())
        / sum(weight for _, _, weight in table.values())
        for table in tables
    ]
