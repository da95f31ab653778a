"""Bands in which the base model stays, learnt from its own spread over seeds, with a stated false-alarm rate.

A measure has one value per prompt. The base model is measured with S seeds on the same n prompts; s^2 is the variance
between seeds, pooled over the prompts, with n (S - 1) degrees of freedom. There are two kinds of measures. The band of
each is centred at the mean over the seeds and uses Student's t at the false-alarm rate:

quality  Higher is better. The mean over the prompts alarms in two cases: below  mean - t s sqrt((1 + 1/S) / n), the
         one-sided prediction interval of one more seed of the same model; and more than  t s sqrt(2 / n)  below an
         earlier mean of the same run, which is more than two seeds of one model differ.
look     An image statistic: neither high nor low is better, and an honest gain moves it too. The mean alarms where a
         single prompt's value would be rare for the base model, outside  mean +- t s sqrt(1 + 1/S); an unchanged model
         stays inside far more often than stated. Outside the narrower interval of the mean the measure drifts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Kind = Literal["quality", "statistic"]
State = Literal["inside", "drift", "alarm"]


@dataclass(frozen=True)
class Band:
    """The range in which the base model's mean of a measure over the prompts stays."""

    kind: Kind
    center: float
    spread: float
    """Standard deviation of one prompt's value between seeds."""
    low: float
    """The measure alarms below this value."""
    high: float
    """The measure alarms above this value; infinite for a quality."""
    drift: float
    """The largest distance from the center that an unchanged model's mean moves; farther away the measure drifts."""
    fall: float = math.inf
    """The largest fall of a quality's mean below an earlier mean of the same run; a larger fall alarms."""

    def state(self, value: float) -> State:
        """The state of a mean over the same prompts."""
        if not self.low <= value <= self.high:
            return "alarm"
        return "drift" if abs(value - self.center) > self.drift else "inside"


def band(sets: np.ndarray, kind: Kind, rate: float) -> Band:
    """The band of a measure from the base model's values (S, n) with S >= 2 seeds on n prompts.

    `rate` is the false-alarm rate of this measure alone. A prompt to which the measure does not apply is nan for
    every seed.
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
    """The bands of several measures, each with the false-alarm rate `rate`, from their values (n,) with each seed."""
    return {name: band(np.stack([values[name] for values in sets]), kind, rate) for name, kind in kinds.items()}
