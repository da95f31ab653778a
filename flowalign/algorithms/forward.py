"""The common part of the algorithms on the forward process: noise levels, predictions and the decay of snapshots.

They need finished samples only: x_sigma = (1 - sigma) x0 + sigma eps with a new eps, whose velocity is v = eps - x0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from flowalign.algorithms.base import Algorithm, Cost, guided_velocity
from flowalign.algorithms.batches import Batches, NoisedBatch, NoisedFinals, Turn
from flowalign.config.algorithm import AlgorithmSettings
from flowalign.config.base import MOST, Section
from flowalign.lazy import torch
from flowalign.sampling.noise import counted_generator
from flowalign.sampling.steps import row_mean

if TYPE_CHECKING:
    from flowalign.config.sections import Rollout, Train
    from flowalign.policies.base import Policy
    from flowalign.rollout.stages import Weighted

Level = Annotated[float, Field(ge=0, le=1)]
TimestepSampling = Literal["schedule", "schedule_strata", "uniform", "logit_normal"]


class Decay(Section):
    """The decay d of a snapshot, which moves after every training step: snapshot <- d snapshot + (1 - d) weights.

    d(n) = min(first + slope (n - start)+, last), where n counts optimizer updates. A higher decay makes the snapshot
    follow the weights more slowly. Source: DiffusionNFT's `return_decay` and the schedules of Flow-Factory's CRD.
    """

    first: Level = 0.0
    """Decay up to update `start`, from 0 (copy the weights) to below 1."""
    slope: Annotated[float, Field(ge=0)] = 0.0
    """Increase of the decay with each update after `start`."""
    start: Annotated[int, Field(ge=0, le=MOST)] = 0
    """Optimizer update after which the decay increases."""
    last: Level = 1.0
    """Decay at which the increase ends."""

    @model_validator(mode="after")
    def _moves(self) -> Decay:
        if self.first >= 1:
            raise ValueError("a decay that begins at 1 never moves the snapshot; set first below 1")
        if self.last < self.first:
            raise ValueError(f"last ({self.last:g}) must not be below first ({self.first:g})")
        if not self.slope and self.last != self.first and (name := self.changed("start", "last")):
            raise ValueError(f"{name} has no effect on a decay without a slope; set slope or leave {name} out")
        return self

    def at(self, update: int) -> float:
        """The decay d after `update` optimizer updates."""
        return min(self.first + self.slope * max(update - self.start, 0), self.last)


class Predictions(NamedTuple):
    """Velocities (n, ...) of the policy, of a snapshot and of the reference (None where it is not needed)."""

    policy: torch.Tensor
    snapshot: torch.Tensor
    reference: torch.Tensor | None


class ForwardSettings(AlgorithmSettings):
    """The settings of an algorithm that learns from finished samples with new noise."""

    needs: ClassVar = "final"
    timesteps: Annotated[int, Field(gt=0, le=MOST)] = 2
    """Number of noise levels at which each sample is trained in an inner epoch. More levels give a less noisy gradient
    and cost as many more forward and backward passes."""
    timestep_sampling: TimestepSampling = "schedule"
    """Distribution of the noise levels. "schedule" draws from the rollout's sigmas without repetition.
    "schedule_strata" divides these sigmas into as many equal parts as there are draws and takes one of each part;
    draws beyond the number of sigmas repeat some. "uniform" and "logit_normal" draw from that density, one level
    from each of equal strata."""
    timestep_range: tuple[Level, Level] = (0.0, 1.0)
    """Lowest and highest sigma at which samples are trained."""

    @model_validator(mode="after")
    def _range_is_wide(self) -> ForwardSettings:
        low, high = self.timestep_range
        if not low < high:
            raise ValueError(f"timestep_range [{low:g}, {high:g}] is empty")
        return self

    def draws(self, rollout: Rollout) -> int:
        """The number of noise levels of a sample."""
        return self.timesteps

    def check(self, rollout: Rollout, train: Train, rewards: int) -> None:
        """The rollout's schedule must have enough sigmas, and guided rollouts need an explicit `train.guidance`."""
        super().check(rollout, train, rewards)
        if rollout.guidance > 1 and train.guidance is None:
            raise ValueError(
                f"train.guidance must be set where rollouts are guided (rollout.guidance {rollout.guidance:g}): 1 "
                f"trains the model's own velocity, as published for {self.name}, more than 1 the guided one"
            )
        if self.timestep_sampling == "schedule" and self.timesteps > rollout.steps:
            raise ValueError(
                f"algorithm.timesteps ({self.timesteps}) exceeds the {rollout.steps} sigmas of the rollout's schedule; "
                "algorithm.timestep_sampling schedule_strata may repeat them"
            )

    def levels(self, sigmas: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """`timesteps` noise levels (T,) for one sample; `sigmas` is the rollout's sigma schedule, from 1 down to 0.

        Raises ValueError when the schedule has too few sigmas in `timestep_range`.
        """
        low, high = self.timestep_range
        inside = sigmas[(sigmas >= low) & (sigmas <= high) & (sigmas > 0)]
        if self.timestep_sampling == "schedule":
            if len(inside) < self.timesteps:
                raise ValueError(
                    f"algorithm.timestep_range [{low:g}, {high:g}] holds {len(inside)} of the rollout's sigmas; "
                    f"algorithm.timesteps needs {self.timesteps}"
                )
            return inside[torch.randperm(len(inside), generator=generator)[: self.timesteps]]
        strata = torch.randperm(self.timesteps, generator=generator)
        uniform = (strata + torch.rand(self.timesteps, generator=generator)) / self.timesteps
        if self.timestep_sampling == "schedule_strata":
            if not len(inside):
                raise ValueError(f"algorithm.timestep_range [{low:g}, {high:g}] holds none of the rollout's sigmas")
            return inside[(uniform * len(inside)).long().clamp(max=len(inside) - 1)]  # since 1 - 1e-8 rounds to 1
        if self.timestep_sampling == "uniform":
            return (low + (high - low) * uniform).clamp(1e-3, 1 - 1e-3)
        ends = torch.tensor([low, high], dtype=torch.float64).logit(eps=1e-9)
        first, last = torch.special.ndtr(ends)
        return torch.special.ndtri(first + (last - first) * uniform.double()).sigmoid().float().clamp(1e-3, 1 - 1e-3)


class ForwardAlgorithm(Algorithm):
    """An algorithm that learns from finished samples with new noise."""

    Settings: ClassVar[type[AlgorithmSettings]] = ForwardSettings
    settings: ForwardSettings

    def check_schedule(self, sigmas: torch.Tensor) -> None:
        """The schedule must have enough sigmas in `timestep_range`."""
        self.settings.levels(sigmas, counted_generator(0))

    def batches(self, weighted: Weighted, turn: Turn) -> Batches[NoisedBatch]:
        """Finished samples with new noise, at the settings' noise levels."""
        return NoisedFinals(weighted, turn, self.settings.unit, self.settings.timesteps, self.settings.levels)

    def cost(self, current: frozenset[str] | set[str]) -> Cost:
        """The old policy needs no forward pass of its own while it equals the trained one."""
        return Cost(snapshots=int("old" not in current), references=int(self.settings.kl_weight > 0))


def predictions(policy: Policy, batch: NoisedBatch, snapshot: str | None, *, reference: bool) -> Predictions:
    """The velocities at the batch's noised samples, each in one forward pass over all items.

    A snapshot that equals the trained weights, as after a copy, needs no forward pass of its own. `snapshot` None
    stands for the reference. Only the reference is guided by `batch.reference_guidance`.
    """

    def velocity(guidance: float) -> torch.Tensor:
        return guided_velocity(policy, batch, batch.state, batch.sigma, guidance)

    own = velocity(batch.guidance)
    with torch.no_grad():
        fixed = None
        if reference or snapshot is None:
            with policy.reference():
                fixed = velocity(batch.reference_guidance)
        if snapshot is None:
            assert fixed is not None
            return Predictions(own, fixed, fixed)
        if policy.is_current(snapshot):
            return Predictions(own, own.detach(), fixed)
        with policy.using(snapshot):
            return Predictions(own, velocity(batch.guidance), fixed)


def squared_error(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error (n,) over each row's dimensions, or over those where `mask` is true."""
    return row_mean((prediction - target) ** 2, mask)


def adaptive_error(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """`squared_error` divided by the row's own mean absolute error, (n,); no gradient flows through the divisor.

    Source: DiffusionNFT's training code, where the divisor is at least 1e-5.
    """
    weight = row_mean((prediction - target).detach().double().abs(), mask).clamp(min=1e-5)
    return (squared_error(prediction, target, mask) / weight).to(prediction.dtype)


def reward_level(advantage: torch.Tensor, clip: float) -> torch.Tensor:
    """Advantages mapped to rewards in [0, 1]: 1/2 + clipped advantage / (2 clip). Source: DiffusionNFT."""
    return (0.5 + advantage / (2 * clip)).clamp(0, 1)
