"""The interface of an algorithm: it weighs scored samples, puts them into batches, and has a loss on a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from flowalign.advantages import RewardTable, advantages, has_spread, summed_advantages
from flowalign.algorithms.batches import Batch, Batches, Turn
from flowalign.config.algorithm import AlgorithmSettings, algorithm_class
from flowalign.config.base import UserError
from flowalign.lazy import torch
from flowalign.rollout.stages import Keep, Scored, Weighted

if TYPE_CHECKING:
    from flowalign.policies.base import Policy

Metrics: TypeAlias = "dict[str, torch.Tensor]"


class Cost(NamedTuple):
    """The forward passes that the loss of an item needs beside the one with a gradient."""

    snapshots: int = 0  # passes of snapshots, without a gradient, under the trained policy's guidance
    references: int = 0  # passes of the reference, without a gradient, under the reference's guidance
    apart: bool = False  # whether an update computes the gradient of each reward separately


def guided_velocity(
    policy: Policy, batch: Batch, state: torch.Tensor, sigma: torch.Tensor, guidance: float
) -> torch.Tensor:
    """The policy's velocities (n, ...) at states (n, ...) and sigmas (n,), in forward passes of `batch.at_once` rows.

    Where there are several passes, none keeps its graph; each is run again in the backward pass (checkpointing, Chen et
    al. 2016). The memory is then that of one pass, the gradient equals that of one large pass, and a plan counts each
    forward pass twice.
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


