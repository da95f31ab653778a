"""How far a policy has moved from its reference: the KL of their stochastic paths, and the size of their velocities.

The policy draws images with flow_sde steps. At every state that it visits, the Gaussian of the next state is computed
for both models. Both have the same standard deviation, so
KL(path) = E[sum over steps and dimensions of (mean - mean_ref)^2 / (2 std^2)] holds exactly. It is an upper bound of
the KL of the finished images. The last step has hardly any noise and is left out, as in training.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from flowalign.config import Rollout, Sampler
from flowalign.policies.base import Policy
from flowalign.policies.request import MediaRequest
from flowalign.rollout.generate import rollout, velocity_in_batches
from flowalign.rollout.prompts import Row
from flowalign.rollout.stages import RolloutRequest
from flowalign.sampling import sde_step
from flowalign.sampling.steps import gaussian_kl

NOISE_LEVEL = 0.7  # of flow_sde, as in Flow-GRPO's training


class Divergence(NamedTuple):
    """The distance of a policy from its reference on B samples."""

    kl: torch.Tensor  # (B,), KL of a whole path, in nats
    norm: torch.Tensor  # (B,), root mean square of the policy's velocities along the path
    reference_norm: torch.Tensor  # (B,), root mean square of the reference's velocities at the same states

    @property
    def velocity_ratio(self) -> torch.Tensor:
        """(B,): 1 where the policy's velocities are as large as the reference's."""
        return self.norm / self.reference_norm


@torch.no_grad()
def reference_divergence(
    policy: Policy,
    rows: Sequence[Row],
    sampler: Sampler,
    request: MediaRequest,
    key: tuple[int, ...],
    *,
    reference: Policy | None = None,
    batch: int = 64,
) -> Divergence:
    """The policy's distance from the model it started from, or from another `reference`, on one image of each row.

    The noise is counted by (*key, row, member, denoising step).
    """
    stochastic = Rollout(
        steps=sampler.steps,
        guidance=sampler.guidance,
        schedule=sampler.schedule,
        dynamics="flow_sde",
        noise_level=NOISE_LEVEL,
    )
    drawn = rollout(policy, RolloutRequest(rows, 1, stochastic, request, key, batch=batch), keep={"trajectory"})
    path = drawn.trajectory
    assert path is not None
    known = (reference.encode(drawn.rows) if reference else drawn.condition)[drawn.groups]
    condition = drawn.condition[drawn.groups]
    kl, squares, reference_squares = torch.zeros(3, len(drawn), dtype=torch.float64, device=policy.device)
    for step in range(len(path.sigmas) - 1):
        states = path.states[:, step]
        levels = path.sigmas[step].to(states.device)
        own = velocity_in_batches(policy, states, levels, condition, sampler.guidance, batch)
        with policy.reference() if reference is None else nullcontext():
            other = velocity_in_batches(reference or policy, states, levels, known, sampler.guidance, batch)
        taken, expected = (
            sde_step(
                velocity,
                states,
                path.sigmas[step],
                path.sigmas[step + 1],
                noise_level=NOISE_LEVEL,
                sigma_max=path.sigma_max,
                next_sample=path.states[:, step + 1],
            )
            for velocity in (own, other)
        )
        kl += gaussian_kl(taken.mean, expected.mean, taken.std).double() * states[0].numel()
        squares += own.double().square().flatten(1).mean(1)
        reference_squares += other.double().square().flatten(1).mean(1)
    steps = len(path.sigmas) - 1
    return Divergence(kl.cpu(), (squares / steps).sqrt().cpu(), (reference_squares / steps).sqrt().cpu())
