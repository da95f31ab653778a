"""One denoising step from sigma to sigma_next < sigma: the ODE step, and five stochastic steps with log-probabilities.

With D = sigma_next - sigma < 0, x0_hat = x - sigma v and eps_hat = x + (1 - sigma) v:

flow_sde   Flow-GRPO (Liu et al. 2025, eq. 9 and 11): s = a sqrt(sigma / (1 - sigma)),
           mean = x (1 + s^2 D / (2 sigma)) + v (1 + s^2 (1 - sigma) / (2 sigma)) D, std = s sqrt(-D);
           at sigma = 1 the denominator uses sigma_max, the schedule's second value.
linear_sde Flow-GRPO's step for Wan: flow_sde with s = a sigma_max sigma; a = 1 is published, and the default.
dance_sde  DanceGRPO (Xue et al. 2025): constant eta = a, std = eta sqrt(-D),
           mean = x + D v + eta^2 D (x - (1 - sigma) x0_hat) / (2 sigma^2).
cps        Flow-CPS (coefficients-preserving sampling): std = sigma_next sin(a pi / 2),
           mean = (1 - sigma_next) x0_hat + sqrt(sigma_next^2 - std^2) eps_hat.
memoryless The SDE of flow_sde with a = sqrt(2). Its finished samples are independent of the first noise, so that the
           optimum of reward - kl KL(path) is the reference tilted by exp(reward / kl) (Domingo-Enrich et al. 2025);
           algorithms/flow_grpo.py says how near a per-step KL loss comes to it. With few steps flow_sde's formula is
           inaccurate at this noise, and it needs sigma_max at sigma = 1. The step is therefore the posterior of the
           noising process at x0_hat, which has the same limit: c = (1 - sigma) sigma_next / ((1 - sigma_next) sigma),
           mean = (1 - sigma_next) x0_hat + c sigma_next eps_hat, std = sigma_next sqrt(1 - c^2). It has no noise level.

A `std_limit` c caps the noise of flow_sde, linear_sde and dance_sde: s or eta is at most c / sqrt(-D), in std, which is
then at most c, and in the mean (LongCat-Video, 2510.22200: c = 0.45).

Log-probabilities are means over a row's dimensions. They are the Gaussian's, except for cps, where the published
-(x' - mean)^2 has neither the Gaussian's constants nor its 1 / (2 std^2); the published clip ranges assume this form.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

from flowalign.lazy import torch

Dynamics = Literal["flow_sde", "dance_sde", "cps", "memoryless", "linear_sde"]
DYNAMICS: tuple[Dynamics, ...] = get_args(Dynamics)


class SdeStep(NamedTuple):
    """A stochastic step of B rows: the next sample, its Gaussian (mean and standard deviation) and log-probability."""

    next_sample: torch.Tensor  # (B, ...)
    mean: torch.Tensor  # (B, ...)
    std: torch.Tensor  # broadcastable to mean: the standard deviation of the whole step
    log_prob: torch.Tensor  # (B,), 0 where std is 0


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def column(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A scalar or a tensor (B,), in the dtype of `like` (B, ...) and in a shape that broadcasts over it."""
    column = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return column.reshape(-1, *[1] * (like.ndim - 1)) if column.ndim else column


def ode_step(
    velocity: torch.Tensor, sample: torch.Tensor, sigma: torch.Tensor | float, sigma_next: torch.Tensor | float
) -> torch.Tensor:
    """Euler's step of the flow from sigma to sigma_next, (B, ...), computed in float32 or better."""
    sample = _precise(sample)
    return sample + (column(sigma_next, sample) - column(sigma, sample)) * velocity.to(sample.dtype)


