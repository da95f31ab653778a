"""The one training loop, for every algorithm: rollout, score, advantages, loss, update, evaluate, checkpoint."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from flowalign.config import Recipe
from flowalign.config.base import CheckFailed, UserError
from flowalign.disk.about import command_line, now, versions
from flowalign.disk.run_folder import RunFolder
from flowalign.disk.starting import check_start
from flowalign.evaluate.evaluation import write_evaluation
from flowalign.evaluate.report.report import write_report
from flowalign.policies.base import Policy
from flowalign.policies.cutting import cut_prompts
from flowalign.rollout.generate import Progress
from flowalign.rollout.stages import Generated, Scored, Weighted
from flowalign.score import load_learnt, tally, unread
from flowalign.training import processes
from flowalign.training.checkpoint import Restore, checkpoints, load_checkpoint, save_checkpoint
from flowalign.training.claims import Claims
from flowalign.training.display import Display
from flowalign.training.finite import not_finite_explained
from flowalign.training.idle import Idle, score_metrics
from flowalign.training.inputs import check_inputs, inputs_of
from flowalign.training.interrupt import Interrupted, asked_to_stop
from flowalign.training.measuring import Leave
from flowalign.training.memory import out_of_memory_explained
from flowalign.training.parts import Parts, Rewards, check_parts, load_parts
from flowalign.training.selftest import Check, SelfTest
from flowalign.training.tracing import traced
from flowalign.training.tracking import evaluation_values, step_values


class Trainer:
    """A run of a recipe with its loaded parts; `from_recipe` checks the recipe and loads the parts."""

    def __init__(self, recipe: Recipe, parts: Parts, *, profile: bool = False):
        """profile: write a trace of the second training step, since the first one warms everything up."""
        self.recipe, self.profile = recipe, profile
        self.accelerator, self.display, self.device = parts.accelerator, parts.display, parts.device
        self.scorer, self.source, self.measuring = parts.scorer, parts.source, parts.measuring
        self.algorithm, self.policy, self.learner = parts.algorithm, parts.policy, parts.learner
        self.guarding = self.measuring.guarding
        self.world, self.main = self.accelerator.num_processes, self.accelerator.is_main_process
        self.claimed = Claims({"policy": self.policy, **self.scorer.learners})
        self.step = 0
        self.minutes, self.forwards = self.source.spent()  # of all processes
        self.seconds: dict[str, float] = defaultdict(float)
        self.tested = False
        self.stop = threading.Event()
        train, equal = recipe.train, self.algorithm.learns_from_equal
        self.idle = Idle(train.idle_steps, train.group_size, equal, self.accelerator)
        self.evaluated_at: int | None = None
        self.run_folder = RunFolder(recipe.folder)

    @classmethod
    @torch.inference_mode(False)  # training needs gradients, which a calling script may have switched off
    def from_recipe(
        cls,
        recipe: Recipe,
        *,
        resume: bool = False,
        overwrite: bool = False,
        display: Display | None = None,
        policy: Policy | None = None,
        rewards: Rewards | None = None,
        profile: bool = False,
    ) -> "Trainer":
        """Check the recipe, load its parts, and lock its run folder.

        policy, rewards: objects of a script that replace the recipe's model and rewards; they first forget what they
        learnt in an earlier run. The rewards have the recipe's names. resume: go on with the run in the folder.
        overwrite: begin anew and replace the run in the folder. profile: as in `Trainer`. Raises UserError for a
        mistake in any of these.
        """
        changes = check_start(recipe, resume=resume, overwrite=overwrite)
        inputs = check_inputs(recipe.folder, inputs_of(recipe, policy, rewards), resume=resume)
        check_parts(recipe)
        trainer = cls(recipe, load_parts(recipe, display=display, policy=policy, rewards=rewards), profile=profile)
        if trainer.main:
            trainer.run_folder = RunFolder.create(recipe, inputs, resume=resume, overwrite=overwrite)
        trainer.accelerator.wait_for_everyone()
        if resume:
            trainer._resume()
            trainer.display.say("; ".join([f"the run goes on after step {trainer.step}", *changes]))
        return trainer

    @property
    def _name(self) -> str:
        return f"step_{self.step:06d}"

    @torch.inference_mode(False)
    def run(self) -> Path:
        """Train to the end and write evaluation, weights and report; returns the run folder.

        Raises Interrupted after Ctrl-C or SIGTERM, once the step in progress is finished and saved. An evaluation in
        progress is dropped, and the resumed run repeats it.
        """
        recipe, train = self.recipe, self.recipe.train
        self.claimed.check()
        self._begin()
        first = self.step
        training, folder = self.display.training(train.steps, self.step), self.run_folder.held()
        with asked_to_stop(self.display.say) as self.stop, training, folder:
            if self.evaluated_at != self.step and (self.step == 0 or self._due()):
                self._evaluate()
            while self.step < train.steps and not self._out_of_time() and not self.guarded():
                with self._traced(first):
                    self._train_step()
                if self._due():
                    self._evaluate()
                if self._asked():  # all processes leave after the same step
                    self._stop()
                if self.step % recipe.run.checkpoint_every == 0:
                    self._checkpoint()
                if self.idle.over:
                    self._give_up()
            if self.evaluated_at != self.step:
                self._evaluate()
            self._checkpoint()
            if self.main:
                with self.averaged():
                    self.policy.export(self.run_folder.adapter)
        why = "sustained alarm" if self.guarded() else None
        self._report(finished=now(), minutes=self.minutes, stopped=why)
        if recipe.run.trackers:
            self.accelerator.end_training()
        return self.run_folder.path

    def _due(self) -> bool:
        """Whether an evaluation other than the final one follows this step."""
        every, end = self.recipe.evaluation.every, self.recipe.train.steps
        return bool(every) and self.step % every == 0 and self.step < end and not self._out_of_time()

    def _asked(self) -> bool:
        """Whether any process was asked to stop; every process gets the same answer."""
        return processes.any_of(self.accelerator, self.stop.is_set())

    def _stop(self, doing: str = "") -> NoReturn:
        if self.step > 0:
            self._checkpoint()
            self._report(stopped="asked to stop")
        raise Interrupted(f"stopped {doing}after step {self.step} of {self.recipe.train.steps}; go on with --resume")

    def _give_up(self) -> None:
        why = f"the last {self.idle.in_a_row} steps taught nothing: {self.idle.reason}"
        self._checkpoint()
        self._report(stopped=why)
        raise UserError(f"stopped after step {self.step}, {why}; train.idle_steps=0 lets such a run go on")

    def averaged(self) -> AbstractContextManager[None]:
        """A context with the weights to evaluate and export: the average (EMA) if the run keeps one."""
        return self.policy.using("ema") if "ema" in self.policy.snapshots else nullcontext()

    # One training step: rollout, reward, advantages, updates.

    def _train_step(self) -> None:
        started = time.perf_counter()
        self.seconds.clear()
        self.policy.forwards = 0
        samples = self.recipe.samples_per_step // self.world
        explained = not_finite_explained(self.recipe, self.step + 1, self.step > 0)
        with self._phase("rollout", "rollout", samples) as advance, explained:
            generated = self.source.next(self.policy, self.step, advance)
        with self._phase("reward", "scoring"):
            scored = self._scored(generated)
            weighted = self._weighted(scored)
            metrics = score_metrics(scored, weighted)
            if answers := processes.summed_counts(self.accelerator, tally(self.scorer.rewards)):
                metrics["answers"] = answers
            learnt, alarms = self.scorer.learn(generated, self.step, self.accelerator)
        test = None
        if not self.tested and (weighted.zero_spread < 1 or self.algorithm.learns_from_equal):
            test = SelfTest(self.policy, self.algorithm, weighted, self.accelerator, self._self_tested)
        with self._phase(
            "train", "training", self.recipe.train.inner_epochs * self.recipe.train.updates_per_step
        ) as advance:
            metrics |= self.learner.learn(weighted, self.step, test, advance)
        self.step += 1
        sentences = self.idle.step(self.step, generated, metrics, self.tested)
        self._spend((time.perf_counter() - started) / 60)
        line = {
            "step": self.step,
            "minutes": self.minutes,
            "forwards": self.forwards,
            **metrics,
            "seconds": dict(self.seconds),
        }
        if learnt:
            line |= {"rewards_learnt": learnt, "alarms": alarms}
        if self.main:
            self.run_folder.log_step(line)
            self.accelerator.log(step_values(line), step=self.step)
        self.display.step(line)
        sentences += [f"step {self.step}: {sentence}" for sentence in unread(metrics.get("answers", {}))]
        self.display.say(*sentences, *(f"alarm at step {self.step}: {alarm}" for alarm in alarms))

    def _spend(self, minutes: float) -> None:
        """Add a step's minutes and forward passes over all processes, which must agree on when the time is over."""
        minutes, forwards = processes.summed(self.accelerator, minutes / self.world, self.policy.forwards)
        self.minutes += minutes
        self.forwards += int(forwards)

    def _scored(self, generated: Generated) -> Scored:
        own = self.scorer.score(generated)
        everyone = processes.all_scored(self.accelerator, own)
        first = self.accelerator.process_index * len(generated)
        return Scored(generated, own, everyone, first, self.recipe.train.group_size)

    def _weighted(self, scored: Scored) -> Weighted:
        try:
            return self.algorithm.weigh(scored)
        except ValueError as error:
            raise UserError(f"step {self.step + 1}: {error}") from error

    # Around the steps.

    def _traced(self, first: int) -> AbstractContextManager[None]:
        """A trace around the next step if `profile` asks for one: of the second step from `first` on, else the last."""
        wanted = self.profile and self.main and self.step == min(first + 1, self.recipe.train.steps - 1)
        place = self.run_folder.path / "profile", f"step_{self.step + 1:06d}"
        return traced(*place, self.display.say) if wanted else nullcontext()

    def _begin(self) -> None:
        recipe = self.recipe
        if recipe.run.trackers:
            self.accelerator.init_trackers(recipe.name, config={"recipe": recipe.name})
        counts = {
            "trainable": sum(p.numel() for p in self.learner.parameters),
            "all": sum(p.numel() for p in self.policy.named_weights().values()),
        }
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        if self.main:
            dtype = str(self.policy.dtype).removeprefix("torch.")
            about: dict[str, Any] = {"name": recipe.name, "device": device, "dtype": dtype, "parameters": counts}
            about["media"] = asdict(self.policy.request)  # the recipe's sizes, or the model's own
            shared = {"processes": self.world, "sharded": self.learner.in_lockstep}
            started = {"started" if self.step == 0 else "resumed": now(), "finished": None, "stopped": None}
            self.run_folder.update_info(**about, **shared, **started, versions=versions(), command=command_line())
        self.display.begin(recipe, self.run_folder.path, counts, self.world)
        if self.main:
            for what, rows in (("training prompts", self.source.rows), ("evaluation prompts", self.measuring.rows)):
                self.display.say(*cut_prompts(self.policy, (row.prompt for row in rows), what))

    def _self_tested(self, checks: list[Check]) -> None:
        self.tested = True
        self.display.self_test(checks)
        if self.main:
            self.run_folder.update_info(self_test=[check._asdict() for check in checks])
        failed = [check for check in checks if not check.passed]
        if failed:
            raise CheckFailed(f"self-test failed: {failed[0].check}: {failed[0].detail}")

    def _evaluate(self) -> None:
        if self.measuring.rows:
            try:
                self._evaluated()
            except Leave:
                self._stop("in the evaluation ")

    def _evaluated(self) -> None:
        settings, started, measuring = self.recipe.evaluation, time.perf_counter(), self.measuring
        diverged = not_finite_explained(self.recipe, self.step, self.step > 0)
        with out_of_memory_explained("evaluation", self.recipe), diverged, self.averaged():
            how = self.stop, self.learner.in_lockstep, self.step == 0
            evaluated, audit = measuring.evaluate(self.policy, *how)
        about: dict[str, Any] = {
            "step": self.step,
            "minutes": self.minutes,
            "forwards": self.forwards,  # measuring is not part of the training budget
            "guidance": settings.guidance,
            "sampler_steps": settings.steps,
            "prompts": measuring.held_out.prompts,
            "trained_prompts": measuring.held_out.trained,
            "trained_rewards": measuring.trained_rewards,
            "seconds": time.perf_counter() - started,
        }
        answers = processes.summed_counts(self.accelerator, tally(measuring.rewards))
        if answers:
            about["answers"] = answers
        best: list[str] = []
        if self.guarding and audit:
            about["audit"] = audit.contents()
            best = self.guarding.conclude(about["audit"])
        if self.main:
            for name in best:  # before the evaluation is written, since a resumed run does not repeat a written one
                with self.averaged():
                    self.run_folder.keep_weights(name, self.policy.export, about)
            summary = write_evaluation(self.run_folder, self._name, evaluated, about)
            self.accelerator.log(evaluation_values(summary, about), step=self.step)
            self.display.evaluation(self.step, summary, about["seconds"], measuring.held_out)
        self.display.say(*(f"evaluation at step {self.step}: {sentence}" for sentence in unread(answers)))
        if audit:
            self.display.audit(self.step, audit)
        self.evaluated_at = self.step
        self.accelerator.wait_for_everyone()

    def guarded(self) -> bool:
        """Whether the guard ends the run."""
        guard = self.recipe.guard
        return bool(guard and guard.stop and self.guarding and self.guarding.sustained)

    def _checkpoint(self) -> None:
        if self.main:
            counters = {
                "step": self.step,
                "update": self.learner.update,
                "forwards": self.forwards,
                "minutes": self.minutes,
                "idle": self.idle.in_a_row,
                "scaler": self.learner.scaler.state_dict(),
            }
            keep = self.recipe.run.keep_checkpoints
            memory = {"algorithm": self.algorithm.state_dict(), "rewards": self.scorer.state()}
            save_checkpoint(self.run_folder.checkpoints, self.policy, self.learner.optimizer, memory, counters, keep)
            self.run_folder.update_info(checkpoint=self.step)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Go on from the last checkpoint; a run killed before its first checkpoint begins again."""
        found = checkpoints(self.run_folder.checkpoints)
        if found:
            remember: dict[str, Restore] = {"rewards": partial(load_learnt, self.scorer.trainable)}
            remember["algorithm"] = self.algorithm.load_state_dict
            counters = load_checkpoint(found[-1], self.policy, self.learner.optimizer, remember)
            self.step, self.learner.update = counters["step"], counters["update"]
            self.minutes, self.forwards = counters["minutes"], counters["forwards"]
            self.idle.in_a_row = counters.get("idle", 0)
            if counters.get("scaler"):
                self.learner.scaler.load_state_dict(counters["scaler"])
        if self.main:
            self.run_folder.forget_after(self.step)
        self.accelerator.wait_for_everyone()
        if self.run_folder.evaluation(self._name).exists():
            self.evaluated_at = self.step
        if self.guarding:
            self.guarding.restore(self.run_folder.path)

    def _report(self, **info: Any) -> None:
        if self.main:
            self.run_folder.update_info(**info)
            self.display.finished(self.run_folder.path, write_report(self.run_folder.path))
        self.accelerator.wait_for_everyone()

    def _out_of_time(self) -> bool:
        limit = self.recipe.run.max_minutes
        return limit is not None and self.minutes >= limit

    @contextmanager
    def _phase(self, name: str, shown: str, total: float | None = None) -> Iterator[Progress]:
        started = time.perf_counter()
        explained, traced = out_of_memory_explained(name, self.recipe), torch.profiler.record_function(name)
        with explained, traced, self.display.phase(shown, total) as advance:
            yield advance
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - started


def train(recipe: Recipe, **options: Any) -> Path:
    """Run a recipe from start to end and return its run folder; `options` are those of `Trainer.from_recipe`."""
    return Trainer.from_recipe(recipe, **options).run()
