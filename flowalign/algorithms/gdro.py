"""GDRO: rank the finished samples of a prompt with a listwise loss, offline, without drawing samples.

Source: Wang et al., "GDRO: Group-level Direct Reward Optimization" (2601.02036). With v = eps - x0, and one noise level
and one noise for a whole group, the implicit reward of a sample and the group's loss are

    s_i  = -beta (mean (v_theta - v)^2 - mean (v_reference - v)^2)
    loss = sum_{i<k} (log sum_{m>=i} exp s_m - sum_{j>=i} q_i(j) s_j),  q_i = softmax over j >= i of r_j / temperature

for rewards in falling order, plus `stabiliser` times the flow-matching error of the best sample. At temperature 0 the
softmax is a hard choice, and with two samples the loss is Diffusion-DPO's (Wallace et al. 2024). `top_1` keeps only the
first term.

Our notes on the paper do not say whether a group shares its noise, and whether errors are summed or averaged over
dimensions. Here a group shares its noise, since only differences count, and errors are averaged, so that beta is not
the paper's number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from flowalign.algorithms.base import Cost, Metrics
from flowalign.algorithms.batches import NoisedBatch
from flowalign.algorithms.forward import ForwardAlgorithm, ForwardSettings, TimestepSampling, predictions, squared_error
from flowalign.config.algorithm import AlgorithmSettings
from flowalign.lazy import torch

if TYPE_CHECKING:
    from flowalign.config.sections import Rollout, Train
    from flowalign.policies.base import Policy


def _listwise(implicit_reward: torch.Tensor, reward: torch.Tensor, temperature: float, top_1: bool) -> torch.Tensor:
    """The loss of one group, a scalar, from implicit rewards (k,) and rewards (k,)."""
    count = len(reward)
    order = reward.argsort(descending=True, stable=True)
    own, ranked = implicit_reward[order], reward[order].to(implicit_reward)
    if temperature > 0:
        logits = (ranked / temperature).expand(count, count)
    else:  # the limit: all weight on the best remaining sample, or equally on the best ones
        logits = torch.where(ranked == ranked[:, None], 0.0, -torch.inf).to(own)
    gone = torch.ones(count, count, dtype=torch.bool, device=own.device).tril(-1)  # row i: the samples ranked before i
    wanted = logits.masked_fill(gone, -torch.inf).softmax(1)
    remaining = own.expand(count, count).masked_fill(gone, -torch.inf).logsumexp(1)
    terms = remaining - wanted @ own
    return terms[0] if top_1 else terms[:-1].sum()


def group_loss(
    implicit_reward: torch.Tensor,
    reward: torch.Tensor,
    groups: torch.Tensor,
    *,
    temperature: float,
    top_1: bool = False,
) -> torch.Tensor:
    """The listwise loss, a scalar, of implicit rewards (n,) and rewards (n,): the mean over `groups` (n,).

    A constant added to a group's rewards, or to its implicit rewards, does not change the loss.
    """
    chosen = [groups == group for group in groups.unique()]
    losses = [_listwise(implicit_reward[rows], reward[rows], temperature, top_1) for rows in chosen]
    return torch.stack(losses).mean()


def best_of_each(reward: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """(n,) bool: the first sample of highest reward in each group."""
    best = torch.zeros_like(groups, dtype=torch.bool)
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        best[rows[reward[rows].argmax()]] = True
    return best


class GDROSettings(ForwardSettings):
    """The settings of GDRO; with group size 2, temperature 0 and stabiliser 0 it is Diffusion-DPO."""

    unit: ClassVar = "group"
    offline: ClassVar = True
    strength: ClassVar = ("beta",)
    has_advantages: ClassVar = False
    name: Literal["gdro"] = "gdro"
    timestep_sampling: TimestepSampling = "uniform"
    """Distribution of the noise levels, as in `ForwardSettings`; by default uniform over the range."""
    beta: Annotated[float, Field(gt=0)] = 1000.0
    """Scale of the implicit reward, whose errors are means over dimensions. Raise it to stay near the reference."""
    temperature: Annotated[float, Field(ge=0)] = 0.05
    """Temperature of the rewards' softmax, in units of reward. Raise it if small differences of the rewards are noise;
    at 0 only their order counts."""
    top_1: bool = False
    """Whether only the best sample counts, and not the order of the others."""
    stabiliser: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the best sample's flow-matching error. Raise it if `best_error` rises, since the likelihood of the best
    samples then falls."""

    def check(self, rollout: Rollout, train: Train, rewards: int) -> None:
        """Settings of a KL or of advantages are refused, since gdro has neither."""
        super().check(rollout, train, rewards)
        self.refuse("gdro has no separate KL; beta sets its pull to the reference", "kl_weight")
        self.refuse("gdro ranks rewards and has no advantages", "advantage", "advantage_std", "advantage_clip")


class GDRO(ForwardAlgorithm):
    """GDRO; with group size 2, temperature 0 and stabiliser 0, Diffusion-DPO."""

    Settings: ClassVar[type[AlgorithmSettings]] = GDROSettings
    settings: GDROSettings

    def cost(self, current: frozenset[str] | set[str]) -> Cost:
        """One forward pass of the reference."""
        return Cost(references=1)

    def loss(self, policy: Policy, batch: NoisedBatch) -> tuple[torch.Tensor, Metrics]:
        """The loss in the module's formula; metrics: ranking loss, implicit reward's deviation, best samples' error."""
        seen = predictions(policy, batch, None, reference=True)
        target = batch.noise - batch.latents
        error = squared_error(seen.policy, target)
        implicit = self.settings.beta * (squared_error(seen.snapshot, target) - error)
        ranking = group_loss(
            implicit, batch.rewards, batch.groups, temperature=self.settings.temperature, top_1=self.settings.top_1
        )
        best = best_of_each(batch.rewards, batch.groups)
        metrics = {
            "policy_loss": ranking.detach(),
            "implicit_reward_std": implicit.detach().std(),
            "best_error": error[best].mean().detach(),
        }
        return ranking + self.settings.stabiliser * error[best].mean(), metrics
