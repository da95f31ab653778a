"""DiffusionNFT: contrast good and bad samples of the policy on the forward process, without trajectories or
likelihoods.

Source: Zheng et al., "DiffusionNFT: Online Diffusion Reinforcement with Forward Process" (2025), and its training code.
Per item (a sample noised to x_sigma with a new eps, with velocity v = eps - x0), r in [0, 1] from its advantage:

    v+ = beta v_theta + (1 - beta) v_old        v- = (1 + beta) v_old - beta v_theta
    l+- = mean (x0+- - x0)^2 / sg[mean |x0+- - x0|],     x0+- = x_sigma - sigma v+-
    loss = clip / beta (r l+ + (1 - r) l-) + kl_weight mean (v_theta - v_reference)^2

Differences from the published code: noise levels reach the model as floats, while the published sampler truncates them
to whole timesteps; the old policy's forward pass is skipped while it equals the trained weights, and the reference's
where kl_weight is 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

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
from flowalign.sampling.steps import column

if TYPE_CHECKING:
    from flowalign.policies.base import Policy


class NftLoss(NamedTuple):
    """Three scalars: the loss to minimise, and its two parts; the KL is not yet weighted."""

    loss: torch.Tensor
    policy_loss: torch.Tensor
    kl: torch.Tensor


def contrast(
    x0: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    velocity: torch.Tensor,
    velocity_old: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The errors l+ and l- (see the module), (n,) each, of x0 (n, ...) noised to sigma (n,)."""
    level = column(sigma, x0)
    state = (1 - level) * x0 + level * noise
    positive = beta * velocity + (1 - beta) * velocity_old
    negative = (1 + beta) * velocity_old - beta * velocity
    return adaptive_error(state - level * positive, x0), adaptive_error(state - level * negative, x0)


def nft_loss(
    x0: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    velocity: torch.Tensor,
    velocity_old: torch.Tensor,
    velocity_ref: torch.Tensor | None,
    advantage: torch.Tensor,
    *,
    beta: float,
    kl_weight: float,
    advantage_clip: float = 5.0,
) -> NftLoss:
    """DiffusionNFT's loss of n items: x0, noise and velocities (n, ...), sigma and advantage (n,).

    Without `velocity_ref` the KL is 0.
    """
    positive, negative = contrast(x0, noise, sigma, velocity, velocity_old, beta)
    level = reward_level(advantage, advantage_clip)
    policy_loss = advantage_clip / beta * (level * positive + (1 - level) * negative).mean()
    kl = policy_loss.new_zeros(()) if velocity_ref is None else squared_error(velocity, velocity_ref).mean()
    return NftLoss(policy_loss + kl_weight * kl, policy_loss, kl)


class NFTSettings(ForwardSettings):
    """The settings of DiffusionNFT."""

    name: Literal["nft"] = "nft"
    equal_groups: Literal["skip", "keep"] = "keep"
    """Groups whose rewards are all equal: "skip" leaves them out of a step, "keep" trains on them."""
    beta: Annotated[float, Field(gt=0)] = 1.0
    """Distance of v+ and v- from the old velocity, as a multiple of the trained velocity's distance. The loss's optimum
    lies at 1 / beta times a fixed distance: lower beta for faster progress, raise it if training is unstable."""
    old_decay: Decay = Decay(slope=1e-3, last=0.5)
    """Decay of the old policy, which draws the rollouts. Raise it if training is unstable: the old policy then follows
    the trained one more slowly."""


class NFT(ForwardAlgorithm):
    """DiffusionNFT."""

    Settings: ClassVar[type[AlgorithmSettings]] = NFTSettings
    settings: NFTSettings
    behaviour = "old"

    def begin(self, policy: Policy) -> None:
        """The old policy starts equal to the trained one."""
        policy.snapshot("old")

    def loss(self, policy: Policy, batch: NoisedBatch) -> tuple[torch.Tensor, Metrics]:
        """The loss in the module's formula; metrics: its parts and the distance to the old policy."""
        seen = predictions(policy, batch, "old", reference=self.settings.kl_weight > 0)
        result = nft_loss(
            batch.latents,
            batch.noise,
            batch.sigma,
            seen.policy,
            seen.snapshot,
            seen.reference,
            batch.advantages,
            beta=self.settings.beta,
            kl_weight=self.settings.kl_weight,
            advantage_clip=self.settings.advantage_clip,
        )
        metrics = {
            "policy_loss": result.policy_loss.detach(),
            "old_distance": squared_error(seen.policy, seen.snapshot).detach(),
        }
        if seen.reference is not None:
            metrics["kl"] = result.kl.detach()
        return result.loss, metrics

    def after_update(self, policy: Policy, update: int) -> None:
        """The old policy moves towards the trained one."""
        policy.blend("old", self.settings.old_decay.at(update))