class Algorithm(ABC):
    """An algorithm, built from its settings. `state` holds what it keeps beside the policy's snapshots."""

    Settings: ClassVar[type[AlgorithmSettings]]
    behaviour: ClassVar[str | None] = None
    """The name of the snapshot that draws the rollouts; None for the trained weights."""

    def __init__(self, settings: AlgorithmSettings):
        self.settings: Any = settings
        self.state: dict[str, torch.Tensor] = {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint stores for the algorithm."""
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores the state that `state_dict` returned."""
        self.state = dict(state)

    # What the algorithm needs of a run.

    @property
    def keep(self) -> frozenset[Keep]:
        """The data that a rollout must keep beside the finished samples."""
        return frozenset()

    def check_schedule(self, sigmas: torch.Tensor) -> None:  # noqa: B027
        """Raises ValueError for a rollout's sigma schedule (steps + 1,) that the algorithm cannot learn from."""

    def begin(self, policy: Policy) -> None:  # noqa: B027
        """Takes the snapshots that the algorithm needs; called once, before the first step."""

    # From scored samples to weighted samples.

    @property
    def learns_from_equal(self) -> bool:
        """Whether a group whose rewards are all equal has a gradient too."""
        return False

    def advantages(self, scored: RewardTable, groups: torch.Tensor) -> torch.Tensor:
        """Advantages (N,) of all samples of a step, or (N, K) with one per reward."""
        settings = self.settings
        if settings.advantage == "summed":
            return summed_advantages(scored, groups, settings.advantage_std)
        return advantages(scored.total, groups, settings.advantage_std)

    def differs(self, scored: RewardTable, groups: torch.Tensor) -> torch.Tensor:
        """(N,) bool: the samples in whose group the rewards that the algorithm learns from differ."""
        if scored.previews is not None:
            learnt = scored.previews.T
        else:
            learnt = scored.values[scored.weights > 0] if self.settings.parts_rewards else scored.total[None]
        return torch.stack([has_spread(values, groups) for values in learnt]).any(0)

    def teaches(self, scored: RewardTable, groups: torch.Tensor) -> torch.Tensor:
        """(N,) bool: the samples that the algorithm learns from."""
        if self.settings.equal_groups == "keep" or self.learns_from_equal:
            return torch.ones_like(scored.total, dtype=torch.bool)
        return self.differs(scored, groups)

    def lessons(self, scored: RewardTable, groups: torch.Tensor) -> Lessons:
        """The lessons of N scored samples in groups (N,); ValueError for rewards that the algorithm cannot learn from.

        A sample that a reward left out is in no statistic and teaches nothing. Where the algorithm learns from whole
        groups, the same holds for all samples of its group.
        """
        known = ~scored.total.isnan()
        if scored.previews is not None:
            known &= ~scored.previews.isnan().any(1)
        if self.settings.unit != "item":
            known &= ~torch.isin(groups, groups[~known])
        if not known.any():
            nothing = torch.zeros(len(known), device=groups.device)
            return Lessons(nothing, nothing.bool(), nothing.bool())
        table, own = (scored, groups) if known.all() else (scored.of(known), groups[known])
        found = Lessons(self.advantages(table, own), self.teaches(table, own), self.differs(table, own))
        if known.all():
            return found
        return Lessons(*(part.new_zeros(len(known), *part.shape[1:]).index_put((known,), part) for part in found))

    def weigh(self, scored: Scored) -> Weighted:
        """This process's samples, weighted with statistics over the samples of all processes; raises as `lessons`."""
        own, table, count = scored.rewards, scored.everyone.trained(), len(scored.generated)
        total = scored.everyone.total
        prompts = torch.arange(len(total) // scored.group_size, device=total.device)
        learnt = self.lessons(table, prompts.repeat_interleave(scored.group_size))
        part = slice(scored.first, scored.first + count)
        found = learnt.advantages[part].to(own.total.device)
        return Weighted(
            generated=scored.generated,
            total=own.total.nan_to_num(0),
            advantages=found if own.trust is None else (found.T * own.trust.nan_to_num(1)).T,
            teaches=learnt.teaches[part],
            differs=learnt.differs[part],
            shares=table.shares(learnt.teaches).T[part],
            zero_spread=1 - learnt.differs.float().mean().item(),
        )

    # From weighted samples to losses.

    @abstractmethod
    def batches(self, weighted: Weighted, turn: Turn) -> Batches[Any]:
        """The items of one inner epoch, as `Transitions` or `NoisedFinals`."""

    @abstractmethod
    def loss(self, policy: Policy, batch: Any) -> tuple[torch.Tensor, Metrics]:
        """The mean loss over the batch's items, and detached metrics to log, each (n,) or a scalar.

        A loss of shape (L,) is L losses: the loop computes their gradients one by one and combines them by `join`. The
        number of the update alone decides whether a loss has this shape.
        """

    def join(self, gram: torch.Tensor) -> tuple[torch.Tensor, Mapping[str, float]]:
        """Weights (L,) for the gradients of a loss (L,), from their inner products (L, L), and metrics to log."""
        raise NotImplementedError(f"{self.settings.name} has one loss")

    def cost(self, current: frozenset[str] | set[str]) -> Cost:
        """The forward passes of an item, while the snapshots `current` equal the trained weights."""
        return Cost(references=int(self.settings.kl_weight > 0))

    def after_update(self, policy: Policy, update: int) -> None:  # noqa: B027
        """Moves the snapshots after a training step's last optimizer update, number `update`, if there are any."""


class Lessons(NamedTuple):
    """What an algorithm learns from N scored samples."""

    advantages: torch.Tensor  # (N,) or (N, ...)
    teaches: torch.Tensor  # (N,) bool: the samples that the algorithm learns from
    differs: torch.Tensor  # (N,) bool: the samples in whose group the rewards differ


def algorithm_of(settings: AlgorithmSettings) -> Algorithm:
    """The algorithm that a recipe's section names; UserError if it is not installed or has other settings."""
    try:
        kind: type[Algorithm] = algorithm_class(settings.name)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not issubclass(kind, Algorithm) or not isinstance(settings, kind.Settings):
        raise UserError(f"algorithm {settings.name!r} is not a flowalign.algorithms.base.Algorithm with these settings")
    return kind(settings)
