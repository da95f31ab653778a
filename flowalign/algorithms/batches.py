"""The batches of a training step, of two kinds: transitions of a trajectory, or finished samples with new noise.

An item is a sample at one of its trained denoising steps or noise levels. A unit is never split between micro-batches:
it is an item, a group at one noise level, or a group with all its trained steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from flowalign.lazy import torch
from flowalign.sampling.noise import FORWARD, counted_generator, counted_noise
from flowalign.sampling.steps import Dynamics, column

if TYPE_CHECKING:
    from flowalign.policies.base import Conditioning
    from flowalign.rollout.stages import Weighted

Unit = Literal["item", "group", "path"]


@dataclass(frozen=True)
class Turn:
    """One inner epoch over a step's samples, and its settings."""

    seed: int
    step: int
    turn: int  # the number of the inner epoch
    group_size: int
    micro_batch: int
    guidance: float
    reference_guidance: float


@dataclass(frozen=True, kw_only=True)
class Batch:
    """n items of one training step: the input of `Algorithm.loss`."""

    condition: Conditioning
    advantages: torch.Tensor  # (n,), or (n, K) where the algorithm keeps one per reward
    groups: torch.Tensor  # (n,), equal for the items that are compared with each other
    samples: torch.Tensor  # (n,), equal for the items of one sample
    latents: torch.Tensor  # (n, ...), the finished sample x0
    rewards: torch.Tensor  # (n,), the weighted total
    shares: torch.Tensor  # (n, K), see `RewardTable.shares`
    guidance: float
    reference_guidance: float
    update: int = 0  # number of optimizer updates before this one
    at_once: int | None = None  # number of items in one forward pass; None: all


@dataclass(frozen=True, kw_only=True)
class TransitionBatch(Batch):
    """Stochastic denoising steps of a rollout."""

    sigma: torch.Tensor  # (n,)
    sigma_next: torch.Tensor  # (n,)
    sigma_max: float
    state: torch.Tensor  # (n, ...), float32, the state for which log_prob was computed
    next_state: torch.Tensor  # (n, ...)
    log_prob: torch.Tensor  # (n,), under the policy that drew the rollout; float64 where the algorithm needs it
    dynamics: Dynamics
    noise_level: float | None
    mean: torch.Tensor | None = None  # (n, ...), the step's mean in the rollout, where the algorithm needs it


@dataclass(frozen=True, kw_only=True)
class NoisedBatch(Batch):
    """Finished samples with new noise: state = (1 - sigma) x0 + sigma noise, whose true velocity is noise - x0."""

    sigma: torch.Tensor  # (n,)
    noise: torch.Tensor  # (n, ...)
    state: torch.Tensor  # (n, ...)


B = TypeVar("B", bound=Batch)


