"""Centered Reward Distillation: regress the implicit reward on the external one, both centred within a prompt.

Source: Zhu et al., "Diffusion Reinforcement Learning via Centered Reward Distillation" (2603.14128), in the form of the
trainer that its first author gave to Flow-Factory. Per item, with v = eps - x0 and D(u) = mean (u - v)^2 / w,
w = sg[mean |u - v|] (or 1):

    s    = -(D(v_theta) - D(v_old))                 the implicit reward, an estimate of log p_theta / p_old
    q    = 1/2 + clip(A) / (2 clip)                 the external reward, from the advantage A
    loss = clip / beta mean (beta (s - sg[sum_j p_j s_j]) - (q - sum_j p_j q_j))^2
           + kl_weight mean (m + q (1 - m)) mean (v_theta - v_reference)^2,      m = 1e-4 / kl_weight

Centring removes log Z of the KL-regularised optimum only within one prompt, at one noise level and one noise: so groups
stay whole and share both, where the public code centres over whatever prompts and noise levels a micro-batch holds. The
reference is guided by `train.reference_guidance`, and only samples of high reward feel it (reward-adaptive KL).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from flowalign.algorithms.base import Figures
from flowalign.algorithms.batches import NoisedBatch
from flowalign.algorithms.forward import (
    Decay,
    ForwardAlgorithm,
    ForwardSettings,
    adaptive_error,
    predictions,
    reward_level,
    squared_error,
)
from flowalign.config.algorithm import AlgorithmSettings
from flowalign.lazy import torch

if TYPE_CHECKING:
    from flowalign.config.sections import Rollout, Train
    from flowalign.policies.base import Policy

Kind = Literal["mse", "bce"]
LOWEST_KL = 1e-4  # what is left of the KL's weight at reward 0


def _weighted_means(values: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Each item's weighted mean over its group, (n,)."""
    count = int(index.max()) + 1
    sums = torch.zeros(2, count, dtype=values.dtype, device=values.device)
    sums[0].index_add_(0, index, weights * values)
    sums[1].index_add_(0, index, weights.to(values.dtype))
    return (sums[0] / sums[1])[index]


def _pools(reward: torch.Tensor, index: torch.Tensor, temperature: float | None) -> list[torch.Tensor]:
    """The weights that a mean is taken with, one or two sets of (n,), not normalised and never all 0 in a group."""
    if temperature is None:
        return [torch.ones_like(reward)]
    count = int(index.max()) + 1
    highest = torch.full((count,), -torch.inf, dtype=reward.dtype, device=reward.device)
    pools = []
    for signed in (reward, -reward):
        if temperature == 0:
            inside = signed > 0
            filled = torch.zeros(count, dtype=torch.bool, device=reward.device).index_fill(0, index[inside], True)[
                index
            ]
            pools.append(torch.where(inside, reward.exp(), (~filled).to(reward)))
        else:
            top = highest.scatter_reduce(0, index, signed, "amax")[index]
            pools.append(((signed - top) / temperature).exp())
    return pools


def centered_reward_loss(
    implicit_reward: torch.Tensor,
    reward: torch.Tensor,
    groups: torch.Tensor,
    *,
    beta: float,
    weight_temperature: float | None = None,
    kind: Kind = "mse",
) -> torch.Tensor:
    """The centred regression, a scalar, of implicit rewards (n,) on rewards (n,), within `groups` (n,).

    `weight_temperature` None: plain means; above 0: the mean of two losses, centred with softmax(reward / temperature)
    and with softmax(-reward / temperature); 0: softmax(reward) over the positive and over the negative rewards alone.
    A group that has none of one sign takes the plain mean in its place: log Z cancels only where the weights of a mean
    sum to 1, and a centre of 0 would pull the implicit rewards themselves, which mean nothing, to the rewards.
    """
    _, index = torch.unique(groups, return_inverse=True)
    losses = []
    for weights in _pools(reward, index, weight_temperature):
        centre = _weighted_means(implicit_reward.detach(), weights, index)
        target = reward - _weighted_means(reward, weights, index)
        own = beta * (implicit_reward - centre)
        if kind == "mse":
            losses.append(((own - target) ** 2).mean())
        else:
            losses.append(torch.nn.functional.binary_cross_entropy_with_logits(own, target.sigmoid()))
    return torch.stack(losses).mean()


