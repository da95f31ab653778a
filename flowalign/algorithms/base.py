"""What an algorithm is: a loss on a batch of items, and what it moves after an update. Nothing else."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from flowalign.sampling.steps import Dynamics
from flowalign.settings import Section

if TYPE_CHECKING:
    from flowalign.policies.base import Condition, Policy

Figures = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Transition:
    """A stochastic step that a rollout took, for n items."""

    sigma: torch.Tensor  # (n,)
    sigma_next: torch.Tensor  # (n,)
    sigma_max: float
    state: torch.Tensor  # (n, ...), float32, as the log-probability was computed on it
    next_state: torch.Tensor  # (n, ...)
    log_prob: torch.Tensor  # (n,), under the policy that sampled
    dynamics: Dynamics
    noise_level: float


@dataclass(frozen=True)
class Batch:
    """n items of one training step: what `Algorithm.loss` sees."""

    condition: "Condition"
    advantages: torch.Tensor  # (n,)
    groups: torch.Tensor  # (n,), the prompt an item belongs to
    latents: torch.Tensor  # (n, ...), the finished sample x0
    guidance: float
    reference_guidance: float
    transition: Transition | None = None


class Algorithm(Section, ABC):
    """The settings of an algorithm and its loss. `needs` says what a rollout must keep for it."""

    needs: ClassVar[Literal["trajectory", "final"]]
    name: str
    """As a recipe gives it."""

    @abstractmethod
    def loss(self, policy: "Policy", batch: Batch) -> tuple[torch.Tensor, Figures]:
        """The mean loss over the batch's items, and detached figures to log, each (n,) or a scalar."""

    def after_update(self, policy: "Policy", update: int) -> None:
        """Move snapshots after optimizer update number `update`; most algorithms have none."""
