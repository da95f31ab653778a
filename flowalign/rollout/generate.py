"""From prompts to samples: latents, media, and the stochastic part of their trajectories.

`denoise` is the loop; it yields its steps. Consumers do the rest with them: `Recorder` keeps the trajectory to learn
from, others score previews or drop samples.

Shape legend: B samples, W stochastic steps, ... a latent's own dimensions.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from flowalign.config import Rollout, Sampler
from flowalign.rollout.finite import refuse_not_finite
from flowalign.rollout.prompts import Row
from flowalign.rollout.stages import Drawn, Keep, RolloutRequest, Trajectory
from flowalign.sampling import SdeStep, counted_noise, ode_solver, ode_step, sde_step

if TYPE_CHECKING:
    from flowalign.policies.base import Conditioning, Policy

Progress = Callable[[float], None]
"""Called with the number of samples finished since the last call; a denoising step is a fraction of a sample."""
Finished = Callable[[torch.Tensor, Sequence[Row]], torch.Tensor]
"""Called with each batch's media (B, 3, H, W) in [0, 1] and rows; returns what the rollout keeps of the media."""


@dataclass
class Step:
    """One denoising step of B samples."""

    index: int
    sigma: float
    sigma_next: float
    state: torch.Tensor  # (B, ...)
    velocity: torch.Tensor  # (B, ...)
    next_state: torch.Tensor  # (B, ...)
    places: list[int]  # B, each sample's index in the rollout
    take: Callable[..., SdeStep] | None = None  # the formula of a stochastic step, for another state or next_sample
    taken: SdeStep | None = None  # the result of a stochastic step
    going: list[int] | None = None  # set by a consumer that drops samples: the indices of those that go on, ascending

    @property
    def predicted(self) -> torch.Tensor:
        """The one-step prediction x0_hat = x - sigma v, (B, ...)."""
        return ode_step(self.velocity, self.state, self.sigma, 0.0)


Watch = Callable[[Step], None]
"""A consumer of a rollout's steps."""


