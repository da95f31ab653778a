"""The items of a training step: which there are, and their batches.

An item is a sample at one of its trained denoising steps or noise levels. A unit is what a micro-batch never parts: an
item, a group at one noise level, or a group with all its steps (`Algorithm.unit`).
"""

import torch

from flowalign.algorithms import Batch, Noised, Transition
from flowalign.algorithms.forward import ForwardAlgorithm
from flowalign.config import Recipe
from flowalign.config.base import UserError
from flowalign.policies.base import Policy
from flowalign.rollout.samples import Samples
from flowalign.sampling import counted_generator, counted_noise
from flowalign.sampling.noise import FORWARD
from flowalign.sampling.steps import column


def check_levels(recipe: Recipe, policy: Policy) -> None:
    """Raises UserError where the rollout's schedule holds too few noise levels for the algorithm to train at."""
    if not isinstance(recipe.algorithm, ForwardAlgorithm):
        return
    try:
        recipe.algorithm.levels(policy.sigmas(recipe.rollout.steps, recipe.rollout.grid), counted_generator(0))
    except ValueError as error:
        raise UserError(str(error)) from error


class Items:
    """The items of `samples` in one pass of a training step; noise levels and noise are counted."""

    def __init__(self, samples: Samples, recipe: Recipe, step: int, turn: int):
        self.samples, self.recipe = samples, recipe
        self.algorithm = recipe.algorithm
        self.draws = self.algorithm.draws(recipe.rollout)
        self.key = (FORWARD, recipe.run.seed, step, turn)
        self.levels = self._levels() if isinstance(self.algorithm, ForwardAlgorithm) else None

    def units(self) -> torch.Tensor:
        """All units (U, m, 2) of (sample, draw) places; those of groups that do not teach are left out."""
        taught = self.samples.teaches.cpu().nonzero().flatten()
        draws = torch.arange(self.draws)
        if self.algorithm.unit == "item":
            return torch.cartesian_prod(taught, draws)[:, None]
        places = torch.cartesian_prod(taught, draws).view(-1, self.recipe.train.group_size, self.draws, 2)
        return places.transpose(1, 2).flatten(0, 1) if self.algorithm.unit == "group" else places.flatten(1, 2)

    def batch(self, units: torch.Tensor, update: int) -> Batch:
        """The items of `units` (u, m, 2) for optimizer update number `update`."""
        samples, train = self.samples, self.recipe.train
        row, draw = units.flatten(0, 1).to(samples.latents.device).unbind(1)
        guidance = self.recipe.rollout.guidance if train.guidance is None else train.guidance
        assert samples.advantages is not None and samples.scored is not None, (
            "samples are scored before a batch is taken"
        )
        dense = samples.previews is not None
        groups = samples.groups[row]
        return Batch(
            condition=samples.condition[groups],
            advantages=samples.advantages[row, draw] if dense else samples.advantages[row],
            groups=groups * self.draws + draw if self.algorithm.unit == "group" else groups,
            latents=samples.latents[row],
            guidance=guidance,
            reference_guidance=guidance if train.reference_guidance is None else train.reference_guidance,
            transition=self._transition(row, draw),
            noised=self._noised(row, draw),
            rewards=samples.scored.total[row],
            shares=None if samples.shares is None else samples.shares[row],
            samples=row,
            update=update,
            at_once=train.micro_batch,
        )

    def _transition(self, row: torch.Tensor, step: torch.Tensor) -> Transition | None:
        path = self.samples.trajectory
        if path is None:
            return None
        sigmas = path.sigmas.to(row.device)
        return Transition(
            sigma=sigmas[step],
            sigma_next=sigmas[step + 1],
            sigma_max=path.sigma_max,
            state=path.states[row, step],
            next_state=path.states[row, step + 1],
            log_prob=path.log_probs[row, step],
            dynamics=path.dynamics,
            noise_level=path.noise_level,
            mean=None if path.means is None else path.means[row, step],
        )

    def _noised(self, row: torch.Tensor, draw: torch.Tensor) -> Noised | None:
        if self.levels is None:
            return None
        latents = self.samples.latents[row]
        sigma = self.levels[row.cpu(), draw.cpu()].to(latents.device)
        keys = [(*self._key(index), 1 + place) for index, place in zip(row.tolist(), draw.tolist(), strict=True)]
        noise = counted_noise(keys, latents.shape[1:], latents.device)
        level = column(sigma, latents)
        return Noised(sigma, noise, (1 - level) * latents + level * noise)

    def _levels(self) -> torch.Tensor:
        """The noise levels (B, T) of all samples."""
        algorithm, grid = self.algorithm, self.samples.grid
        assert isinstance(algorithm, ForwardAlgorithm)
        keys = [(*self._key(index), 0) for index in range(len(self.samples))]
        made = {key: algorithm.levels(grid, counted_generator(*key)) for key in dict.fromkeys(keys)}
        return torch.stack([made[key] for key in keys])

    def _key(self, index: int) -> tuple[int, ...]:
        """What a sample's noise depends on: its prompt, and its place in the group unless a group shares its noise."""
        member = 0 if self.algorithm.unit == "group" else self.samples.members[index]
        return (*self.key, self.samples.rows[index].index, member)