class CRDSettings(ForwardSettings):
    """What a recipe may say of Centered Reward Distillation."""

    unit: ClassVar = "group"
    name: Literal["crd"] = "crd"
    equal_groups: Literal["skip", "keep"] = "keep"
    """Whether groups whose rewards are all equal are left out of a step."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the KL to the reference; 0 spends no forward on it."""
    beta: Annotated[float, Field(gt=0)] = 1.0
    """Scale of the implicit reward."""
    kind: Kind = "mse"
    """Squared error, or binary cross entropy with the squashed centred reward."""
    weight_temperature: Annotated[float, Field(ge=0)] | None = None
    """Means within a prompt are plain (null), soft (above 0) or over the good and the bad alone (0)."""
    adaptive: bool = True
    """Divide errors by their own mean absolute value."""
    adaptive_kl: bool | None = None
    """Weigh the KL by the reward, so that bad samples leave the reference freely; null: wherever there is a KL."""
    old_decay: Decay = Decay(first=0.25, slope=5e-3, last=0.999)
    """How the policy of the implicit reward follows the trained one."""
    sampling_decay: Decay = Decay(start=75, slope=7.5e-3, last=0.999)
    """How the policy that draws the rollouts follows the trained one."""

    def check(self, rollout: Rollout, train: Train, rewards: int) -> None:
        """What weighs the KL needs one."""
        super().check(rollout, train, rewards)
        if not self.kl_weight:
            self.refuse("there is no KL to weigh with kl_weight 0; leave it out", "adaptive_kl")


class CRD(ForwardAlgorithm):
    """Centered Reward Distillation."""

    Settings: ClassVar[type[AlgorithmSettings]] = CRDSettings
    settings: CRDSettings
    behaviour = "sampling"

    def begin(self, policy: Policy) -> None:
        """Both snapshots start as the trained policy."""
        policy.snapshot("old")
        policy.snapshot("sampling")

    def loss(self, policy: Policy, batch: NoisedBatch) -> tuple[torch.Tensor, Figures]:
        """See the module; figures: both parts, the spread of the implicit reward."""
        seen = predictions(policy, batch, "old", reference=self.settings.kl_weight > 0)
        target = batch.noise - batch.latents
        error = adaptive_error if self.settings.adaptive else squared_error
        implicit = error(seen.snapshot, target) - error(seen.policy, target)
        level = reward_level(batch.advantages, self.settings.advantage_clip)
        loss = (
            self.settings.advantage_clip
            / self.settings.beta
            * centered_reward_loss(
                implicit,
                level - 0.5,  # good above 0, bad below: only the pools of temperature 0 see the difference
                batch.groups,
                beta=self.settings.beta,
                weight_temperature=self.settings.weight_temperature,
                kind=self.settings.kind,
            )
        )
        figures = {"policy_loss": loss.detach(), "implicit_reward_std": implicit.detach().std()}
        if seen.reference is not None:
            kl = squared_error(seen.policy, seen.reference)
            lowest = min(1.0, LOWEST_KL / self.settings.kl_weight) if self.settings.adaptive_kl is not False else 1.0
            loss = loss + self.settings.kl_weight * ((lowest + level * (1 - lowest)) * kl).mean()
            figures["kl"] = kl.detach()
        return loss, figures

    def after_update(self, policy: Policy, update: int) -> None:
        """Each snapshot follows at its own pace."""
        policy.blend("old", self.settings.old_decay.at(update))
        policy.blend("sampling", self.settings.sampling_decay.at(update))
