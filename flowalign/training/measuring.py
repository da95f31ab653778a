"""What a run's evaluations measure, on which prompts, and how its processes share the work."""

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
    """An evaluation is left, since a process was asked to stop."""


class Measuring:
    """The evaluations of one run, and their audits where it has a guard; all processes call it alike."""

    def __init__(
        self,
        recipe: Recipe,
        scorer: Scorer,
        training_rows: Sequence[Row],
        accelerator: Accelerator,
        device: torch.device,
        display: Display,
    ):
        """Raises UserError for prompts that cannot be measured by the rewards, or audited."""
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
        """The evaluation of a policy as it is, and its audit; Leave where `stop` of any process is set.

        in_lockstep: its passes wait for those of other processes; untrained: it is the model that the run began with.
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
        """The evaluation of rows, shared among the processes, known to all of them."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        shard, spare = processes.rows_of_process(rows, rank, world, in_lockstep)
        observe, own = self.guarding.auditor.observe if self.guarding else None, None
        with self.display.evaluating(len(shard) * settings.images_per_prompt) as advance, suppress(Leave):

            def progress(count: float) -> None:
                advance(count)
                # Others wait in lockstep alone.
                if processes.any_of(self.accelerator, stop.is_set()) if in_lockstep else stop.is_set():
                    raise Leave

            own = evaluate(policy, shard, self.rewards, settings, policy.request, progress, observe, spare)
        if processes.any_of(self.accelerator, stop.is_set()):
            raise Leave
        assert own is not None  # or this process was asked
        return own if world == 1 else evaluated_by_all(own, settings.keep_media)
