"""Flow-GRPO: policy gradients on the stochastic denoising steps of a flow model.

Source: Liu et al., "Flow-GRPO: Training Flow Matching Models via Online RL" (2025), eq. 5-7; a window of stochastic
steps inside an ODE rollout as in Flow-GRPO-Fast and MixGRPO. Per item (a sample and one of its trained steps):

    ratio  = exp(log p(x_next | x) - log p_rollout(x_next | x))       log-probabilities: means over dimensions
    loss   = max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) + kl_weight KL(p || p_reference)

Differences from the published code: the KL is that of the step's Gaussian, variance s^2 (-D), where the code divides by
2 s^2 and is 4 to 30 times weaker; `kl: flow_grpo` keeps the published scaling.

As published, the KL is differentiated at the visited states: that a step also changes the KL of later ones is not seen.
With `dynamics: memoryless` the fixed point is the sampler's law tilted by exp(reward / kl) where that does not matter
(linear rewards, tests/algorithms/test_closed_forms.py), and near it elsewhere. Centring by the mean of G samples makes
a reward's pull (1 - 1/G) as strong, which is as if kl were larger by 1 / (1 - 1/G).

`ratio: guard` is GRPO-Guard (Wang et al. 2025): with b = mean (m - m_rollout)^2 / (2 std^2) of an item's own means m,
ratio = exp((log p - log p_rollout + b) std) and the policy loss is divided by -D. The published code takes one b for a
whole batch. `values: dense` is VGPO (2512.12387): see `advantages.value_advantages`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from flowalign.advantages import RewardTable, value_advantages
from flowalign.algorithms.base import Algorithm, Figures, guided_velocity
from flowalign.algorithms.batches import TransitionBatch, Transitions, Turn
from flowalign.config.algorithm import AlgorithmSettings
from flowalign.lazy import torch
from flowalign.sampling import SdeStep, gaussian_kl, sde_step

if TYPE_CHECKING:
    from flowalign.config.sections import Rollout, Train
    from flowalign.policies.base import Policy
    from flowalign.rollout.stages import Keep, Weighted


def replay(policy: Policy, batch: TransitionBatch, guidance: float, *, exact: bool = False) -> SdeStep:
    """The batch's stochastic steps under the weights in use: mean, std and log-probability of where they went.

    `exact`: all but the velocity in float64, for who multiplies a log-probability by the number of dimensions.
    """
    return sde_step(
        guided_velocity(policy, batch, batch.state, batch.sigma, guidance),
        batch.state.double() if exact else batch.state,
        batch.sigma,
        batch.sigma_next,
        dynamics=batch.dynamics,
        noise_level=batch.noise_level,
        sigma_max=batch.sigma_max,
        next_sample=batch.next_state,
    )


def clipped_ratio_loss(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate per item and the ratio, both (n,), from (n,) arguments."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio


class FlowGRPOSettings(AlgorithmSettings):
    """What a recipe may say of Flow-GRPO and its variants."""

    needs: ClassVar = "trajectory"
    strength: ClassVar = ("clip_range", "kl_weight")
    name: Literal["flow_grpo"] = "flow_grpo"
    clip_range: Annotated[float, Field(gt=0)] = 1e-4
    """How far the ratio may move from 1 before an item stops teaching; log-probabilities are means over dimensions."""
    ratio: Literal["plain", "guard"] = "plain"
    """The likelihood ratio, or GRPO-Guard's, normalised over noise levels."""
    kl: Literal["exact", "flow_grpo"] = "exact"
    """The Gaussian KL of the step, or the published code's scaling, smaller by the factor sigma - sigma_next."""
    values: Literal["final", "dense"] = "final"
    """Advantages from the finished picture, or from one-step previews after every trained step (VGPO)."""
    discount: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Of the rewards of later previews, with dense values."""
    absolute: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the value itself beside the advantage, with dense values, so that equal groups teach too."""

    def check(self, rollout: Rollout, train: Train, rewards: int) -> None:
        """What belongs to a variant is refused without it."""
        super().check(rollout, train, rewards)
        if not self.kl_weight:
            self.refuse("there is no KL with kl_weight 0; leave it out", "kl")
        elif self.kl == "flow_grpo" and rollout.dynamics == "memoryless":
            raise ValueError("algorithm.kl flow_grpo: nothing is published for rollout.dynamics memoryless; use exact")
        if self.ratio == "guard" and rollout.dynamics == "cps":
            raise ValueError("algorithm.ratio guard needs true log-probabilities, which rollout.dynamics cps has not")
        if self.values == "final":
            self.refuse("belongs to values: dense", "absolute", "discount")
        else:
            self.refuse(
                "dense values are of the weighted total, within groups; leave it out", "advantage", "advantage_std"
            )


class FlowGRPO(Algorithm):
    """Flow-GRPO and its variants."""

    Settings: ClassVar[type[AlgorithmSettings]] = FlowGRPOSettings
    settings: FlowGRPOSettings

    @property
    def keep(self) -> frozenset[Keep]:
        """The means for GRPO-Guard, the previews for dense values."""
        more: list[Keep] = ["trajectory"]
        if self.settings.ratio == "guard":
            more.append("means")
        if self.settings.values == "dense":
            more.append("previews")
        return frozenset(more)

    @property
    def learns_from_equal(self) -> bool:
        """With the absolute term."""
        return self.settings.absolute > 0

    def batches(self, weighted: Weighted, turn: Turn) -> Transitions:
        """One advantage a sample, or one a step."""
        return Transitions(weighted, turn, dense=self.settings.values == "dense")

    def advantages(self, scored: RewardTable, groups: torch.Tensor) -> torch.Tensor:
        """(N,), or (N, T) of dense values."""
        if scored.previews is None:
            return super().advantages(scored, groups)
        return value_advantages(
            scored.previews, groups, discount=self.settings.discount, absolute=self.settings.absolute
        )

    def loss(self, policy: Policy, batch: TransitionBatch) -> tuple[torch.Tensor, Figures]:
        """See the module; figures: ratio, clipped share, KL."""
        taken = replay(policy, batch, batch.guidance)
        advantages = batch.advantages.clamp(-self.settings.advantage_clip, self.settings.advantage_clip)
        log_prob, old_log_prob = taken.log_prob, batch.log_prob
        if self.settings.ratio == "guard":
            assert batch.mean is not None, "the rollout kept its means"
            std = taken.std.flatten()
            log_prob = (log_prob + gaussian_kl(taken.mean, batch.mean, taken.std)) * std
            old_log_prob = old_log_prob * std
        losses, ratio = clipped_ratio_loss(log_prob, old_log_prob, advantages, self.settings.clip_range)
        if self.settings.ratio == "guard":
            losses = losses / (batch.sigma - batch.sigma_next)
        distance = (ratio.detach() - 1).abs()
        figures = {
            "policy_loss": losses.detach(),
            "ratio_distance": distance,
            "clipped": (distance > self.settings.clip_range).float(),
        }
        if self.settings.kl_weight:
            with torch.no_grad(), policy.reference():
                reference = replay(policy, batch, batch.reference_guidance)
            divergence = gaussian_kl(taken.mean, reference.mean, taken.std)
            if self.settings.kl == "flow_grpo" and batch.dynamics != "cps":  # a cps step's variance holds no -D
                divergence = divergence * (batch.sigma - batch.sigma_next)
            losses = losses + self.settings.kl_weight * divergence
            figures["kl"] = divergence.detach()
        return losses.mean(), figures
