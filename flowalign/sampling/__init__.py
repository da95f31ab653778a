"""Rectified-flow sampling: ODE and SDE steps, solvers, guidance and counted noise, as pure functions on tensors.

Shapes: B rows; "..." stands for a latent's own dimensions. Conventions: sigma in [0, 1] with 1 = noise,
x = (1 - sigma) x0 + sigma eps, velocity v = eps - x0.
"""

from flowalign.sampling.guidance import GuidanceForm, guided
from flowalign.sampling.noise import counted_generator, counted_noise
from flowalign.sampling.solvers import ode_solver
from flowalign.sampling.steps import DYNAMICS, SdeStep, gaussian_kl, longcat_weight, ode_step, sde_step

__all__ = [
    "DYNAMICS",
    "GuidanceForm",
    "SdeStep",
    "counted_generator",
    "counted_noise",
    "gaussian_kl",
    "guided",
    "longcat_weight",
    "ode_solver",
    "ode_step",
    "sde_step",
]
