"""Quality against compute without training: the expectation of best-of-n.

The forwards of a picture that is kept are those of all candidates of its prompt.
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
    """Quality at a cost: the scores of the chosen pictures, summarised over prompts as an evaluation is."""

    candidates: int
    cost: Cost
    summary: dict[str, dict[str, Any]]


def best_of_weights(drawn: int, n: int) -> np.ndarray:
    """The probability (N,) that each of N = `drawn` values, ascending, is the highest of n of them, drawn at random.

    C(r - 1, n - 1) / C(N, n) for the r-th: of the n, all others lie below it. ValueError unless 1 <= n <= N.
    """
    if not 1 <= n <= drawn:
        raise ValueError(f"best of {n} cannot be known from {drawn} candidates")
    total = math.comb(drawn, n)
    return np.array([math.comb(below, n - 1) / total for below in range(drawn)])


def expected_best_of(selection: np.ndarray, measured: np.ndarray, n: int) -> float:
    """The expectation of `measured` (N,) for the candidate that `selection` (N,) puts first among n of the N.

    Exact over all subsets of n, so without the noise of drawing them; equal ones are equally likely to be taken.
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
    """Best-of-n for each n of `counts`, chosen by the reward `by` and measured by all, from one draw of max(counts).

    Prompts that `by` does not judge are left out. The noise is that of `evaluate`, whose pictures are the first
    candidates. Raises UserError for rewards that cannot choose, for counts below 1, and where `by` judges no prompt.
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
    """The expected scores of best-of-n of every row, as an evaluation of one picture each."""
    scores = [
        {
            name: expected_best_of(np.array([one[by] for one in drawn]), np.array([one[name] for one in drawn]), n)
            for name in drawn[0]
        }
        for drawn in groups
    ]
    return Evaluated(list(rows), scores, torch.empty(0))
