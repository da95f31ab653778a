"""PRDP: regress the difference of two trajectories' log-likelihood ratios on the difference of their rewards.

Source: Deng et al., "PRDP: Proximal Reward Difference Prediction" (2402.08714), on the Gaussian steps of a flow model.
With R = sum over trained steps of log p_theta(x_next | x) - log p_reference(x_next | x), for each pair of a prompt's
samples

    loss = max((dR - d reward / beta)^2, (dR_clipped - d reward / beta)^2)

where each step's log-ratio is clipped to `proximity` around its value under the policy that drew the rollout. The loss
is zero on all pairs exactly at the optimum of the KL-regularised objective, p ~ p_reference exp(reward / beta).

This optimum concerns the whole density, so log-probabilities are summed over dimensions here, not averaged. They are
computed in float64: a float32 mean times the 65,536 dimensions of a latent is off by hundredths of a nat, while the
proximity is tenths. Summed over the pairs of a group, the unclipped loss is a regression centred within the prompt, as
in CRD, but on trajectories.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from flowalign.algorithms.base import Algorithm, Cost, Metrics
from flowalign.algorithms.batches import TransitionBatch, Transitions, Turn
from flowalign.algorithms.flow_grpo import replay
from flowalign.config.algorithm import AlgorithmSettings
from flowalign.lazy import torch

if TYPE_CHECKING:
    from flowalign.config.sections import Rollout, Train
    from flowalign.policies.base import Policy
    from flowalign.rollout.stages import Keep, Weighted


def pair_loss(
    ratio: torch.Tensor, old_ratio: torch.Tensor, reward: torch.Tensor, *, beta: float, proximity: float
) -> torch.Tensor:
    """The loss of one prompt, a scalar.

    ratio, old_ratio: log-ratios (G, T) of G trajectories' steps, now and in the rollout. reward: (G,).
    """
    clipped = ratio.clamp(old_ratio - proximity, old_ratio + proximity)
    target = (reward[:, None] - reward) / beta

    def error(total: torch.Tensor) -> torch.Tensor:
        return (total[:, None] - total - target) ** 2

    errors = torch.maximum(error(ratio.sum(1)), error(clipped.sum(1)))
    return errors.sum() / (len(reward) * (len(reward) - 1))


class PRDPSettings(AlgorithmSettings):
    """The settings of PRDP."""

    needs: ClassVar = "trajectory"
    unit: ClassVar = "path"
    has_advantages: ClassVar = False
    name: Literal["prdp"] = "prdp"
    beta: Annotated[float, Field(gt=0)] = 10.0
    """Weight of the KL in the objective, in units of reward: the optimum tilts the reference by exp(reward / beta).
    Raise it to stay nearer to the reference, lower it to follow the rewards more."""
    proximity: Annotated[float, Field(gt=0)] = 0.1
    """Largest change of a step's log-ratio since the rollout, in nats, beyond which it has no gradient. Lower it if
    training is unstable."""

    def check(self, rollout: Rollout, train: Train, rewards: int) -> None:
        """The rollout's dynamics must have true log-probabilities."""
        super().check(rollout, train, rewards)
        if rollout.dynamics == "cps":
            raise ValueError("rollout.dynamics cps has no true log-probabilities; use other dynamics with prdp")
        self.refuse("prdp has no separate KL; beta sets its pull to the reference", "kl_weight")
        self.refuse("prdp regresses on rewards and has no advantages", "advantage", "advantage_std", "advantage_clip")


class PRDP(Algorithm):
    """PRDP."""

    Settings: ClassVar[type[AlgorithmSettings]] = PRDPSettings
    settings: PRDPSettings

    @property
    def keep(self) -> frozenset[Keep]:
        """The trajectory, with log-probabilities in float64."""
        return frozenset({"trajectory", "float64"})

    def batches(self, weighted: Weighted, turn: Turn) -> Transitions:
        """The trained steps; a group with all its steps is never split between micro-batches."""
        return Transitions(weighted, turn, "path")

    def cost(self, current: frozenset[str] | set[str]) -> Cost:
        """One forward pass of the reference."""
        return Cost(references=1)

    def loss(self, policy: Policy, batch: TransitionBatch) -> tuple[torch.Tensor, Metrics]:
        """The loss in the module's formula; metrics: the log-ratios and their change since the rollout."""
        dimensions = batch.latents[0].numel()
        own = replay(policy, batch, batch.guidance, exact=True).log_prob
        with torch.no_grad(), policy.reference():
            reference = replay(policy, batch, batch.reference_guidance, exact=True).log_prob
        ratio, old_ratio = dimensions * (own - reference), dimensions * (batch.log_prob - reference)
        losses = []
        for group in batch.groups.unique():
            rows = (batch.groups == group).nonzero().flatten()
            rows = rows[batch.samples[rows].argsort(stable=True)]
            members = len(batch.samples[rows].unique())
            now, then = ratio[rows].view(members, -1), old_ratio[rows].view(members, -1)
            rewards = batch.rewards[rows].view(members, -1)[:, 0]
            losses.append(pair_loss(now, then, rewards, beta=self.settings.beta, proximity=self.settings.proximity))
        metrics = {
            "ratio_distance": (own.detach() - batch.log_prob).expm1().abs(),
            "log_ratio": ratio.detach(),
            "clipped": ((ratio - old_ratio).detach().abs() > self.settings.proximity).float(),
        }
        return torch.stack(losses).mean(), metrics
