"""Reductions over the part of a sample that is not given: a first frame, padding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flowalign.algorithms.forward import adaptive_error, squared_error
from flowalign.sampling import DYNAMICS, sde_step
from flowalign.sampling.steps import gaussian_kl, row_mean


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(3, 2, 4, 5, 5, generator=torch.Generator().manual_seed(seed))


def log_prob(dynamics: Any) -> Callable[..., torch.Tensor]:
    level = None if dynamics == "memoryless" else 0.5

    def of(velocity: torch.Tensor, sample: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        how = {"dynamics": dynamics, "noise_level": level, "sigma_max": 0.9}
        return sde_step(velocity, sample, 0.7, 0.5, **how, next_sample=velocity - sample, mask=mask).log_prob

    return of


def kl(mean: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return gaussian_kl(mean, other, torch.tensor(0.3), mask)


REDUCTIONS = [kl, squared_error, adaptive_error, *map(log_prob, DYNAMICS)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_given_part_of_a_latent_does_not_count(reduction: Callable[..., torch.Tensor]) -> None:
    """The first of 4 frames is given: its values change nothing, and the mean is that of the other frames alone."""
    a, b = drawn(0), drawn(1)
    mask = torch.ones(1, 1, 4, 1, 1, dtype=torch.bool)
    mask[:, :, 0] = False
    masked = reduction(a, b, mask=mask)
    torch.testing.assert_close(masked, reduction(a[:, :, 1:], b[:, :, 1:]))
    other = a.clone()
    other[:, :, 0] += 100
    assert torch.equal(reduction(other, b, mask=mask), masked)
    assert not torch.allclose(reduction(a, b), masked)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_mask_that_is_true_everywhere_changes_nothing(reduction: Callable[..., torch.Tensor]) -> None:
    a, b = drawn(0), drawn(1)
    torch.testing.assert_close(
        reduction(a, b, mask=torch.ones(1, dtype=torch.bool)), reduction(a, b), rtol=1e-6, atol=0
    )


def test_rows_may_have_different_masks_and_a_fully_given_row_has_no_gradient() -> None:
    values = drawn(0).requires_grad_(True)
    mask = torch.zeros(3, 2, 4, 5, 5, dtype=torch.bool)
    mask[0] = True
    mask[1, :, 2] = True
    means = row_mean(values, mask)
    torch.testing.assert_close(means[:2], torch.stack([values[0].mean(), values[1, :, 2].mean()]))
    assert means[2] == 0
    (gradient,) = torch.autograd.grad(means.sum(), values)
    assert torch.equal(gradient != 0, mask) and gradient.isfinite().all()