def sde_step(
    velocity: torch.Tensor,
    sample: torch.Tensor,
    sigma: torch.Tensor | float,
    sigma_next: torch.Tensor | float,
    *,
    dynamics: Dynamics = "flow_sde",
    noise_level: float | None = None,
    sigma_max: torch.Tensor | float | None = None,
    std_limit: float | None = None,
    next_sample: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    noise: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> SdeStep:
    """A stochastic step, and the log-probability of `next_sample`; None draws the next sample.

    velocity, sample, next_sample, noise: (B, ...); sigma, sigma_next, sigma_max: scalars or (B,). `sigma_max`, the
    schedule's second value, replaces sigma = 1 in flow_sde's denominator and scales linear_sde's noise. `std_limit`
    caps std. `noise` or `generator` decides the draw. `mask`, bool and broadcastable to the sample, is true for the
    part of a latent that is sampled and not given; the log-probability is the mean over that part. Computed in float32
    or better; see the module for the formulas. Raises ValueError for unknown dynamics and for a `noise_level`,
    `sigma_max` or `std_limit` that is missing or not allowed.
    """
    if dynamics not in DYNAMICS:
        raise ValueError(f"unknown dynamics {dynamics!r}; choose one of {', '.join(DYNAMICS)}")
    x = _precise(sample)
    v = velocity.to(x.dtype)
    now, after = column(sigma, x), column(sigma_next, x)
    if dynamics in ("cps", "memoryless"):
        if std_limit is not None:
            raise ValueError(f"{dynamics} takes no std_limit")
        mean, std = _recombined(x, v, now, after, dynamics, noise_level)
    else:
        scale = _noise_scale(dynamics, now, noise_level, sigma_max)
        if std_limit is not None:
            scale = torch.minimum(column(scale, x), std_limit / torch.sqrt(now - after))
        mean, std = _diffused(x, v, now, after, dynamics, scale)
    if next_sample is None:
        if noise is None:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        next_sample = mean + std * noise.to(x.dtype)
    else:
        next_sample = next_sample.to(x.dtype)
    return SdeStep(next_sample, mean, std, _log_prob(next_sample - mean, std, dynamics, mask))


def longcat_weight(
    sigma: torch.Tensor, sigma_next: torch.Tensor, *, sigma_max: torch.Tensor | float | None = None
) -> torch.Tensor:
    """LongCat-Video's weights (B,) of the policy losses of steps: sqrt(sigma / (1 - sigma)) / sqrt(sigma - sigma_next).

    The KL of a step has the square. `sigma_max` is as in `sde_step`; a row has the weight of its own step, not, as in
    the published code, the mean over its batch.
    """
    return _noise_scale("flow_sde", sigma, 1.0, sigma_max) / torch.sqrt(sigma - sigma_next)


def _noise_scale(
    dynamics: Dynamics, now: torch.Tensor, noise_level: float | None, sigma_max: torch.Tensor | float | None
) -> torch.Tensor | float:
    """The noise s of a step's SDE per root of time, eta for dance_sde."""
    if dynamics == "linear_sde":
        if sigma_max is None:
            raise ValueError("linear_sde needs sigma_max, the schedule's second value")
        return (1.0 if noise_level is None else noise_level) * column(sigma_max, now) * now
    if noise_level is None:
        raise ValueError(f"{dynamics} needs a noise_level")
    if dynamics == "dance_sde":
        return noise_level
    if sigma_max is None:
        if bool((now >= 1).any()):
            raise ValueError("flow_sde at sigma = 1 needs sigma_max, the schedule's second value")
        sigma_max = 1.0
    bounded = torch.where(now >= 1, column(sigma_max, now), now)
    return noise_level * torch.sqrt(now / (1 - bounded))


def _diffused(
    x: torch.Tensor, v: torch.Tensor, now: torch.Tensor, after: torch.Tensor, dynamics: Dynamics, scale: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of an SDE's step with the noise `scale`."""
    delta = after - now
    std = scale * torch.sqrt(-delta)
    if dynamics == "dance_sde":
        x0 = x - now * v
        return x + delta * v + 0.5 * scale**2 * delta * (x - (1 - now) * x0) / now**2, std
    drift = scale**2 / (2 * now)
    return x * (1 + drift * delta) + v * (1 + drift * (1 - now)) * delta, std


def _recombined(
    x: torch.Tensor,
    v: torch.Tensor,
    now: torch.Tensor,
    after: torch.Tensor,
    dynamics: Dynamics,
    noise_level: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of a step of cps or memoryless, which mixes x0_hat, eps_hat and new noise."""
    x0, eps = x - now * v, x + (1 - now) * v
    if dynamics == "memoryless":
        if noise_level is not None:
            raise ValueError("memoryless takes no noise_level")
        kept = (1 - now) * after / ((1 - after) * now)
        return (1 - after) * x0 + kept * after * eps, after * torch.sqrt(1 - kept**2)
    if noise_level is None:
        raise ValueError("cps needs a noise_level")
    std = after * math.sin(noise_level * math.pi / 2)
    return (1 - after) * x0 + torch.sqrt(after**2 - std**2) * eps, std


def row_mean(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The mean (B,) of values (B, ...) over each row's dimensions, or over those where `mask` is true.

    mask: bool, broadcastable to the values; a row in which it is nowhere true has the mean 0.
    """
    if mask is None:
        return values.flatten(1).mean(1)
    counted = mask.expand_as(values).flatten(1)
    return torch.where(counted, values.flatten(1), 0.0).sum(1) / counted.sum(1).clamp(min=1)


def _log_prob(residual: torch.Tensor, std: torch.Tensor, dynamics: Dynamics, mask: torch.Tensor | None) -> torch.Tensor:
    if dynamics == "cps":
        values = -(residual**2)
    else:
        safe = torch.where(std > 0, std, torch.ones_like(std))
        values = -(residual**2) / (2 * safe**2) - torch.log(safe) - 0.5 * math.log(2 * math.pi)
    values = torch.where(std > 0, values, torch.zeros_like(values))
    return row_mean(values, mask)


def gaussian_kl(
    mean: torch.Tensor, other_mean: torch.Tensor, std: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """KL divergence (B,) of two Gaussians with the same `std`, as a mean over each row's dimensions in the mask."""
    return row_mean((mean - other_mean) ** 2 / (2 * std**2), mask)
