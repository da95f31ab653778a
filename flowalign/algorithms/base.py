"""What an algorithm is: a loss on a batch of items, and what it moves after a training step. Nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import PrivateAttr

from flowalign.advantages import Scored, advantages, has_spread, summed_advantages
from flowalign.config.algorithm import AlgorithmSettings, Keep
from flowalign.config.base import UserError
from flowalign.lazy import torch
from flowalign.sampling.steps import Dynamics

if TYPE_CHECKING:
    from flowalign.config.recipe import Recipe
    from flowalign.policies.base import Conditioning, Policy

Figures: TypeAlias = "dict[str, torch.Tensor]"


@dataclass(frozen=True)
class Transition:
    """A stochastic step that a rollout took, for n items."""

    sigma: torch.Tensor  # (n,)
    sigma_next: torch.Tensor  # (n,)
    sigma_max: float
    state: torch.Tensor  # (n, ...), float32, as the log-probability was computed on it
    next_state: torch.Tensor  # (n, ...)
    log_prob: torch.Tensor  # (n,), under the policy that sampled; float64 where the algorithm asks for it
    dynamics: Dynamics
    noise_level: float | None
    mean: torch.Tensor | None = None  # (n, ...), of the policy that sampled, where the algorithm asks for it


@dataclass(frozen=True)
class Noised:
    """Finished samples noised anew, for n items: state = (1 - sigma) x0 + sigma noise, with target noise - x0."""

    sigma: torch.Tensor  # (n,)
    noise: torch.Tensor  # (n, ...)
    state: torch.Tensor  # (n, ...)


@dataclass(frozen=True)
class Batch:
    """n items of one training step: what `Algorithm.loss` sees."""

    condition: Conditioning
    advantages: torch.Tensor  # (n,), or (n, K) of an algorithm that keeps one a reward
    groups: torch.Tensor  # (n,), the set within which an item is compared
    latents: torch.Tensor  # (n, ...), the finished sample x0
    guidance: float
    reference_guidance: float
    transition: Transition | None = None  # where needs = "trajectory"
    noised: Noised | None = None  # where needs = "final"
    rewards: torch.Tensor | None = None  # (n,), the weighted total
    shares: torch.Tensor | None = None  # (n, K), see Scored.shares
    samples: torch.Tensor | None = None  # (n,), which items are of one sample
    update: int = 0  # optimizer updates before this one
    at_once: int | None = None  # the items that fit in a pass; None: all


def guided_velocity(
    policy: Policy, batch: Batch, state: torch.Tensor, sigma: torch.Tensor, guidance: float
) -> torch.Tensor:
    """The policy's velocities (n, ...) at a batch's states (n, ...) and levels (n,), in passes of `batch.at_once` rows.

    Of several passes none keeps its graph: each is made again when the gradient comes to it (checkpointing, Chen et al.
    2016), so that the memory is that of one pass and the gradient that of all at once. They are then counted twice.
    """

    def of(rows: slice) -> torch.Tensor:
        return policy.guided_velocity(state[rows], sigma[rows], batch.condition[rows], guidance)

    size = batch.at_once or len(state)
    if len(state) <= size:
        return policy.guided_velocity(state, sigma, batch.condition, guidance)
    parts = [slice(start, start + size) for start in range(0, len(state), size)]
    if not torch.is_grad_enabled():
        return torch.cat([of(part) for part in parts])
    from torch.utils.checkpoint import checkpoint

    return torch.cat([checkpoint(of, part, use_reentrant=False) for part in parts])


class Algorithm(AlgorithmSettings, ABC):
    """An algorithm: its settings and its loss."""

    _state: dict[str, Any] = PrivateAttr(default_factory=dict)  # tensors

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """What the algorithm remembers from update to update beside the policy's snapshots; checkpoints hold it."""
        return self._state

    @property
    def learns_from_equal(self) -> bool:
        """Whether groups of equal rewards say where to go too."""
        return False

    @property
    def keep(self) -> frozenset[Keep]:
        """What a rollout must keep beside the finished samples."""
        return frozenset({"trajectory"}) if self.needs == "trajectory" else frozenset()

    def begin(self, policy: Policy) -> None:
        """Take the snapshots that the algorithm lives on; called once, before the first step."""

    def advantages(self, scored: Scored, groups: torch.Tensor) -> torch.Tensor:
        """Advantages (N,) of all samples of a step, or (N, K)."""
        if self.advantage == "summed":
            return summed_advantages(scored, groups, self.advantage_std)
        return advantages(scored.total, groups, self.advantage_std)

    def differs(self, scored: Scored, groups: torch.Tensor) -> torch.Tensor:
        """(N,) bool: the samples in whose group the rewards differ, as far as the algorithm learns from them."""
        if scored.previews is not None:
            learnt = scored.previews.T
        else:
            learnt = scored.values[scored.weights > 0] if self.parts_rewards else scored.total[None]
        return torch.stack([has_spread(values, groups) for values in learnt]).any(0)

    def teaches(self, scored: Scored, groups: torch.Tensor) -> torch.Tensor:
        """(N,) bool: the samples to learn from."""
        if self.equal_groups == "keep" or self.learns_from_equal:
            return torch.ones_like(scored.total, dtype=torch.bool)
        return self.differs(scored, groups)

    @abstractmethod
    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, Figures]:
        """The mean loss over the batch's items, and detached figures to log, each (n,) or a scalar.

        Where `apart` says so it is of shape (L,), and the loop asks `gradient_weights` how to join the L gradients.
        """

    def apart(self, update: int) -> bool:
        """Whether the loss of this update is several, whose gradients are taken one by one."""
        return False

    def gradient_weights(self, gram: torch.Tensor) -> tuple[torch.Tensor, Mapping[str, float]]:
        """Weights (L,) of the gradients of a loss (L,), from their inner products (L, L), and figures to log."""
        raise NotImplementedError(f"{self.name} has one loss")

    def after_update(self, policy: Policy, update: int) -> None:
        """Move snapshots after a training step's last optimizer update, number `update`; many algorithms have none."""


def algorithm_of(recipe: Recipe) -> Algorithm:
    """The recipe's algorithm; UserError for an installed one that has settings but no loss."""
    if not isinstance(recipe.algorithm, Algorithm):
        raise UserError(f"algorithm {recipe.algorithm.name!r} is no flowalign.algorithms.base.Algorithm")
    return recipe.algorithm
