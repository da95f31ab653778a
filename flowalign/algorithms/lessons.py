"""What an algorithm makes of scored samples: advantages, and which of them teach."""

from typing import NamedTuple

import torch

from flowalign.advantages import Scored
from flowalign.algorithms.base import Algorithm


class Lessons(NamedTuple):
    """What an algorithm makes of N scored samples."""

    advantages: torch.Tensor  # (N,) or (N, ...)
    teaches: torch.Tensor  # (N,) bool: the samples to learn from
    differs: torch.Tensor  # (N,) bool: those in whose group the rewards differ


def lessons(algorithm: Algorithm, scored: Scored, groups: torch.Tensor) -> Lessons:
    """The Lessons of all samples of a step; ValueError as `Algorithm.advantages`.

    A sample that a reward left out takes no part in any statistic and teaches nothing; nor do the others of its group
    where the algorithm learns from whole groups.
    """

    def of(scored: Scored, groups: torch.Tensor) -> Lessons:
        advantages = algorithm.advantages(scored, groups)
        return Lessons(advantages, algorithm.teaches(scored, groups), algorithm.differs(scored, groups))

    known = ~scored.total.isnan()
    if scored.previews is not None:
        known &= ~scored.previews.isnan().any(1)
    if algorithm.unit != "item":
        known &= ~torch.isin(groups, groups[~known])
    if known.all():
        return of(scored, groups)
    if not known.any():
        nothing = torch.zeros(len(known), device=groups.device)
        return Lessons(nothing, nothing.bool(), nothing.bool())
    learnt = of(scored.of(known), groups[known])
    whole = [part.new_zeros(len(known), *part.shape[1:]).index_put((known,), part) for part in learnt]
    return Lessons(*whole)
