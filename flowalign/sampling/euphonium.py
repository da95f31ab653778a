"""Euphonium's sampling (2602.04928): steps that a reward of the noisy latents pulls along by its gradient.

A guided step draws from N(m + k g, std^2) in place of N(m, std^2), where g is the gradient of the reward for the state
and k the scale, k = scale D in the released settings, D = sigma - sigma_next. Log-probabilities are those of m, the
policy's own mean, so that the likelihood ratio of an unchanged policy is 1.

Where the published code differs: it divides a gradient by the norm of its whole batch, and its KL has the factor
1 / sigma^2 whatever its settings say; here every row has its own norm, and `gaussian_kl` is the KL of the steps.
"""

from __future__ import annotations

from typing import Any

from flowalign.lazy import torch
from flowalign.sampling.steps import SdeStep, column, sde_step


def guided_mean(
    mean: torch.Tensor, gradient: torch.Tensor, *, scale: torch.Tensor | float, normalize: bool = False
) -> torch.Tensor:
    """mean + scale * gradient, (B, ...); with `normalize` each row's gradient is first divided by its norm + 1e-8.

    scale: a scalar or (B,), with the step's length and eta^2 / (2 beta) already in it where they are wanted.
    """
    gradient = gradient.to(mean.dtype)
    if normalize:
        gradient = gradient / column(gradient.flatten(1).norm(dim=1) + 1e-8, gradient)
    return mean + column(scale, mean) * gradient


def guided_step(
    velocity: torch.Tensor,
    sample: torch.Tensor,
    sigma: torch.Tensor | float,
    sigma_next: torch.Tensor | float,
    *,
    gradient: torch.Tensor,
    scale: torch.Tensor | float,
    normalize: bool = False,
    **how: Any,
) -> SdeStep:
    """A guided step: the next sample is drawn around the guided mean; mean and log-probability are the policy's own.

    gradient: (B, ...), of the reward for the sample; scale and normalize as in `guided_mean`; the others as in
    `sde_step`, without `next_sample`.
    """
    step = sde_step(velocity, sample, sigma, sigma_next, **how)
    pulled = guided_mean(step.mean, gradient, scale=scale, normalize=normalize)
    drawn = step.next_sample + (pulled - step.mean)
    return sde_step(velocity, sample, sigma, sigma_next, **{**how, "next_sample": drawn})


def guided_steps(steps: int, *, start: int = 0, end: int | None = None, interval: int = 1) -> range:
    """Which of the steps 0 ... steps - 1 are guided: every `interval`-th from `start` to before `end` (None: `steps`).

    The released settings are start 12 of 16 steps. Raises ValueError unless 0 <= start, end <= steps and interval > 0.
    """
    if start < 0 or interval < 1 or not 0 <= (last := steps if end is None else end) <= steps:
        raise ValueError(f"start {start}, end {end} and interval {interval} do not lie within {steps} steps")
    return range(start, last, interval)
