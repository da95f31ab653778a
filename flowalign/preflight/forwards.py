"""The number of rows through the transformer in a training step, from the cost per item that each algorithm states.

The count is exact if no group is skipped. It follows the snapshots through the updates, because an algorithm saves the
forward pass of a snapshot that equals the trained weights.
"""

from typing import NamedTuple

import torch

from flowalign.algorithms.base import Algorithm, algorithm_of
from flowalign.config import Recipe


class Forwards(NamedTuple):
    """Rows through the transformer in a training step."""

    rollout: int
    trained: int  # with a backward pass
    fixed: int  # of snapshots and the reference, without a backward pass

    @property
    def total(self) -> int:
        """All rows, as a run counts them."""
        return self.rollout + self.trained + self.fixed


class Snapshots:
    """Takes a policy's place in an algorithm's calls: it keeps the snapshots' names and which equal the weights."""

    def __init__(self, algorithm: Algorithm):
        self.names: list[str] = []
        self.current: set[str] = set()
        algorithm.begin(self)  # type: ignore[arg-type]

    def snapshot(self, name: str) -> None:
        """Take a snapshot; it equals the weights."""
        self.names.append(name)
        self.current.add(name)

    def blend(self, name: str, decay: float) -> None:
        """Move a snapshot; with a decay of 0 it equals the weights again."""
        if decay == 0:
            self.current.add(name)


def step_forwards(recipe: Recipe, steps: int = 2) -> list[Forwards]:
    """The forwards of the first training steps, summed over all processes; the first step may need fewer."""
    train, sampler, algorithm = recipe.train, recipe.rollout, algorithm_of(recipe.algorithm)
    own = sampler.guidance if train.guidance is None else train.guidance
    reference = own if train.reference_guidance is None else train.reference_guidance
    drawn = 0 if recipe.dataset else recipe.samples_per_step * sampler.steps * _passes(sampler.guidance)
    units = torch.arange(recipe.items_per_step // recipe.unit_items)
    sizes = [len(part) * recipe.unit_items for part in units.tensor_split(train.updates_per_step)]
    snapshots, update, counted = Snapshots(algorithm), 0, []
    for _ in range(min(steps, train.steps)):
        trained = fixed = 0
        for items in [size for size in sizes if size] * train.inner_epochs:
            cost = algorithm.cost(snapshots.current)
            trained += items * _passes(own)
            fixed += items * (cost.snapshots * _passes(own) + cost.references * _passes(reference))
            fixed += (
                items * _passes(own) * recipe.in_parts
            )  # a unit that is split into parts needs each forward pass twice
            snapshots.current.clear()
            update += 1
        algorithm.after_update(snapshots, update)  # type: ignore[arg-type]
        counted.append(Forwards(drawn, trained, fixed))
    return counted


def _passes(guidance: float) -> int:
    """Rows through the transformer for one velocity: two with guidance."""
    return 1 if guidance == 1 else 2
