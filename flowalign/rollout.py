"""From prompts to samples: latents, media, and the stochastic part of their trajectories.

Shape legend: B samples, W stochastic steps, ... a latent's own dimensions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from flowalign.data import Row
from flowalign.sampling import counted_noise, ode_step, sde_step
from flowalign.sampling.steps import Dynamics

if TYPE_CHECKING:
    from flowalign.config import Rollout, Sampler
    from flowalign.policies.base import Condition, Policy

Progress = Callable[[int], None]


@dataclass
class Trajectory:
    """The stochastic steps of B samples, as they were taken."""

    states: torch.Tensor  # (B, W + 1, ...), float32
    log_probs: torch.Tensor  # (B, W)
    sigmas: torch.Tensor  # (W + 1,)
    sigma_max: float
    dynamics: Dynamics
    noise_level: float


@dataclass
class Samples:
    """B generated samples. Groups are the rows of one prompt in one step."""

    rows: list[Row]
    groups: torch.Tensor  # (B,), the prompt's place in the step
    condition: "Condition"  # one row a prompt; `groups` indexes it
    latents: torch.Tensor  # (B, ...), x0
    media: torch.Tensor  # (B, 3, H, W) in [0, 1]
    trajectory: Trajectory | None = None
    rewards: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> (B,)
    advantages: torch.Tensor | None = None  # (B,)
    has_spread: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # (B,) bool: groups that teach

    @property
    def prompts(self) -> list[str]:
        """B prompts."""
        return [row.prompt for row in self.rows]

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """B metadata rows."""
        return [row.metadata for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)


@torch.no_grad()
def rollout(
    policy: "Policy",
    rows: Sequence[Row],
    group_size: int,
    sampler: "Sampler",
    size: tuple[int, int],
    key: tuple[int, ...],
    *,
    batch: int,
    keep_trajectory: bool = False,
    progress: Progress | None = None,
) -> Samples:
    """`group_size` samples of each row's prompt, in groups, with noise counted by (*key, row, member, denoising step).

    A `Rollout` sampler takes its window of stochastic steps; any other follows the ODE. size: (height, width) in
    pixels. Whatever `batch`, the numbers of a sample are its own.
    """
    condition = policy.encode([row.prompt for row in rows])
    groups = torch.arange(len(rows)).repeat_interleave(group_size)
    members = torch.arange(group_size).repeat(len(rows)).tolist()
    samples = [rows[group] for group in groups.tolist()]
    keys = [(*key, row.index, member) for row, member in zip(samples, members, strict=True)]
    parts, media = [], []
    for start in range(0, len(samples), batch):
        chosen = slice(start, start + batch)
        part = _denoise(policy, condition[groups[chosen].to(policy.device)], keys[chosen], sampler, size)
        if not keep_trajectory:
            part.trajectory = None
        parts.append(part)
        media.append(policy.decode(part.latents))
        if progress:
            progress(len(part.latents))
    return Samples(
        rows=samples,
        groups=groups.to(policy.device),
        condition=condition,
        latents=torch.cat([part.latents for part in parts]),
        media=torch.cat(media),
        trajectory=_join([part.trajectory for part in parts if part.trajectory]),
    )


@dataclass
class _Denoised:
    latents: torch.Tensor
    trajectory: Trajectory | None


def _denoise(
    policy: "Policy",
    condition: "Condition",
    keys: Sequence[tuple[int, ...]],
    sampler: "Sampler",
    size: tuple[int, int],
) -> _Denoised:
    """One batch from noise to latents; keys end in the member.

    Initial noise is denoising step 0 of its member, or of member 0 where it is shared; the noise of step i is i + 1.
    """
    shape = policy.latent_shape(*size)
    sigmas = policy.sigmas(sampler.steps, sampler.grid)
    settings: Rollout | None = sampler if hasattr(sampler, "sde_window") else None  # type: ignore[assignment]
    first, end = settings.sde_window if settings else (0, 0)
    shared = settings is not None and settings.shared_noise
    x = counted_noise([(*key[:-1], 0 if shared else key[-1], 0) for key in keys], shape, policy.device)
    states, log_probs = [x], []
    for step in range(sampler.steps):
        sigma, sigma_next = sigmas[step].item(), sigmas[step + 1].item()
        level = torch.full((len(x),), sigma, device=x.device)
        velocity = policy.guided_velocity(x, level, condition, sampler.guidance)
        if settings and first <= step < end:
            taken = sde_step(
                velocity,
                x,
                sigma,
                sigma_next,
                dynamics=settings.dynamics,
                noise_level=settings.noise_level,
                sigma_max=sigmas[1].item(),
                noise=counted_noise([(*key, step + 1) for key in keys], shape, policy.device),
            )
            states = [x, taken.next_sample] if step == first else [*states, taken.next_sample]
            log_probs.append(taken.log_prob)
            x = taken.next_sample
        else:
            x = ode_step(velocity, x, sigma, sigma_next)
    if settings is None:
        return _Denoised(x, None)
    kept = Trajectory(
        states=torch.stack(states, dim=1),
        log_probs=torch.stack(log_probs, dim=1),
        sigmas=sigmas[first : end + 1],
        sigma_max=sigmas[1].item(),
        dynamics=settings.dynamics,
        noise_level=settings.noise_level,
    )
    return _Denoised(x, kept)


def _join(parts: Sequence[Trajectory]) -> Trajectory | None:
    if not parts:
        return None
    states = torch.cat([part.states for part in parts])
    log_probs = torch.cat([part.log_probs for part in parts])
    first = parts[0]
    return Trajectory(states, log_probs, first.sigmas, first.sigma_max, first.dynamics, first.noise_level)