@torch.inference_mode(False)  # a caller may be in inference mode, whose tensors no training accepts
@torch.no_grad()
def rollout(
    policy: "Policy",
    request: RolloutRequest,
    *,
    condition: "Conditioning | None" = None,
    keep: Collection[Keep] = (),
    progress: Progress | None = None,
    finished: Finished | None = None,
    watch: Watch | None = None,
    whole_groups: bool = False,
) -> Drawn:
    """Draw the samples of a request, in groups. The batch size does not change a sample.

    A `Rollout` sampler takes stochastic steps in its window; any other sampler follows the ODE.

    condition: the condition of the rows; None encodes them. keep: what to return beside the finished samples.
    watch: gets every step, and may drop samples. whole_groups: `watch` and `finished` get all samples of a prompt at
    once.

    Raises ValueError when `watch` drops samples that `keep` or the solver remembers, and NotFinite for latents or media
    that are NaN or infinite.
    """
    rows, sampler, size = request.rows, request.sampler, request.group_size
    condition = policy.encode(rows) if condition is None else condition
    groups = torch.arange(len(rows)).repeat_interleave(size)
    members = torch.arange(size).repeat(len(rows)).tolist()
    samples = [rows[group] for group in groups.tolist()]
    keys = [(*request.key, row.index, member) for row, member in zip(samples, members, strict=True)]
    recorder = Recorder(keep) if "trajectory" in keep else None
    places: list[int] = []
    latents, media = [], []
    together = max(1, request.batch // size) * size if whole_groups else request.batch
    with policy.using(request.weights) if request.weights else nullcontext():
        for start in range(0, len(samples), together):
            own = dict(enumerate(keys[start : start + together], start))
            for step in denoise(policy, condition[groups[list(own)].to(policy.device)], own, request):
                for consumer in (recorder, watch):
                    if consumer:
                        consumer(step)
                if step.going is not None and (recorder or sampler.solver != "euler"):
                    raise ValueError("a rollout can drop samples only with solver euler and no kept trajectory")
                if progress:
                    progress(len(own) / sampler.steps)
            places += step.places
            latents.append(step.next_state)
            media.append(policy.decode(step.next_state))
            refuse_not_finite([samples[place].prompt for place in step.places], latents[-1], media[-1])
            if finished:
                media[-1] = finished(media[-1], [samples[place] for place in step.places])
    sigmas = policy.sigmas(sampler.steps, sampler.schedule)
    return Drawn(
        rows=[samples[place] for place in places],
        groups=groups[places].to(policy.device),
        condition=condition,
        latents=torch.cat(latents),
        media=torch.cat(media),
        sigmas=sigmas,
        members=[members[place] for place in places],
        trajectory=recorder.trajectory(sampler, sigmas, window_of(request)) if recorder else None,
    )


def window_of(request: RolloutRequest) -> tuple[int, int]:
    """The window [first, end) of stochastic steps; it is empty for a sampler that follows the ODE."""
    sampler = request.sampler
    return sampler.window_at(*request.training_step) if isinstance(sampler, Rollout) else (0, 0)


def denoise(
    policy: "Policy", condition: "Conditioning", keys: Mapping[int, tuple[int, ...]], request: RolloutRequest
) -> Iterator[Step]:
    """Yield the steps of some of a request's samples from noise to latents, `request.batch` samples in a forward pass.

    keys: a sample's place in the rollout -> the key of its noise, which ends in its member. The initial noise counts
    as denoising step 0 of the member, or of member 0 when the group shares it; the noise of step i counts as i + 1.
    """
    sampler, window, shape = request.sampler, window_of(request), policy.latent_shape(request.media)
    sigmas = policy.sigmas(sampler.steps, sampler.schedule)
    settings = sampler if isinstance(sampler, Rollout) else None
    shared = settings is not None and settings.shared_noise
    solve = ode_solver(sampler.solver, sigmas)
    x = counted_noise([(*key[:-1], 0 if shared else key[-1], 0) for key in keys.values()], shape, policy.device)
    for index in range(sampler.steps):
        sigma, sigma_next = sigmas[index].item(), sigmas[index + 1].item()
        velocity = velocity_in_batches(policy, x, sigma, condition, sampler.guidance, request.batch)
        step = Step(index, sigma, sigma_next, x, velocity, x, list(keys))
        if settings is not None and settings.dynamics != "ode" and window[0] <= index < window[1]:
            step.take = partial(
                sde_step,
                velocity,
                sigma=sigma,
                sigma_next=sigma_next,
                dynamics=settings.dynamics,
                noise_level=settings.noise_level,
                sigma_max=sigmas[1].item(),
            )
            noise = counted_noise([(*key, index + 1) for key in keys.values()], shape, policy.device)
            step.taken = step.take(x, noise=noise)
            step.next_state = step.taken.next_sample
        else:
            step.next_state = solve(velocity, x, index)
        yield step
        x = step.next_state
        if step.going is not None:
            x, condition = x[step.going], condition[step.going]
            keys = {step.places[row]: keys[step.places[row]] for row in step.going}


class Recorder:
    """Records the stochastic steps of a rollout, batch after batch."""

    def __init__(self, keep: Collection[Keep]):
        """keep: "means" records the steps' Gaussian means too; "float64" computes log-probabilities in float64."""
        self.keep = keep
        self.states: list[list[torch.Tensor]] = []  # one list for each batch
        self.log_probs: list[list[torch.Tensor]] = []
        self.means: list[list[torch.Tensor]] = []

    def __call__(self, step: Step) -> None:
        """Record a step; steps of the ODE are not kept."""
        if step.index == 0:
            for batches in (self.states, self.log_probs, self.means):
                batches.append([])
        if step.taken is None or step.take is None:
            return
        exact = step.taken
        if "float64" in self.keep:
            exact = step.take(step.state.double(), next_sample=step.next_state)
        self.states[-1] += [step.next_state] if self.states[-1] else [step.state, step.next_state]
        self.log_probs[-1].append(exact.log_prob)
        if "means" in self.keep:
            self.means[-1].append(step.taken.mean)

    def trajectory(self, sampler: Sampler, sigmas: torch.Tensor, window: tuple[int, int]) -> Trajectory | None:
        """The recorded trajectory; None for a rollout without stochastic steps."""
        if not isinstance(sampler, Rollout) or sampler.dynamics == "ode":
            return None

        def joined(batches: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
            return torch.cat([torch.stack([*part], dim=1) for part in batches])

        return Trajectory(
            states=joined(self.states),
            log_probs=joined(self.log_probs),
            sigmas=sigmas[window[0] : window[1] + 1],
            sigma_max=sigmas[1].item(),
            dynamics=sampler.dynamics,
            noise_level=sampler.noise_level,
            means=joined(self.means) if "means" in self.keep else None,
        )


def velocity_in_batches(
    policy: "Policy",
    x: torch.Tensor,
    sigma: float | torch.Tensor,
    condition: "Conditioning",
    guidance: float,
    batch: int,
) -> torch.Tensor:
    """The guided velocity (B, ...) of states x (B, ...), `batch` rows in a forward pass; sigma: a number or (B,)."""
    levels = torch.as_tensor(sigma, device=x.device).expand(len(x))
    parts = [slice(start, start + batch) for start in range(0, len(x), batch)]
    return torch.cat([policy.guided_velocity(x[p], levels[p], condition[p], guidance) for p in parts])
