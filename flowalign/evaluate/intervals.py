"""95 % intervals of benchmark scores, by the percentile bootstrap over prompts (Efron and Tibshirani 1993, ch. 13).

The prompt is what is resampled: pictures of one prompt succeed and fail together, so intervals over pictures would be
too narrow. Fewer than two prompts have no interval (None). Where all prompts score alike the interval has no width;
that says only that the prompts at hand do not differ.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap

LEVEL = 0.95
RESAMPLES = 9_999
Interval = tuple[float, float] | None


def mean_interval(values: Sequence[float]) -> Interval:
    """Of the mean of values (N,), one a prompt; of a paired difference, give the prompts' differences."""
    return stratified_interval([values], [1.0])


def stratified_interval(strata: Sequence[Sequence[float]], weights: Sequence[float] | None = None) -> Interval:
    """Of the weighted mean of the strata's means; each stratum's values are resampled among themselves.

    Weights need not sum to 1; None weighs all strata alike. None for a stratum of fewer than two values.
    """
    if any(len(values) < 2 for values in strata):
        return None
    shares = np.ones(len(strata)) if weights is None else np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum()

    def mean(*samples: np.ndarray, axis: int) -> np.ndarray:
        return np.sum([share * sample.mean(axis) for share, sample in zip(shares, samples, strict=True)], axis=0)

    found = bootstrap(
        [np.asarray(values, dtype=np.float64) for values in strata],
        mean,
        n_resamples=RESAMPLES,
        batch=500,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
