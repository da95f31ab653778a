"""The parts of a run, loaded from a recipe that was checked before."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flowalign.algorithms.base import Algorithm, algorithm_of
from flowalign.config import Recipe
from flowalign.config.base import UserError
from flowalign.policies.base import Policy
from flowalign.policies.conditions import cached_policy
from flowalign.rollout.dataset import GroupDataset
from flowalign.rollout.prompts import load_prompts
from flowalign.rollout.source import Dataset, Rollouts, Source
from flowalign.rollout.stages import Share
from flowalign.score import Scorer, check_prompts
from flowalign.training import processes
from flowalign.training.display import Display
from flowalign.training.finite import what_to_lower
from flowalign.training.learner import Learner, optimizer_class
from flowalign.training.measuring import Measuring
from flowalign.training.tracking import check_trackers
from rewards import Reward
from rewards.devices import chosen_device

Rewards = Mapping[str, Reward | Callable[..., Any]]


@dataclass(frozen=True)
class Parts:
    """The parts of a run, ready for its first step."""

    accelerator: Accelerator
    display: Display
    scorer: Scorer
    source: Source
    measuring: Measuring
    algorithm: Algorithm
    policy: Policy
    learner: Learner

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return chosen_device(self.accelerator.device)


def check_parts(recipe: Recipe) -> None:
    """Raises UserError for the mistakes that show before anything loads."""
    check_trackers(recipe.run.trackers)
    processes.refuse_launcher(recipe)
    optimizer_class(recipe.train.optimizer)
    algorithm_of(recipe.algorithm)


def load_parts(
    recipe: Recipe, *, display: Display | None = None, policy: Policy | None = None, rewards: Rewards | None = None
) -> Parts:
    """Load the parts of a recipe's run; a script's `policy` and `rewards` replace the recipe's.

    What loads fastest loads first, so that mistakes in rewards and prompts show before the model loads.
    """
    accelerator = processes.accelerator_for(recipe)  # first, since it chooses the device
    device = chosen_device(accelerator.device)
    display = display or Display(quiet=not accelerator.is_main_process)
    algorithm = algorithm_of(recipe.algorithm)
    scorer = Scorer(recipe, rewards, device)
    source = _source(recipe, scorer, algorithm, accelerator)
    measuring = Measuring(recipe, scorer, source.rows, accelerator, device, display)
    rows = [*source.rows, *measuring.rows]
    whole, seed = not processes.shards_weights(), recipe.run.seed
    policy = cached_policy(recipe.model, rows, device, seed, accelerator, given=policy, whole=whole)
    source.check(policy)
    try:
        algorithm.check_schedule(policy.sigmas(recipe.rollout.steps, recipe.rollout.schedule))
    except ValueError as error:
        raise UserError(str(error)) from error
    if policy.begin():
        display.say("an earlier run has trained the policy; this run begins with the weights from before that run")
    processes.prepare(accelerator, policy)
    guidance, remedy = recipe.rollout.guidance, what_to_lower(recipe)
    learner = Learner(recipe.train, algorithm, policy, accelerator, seed=seed, guidance=guidance, remedy=remedy)
    if recipe.train.ema_decay:
        policy.snapshot("ema")
    algorithm.begin(policy)
    return Parts(accelerator, display, scorer, source, measuring, algorithm, policy, learner)


def _source(recipe: Recipe, scorer: Scorer, algorithm: Algorithm, accelerator: Accelerator) -> Source:
    """The source of a run's samples. Raises UserError for prompts that the rewards cannot judge."""
    train, sampler = recipe.train, recipe.rollout
    share = Share(
        train.prompts_per_step,
        train.group_size,
        recipe.run.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    source: Source
    if recipe.dataset:
        dataset = GroupDataset.open(Path(recipe.dataset))
        dataset.check(recipe)
        source = Dataset(dataset, list(recipe.rewards), sampler, share)
    else:
        rows = load_prompts(recipe.prompts)
        check_prompts(rows, scorer.trained, recipe.prompts)
        source = Rollouts(rows, sampler, share, scorer, algorithm.keep, algorithm.behaviour)
    scorer.check_prompts(source.rows)
    return source
