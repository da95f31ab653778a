"""How far samples have come: `Generated` becomes `Scored`, and `Scored` becomes `Weighted`; nothing is filled in later.

Shape legend: B samples of this process, N of all processes, W stochastic steps, K rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from flowalign.advantages import RewardTable
    from flowalign.config import Sampler
    from flowalign.policies.base import Conditioning
    from flowalign.policies.request import MediaRequest
    from flowalign.rollout.prompts import Row
    from flowalign.sampling.steps import Dynamics
    from rewards.combine import Scores

Keep = Literal["trajectory", "means", "previews", "float64"]  # what a rollout may have to keep beside its samples


@dataclass(frozen=True)
class Share:
    """Which groups of a step this process has, and how many there are over all."""

    prompts_per_step: int
    group_size: int
    seed: int
    rank: int = 0
    world: int = 1

    @property
    def own(self) -> slice:
        """The prompts of this process among those of the step."""
        count = self.prompts_per_step // self.world
        return slice(self.rank * count, (self.rank + 1) * count)


@dataclass(frozen=True)
class RolloutRequest:
    """What is to be drawn: plain data, since counted noise makes the samples the same wherever they are drawn."""

    rows: Sequence[Row]
    group_size: int  # samples of each row
    sampler: Sampler
    media: MediaRequest
    key: tuple[int, ...]  # the noise is counted by (*key, row's index, member, denoising step)
    batch: int  # samples in a forward pass
    training_step: tuple[int, int] = (0, 0)  # (seed, step), which decides where a window that moves stands
    weights: str | None = None  # the policy's snapshot that draws; None: the trained weights


@dataclass(frozen=True)
class Trajectory:
    """The stochastic steps of B samples, as they were taken."""

    states: torch.Tensor  # (B, W + 1, ...), float32
    log_probs: torch.Tensor  # (B, W), float64 where asked for
    sigmas: torch.Tensor  # (W + 1,)
    sigma_max: float
    dynamics: Dynamics
    noise_level: float | None
    means: torch.Tensor | None = None  # (B, W, ...), of the steps' Gaussians, where asked for


@dataclass(frozen=True)
class Generated:
    """B samples in whole groups, one after the other. A group is the samples of one prompt in one step."""

    rows: Sequence[Row]  # B
    members: Sequence[int]  # B, the place of a sample in its group
    groups: torch.Tensor  # (B,), the prompt's place in the step
    condition: Conditioning  # one row a prompt; `groups` indexes it
    latents: torch.Tensor  # (B, ...), x0
    sigmas: torch.Tensor  # (steps + 1,), the schedule that they were drawn on

    @property
    def prompts(self) -> list[str]:
        """B prompts."""
        return [row.prompt for row in self.rows]

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """B metadata rows."""
        return [row.metadata for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Drawn(Generated):
    """Samples of a rollout."""

    media: torch.Tensor  # (B, 3, H, W): in [0, 1], or what `finished` made of them
    trajectory: Trajectory | None = None  # of a rollout that was asked to keep it


@dataclass(frozen=True)
class Recorded(Generated):
    """Samples of a dataset of groups, which were scored when they were collected."""

    scores: dict[str, Scores]


@dataclass(frozen=True)
class Scored:
    """Samples with their rewards, and the rewards of all processes' samples, to which theirs are compared."""

    generated: Generated
    rewards: RewardTable  # of the B samples
    everyone: RewardTable  # of the N samples of all processes, in the order of the processes
    first: int  # the place of this process's first sample among them
    group_size: int


@dataclass(frozen=True)
class Weighted:
    """Samples with what each of them teaches."""

    generated: Generated
    total: torch.Tensor  # (B,), the rewards' total; 0 for a sample that a reward left out, which does not teach
    advantages: torch.Tensor  # (B,), or (B, K) or (B, T) as the algorithm has them
    teaches: torch.Tensor  # (B,) bool: the samples to learn from
    differs: torch.Tensor  # (B,) bool: the samples in whose group the rewards differ
    shares: torch.Tensor  # (B, K), see `RewardTable.shares`
    zero_spread: float  # the share of all processes' samples in whose group the rewards are equal
