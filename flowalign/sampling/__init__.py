"""Rectified-flow sampling: schedules, ODE and SDE steps, counted noise. Pure functions on tensors.

Shape legend: B rows, ... a latent's own dimensions; sigma in [0, 1] with 1 = noise, x = (1 - sigma) x0 + sigma eps,
velocity v = eps - x0.
"""

from flowalign.sampling.guidance import GuidanceForm, guided
from flowalign.sampling.noise import counted_generator, counted_noise
from flowalign.sampling.solvers import ode_solver
from flowalign.sampling.steps import DYNAMICS, SdeStep, gaussian_kl, ode_step, sde_step

__all__ = [
    "DYNAMICS",
    "GuidanceForm",
    "SdeStep",
    "counted_generator",
    "counted_noise",
    "gaussian_kl",
    "guided",
    "ode_solver",
    "ode_step",
    "sde_step",
]
