"""From prompts to samples: latents, media, and the stochastic part of their trajectories.

Shape legend: B samples, W stochastic steps, ... a latent's own dimensions.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from flowalign.config import Rollout, Sampler
from flowalign.config.algorithm import Keep
from flowalign.policies.request import MediaRequest
from flowalign.rollout.finite import refuse_not_finite
from flowalign.rollout.prompts import Row
from flowalign.rollout.samples import Samples, Trajectory
from flowalign.sampling import counted_noise, ode_solver, ode_step, sde_step

if TYPE_CHECKING:
    from flowalign.policies.base import Conditioning, Policy

Progress = Callable[[float], None]
"""Called with how many more pictures are done; a denoising step is a part of one."""
Finished = Callable[[torch.Tensor, Sequence[Row]], None]
Survivors = Callable[[torch.Tensor, Sequence[int]], list[int]]
"""(one-step predictions x0_hat (R, ...), the places of these R samples) -> which of the R go on, ascending."""


@torch.inference_mode(False)  # its samples are learnt from, wherever they were drawn
@torch.no_grad()
def rollout(
    policy: "Policy",
    rows: Sequence[Row],
    group_size: int,
    sampler: Sampler,
    request: MediaRequest,
    key: tuple[int, ...],
    *,
    batch: int,
    condition: "Conditioning | None" = None,
    keep: Collection[Keep] = (),
    training_step: tuple[int, int] = (0, 0),
    progress: Progress | None = None,
    finished: Finished | None = None,
    survivors: Mapping[int, Survivors] | None = None,
) -> Samples:
    """`group_size` samples of each row's prompt, in groups, with noise counted by (*key, row, member, denoising step).

    A `Rollout` sampler takes its window of stochastic steps, that of `training_step` (seed, step) where it moves; any
    other follows the ODE. `condition` is that of the rows; None encodes them. `keep` names what is returned beside the
    finished samples. Whatever `batch`, the numbers of a sample are its own.
    `finished` is called with each batch's media and rows.
    `survivors` are asked, after as many steps as their key says, which samples go on; they see whole groups, and only
    what goes on to the end is returned. ValueError with a `keep` or a solver that remembers the others.
    NotFinite for latents or pictures that are NaN or infinite.
    """
    if survivors and (keep or sampler.solver != "euler"):
        raise ValueError("samples can be dropped on the way only with solver euler and nothing else kept")
    condition = policy.encode(rows) if condition is None else condition
    groups = torch.arange(len(rows)).repeat_interleave(group_size)
    members = torch.arange(group_size).repeat(len(rows)).tolist()
    samples = [rows[group] for group in groups.tolist()]
    keys = [(*key, row.index, member) for row, member in zip(samples, members, strict=True)]
    window = sampler.window_at(*training_step) if isinstance(sampler, Rollout) else (0, 0)
    parts, media, previews = [], [], []
    together = max(1, batch // group_size) * group_size if survivors else batch
    for start in range(0, len(samples), together):
        chosen = slice(start, start + together)
        own = dict(enumerate(keys[chosen], start))
        text = condition[groups[chosen].to(policy.device)]
        moved = partial(progress, len(own) / sampler.steps) if progress else None
        part = _denoise(policy, text, own, sampler, window, request, keep, batch, survivors or {}, moved)
        parts.append(part)
        media.append(policy.decode(part.latents))
        refuse_not_finite([samples[place].prompt for place in part.places], part.latents, media[-1])
        if "previews" in keep:
            shown = [policy.decode(preview) for preview in part.previews]
            previews.append(torch.stack([*shown, media[-1]], dim=1))
        if finished:
            finished(media[-1], [samples[place] for place in part.places])
    places = [place for part in parts for place in part.places]
    return Samples(
        rows=[samples[place] for place in places],
        groups=groups[places].to(policy.device),
        condition=condition,
        latents=torch.cat([part.latents for part in parts]),
        media=torch.cat(media),
        grid=policy.sigmas(sampler.steps, sampler.grid),
        members=[members[place] for place in places],
        trajectory=_join([part.trajectory for part in parts if part.trajectory]),
        previews=torch.cat(previews) if previews else None,
    )


@dataclass
class _Denoised:
    places: list[int]  # of the samples that came to the end
    latents: torch.Tensor
    trajectory: Trajectory | None
    previews: list[torch.Tensor]  # x0_hat after each step from the window on, but the last


def _denoise(
    policy: "Policy",
    condition: "Conditioning",
    keys: Mapping[int, tuple[int, ...]],
    sampler: Sampler,
    window: tuple[int, int],
    request: MediaRequest,
    keep: Collection[Keep],
    batch: int,
    survivors: Mapping[int, Survivors],
    moved: Callable[[], None] | None,
) -> _Denoised:
    """Samples from noise to latents, `batch` in a forward pass; keys are by the sample's place and end in its member.

    Initial noise is denoising step 0 of its member, or of member 0 where it is shared; the noise of step i is i + 1.
    """
    shape = policy.latent_shape(request)
    sigmas = policy.sigmas(sampler.steps, sampler.grid)
    settings = sampler if isinstance(sampler, Rollout) else None
    shared = settings is not None and settings.shared_noise
    solve = ode_solver(sampler.solver, sigmas)
    first = [(*key[:-1], 0 if shared else key[-1], 0) for key in keys.values()]
    x = counted_noise(first, shape, policy.device)
    states, log_probs, means, previews = [x], [], [], []
    for step in range(sampler.steps):
        sigma, sigma_next = sigmas[step].item(), sigmas[step + 1].item()
        velocity = _velocity(policy, x, sigma, condition, sampler.guidance, batch)
        if judge := survivors.get(step + 1):
            places = list(keys)
            going = judge(ode_step(velocity, x, sigma, 0.0), places)
            x, velocity, condition = x[going], velocity[going], condition[going]
            keys = {places[row]: keys[places[row]] for row in going}
        if "previews" in keep and step > window[0]:
            previews.append(ode_step(velocity, x, sigma, 0.0))
        if settings is not None and settings.dynamics != "ode" and window[0] <= step < window[1]:
            take = partial(
                sde_step,
                velocity,
                sigma=sigma,
                sigma_next=sigma_next,
                dynamics=settings.dynamics,
                noise_level=settings.noise_level,
                sigma_max=sigmas[1].item(),
            )
            taken = take(x, noise=counted_noise([(*key, step + 1) for key in keys.values()], shape, policy.device))
            states = [x, taken.next_sample] if step == window[0] else [*states, taken.next_sample]
            exact = take(x.double(), next_sample=taken.next_sample) if "float64" in keep else taken
            log_probs.append(exact.log_prob)
            if "means" in keep:
                means.append(taken.mean)
            x = taken.next_sample
        else:
            x = solve(velocity, x, step)
        if moved:
            moved()
    if settings is None or settings.dynamics == "ode" or "trajectory" not in keep:
        return _Denoised(list(keys), x, None, previews)
    kept = Trajectory(
        states=torch.stack(states, dim=1),
        log_probs=torch.stack(log_probs, dim=1),
        sigmas=sigmas[window[0] : window[1] + 1],
        sigma_max=sigmas[1].item(),
        dynamics=settings.dynamics,
        noise_level=settings.noise_level,
        means=torch.stack(means, dim=1) if means else None,
    )
    return _Denoised(list(keys), x, kept, previews)


def _velocity(
    policy: "Policy", x: torch.Tensor, sigma: float, condition: "Conditioning", guidance: float, batch: int
) -> torch.Tensor:
    """The guided velocity (B, ...) of states at one sigma, `batch` rows at a time."""
    level = torch.full((len(x),), sigma, device=x.device)
    parts = [slice(start, start + batch) for start in range(0, len(x), batch)]
    return torch.cat([policy.guided_velocity(x[p], level[p], condition[p], guidance) for p in parts])


def _join(parts: Sequence[Trajectory]) -> Trajectory | None:
    if not parts:
        return None
    first = parts[0]
    return replace(
        first,
        states=torch.cat([part.states for part in parts]),
        log_probs=torch.cat([part.log_probs for part in parts]),
        means=None if first.means is None else torch.cat([part.means for part in parts if part.means is not None]),
    )
