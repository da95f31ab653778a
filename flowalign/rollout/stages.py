"""The stages of samples: `Generated` becomes `Scored`, and `Scored` becomes `Weighted`. No field is filled in later.

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

Keep = Literal["trajectory", "means", "previews", "float64"]  # what a rollout can keep beside its samples


@dataclass(frozen=True)
class Share:
    """This process's share of a step's groups."""

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
    """What to draw, as plain data: noise is counted, so a request gives the same samples wherever it is drawn."""

    rows: Sequence[Row]
    group_size: int  # samples of each row
    sampler: Sampler
    media: MediaRequest
    key: tuple[int, ...]  # the noise is counted by (*key, row's index, member, denoising step)
    batch: int  # samples in a forward pass
    training_step: tuple[int, int] = (0, 0)  # (seed, step), which places a moving window of stochastic steps
    weights: str | None = None  # the policy's snapshot to draw with; None: the trained weights


@dataclass(frozen=True)
class Trajectory:
    """The stochastic steps of B samples, as the rollout took them."""

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
    members: Sequence[int]  # B, each sample's index in its group
    groups: torch.Tensor  # (B,), the index of each sample's prompt in the step
    condition: Conditioning  # one row for each prompt, indexed by `groups`
    latents: torch.Tensor  # (B, ...), x0
    sigmas: torch.Tensor  # (steps + 1,), the sigma schedule of the rollout

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

    media: torch.Tensor  # (B, 3, H, W) in [0, 1], or what `finished` returned for them
    trajectory: Trajectory | None = None  # if the rollout was asked to keep it


@dataclass(frozen=True)
class Recorded(Generated):
    """Samples of a dataset of groups, with the scores that they got when they were collected."""

    scores: dict[str, Scores]


@dataclass(frozen=True)
class Scored:
    """Samples with their rewards, and the rewards of all processes' samples to compare them with."""

    generated: Generated
    rewards: RewardTable  # of the B samples
    everyone: RewardTable  # of the N samples of all processes, in the order of the processes
    first: int  # the index of this process's first sample in `everyone`
    group_size: int


@dataclass(frozen=True)
class Weighted:
    """Samples with the advantages to learn from."""

    generated: Generated
    total: torch.Tensor  # (B,), the total reward; 0 for a sample that a reward left out, which does not teach
    advantages: torch.Tensor  # (B,), (B, K) or (B, T), as the algorithm defines them
    teaches: torch.Tensor  # (B,) bool: the samples to learn from
    differs: torch.Tensor  # (B,) bool: the samples in whose group the rewards differ
    shares: torch.Tensor  # (B, K), see `RewardTable.shares`
    zero_spread: float  # the share of all processes' samples in whose group the rewards are equal
