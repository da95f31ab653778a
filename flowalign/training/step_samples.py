"""A training step's samples: drawn by the policy or taken from a store, scored, and what each of them teaches."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from flowalign.algorithms.base import algorithm_of
from flowalign.algorithms.lessons import lessons
from flowalign.config import Recipe
from flowalign.config.base import UserError
from flowalign.policies.base import Policy
from flowalign.rollout.generate import Progress, rollout
from flowalign.rollout.prompts import Row, step_rows
from flowalign.rollout.samples import Samples
from flowalign.rollout.store import GroupStore
from flowalign.sampling.noise import ROLLOUT
from flowalign.score import Judging, tally
from flowalign.training import processes
from flowalign.training.idle import score_figures


def step_samples(
    policy: Policy,
    source: Sequence[Row] | GroupStore,
    recipe: Recipe,
    judging: Judging,
    accelerator: Accelerator,
    step: int,
    progress: Progress | None = None,
) -> Samples:
    """This process's share of training step `step`'s groups, of the prompts or the store that are trained on.

    `judging` begins to score what is drawn as soon as it is.
    """
    train = recipe.train
    count = train.prompts_per_step // accelerator.num_processes
    share = slice(accelerator.process_index * count, (accelerator.process_index + 1) * count)
    if isinstance(source, GroupStore):
        return source.draw(policy, recipe, step, share)
    rows = step_rows(source, train.prompts_per_step, recipe.run.seed, step)
    # All of the step's: a text encoder's last digits depend on how many prompts it sees at once.
    condition = policy.encode(rows)
    behaviour = algorithm_of(recipe).behaviour
    with policy.using(behaviour) if behaviour else nullcontext():
        return rollout(
            policy,
            rows[share],
            train.group_size,
            recipe.rollout,
            policy.request,
            (ROLLOUT, recipe.run.seed, step),
            batch=recipe.rollout.batch,
            condition=condition[share],
            keep=algorithm_of(recipe).keep,
            training_step=(recipe.run.seed, step),
            finished=judging.judge,
            progress=progress,
        )


def score_samples(
    samples: Samples, recipe: Recipe, judging: Judging, accelerator: Accelerator, step: int
) -> dict[str, Any]:
    """Give the samples of training step `step` their rewards and advantages, by statistics over all processes.

    Returns the figures to log. Raises UserError for rewards that the algorithm cannot learn from.
    """
    own = judging.score(samples)
    train = recipe.train
    everyone = processes.all_scored(accelerator, own)
    groups = torch.arange(train.prompts_per_step, device=own.total.device).repeat_interleave(train.group_size)
    part = slice(accelerator.process_index * len(samples), (accelerator.process_index + 1) * len(samples))
    try:
        learnt = lessons(algorithm_of(recipe), everyone.trained(), groups)
    except ValueError as error:
        raise UserError(f"step {step + 1}: {error}") from error
    advantages = learnt.advantages[part].to(own.total.device)
    samples.advantages = advantages if own.trust is None else (advantages.T * own.trust.nan_to_num(1)).T
    samples.teaches, samples.differs = learnt.teaches[part], learnt.differs[part]
    samples.shares = everyone.trained().shares(learnt.teaches).T[part]
    samples.scored = own._replace(total=own.total.nan_to_num(0))  # those left out do not teach
    figures = score_figures(everyone, groups, learnt.differs)
    if answers := processes.summed_counts(accelerator, tally(judging.rewards)):
        figures["answers"] = answers
    return figures
