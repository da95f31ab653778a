"""Centered Reward Distillation: regress the implicit reward on the external reward, both centred within a prompt.

Source: Zhu et al., "Diffusion Reinforcement Learning via Centered Reward Distillation" (2603.14128), in the form of the
trainer that its first author contributed to Flow-Factory. Per item, with v = eps - x0 and D(u) = mean (u - v)^2 / w,
w = sg[mean |u - v|] (or 1):

    s    = -(D(v_theta) - D(v_old))                 the implicit reward, an estimate of log p_theta / p_old
    q    = 1/2 + clip(A) / (2 clip)                 the external reward, from the advantage A
    loss = clip / beta mean (beta (s - sg[sum_j p_j s_j]) - (q - sum_j p_j q_j))^2
           + kl_weight mean (m + q (1 - m)) mean (v_theta - v_reference)^2,      m = 1e-4 / kl_weight

Centring removes log Z of the KL-regularised optimum only within one prompt, at one noise level and one noise. Groups
therefore stay whole and share both; the public code centres over all prompts and noise levels in a micro-batch. The
reference is guided by `train.reference_guidance`, and its KL weighs more on samples of high reward (reward-adaptive
KL).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from flowalign.algorithms.base import Metrics
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
LOWEST_KL = 1e-4  # the KL's weight at reward 0


def _weighted_means(values: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The weighted mean of each item's group, (n,)."""
    count = int(index.max()) + 1
    sums = torch.zeros(2, count, dtype=values.dtype, device=values.device)
    sums[0].index_add_(0, index, weights * values)
    sums[1].index_add_(0, index, weights.to(values.dtype))
    return (sums[0] / sums[1])[index]


def _pools(reward: torch.Tensor, index: torch.Tensor, temperature: float | None) -> list[torch.Tensor]:
    """One or two sets of weights (n,) for the means; they are not normalised, and never all 0 in a group."""
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
    """The centred regression loss, a scalar, of implicit rewards (n,) on rewards (n,), within `groups` (n,).

    weight_temperature: None centres with plain means. Above 0, the loss is the mean of two losses: one centred with the
    weights softmax(reward / temperature), one with softmax(-reward / temperature). At 0, the weights are
    softmax(reward) over the positive rewards only, and over the negative rewards only; a group without rewards of one
    sign uses the plain mean there. Weights must sum to 1, since only then log Z cancels: with a centre of 0 the loss
    would regress the uncentred implicit rewards, whose level has no meaning.
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
    """The settings of Centered Reward Distillation."""

    unit: ClassVar = "group"
    name: Literal["crd"] = "crd"
    equal_groups: Literal["skip", "keep"] = "keep"
    """Groups whose rewards are all equal: "skip" leaves them out of a step, "keep" trains on them."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the KL to the reference. Raise it if samples drift away from the reference; 0 saves the reference's
    forward pass."""
    beta: Annotated[float, Field(gt=0)] = 1.0
    """Scale of the implicit reward. The optimum's implicit rewards are 1 / beta times the centred rewards: lower it for
    larger changes of the policy."""
    kind: Kind = "mse"
    """Regression loss: "mse" is the squared error, "bce" the cross entropy with the sigmoid of the centred reward."""
    weight_temperature: Annotated[float, Field(ge=0)] | None = None
    """Weights of the means within a prompt: null is plain means, above 0 is a softmax of the rewards with this
    temperature, and 0 takes the good and the bad samples separately."""
    adaptive: bool = True
    """Whether each squared error is divided by its own mean absolute error."""
    adaptive_kl: bool | None = None
    """Whether the KL is weighted by the reward, so that bad samples may leave the reference. null: yes, if there is a
    KL."""
    old_decay: Decay = Decay(first=0.25, slope=5e-3, last=0.999)
    """Decay of the snapshot in the implicit reward. Raise it to measure the reward from an older policy."""
    sampling_decay: Decay = Decay(start=75, slope=7.5e-3, last=0.999)
    """Decay of the snapshot that draws the rollouts. Raise it to make the rollouts change more slowly."""

    def check(self, rollout: Rollout, train: Train, rewards: int) -> None:
        """`adaptive_kl` needs a KL."""
        super().check(rollout, train, rewards)
        if not self.kl_weight:
            self.refuse("there is no KL to weigh with kl_weight 0; leave it out", "adaptive_kl")


class CRD(ForwardAlgorithm):
    """Centered Reward Distillation."""

    Settings: ClassVar[type[AlgorithmSettings]] = CRDSettings
    settings: CRDSettings
    behaviour = "sampling"

    def begin(self, policy: Policy) -> None:
        """Both snapshots start equal to the trained policy."""
        policy.snapshot("old")
        policy.snapshot("sampling")

    def loss(self, policy: Policy, batch: NoisedBatch) -> tuple[torch.Tensor, Metrics]:
        """The loss in the module's formula; metrics: its parts and the implicit reward's standard deviation."""
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
                level - 0.5,  # good samples above 0, bad ones below; the shift matters only at temperature 0
                batch.groups,
                beta=self.settings.beta,
                weight_temperature=self.settings.weight_temperature,
                kind=self.settings.kind,
            )
        )
        metrics = {"policy_loss": loss.detach(), "implicit_reward_std": implicit.detach().std()}
        if seen.reference is not None:
            kl = squared_error(seen.policy, seen.reference)
            lowest = min(1.0, LOWEST_KL / self.settings.kl_weight) if self.settings.adaptive_kl is not False else 1.0
            loss = loss + self.settings.kl_weight * ((lowest + level * (1 - lowest)) * kl).mean()
            metrics["kl"] = kl.detach()
        return loss, metrics

    def after_update(self, policy: Policy, update: int) -> None:
        """Each snapshot moves towards the trained policy by its own decay."""
        policy.blend("old", self.settings.old_decay.at(update))
        policy.blend("sampling", self.settings.sampling_decay.at(update))
