"""Flow-GRPO: policy gradients on the stochastic denoising steps of a flow model.

Source: Liu et al., "Flow-GRPO: Training Flow Matching Models via Online RL" (2025), eq. 5-7; a window of stochastic
steps inside an ODE rollout as in Flow-GRPO-Fast and MixGRPO. Per item (a sample and one of its trained steps):

    ratio  = exp(log p(x_next | x) - log p_rollout(x_next | x))       log-probabilities: means over dimensions
    loss   = max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) + kl_weight KL(p || p_reference)

Differences from the published code: the KL is that of the step's Gaussian, variance s^2 (-D), where the code divides by
2 s^2 and is 4 to 30 times weaker; `kl: flow_grpo` keeps the published scaling.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from flowalign.algorithms.base import Algorithm, Batch, Figures
from flowalign.sampling import gaussian_kl, sde_step

if TYPE_CHECKING:
    from flowalign.policies.base import Policy


def clipped_ratio_loss(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate per item and the ratio, both (n,), from (n,) arguments."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio


class FlowGRPO(Algorithm):
    """Settings and loss of Flow-GRPO."""

    needs: ClassVar = "trajectory"
    name: Literal["flow_grpo"] = "flow_grpo"
    clip_range: Annotated[float, Field(gt=0)] = 1e-4
    """How far the ratio may move from 1 before an item stops teaching; log-probabilities are means over dimensions."""
    advantage_clip: Annotated[float, Field(gt=0)] = 5.0
    """Advantages are clipped to [-this, this]."""
    global_std: bool = True
    """Divide advantages by the standard deviation of the whole step's rewards instead of the group's."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL to the reference; 0 spends no forward on it."""
    kl: Literal["exact", "flow_grpo"] = "exact"
    """The Gaussian KL of the step, or the published code's scaling, smaller by the factor sigma - sigma_next."""

    def loss(self, policy: "Policy", batch: Batch) -> tuple[torch.Tensor, Figures]:
        """See the module; figures: ratio, clipped share, KL."""
        step = batch.transition
        assert step is not None, "the rollout kept a trajectory, since needs = 'trajectory'"

        def replay(guidance: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            velocity = policy.guided_velocity(step.state, step.sigma, batch.condition, guidance)
            taken = sde_step(
                velocity,
                step.state,
                step.sigma,
                step.sigma_next,
                dynamics=step.dynamics,
                noise_level=step.noise_level,
                sigma_max=step.sigma_max,
                next_sample=step.next_state,
            )
            return taken.mean, taken.std, taken.log_prob

        mean, std, log_prob = replay(batch.guidance)
        advantages = batch.advantages.clamp(-self.advantage_clip, self.advantage_clip)
        losses, ratio = clipped_ratio_loss(log_prob, step.log_prob, advantages, self.clip_range)
        distance = (ratio.detach() - 1).abs()
        figures = {
            "policy_loss": losses.detach(),
            "ratio_distance": distance,
            "clipped": (distance > self.clip_range).float(),
        }
        if self.kl_weight:
            with torch.no_grad(), policy.reference():
                reference_mean, _, _ = replay(batch.reference_guidance)
            divergence = gaussian_kl(mean, reference_mean, std)
            if self.kl == "flow_grpo" and step.dynamics != "cps":  # a cps step's variance holds no -D
                divergence = divergence * (step.sigma - step.sigma_next)
            losses = losses + self.kl_weight * divergence
            figures["kl"] = divergence.detach()
        return losses.mean(), figures