class Batches(ABC, Generic[B]):
    """The items of weighted samples in one inner epoch: `units` lists them, `batch` builds a batch of some of them."""

    def __init__(self, weighted: Weighted, turn: Turn, unit: Unit, draws: int):
        """draws: number of items of a sample."""
        self.weighted, self.turn, self.unit, self.draws = weighted, turn, unit, draws

    def units(self) -> torch.Tensor:
        """All units (U, m, 2), each of m pairs (sample, draw); samples that do not teach are left out."""
        return self._units_of(self.weighted.teaches.cpu().nonzero().flatten())

    def spare(self) -> torch.Tensor:
        """One unit (1, m, 2) of full size, whose samples need not teach: for a process without units of its own."""
        return self._units_of(torch.arange(1 if self.unit == "item" else self.turn.group_size))[:1]

    def _units_of(self, samples: torch.Tensor) -> torch.Tensor:
        places = torch.cartesian_prod(samples, torch.arange(self.draws))
        if self.unit == "item":
            return places[:, None]
        places = places.view(-1, self.turn.group_size, self.draws, 2)
        return places.transpose(1, 2).flatten(0, 1) if self.unit == "group" else places.flatten(1, 2)

    def batch(self, units: torch.Tensor, update: int) -> B:
        """The items of `units` (u, m, 2) for optimizer update number `update`."""
        generated = self.weighted.generated
        row, draw = units.flatten(0, 1).to(generated.latents.device).unbind(1)
        groups = generated.groups[row]
        return self._built(
            row,
            draw,
            condition=generated.condition[groups],
            advantages=self._advantages(row, draw),
            groups=groups * self.draws + draw if self.unit == "group" else groups,
            samples=row,
            latents=generated.latents[row],
            rewards=self.weighted.total[row],
            shares=self.weighted.shares[row],
            guidance=self.turn.guidance,
            reference_guidance=self.turn.reference_guidance,
            update=update,
            at_once=self.turn.micro_batch,
        )

    def _advantages(self, row: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        return self.weighted.advantages[row]

    @abstractmethod
    def _built(self, row: torch.Tensor, draw: torch.Tensor, **shared: Any) -> B:
        """The batch of the items with samples `row` (n,) and draws `draw` (n,); `shared` are the fields of `Batch`."""


class Transitions(Batches[TransitionBatch]):
    """The stochastic steps of a trajectory."""

    def __init__(self, weighted: Weighted, turn: Turn, unit: Unit = "item", *, dense: bool = False):
        """dense: whether the advantages are (B, W), one for each step."""
        from flowalign.rollout.stages import Drawn

        generated = weighted.generated
        assert isinstance(generated, Drawn) and generated.trajectory is not None, "the algorithm kept a trajectory"
        self.path, self.dense = generated.trajectory, dense
        super().__init__(weighted, turn, unit, self.path.log_probs.shape[1])

    def _advantages(self, row: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        return self.weighted.advantages[row, draw] if self.dense else super()._advantages(row, draw)

    def _built(self, row: torch.Tensor, draw: torch.Tensor, **shared: Any) -> TransitionBatch:
        path = self.path
        sigmas = path.sigmas.to(row.device)
        return TransitionBatch(
            **shared,
            sigma=sigmas[draw],
            sigma_next=sigmas[draw + 1],
            sigma_max=path.sigma_max,
            state=path.states[row, draw],
            next_state=path.states[row, draw + 1],
            log_prob=path.log_probs[row, draw],
            dynamics=path.dynamics,
            noise_level=path.noise_level,
            mean=None if path.means is None else path.means[row, draw],
        )


class NoisedFinals(Batches[NoisedBatch]):
    """Finished samples with new noise; noise and level are counted, and the samples of a unit "group" share both."""

    def __init__(
        self,
        weighted: Weighted,
        turn: Turn,
        unit: Unit,
        draws: int,
        levels: Callable[[torch.Tensor, torch.Generator], torch.Tensor],
    ):
        """levels: gives the noise levels (draws,) of one sample, from the rollout's sigma schedule and a generator."""
        super().__init__(weighted, turn, unit, draws)
        keys = [(*self._key(index), 0) for index in range(len(weighted.generated))]
        drawn = {key: levels(weighted.generated.sigmas, counted_generator(*key)) for key in dict.fromkeys(keys)}
        self.levels = torch.stack([drawn[key] for key in keys])

    def _built(self, row: torch.Tensor, draw: torch.Tensor, **shared: Any) -> NoisedBatch:
        latents = shared["latents"]
        sigma = self.levels[row.cpu(), draw.cpu()].to(latents.device)
        keys = [(*self._key(index), 1 + place) for index, place in zip(row.tolist(), draw.tolist(), strict=True)]
        noise = counted_noise(keys, latents.shape[1:], latents.device)
        level = column(sigma, latents)
        return NoisedBatch(**shared, sigma=sigma, noise=noise, state=(1 - level) * latents + level * noise)

    def _key(self, index: int) -> tuple[int, ...]:
        """The key of a sample's noise: its prompt, and its place in the group unless the group shares its noise."""
        generated, turn = self.weighted.generated, self.turn
        member = 0 if self.unit == "group" else generated.members[index]
        return (FORWARD, turn.seed, turn.step, turn.turn, generated.rows[index].index, member)
