"""Bands that a base model keeps to by itself, learnt from its own spread over seeds, with a stated false-alarm rate.

A measure has one value a prompt. The base model is measured with S seeds on the same n prompts; s^2 is the variance
between seeds, pooled over the prompts, with n (S - 1) degrees of freedom. Two kinds of measure, two bands about the
mean over the seeds, with Student's t at the rate:

quality  higher is better. The mean over the prompts alarms below  mean - t s sqrt((1 + 1/S) / n), the one-sided
         prediction interval of one more seed of the same model; and more than  t s sqrt(2 / n)  below an earlier mean
         of the same run, farther than two seeds of one model differ.
look     neither good nor bad, and an honest gain moves it. The mean alarms where a single prompt's value would be
         rare for the base model, outside  mean +- t s sqrt(1 + 1/S); an unchanged model stays inside far more often
         than stated. Beyond the interval of the mean it is said to drift.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Kind = Literal["quality", "look"]
State = Literal["inside", "drift", "alarm"]


@dataclass(frozen=True)
class Band:
    """Where the mean over the prompts of a measure stays while the model is the base model."""

    kind: Kind
    center: float
    spread: float
    """Standard deviation between seeds of one prompt's value."""
    low: float
    """Below it the measure alarms."""
    high: float
    """Above it the measure alarms; infinite of a quality."""
    drift: float
    """How far from the center the mean of an unchanged model moves; farther is a drift."""
    fall: float = math.inf
    """How far below an earlier mean of the same run the mean of a quality may be."""

    def state(self, value: float) -> State:
        """Of a mean over the same prompts."""
        if not self.low <= value <= self.high:
            return "alarm"
        return "drift" if abs(value - self.center) > self.drift else "inside"


def band(sets: np.ndarray, kind: Kind, rate: float) -> Band:
    """The band of a measure from its values (S, n) on n prompts with S >= 2 seeds of the base model.

    `rate` is the false-alarm rate of this measure alone. Prompts that lack the measure are nan in every set.
    """
    values = np.asarray(sets, dtype=np.float64)
    values = values[:, ~np.isnan(values).any(0)]
    seeds, prompts = values.shape
    center, spread = float(values.mean()), math.sqrt(float(values.var(axis=0, ddof=1).mean()))
    freedom = prompts * (seeds - 1)
    one_more = spread * math.sqrt(1 + 1 / seeds)
    drift = float(stats.t.ppf(1 - rate / 2, freedom)) * one_more / math.sqrt(prompts)
    if kind == "quality":
        deviations = float(stats.t.ppf(1 - rate, freedom)) / math.sqrt(prompts)
        return Band(
            kind, center, spread, center - deviations * one_more, math.inf, drift, deviations * spread * math.sqrt(2)
        )
    half = float(stats.t.ppf(1 - rate / 2, freedom)) * one_more
    return Band(kind, center, spread, center - half, center + half, drift)


def learn_bands(sets: Sequence[Mapping[str, np.ndarray]], kinds: Mapping[str, Kind], rate: float) -> dict[str, Band]:
    """The bands of several measures, each with the false-alarm rate `rate`, from its values (n,) with each seed."""
    return {name: band(np.stack([values[name] for values in sets]), kind, rate) for name, kind in kinds.items()}
