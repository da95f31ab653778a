"""The sigma schedule is ours, from a model's shift; where diffusers' scheduler has one, the two agree."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flowalign.sampling.schedule import shifted, sigma_schedule

STEPS = (1, 2, 3, 10, 28, 50)
ROUNDING = {"atol": 2e-7, "rtol": 0.0}  # of float32, in which diffusers computes part of it


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_it_begins_with_exactly_1_falls_and_ends_with_0(steps: int, shift: float) -> None:
    sigmas = sigma_schedule(steps, shift)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and len(sigmas) == steps + 1 and sigmas.dtype == torch.float32
    assert (sigmas.diff() < 0).all()


def test_the_shift_multiplies_the_odds_of_noise() -> None:
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    moved = shifted(sigma, 3.0)
    torch.testing.assert_close(moved / (1 - moved), 3 * sigma / (1 - sigma))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_the_model_s_own_values_are_those_of_diffusers_scheduler(steps: int, shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    lowest = float(shifted(torch.tensor(1 / 1000, dtype=torch.float64), shift))
    torch.testing.assert_close(sigma_schedule(steps, shift, lowest=lowest), theirs.sigmas, **ROUNDING)


@pytest.mark.parametrize("terminal", [None, 0.1])
@pytest.mark.parametrize(("kind", "shift"), [("exponential", math.exp(0.8)), ("linear", 0.8)])
def test_a_shift_by_resolution_and_a_terminal_value_are_those_of_diffusers_scheduler(
    kind: str, shift: float, terminal: float | None
) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=terminal)  # type: ignore[arg-type]
    for steps in (2, 7, 30):
        theirs.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=0.8)
        torch.testing.assert_close(sigma_schedule(steps, shift, terminal=terminal), theirs.sigmas, **ROUNDING)


def test_one_step_goes_from_noise_to_the_end_whatever_the_terminal_value() -> None:
    assert sigma_schedule(1, 3.0, terminal=0.1).tolist() == [1.0, 0.0]
