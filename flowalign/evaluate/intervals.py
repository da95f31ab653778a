"""95 % intervals of scores. The prompt is the unit, because the images of one prompt succeed and fail together.

Scores come in groups: a group holds the scores of one prompt's images. Every mean is over all images.

a proportion    Scores that are all 0 or 1: Wilson (1927) with an effective number of images, the number of independent
                images that would give the same variance: p (1 - p) / v, with v the mean's variance between prompts,
                times (z / t)^2 for few prompts; at least the number of prompts, at most the number of images (Korn and
                Graubard 1998, Franco et al. 2019). Two correct images of two prompts give .342 to 1, not 1 to 1.
any other mean  The percentile bootstrap over prompts (Efron and Tibshirani 1993, ch. 13). With fewer than FEW prompts
                the bootstrap is too narrow, and Student's t is used. None if there is one prompt, or if all prompts
                score the same, since then no spread is known.
several means   The weighted mean of independent means, such as GenEval's overall, from their intervals (MOVER; Zou,
                Huang and Zhang 2009): its lower bound is  m - sqrt(sum w^2 (m_i - l_i)^2),  the upper bound likewise.
paired means    Differences of two models on the same prompts and noise. For proportions, Agresti and Min (2005): half a
                prompt is added to each of the four outcomes. For other scores, a mean as above.
"""

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9_999
FEW = 20  # prompts; an interval from fewer is called rough
FEW_WORDS = f"few: fewer than {FEW} prompts, so the interval is rough"
Interval = tuple[float, float] | None
Groups = Sequence[Sequence[float]]
_Z = float(stats.norm.ppf((1 + LEVEL) / 2))


def mean_of(groups: Groups) -> float:
    """The mean over all images' scores, given in a group per prompt; a prompt with more images weighs more."""
    return float(np.mean(list(chain.from_iterable(groups))))


def mean_interval(groups: Groups, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
    """The interval of the mean of scores, given in a group per prompt; None without scores.

    `bounds` are the lowest and highest possible score.
    """
    if len(groups) == 0:
        return None
    if _binary(groups):
        return proportion_interval(groups)
    usual = sum(map(len, groups)) / len(groups)
    found = plain_interval([math.fsum(group) / usual for group in groups])  # their mean is the mean over all images
    return found and (max(found[0], bounds[0]), min(found[1], bounds[1]))


def proportion_interval(groups: Groups) -> tuple[float, float]:
    """The interval of the share of ones among scores of 0 and 1, given in a group per prompt."""
    scores, prompts = list(chain.from_iterable(groups)), len(groups)
    share = float(np.mean(scores))
    effective = float(prompts)  # a known spread between prompts raises it by what further images of a prompt add
    if error := clustered_error(groups):
        fewness = (_Z / float(stats.t.ppf((1 + LEVEL) / 2, prompts - 1))) ** 2
        effective = min(max(share * (1 - share) / error**2 * fewness, prompts), len(scores))
    centre = (share + _Z**2 / (2 * effective)) / (1 + _Z**2 / effective)
    half = math.sqrt(share * (1 - share) / effective + (_Z / (2 * effective)) ** 2) * _Z / (1 + _Z**2 / effective)
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def combined_interval(
    means: Sequence[float], intervals: Sequence[Interval], weights: Sequence[float] | None = None
) -> Interval:
    """The interval of the weighted mean of independent means; weights need not sum to 1, None weighs all equally."""
    if not means or any(interval is None for interval in intervals):
        return None
    shares = np.ones(len(means)) if weights is None else np.asarray(weights, dtype=np.float64)
    shares, bounds = shares / shares.sum(), np.array(intervals, dtype=np.float64)
    mean = float(shares @ np.asarray(means))
    below, above = (math.sqrt(float((shares**2) @ (bounds[:, end] - means) ** 2)) for end in (0, 1))
    return mean - below, mean + above


def difference_interval(before: Groups, after: Groups) -> Interval:
    """The interval of the mean of after - before, for images of the same prompts drawn from the same noise.

    None where `mean_interval` is None. For proportions, with n prompts and their differences d, the centre is
    m = sum d / (n + 2) and its variance ((sum d^2 + 1) / (n + 2) - m^2) / (n + 2).
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
    """The standard error of the mean of all N scores in g groups; None for fewer than two groups.

    Its square is g / (g - 1) times the sum over groups of (sum of deviations)^2 / N^2. For groups of one score the
    error is std / sqrt(N).
    """
    if len(groups) < 2:
        return None
    scores = np.array(list(chain.from_iterable(groups)), dtype=np.float64)
    mean = scores.mean()
    squares = sum(float(np.sum(np.asarray(group, dtype=np.float64) - mean)) ** 2 for group in groups)
    return math.sqrt(len(groups) / (len(groups) - 1) * squares) / len(scores)


def plain_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """The interval of the mean of values (N,) other than 0 and 1, one per prompt or seed."""
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
