"""Flow-GRPO: policy gradients on the stochastic denoising steps of a flow model.

Source: Liu et al., "Flow-GRPO: Training Flow Matching Models via Online RL" (2025), eq. 5-7; a window of stochastic
steps inside an ODE rollout as in Flow-GRPO-Fast and MixGRPO. Per item (a sample and one of its trained steps):

    ratio  = exp(log p(x_next | x) - log p_rollout(x_next | x))       log-probabilities: means over dimensions
    loss   = max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) + kl_weight KL(p || p_reference)

Differences from the published code: the KL is that of the step's Gaussian, whose variance is s^2 (-D); the code divides
by 2 s^2, and its KL is 4 to 30 times weaker. `kl: flow_grpo` keeps the published scaling.

As published, the KL is differentiated at the visited states only; the gradient does not see that a step also changes
the KL of later steps. With `dynamics: memoryless` the fixed point is the sampler's distribution, tilted by
exp(reward / kl), where this does not matter (linear rewards, tests/algorithms/test_closed_forms.py), and near it
elsewhere. Centring by the mean of G samples weakens the reward's pull by the factor 1 - 1/G, as a KL weight larger by
1 / (1 - 1/G) would.

`ratio: guard` is GRPO-Guard (Wang et al. 2025): with b = mean (m - m_rollout)^2 / (2 std^2) for the item's own mean m,
ratio = exp((log p - log p_rollout + b) std), and the policy loss is divided by -D. The published code uses one b for a
whole batch. `values: dense` is VGPO (2512.12387): see `advantages.value_advantages`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from flowalign.advantages import RewardTable, value_advantages
from flowalign.algorithms.base import Algorithm, Metrics, guided_velocity
from flowalign.algorithms.batches import TransitionBatch, Transitions, Turn
from flowalign.config.algorithm import AlgorithmSettings
from flowalign.lazy import torch
from flowalign.sampling import SdeStep, gaussian_kl, sde_step

if TYPE_CHECKING:
    from flowalign.config.sections import Rollout, Train
    from flowalign.policies.base import Policy
    from flowalign.rollout.stages import Keep, Weighted


def replay(policy: Policy, batch: TransitionBatch, guidance: float, *, exact: bool = False) -> SdeStep:
    """The batch's stochastic steps under the current weights: mean, std and the log-probability of the step taken.

    `exact` computes all but the velocity in float64, for an algorithm that sums log-probabilities over dimensions.
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
    """PPO's clipped surrogate loss per item, and the ratio, both (n,), from arguments (n,)."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio


class FlowGRPOSettings(AlgorithmSettings):
    """The settings of Flow-GRPO and its variants."""

    needs: ClassVar = "trajectory"
    strength: ClassVar = ("clip_range", "kl_weight")
    name: Literal["flow_grpo"] = "flow_grpo"
    clip_range: Annotated[float, Field(gt=0)] = 1e-4
    """Largest distance of the likelihood ratio from 1, beyond which an item has no gradient. It is small, since
    log-probabilities are means over dimensions. Lower it if training is unstable, raise it if most items are
    clipped."""
    ratio: Literal["plain", "guard"] = "plain"
    """Form of the ratio: "plain" is the likelihood ratio, "guard" is GRPO-Guard's, normalised over noise levels."""
    kl: Literal["exact", "flow_grpo"] = "exact"
    """Form of the KL: "exact" is the Gaussian KL of the step, "flow_grpo" has the published code's scaling, which is
    smaller by the factor sigma - sigma_next."""
    values: Literal["final", "dense"] = "final"
    """Source of the advantages: "final" is the reward of the finished sample, "dense" are the rewards of one-step
    previews after every trained step (VGPO)."""
    discount: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Factor on the reward of each later preview, with `values: dense`. Raise it to let later previews count more."""
    absolute: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the value itself beside the advantage, with `values: dense`. Above 0, groups of equal rewards teach
    too."""

    def check(self, rollout: Rollout, train: Train, rewards: int) -> None:
        """A setting that belongs to a variant is refused without that variant."""
        super().check(rollout, train, rewards)
        if not self.kl_weight:
            self.refuse("there is no KL with kl_weight 0; leave it out", "kl")
        elif self.kl == "flow_grpo" and rollout.dynamics in ("memoryless", "linear_sde"):
            raise ValueError(f"algorithm.kl flow_grpo: no such KL is published for {rollout.dynamics}; use exact")
        if self.ratio == "guard" and rollout.dynamics == "cps":
            raise ValueError("algorithm.ratio guard needs true log-probabilities; rollout.dynamics cps has none")
        if self.values == "final":
            self.refuse("belongs to values: dense", "absolute", "discount")
        else:
            self.refuse(
                "dense values use the weighted total, within groups; leave it out", "advantage", "advantage_std"
            )


class FlowGRPO(Algorithm):
    """Flow-GRPO and its variants."""

    Settings: ClassVar[type[AlgorithmSettings]] = FlowGRPOSettings
    settings: FlowGRPOSettings

    @property
    def keep(self) -> frozenset[Keep]:
        """The trajectory, with the means for GRPO-Guard and the previews for dense values."""
        more: list[Keep] = ["trajectory"]
        if self.settings.ratio == "guard":
            more.append("means")
        if self.settings.values == "dense":
            more.append("previews")
        return frozenset(more)

    @property
    def learns_from_equal(self) -> bool:
        """True with the absolute term."""
        return self.settings.absolute > 0

    def batches(self, weighted: Weighted, turn: Turn) -> Transitions:
        """The trained steps, with one advantage per sample, or one per step for dense values."""
        return Transitions(weighted, turn, dense=self.settings.values == "dense")

    def advantages(self, scored: RewardTable, groups: torch.Tensor) -> torch.Tensor:
        """Advantages (N,), or (N, T) for dense values."""
        if scored.previews is None:
            return super().advantages(scored, groups)
        return value_advantages(
            scored.previews, groups, discount=self.settings.discount, absolute=self.settings.absolute
        )

    def loss(self, policy: Policy, batch: TransitionBatch) -> tuple[torch.Tensor, Metrics]:
        """The loss in the module's formula; metrics: policy loss, the ratio's distance from 1, clipped share, KL."""
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
        metrics = {
            "policy_loss": losses.detach(),
            "ratio_distance": distance,
            "clipped": (distance > self.settings.clip_range).float(),
        }
        if self.settings.kl_weight:
            with torch.no_grad(), policy.reference():
                reference = replay(policy, batch, batch.reference_guidance)
            divergence = gaussian_kl(taken.mean, reference.mean, taken.std)
            if self.settings.kl == "flow_grpo" and batch.dynamics != "cps":  # a cps step's variance has no factor -D
                divergence = divergence * (batch.sigma - batch.sigma_next)
            losses = losses + self.settings.kl_weight * divergence
            metrics["kl"] = divergence.detach()
        return losses.mean(), metrics
