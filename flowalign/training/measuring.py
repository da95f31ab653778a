"""A run's evaluations: what they measure, on which prompts, and how the processes divide the work."""

import threading
from collections.abc import Sequence
from contextlib import suppress

import torch
from accelerate import Accelerator

from flowalign.config import Evaluation, Recipe
from flowalign.evaluate.audit.audit import Audit
from flowalign.evaluate.audit.guard import Guarding, evaluation_rewards
from flowalign.evaluate.evaluation import Evaluated, evaluate, evaluated_by_all
from flowalign.evaluate.held_out import held_out
from flowalign.policies.base import Policy
from flowalign.rollout.prompts import Row, load_prompts
from flowalign.score import Scorer, check_prompts
from flowalign.training import processes
from flowalign.training.display import Display


class Leave(Exception):
    """Ends an evaluation early, since a process was asked to stop."""


class Measuring:
    """The evaluations of one run, and their audits if it has a guard; every process calls it."""

    def __init__(
        self,
        recipe: Recipe,
        scorer: Scorer,
        training_rows: Sequence[Row],
        accelerator: Accelerator,
        device: torch.device,
        display: Display,
    ):
        """Raises UserError for prompts that the rewards cannot judge or that an audit cannot use."""
        self.accelerator, self.display = accelerator, display
        self.settings = settings = recipe.evaluation
        self.rows = load_prompts(settings.prompts, settings.count) if settings.prompts else []
        self.rewards, weights = evaluation_rewards(recipe, scorer)
        check_prompts(self.rows, self.rewards, settings.prompts)
        self.held_out = held_out(self.rows, training_rows)
        self.trained_rewards = [name for name, weight in weights.items() if weight > 0]  # as evaluations name them
        self.guarding: Guarding | None = None
        if recipe.guard and self.rows:
            self.guarding = Guarding(recipe.evaluation, recipe.guard, weights, self.rows, training_rows, device)

    def evaluate(
        self, policy: Policy, stop: threading.Event, in_lockstep: bool, untrained: bool
    ) -> tuple[Evaluated, Audit | None]:
        """Evaluate a policy with its current weights, and audit the evaluation.

        in_lockstep: the policy's passes wait for those of other processes; untrained: the run has not trained the
        policy yet. Raises Leave when any process was asked to stop.
        """

        def measure(rows: Sequence[Row], settings: Evaluation) -> Evaluated:
            return self._measure(policy, stop, in_lockstep, rows, settings)

        evaluated = measure(self.rows, self.settings)
        if self.guarding is None:
            return evaluated, None
        if not self.guarding.bands:
            with policy.reference():
                self.guarding.learn(policy, measure, evaluated if untrained else None)
        return evaluated, self.guarding.audit(policy, evaluated)

    def _measure(
        self, policy: Policy, stop: threading.Event, in_lockstep: bool, rows: Sequence[Row], settings: Evaluation
    ) -> Evaluated:
        """The evaluation of rows; the processes divide the rows, and each gets the whole result."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        shard, spare = processes.rows_of_process(rows, rank, world, in_lockstep)
        observe, own = self.guarding.auditor.observe if self.guarding else None, None
        with self.display.evaluating(len(shard) * settings.images_per_prompt) as advance, suppress(Leave):

            def progress(count: float) -> None:
                advance(count)
                # In lockstep others would wait for this process, so all leave together.
                if processes.any_of(self.accelerator, stop.is_set()) if in_lockstep else stop.is_set():
                    raise Leave

            own = evaluate(policy, shard, self.rewards, settings, policy.request, progress, observe, spare)
        if processes.any_of(self.accelerator, stop.is_set()):
            raise Leave
        assert own is not None  # else this process was asked to stop
        return own if world == 1 else evaluated_by_all(own, settings.keep_media)
