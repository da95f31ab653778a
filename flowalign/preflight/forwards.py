"""How many rows the transformer sees in a training step, by walking through the step with a model of one weight.

The rollout, the items, the algorithm's loss and the updates are the run's own code; only the pictures are a pixel and
the rewards are drawn. So the count is exact for every algorithm, if every group teaches.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from flowalign.advantages import Scored
from flowalign.algorithms.base import algorithm_of
from flowalign.algorithms.forward import ForwardAlgorithm
from flowalign.config import Recipe
from flowalign.policies.base import Condition, Grid, TextPolicy
from flowalign.policies.devices import own_device
from flowalign.policies.request import MediaRequest
from flowalign.rollout.generate import rollout
from flowalign.rollout.prompts import Row
from flowalign.rollout.samples import Samples
from flowalign.sampling import counted_generator
from flowalign.training.learner import Learner


class Forwards(NamedTuple):
    """Rows through the transformer in a training step."""

    rollout: int
    trained: int  # with a backward pass
    fixed: int  # of snapshots and the reference, in the loss

    @property
    def total(self) -> int:
        """What a run counts."""
        return self.rollout + self.trained + self.fixed


class _Pixel(TextPolicy):
    """v = w x on pictures of one pixel; counts rows with and without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.request = MediaRequest(1, 1)
        self.transformer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.transformer.weight)
        self.snapshot("reference")
        self.with_gradient = 0

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        return Condition({"row": torch.zeros(len(prompts), 1)})

    def _forward(self, x: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        self.with_gradient += len(x) * torch.is_grad_enabled()
        return self.transformer(x)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.new_zeros(len(latents), 3, 1, 1)

    def latent_shape(self, request: MediaRequest) -> tuple[int, ...]:
        return (1, 1, 1)

    def sigmas(self, steps: int, grid: Grid = "model") -> torch.Tensor:
        return torch.linspace(1, 0, steps + 1)

    def export(self, folder: Path) -> None:
        raise NotImplementedError("nothing in it is worth keeping")


@torch.inference_mode(False)
def step_forwards(recipe: Recipe, steps: int = 2) -> list[Forwards]:
    """The forwards of the first training steps over all processes: the first may save what later ones cannot."""
    algorithm = algorithm_of(recipe).model_copy(deep=True)
    if isinstance(algorithm, ForwardAlgorithm):  # how many levels count, not where they lie on a pixel's schedule
        algorithm = algorithm.model_copy(update={"timestep_range": (0.0, 1.0)})
    together = recipe.unit_items - 1 if recipe.in_parts else recipe.items_per_step + recipe.train.group_size
    train = recipe.train.model_copy(update={"micro_batch": together, "optimizer": "adamw"})
    recipe = recipe.model_copy(update={"algorithm": algorithm, "train": train})
    policy = _Pixel()
    learner = Learner(recipe, policy, Accelerator(cpu=own_device().type == "cpu"))
    algorithm.begin(policy)
    if train.ema_decay:
        policy.snapshot("ema")
    return [_step(recipe, policy, learner, step) for step in range(min(steps, train.steps))]


def _step(recipe: Recipe, policy: _Pixel, learner: Learner, step: int) -> Forwards:
    train, algorithm = recipe.train, algorithm_of(recipe)
    policy.forwards = policy.with_gradient = 0
    rows = [Row(place, str(place)) for place in range(train.prompts_per_step)]
    samples = rollout(
        policy,
        rows,
        train.group_size,
        recipe.rollout,
        policy.request,
        (recipe.run.seed, step),
        batch=len(rows) * train.group_size,
        keep=algorithm.keep,
        training_step=(recipe.run.seed, step),
    )
    drawn = 0 if recipe.store else policy.forwards
    policy.forwards = 0
    _score(samples, recipe, step)
    learner.learn(samples, step)
    # Of a unit in parts both passes ask for a gradient, and one has it.
    trained = policy.with_gradient // (2 if recipe.in_parts else 1)
    return Forwards(drawn, trained, policy.forwards - trained)


def _score(samples: Samples, recipe: Recipe, step: int) -> None:
    """Rewards that differ within every group."""
    count, names = len(samples), tuple(recipe.rewards)
    generator = counted_generator(recipe.run.seed, step)
    values = torch.rand(len(names), count, generator=generator)
    previews: Any = None if samples.previews is None else torch.rand(samples.previews.shape[:2], generator=generator)
    weights = torch.tensor([entry.weight for entry in recipe.rewards.values()])
    every = torch.ones_like(values, dtype=torch.bool)
    scored = Scored(values.mean(0), values, every, weights, names, previews).trained()
    samples.scored, samples.teaches = scored, algorithm_of(recipe).teaches(scored, samples.groups)
    samples.advantages = algorithm_of(recipe).advantages(scored, samples.groups)
    samples.shares = scored.shares(samples.teaches).T
