"""What a rollout gives: the samples of each group, and the steps that they took."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from flowalign.advantages import Scored
from flowalign.rollout.prompts import Row
from flowalign.sampling.steps import Dynamics
from rewards.combine import Scores

if TYPE_CHECKING:
    from flowalign.policies.base import Conditioning


@dataclass
class Trajectory:
    """The stochastic steps of B samples, as they were taken."""

    states: torch.Tensor  # (B, W + 1, ...), float32
    log_probs: torch.Tensor  # (B, W), float64 where asked for
    sigmas: torch.Tensor  # (W + 1,)
    sigma_max: float
    dynamics: Dynamics
    noise_level: float | None
    means: torch.Tensor | None = None  # (B, W, ...), of the steps' Gaussians, where asked for


@dataclass
class Samples:
    """B generated samples. Groups are the rows of one prompt in one step."""

    rows: list[Row]
    groups: torch.Tensor  # (B,), the prompt's place in the step
    condition: Conditioning  # one row a prompt; `groups` indexes it
    latents: torch.Tensor  # (B, ...), x0
    media: torch.Tensor  # (B, 3, H, W) in [0, 1]
    grid: torch.Tensor  # (steps + 1,), the sigmas of the rollout
    members: list[int] = field(default_factory=list)  # B, the place of a sample in its group
    trajectory: Trajectory | None = None
    previews: torch.Tensor | None = None  # (B, T, 3, H, W), one-step predictions after each step from the window on
    scores: dict[str, Scores] | None = None  # of each reward, as measured
    scored: Scored | None = None  # what the algorithm gets of them
    shares: torch.Tensor | None = None  # (B, K), see Scored.shares
    advantages: torch.Tensor | None = None  # (B,), or (B, K) or (B, T) as the algorithm has them
    teaches: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # (B,) bool: the samples to learn from
    differs: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # (B,) bool: whose group's rewards differ

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
