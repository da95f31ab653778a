"""Quality against compute without training: the expected score of best-of-n.

The cost of a chosen image is the forwards of all candidates of its prompt.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flowalign.config import Evaluation
from flowalign.config.base import UserError
from flowalign.evaluate.evaluation import Evaluated, evaluate
from flowalign.experiments.scaling import Cost, check_judges, check_search, cost
from flowalign.policies.base import Policy
from flowalign.policies.request import MediaRequest
from flowalign.rollout.generate import Progress
from flowalign.rollout.prompts import Row
from rewards import Reward


@dataclass(frozen=True)
class Point:
    """Quality at a cost: the scores of the chosen images, summarised over prompts like an evaluation."""

    candidates: int
    cost: Cost
    summary: dict[str, dict[str, Any]]


def best_of_weights(drawn: int, n: int) -> np.ndarray:
    """The probability (N,) that each of N = `drawn` ascending values is the highest of n values drawn at random.

    It is C(r - 1, n - 1) / C(N, n) for the r-th value, since the n - 1 others must lie below it. Raises ValueError
    unless 1 <= n <= N.
    """
    if not 1 <= n <= drawn:
        raise ValueError(f"best of {n} cannot be computed from {drawn} candidates")
    total = math.comb(drawn, n)
    return np.array([math.comb(below, n - 1) / total for below in range(drawn)])


def expected_best_of(selection: np.ndarray, measured: np.ndarray, n: int) -> float:
    """The expected `measured` (N,) of the candidate with the highest `selection` (N,) among n of the N candidates.

    The expectation is exact over all subsets of n, so it has no sampling noise. Candidates with equal `selection` are
    equally likely to be chosen.
    """
    _, level, sizes = np.unique(selection, return_inverse=True, return_counts=True)
    tied = (np.bincount(level, weights=measured) / sizes)[level]
    return float(best_of_weights(len(selection), n) @ tied[np.argsort(selection, kind="stable")])


def evaluate_best_of(
    policy: Policy,
    rows: Sequence[Row],
    rewards: Mapping[str, Reward],
    by: str,
    counts: Sequence[int],
    settings: Evaluation,
    request: MediaRequest,
    progress: Progress | None = None,
) -> list[Point]:
    """Best-of-n for each n of `counts`, chosen by the reward `by` and measured by all rewards.

    All n share one draw of max(counts) candidates per prompt. Prompts that `by` does not judge are left out. The noise
    is that of `evaluate`, so its images are the first candidates. Raises UserError for rewards that cannot choose, for
    counts below 1, and if `by` judges no prompt.
    """
    for count in counts:
        check_search(count, (), settings)
    check_judges(rewards)
    asked = [row for row in rows if rewards[by].applies_to(row.about)]
    if not asked:
        raise UserError(f"{by} judges none of the evaluation prompts; choose by another reward")
    most = max(counts)
    settings = settings.model_copy(update={"images_per_prompt": most, "keep_media": 0})
    drawn = evaluate(policy, asked, rewards, settings, request, progress)
    groups = [drawn.scores[start : start + most] for start in range(0, len(drawn.scores), most)]
    return [
        Point(n, cost(n, (), settings.steps, settings.guidance), _expected(asked, groups, by, n).summary())
        for n in counts
    ]


def _expected(rows: Sequence[Row], groups: Sequence[Sequence[Mapping[str, float]]], by: str, n: int) -> Evaluated:
    """The expected scores of best-of-n of every row, as an evaluation with one image per row."""
    scores = [
        {
            name: expected_best_of(np.array([one[by] for one in drawn]), np.array([one[name] for one in drawn]), n)
            for name in drawn[0]
        }
        for drawn in groups
    ]
    return Evaluated(list(rows), scores, torch.empty(0))
