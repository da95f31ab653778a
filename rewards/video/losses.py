"""Losses of reward models that are trained on pairs of videos, where a pair may be a tie, and their accuracy.

Bradley-Terry with ties is VideoAlign's (2501.13918), the win-tie loss is SoliReward's (2512.22170), the uncertainty
loss HPSv3's (2508.03789). `margin` is the winner's reward minus the loser's, of any shape; in a tie either comes first.
Means are over the entries that count; the published codes keep the entries that do not in the denominator.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F


def bradley_terry_with_ties(
    margin: torch.Tensor, tie: torch.Tensor, *, k: float, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean negative log-likelihood of the pairs' outcomes; a scalar.

    P(win) = s(margin - log k) and P(tie) = (k^2 - 1) s(margin - log k) s(-margin - log k) with the logistic s. tie and
    valid: bool, as margin; valid is true for the entries that count. k > 1: the larger, the likelier a tie.
    """
    if k <= 1:
        raise ValueError(f"k must be above 1, where ties are possible, and is {k:g}")
    margin, tie = _counted(margin, tie, valid)
    return _mean(_outcome_loss(margin, tie, math.log(k)) - math.log(k**2 - 1) * tie)


def win_tie_loss(
    margin: torch.Tensor,
    tie: torch.Tensor,
    *,
    at_least: float,
    win_weight: float = 1.0,
    tie_weight: float = 1.0,
    smoothing: float = 0.0,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean of -log s(margin - at_least) for a win, plus -log s(-margin - at_least) for a tie; a scalar.

    at_least: the margin that a win should have, and a tie not. smoothing: the probability that a win is labelled the
    wrong way round. With no ties and at_least 0 it is Bradley and Terry's loss. tie and valid: bool, as margin.
    """
    margin, tie = _counted(margin, tie, valid)
    weights = torch.where(tie, tie_weight, win_weight)
    return _mean(weights * _outcome_loss(margin, tie, at_least, smoothing))


def rating_loss(reward: torch.Tensor, rating: torch.Tensor) -> torch.Tensor:
    """VideoAlign's regression: the mean of (reward - (rating - 3))^2 over ratings from 1 to 5; 0 is no rating."""
    rated = rating != 0
    return _mean((reward[rated] - (rating[rated] - 3)) ** 2)


def uncertainty_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, draws: torch.Tensor | None = None, *, nodes: int = 128
) -> torch.Tensor:
    """HPSv3's loss, the mean of -E log s(z) where z ~ N(m_c - m_r, d_c^2 + d_r^2); a scalar.

    chosen, rejected: (B, 2), the mean m and the logarithm of the deviation d of each reward. draws: (B, N), standard
    normal, for the published estimate by sampling; None takes the expectation itself, by quadrature with so many nodes.
    """
    deviation = (torch.exp(2 * chosen[:, 1]) + torch.exp(2 * rejected[:, 1])).sqrt()
    if draws is None:
        places, weights = (torch.from_numpy(part).to(chosen) for part in np.polynomial.hermite_e.hermegauss(nodes))
        draws, weights = places[None], weights / weights.sum()
    else:
        weights = draws.new_full(draws.shape[1:], 1 / draws.shape[1])
    z = (chosen[:, 0] - rejected[:, 0])[:, None] + deviation[:, None] * draws
    return (-F.logsigmoid(z) @ weights).mean()


class PairAccuracy(NamedTuple):
    """The shares of pairs that a reward model gets right."""

    with_ties: float  # of all pairs, at the best threshold below which a margin is called a tie
    without_ties: float  # of the pairs that are no ties; a margin of 0 is wrong


def pair_accuracy(outcome: torch.Tensor, margin: torch.Tensor) -> PairAccuracy:
    """How well margins r_A - r_B (N,) agree with people's outcomes (N,): 1 for A, -1 for B, 0 for a tie.

    Pairs of equal margins stay together at every threshold; VideoAlign's code splits them. NaN where no pair counts.
    """
    size = margin.abs()
    thresholds = torch.cat([size.new_tensor([-1.0]), size.unique()])
    called = torch.where(size <= thresholds[:, None], 0, margin.sign())
    with_ties = (called == outcome).double().mean(1).max()
    decided = outcome != 0
    return PairAccuracy(with_ties.item(), (margin[decided].sign() == outcome[decided]).double().mean().item())


def _outcome_loss(margin: torch.Tensor, tie: torch.Tensor, at_least: float, smoothing: float = 0.0) -> torch.Tensor:
    won, lost = -F.logsigmoid(margin - at_least), -F.logsigmoid(-margin - at_least)
    return torch.where(tie, won + lost, (1 - smoothing) * won + smoothing * lost)


def _counted(margin: torch.Tensor, tie: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries that count: what does not is removed before any arithmetic, so that it may even be NaN."""
    return (margin.flatten(), tie.flatten()) if valid is None else (margin[valid], tie[valid])


def _mean(values: torch.Tensor) -> torch.Tensor:
    """The mean, 0 with gradients of 0 where there are no values."""
    return values.sum() / max(1, values.numel())
