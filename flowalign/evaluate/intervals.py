"""95 % intervals of scores. The prompt is the unit: pictures of one prompt succeed and fail together.

Scores come in groups, those of one prompt's pictures. Every mean is over all pictures.

a proportion    scores that are all 0 or 1. Wilson (1927), with the number of pictures that independent ones would need
                to be as sure: p (1 - p) / v, with v the mean's variance between prompts, times (z / t)^2 for few
                prompts; at least the number of prompts, at most that of pictures (Korn and Graubard 1998, Franco et al.
                2019). Two pictures of two prompts that are both right have .342 to 1, not 1 to 1.
any other mean  The percentile bootstrap over prompts (Efron and Tibshirani 1993, ch. 13); with fewer than FEW of them,
                where that is too narrow, Student's t. None for one prompt, or where all score alike: no spread is seen.
of several      The weighted mean of independent means, as GenEval's overall, from their intervals (MOVER; Zou, Huang
                and Zhang 2009): its lower bound is  m - sqrt(sum w^2 (m_i - l_i)^2),  the upper one alike.
of pairs        Differences of two models on the same prompts and noise. Of proportions, Agresti and Min (2005): half a
                prompt is added to each of the four outcomes. Others are a mean as above.
"""

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9_999
FEW = 20  # prompts; with fewer an interval is said to be rough
FEW_WORDS = f"few: fewer than {FEW} prompts, so the interval is rough"
Interval = tuple[float, float] | None
Groups = Sequence[Sequence[float]]
_Z = float(stats.norm.ppf((1 + LEVEL) / 2))


def mean_of(groups: Groups) -> float:
    """Of all pictures' scores, a group for each prompt; one with more pictures weighs more."""
    return float(np.mean(list(chain.from_iterable(groups))))


def mean_interval(groups: Groups, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
    """Of the mean of scores, a group for each prompt; None without any. No score lies outside the bounds."""
    if len(groups) == 0:
        return None
    if _binary(groups):
        return proportion_interval(groups)
    usual = sum(map(len, groups)) / len(groups)
    found = plain_interval([math.fsum(group) / usual for group in groups])  # whose mean is that of all pictures
    return found and (max(found[0], bounds[0]), min(found[1], bounds[1]))


def proportion_interval(groups: Groups) -> tuple[float, float]:
    """Of the share of ones among zeros and ones, a group for each prompt."""
    scores, prompts = list(chain.from_iterable(groups)), len(groups)
    share = float(np.mean(scores))
    effective = float(prompts)  # unless a spread between prompts is seen that says how much their pictures add
    if error := clustered_error(groups):
        fewness = (_Z / float(stats.t.ppf((1 + LEVEL) / 2, prompts - 1))) ** 2
        effective = min(max(share * (1 - share) / error**2 * fewness, prompts), len(scores))
    centre = (share + _Z**2 / (2 * effective)) / (1 + _Z**2 / effective)
    half = math.sqrt(share * (1 - share) / effective + (_Z / (2 * effective)) ** 2) * _Z / (1 + _Z**2 / effective)
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def combined_interval(
    means: Sequence[float], intervals: Sequence[Interval], weights: Sequence[float] | None = None
) -> Interval:
    """Of the weighted mean of independent means with intervals; weights need not sum to 1, None weighs all alike."""
    if not means or any(interval is None for interval in intervals):
        return None
    shares = np.ones(len(means)) if weights is None else np.asarray(weights, dtype=np.float64)
    shares, bounds = shares / shares.sum(), np.array(intervals, dtype=np.float64)
    mean = float(shares @ np.asarray(means))
    below, above = (math.sqrt(float((shares**2) @ (bounds[:, end] - means) ** 2)) for end in (0, 1))
    return mean - below, mean + above


def difference_interval(before: Groups, after: Groups) -> Interval:
    """Of the mean of after - before, pictures of the same prompts drawn from the same noise; None as `mean_interval`.

    Proportions: with n prompts and d their differences, m = sum d / (n + 2) and the variance is
    (sum d^2 + 1) / (n + 2) - m^2, over n + 2.
    """
    usual = sum(map(len, before)) / max(len(before), 1)  # as in `mean_interval`
    values = np.array([(math.fsum(b) - math.fsum(a)) / usual for a, b in zip(before, after, strict=True)])
    if not len(values) or not (_binary(before) and _binary(after)):
        return plain_interval(values)
    count = len(values) + 2
    centre = float(values.sum()) / count
    half = _Z * math.sqrt(((float((values**2).sum()) + 1) / count - centre**2) / count)
    return max(-1.0, centre - half), min(1.0, centre + half)


def clustered_error(groups: Groups) -> float | None:
    """The standard error of the mean of all scores; None for fewer than two groups.

    g / (g - 1) sum over the g groups of (sum of deviations)^2 / N^2; with groups of one it is std / sqrt(N).
    """
    if len(groups) < 2:
        return None
    scores = np.array(list(chain.from_iterable(groups)), dtype=np.float64)
    mean = scores.mean()
    squares = sum(float(np.sum(np.asarray(group, dtype=np.float64) - mean)) ** 2 for group in groups)
    return math.sqrt(len(groups) / (len(groups) - 1) * squares) / len(scores)


def plain_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Of the mean of values (N,) that are no proportion, one a prompt or a seed."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or np.ptp(values) <= 1e-12 * np.abs(values).max():
        return None
    if len(values) < FEW:
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * float(stats.sem(values))
        return float(values.mean()) - half, float(values.mean()) + half
    found = stats.bootstrap(
        [values],
        np.mean,
        n_resamples=RESAMPLES,
        batch=500,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def _binary(groups: Groups) -> bool:
    return all(score in (0.0, 1.0) for group in groups for score in group)
