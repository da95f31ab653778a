"""Solvers of the sampling ODE over a sigma schedule: Euler, and DPM-Solver++ through diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from flowalign.lazy import torch
from flowalign.sampling.steps import ode_step

Solver = Literal["euler", "dpm++"]


def ode_solver(name: Solver, sigmas: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """A function (velocity (B, ...), sample (B, ...), step) -> next sample, for the sigma schedule (steps + 1,).

    "dpm++" is DPM-Solver++ (2M) in sigma (Lu et al. 2022), the solver of DiffusionNFT's rollouts. It uses the previous
    step, so it must be called once for each step, in order.
    """
    if name == "euler":
        return lambda velocity, sample, step: ode_step(velocity, sample, sigmas[step].item(), sigmas[step + 1].item())
    from diffusers import DPMSolverMultistepScheduler  # imported here, since it is slow and rarely needed

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas.cpu()
    scheduler.timesteps = sigmas[:-1] * scheduler.config.num_train_timesteps

    def step_on(velocity: torch.Tensor, sample: torch.Tensor, step: int) -> torch.Tensor:
        sample = sample.float()
        taken = scheduler.step(velocity.float(), scheduler.timesteps[step], sample, return_dict=False)[0]
        assert isinstance(taken, torch.Tensor)
        return taken

    return step_on
