"""The one training loop, for every algorithm: rollout, score, advantages, loss, update, evaluate, checkpoint."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from flowalign import processes
from flowalign.checkpoint import Restore, checkpoints, load_checkpoint, save_checkpoint
from flowalign.claims import Claims
from flowalign.conditions import cached_policy
from flowalign.config import Evaluation, Recipe
from flowalign.data import Row, load_prompts, step_rows
from flowalign.display import Display
from flowalign.evaluate.evaluation import Evaluated, check_prompts, evaluate, evaluated_by_all
from flowalign.evaluate.held_out import held_out
from flowalign.evaluate.report import write_report
from flowalign.finite import not_finite_explained
from flowalign.guard import Guarding, evaluation_rewards
from flowalign.idle import Idle, score_figures
from flowalign.inputs import check_inputs, inputs_of
from flowalign.interrupt import Interrupted, asked_to_stop
from flowalign.items import check_levels
from flowalign.judging import Judging, lessons, tally, unread
from flowalign.learner import Learner, optimizer_class
from flowalign.memory import out_of_memory_explained
from flowalign.offline import GroupStore
from flowalign.policies.base import Policy
from flowalign.policies.cutting import cut_prompts
from flowalign.rollout import Progress, Samples, rollout
from flowalign.runs import RunFolder, command_line, now, versions
from flowalign.sampling.noise import ROLLOUT
from flowalign.selftest import Check, SelfTest
from flowalign.settings import CheckFailed, UserError
from flowalign.starting import check_start
from flowalign.tracing import traced
from flowalign.tracking import check_trackers, evaluation_values, step_values
from rewards import Reward
from rewards.weights import chosen_device


class _Leave(Exception):
    """An evaluation is left, since a process was asked to stop."""


class Trainer:
    """A run of a recipe. Everything that can be wrong is found out before the first step, in the cheapest order."""

    @torch.inference_mode(False)  # with gradients, whatever a script around it has switched off
    def __init__(
        self,
        recipe: Recipe,
        *,
        resume: bool = False,
        overwrite: bool = False,
        display: Display | None = None,
        policy: Policy | None = None,
        rewards: Mapping[str, Reward | Callable[..., Any]] | None = None,
        profile: bool = False,
    ):
        """`policy` and `rewards`, of a script's own, take the place of the recipe's model and rewards.

        What they learnt in an earlier run is forgotten first. Rewards bear the names that the recipe gives them. With
        `overwrite` the run begins anew over another one in its folder.
        `profile` writes a trace of the second step that is trained, when the first has warmed everything up.
        """
        self.recipe, self.profile = recipe, profile
        changes = check_start(recipe, resume=resume, overwrite=overwrite)
        inputs = check_inputs(recipe.folder, inputs_of(recipe, policy, rewards), resume=resume)
        check_trackers(recipe.run.trackers)
        processes.refuse_launcher(recipe)
        optimizer_class(recipe.train.optimizer)  # a missing library is found before a model loads
        self.accelerator = processes.accelerator_for(recipe)  # which chooses the device, before anything loads
        self.device = chosen_device(self.accelerator.device)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.display = display or Display(quiet=not self.main)
        self.judging = Judging(recipe, rewards, self.device)
        self.store = GroupStore.open(Path(recipe.store)) if recipe.store else None
        self.rows = self.store.rows if self.store is not None else load_prompts(recipe.prompts)
        if self.store is not None:
            self.store.check(recipe)
        else:
            check_prompts(self.rows, self.judging.trained, recipe.prompts)
            step_rows(self.rows, recipe.train.prompts_per_step, 0, 0)
        self.judging.check_prompts(self.rows)
        settings = recipe.evaluation
        self.evaluation_rows = load_prompts(settings.prompts, settings.count) if settings.prompts else []
        self.evaluation_rewards, weights = evaluation_rewards(recipe, self.judging)
        check_prompts(self.evaluation_rows, self.evaluation_rewards, settings.prompts)
        self.held_out = held_out(self.evaluation_rows, self.rows)
        self.trained_rewards = [name for name, weight in weights.items() if weight > 0]  # as evaluations name them
        self.guarding: Guarding | None = None
        if recipe.guard and self.evaluation_rows:
            self.guarding = Guarding(recipe, recipe.guard, weights, self.evaluation_rows, self.rows, self.device)
        prompts = [row.prompt for row in (*self.rows, *self.evaluation_rows)]
        seed, whole = recipe.run.seed, not processes.shares_out()
        self.policy = cached_policy(
            recipe.model, prompts, self.device, seed, self.accelerator, given=policy, whole=whole
        )
        if self.store is not None:
            self.store.check_model(self.policy)
        check_levels(recipe, self.policy)
        if self.policy.begin():
            self.display.say("the policy was trained before; this run begins with the weights that it had before that")
        processes.prepare(self.accelerator, self.policy.transformer)
        self.learner = Learner(recipe, self.policy, self.accelerator)
        if recipe.train.ema_decay:
            self.policy.snapshot("ema")
        recipe.algorithm.state.clear()  # of an earlier run of the same recipe
        recipe.algorithm.begin(self.policy)
        self.claimed = Claims({"policy": self.policy, "recipe": recipe.algorithm, **self.judging.learners})
        self.step = 0
        self.minutes, self.forwards = self.store.spent() if self.store is not None else (0.0, 0)  # of all processes
        self.seconds: dict[str, float] = defaultdict(float)
        self.tested = False
        self.stop = threading.Event()
        self.idle = Idle(recipe, self.accelerator)
        self.evaluated_at: int | None = None
        self.run_folder = RunFolder(recipe.folder)
        if self.main:
            self.run_folder = RunFolder.create(recipe, inputs, resume=resume, overwrite=overwrite)
        self.accelerator.wait_for_everyone()
        if resume:
            self._resume()
            self.display.say("; ".join([f"goes on after step {self.step}", *changes]))

    @property
    def _name(self) -> str:
        return f"step_{self.step:06d}"

    @property
    def size(self) -> tuple[int, int]:
        """Pixels of the pictures, (height, width)."""
        return self.recipe.model.height, self.recipe.model.width

    @torch.inference_mode(False)
    def run(self) -> Path:
        """Train to the end and write evaluation, weights and report; returns the run folder.

        Raises Interrupted after Ctrl-C or SIGTERM, when the step in progress is finished and saved. An evaluation is
        not finished; the run that goes on makes it anew.
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
                if self._asked():  # all leave after the same step
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
        """Whether an evaluation on the way is to follow this step."""
        every, end = self.recipe.evaluation.every, self.recipe.train.steps
        return bool(every) and self.step % every == 0 and self.step < end and not self._out_of_time()

    def _asked(self) -> bool:
        """Whether any process was asked to stop; all get the same answer."""
        (asked,) = processes.summed(self.accelerator, self.stop.is_set())
        return bool(asked)

    def _stop(self, doing: str = "") -> NoReturn:
        if self.step > 0:
            self._checkpoint()
            self._report(stopped="asked to stop")
        raise Interrupted(f"stopped {doing}after step {self.step} of {self.recipe.train.steps}; go on with --resume")

    def _give_up(self) -> None:
        why = f"the last {self.idle.in_a_row} steps taught nothing: {self.idle.reason}"
        self._checkpoint()
        self._report(stopped=why)
        raise UserError(f"stopped after step {self.step}, {why}; train.idle_steps=0 would go on all the same")

    def averaged(self) -> AbstractContextManager[None]:
        """The weights to evaluate and export: the average where one is kept."""
        return self.policy.using("ema") if "ema" in self.policy.snapshots else nullcontext()

    # One training step, in the order of the design's line.

    def _train_step(self) -> None:
        started = time.perf_counter()
        self.seconds.clear()
        self.policy.forwards = 0
        pictures = self.recipe.samples_per_step // self.world
        explained = not_finite_explained(self.recipe, self.step + 1, self.step > 0)
        with self._phase("rollout", "rollout", pictures) as advance, explained:
            samples = self._samples(advance)
        with self._phase("reward", "scoring"):
            figures = self._score(samples)
            learnt, alarms = self.judging.learn(samples, self.step, self.accelerator)
        test = None
        if not self.tested and (figures["zero_spread"] < 1 or self.recipe.algorithm.learns_from_equal):
            test = SelfTest(self.policy, self.recipe.algorithm, samples, self.accelerator, self._self_tested)
        with self._phase("train", "training", self.recipe.train.passes * self.recipe.train.updates_per_step) as advance:
            figures |= self.learner.learn(samples, self.step, test, advance)
        self.step += 1
        sentences = self.idle.step(self.step, samples, figures, self.tested)
        self._spend((time.perf_counter() - started) / 60)
        line = {
            "step": self.step,
            "minutes": self.minutes,
            "forwards": self.forwards,
            **figures,
            "seconds": dict(self.seconds),
        }
        if learnt:
            line |= {"rewards_learnt": learnt, "alarms": alarms}
        if self.main:
            self.run_folder.log_step(line)
            self.accelerator.log(step_values(line), step=self.step)
        self.display.step(line)
        sentences += [f"step {self.step}: {sentence}" for sentence in unread(figures.get("answers", {}))]
        for sentence in (*sentences, *(f"alarm at step {self.step}: {alarm}" for alarm in alarms)):
            self.display.say(sentence)

    def _spend(self, minutes: float) -> None:
        """Count a step's minutes and forwards, over all processes: they must agree on when the time is over."""
        minutes, forwards = processes.summed(self.accelerator, minutes / self.world, self.policy.forwards)
        self.minutes += minutes
        self.forwards += int(forwards)

    def _samples(self, progress: Progress | None = None) -> Samples:
        """This process's share of the step's groups: drawn by the behaviour policy, or taken from the store."""
        recipe, train = self.recipe, self.recipe.train
        count = train.prompts_per_step // self.world
        share = slice(self.rank * count, (self.rank + 1) * count)
        if self.store is not None:
            return self.store.draw(self.policy, recipe, self.step, share)
        rows = step_rows(self.rows, train.prompts_per_step, recipe.run.seed, self.step)
        # All of the step's: a text encoder's last digits depend on how many prompts it sees at once.
        condition = self.policy.encode([row.prompt for row in rows])
        behaviour = recipe.algorithm.behaviour
        with self.policy.using(behaviour) if behaviour else nullcontext():
            return rollout(
                self.policy,
                rows[share],
                train.group_size,
                recipe.rollout,
                self.size,
                (ROLLOUT, recipe.run.seed, self.step),
                batch=recipe.rollout.batch,
                condition=condition[share],
                keep=recipe.algorithm.keep,
                training_step=(recipe.run.seed, self.step),
                finished=self.judging.judge,
                progress=progress,
            )

    def _score(self, samples: Samples) -> dict[str, Any]:
        """Rewards and advantages of the samples; statistics over all processes."""
        own = self.judging.score(samples)
        train = self.recipe.train
        everyone = processes.all_scored(self.accelerator, own)
        groups = torch.arange(train.prompts_per_step, device=own.total.device).repeat_interleave(train.group_size)
        part = slice(self.rank * len(samples), (self.rank + 1) * len(samples))
        try:
            learnt = lessons(self.recipe.algorithm, everyone.trained(), groups)
        except ValueError as error:
            raise UserError(f"step {self.step + 1}: {error}") from error
        advantages = learnt.advantages[part].to(own.total.device)
        samples.advantages = advantages if own.trust is None else (advantages.T * own.trust.nan_to_num(1)).T
        samples.teaches, samples.differs = learnt.teaches[part], learnt.differs[part]
        samples.shares = everyone.trained().shares(learnt.teaches).T[part]
        samples.scored = own._replace(total=own.total.nan_to_num(0))  # those left out do not teach
        figures = score_figures(everyone, groups, learnt.differs)
        if answers := tally(self.judging.rewards, self.accelerator):
            figures["answers"] = answers
        return figures

    # What surrounds the steps.

    def _traced(self, first: int) -> AbstractContextManager[None]:
        """Around a training step: a trace, where one is asked for and it is the second after `first`, or the last."""
        wanted = self.profile and self.main and self.step == min(first + 1, self.recipe.train.steps - 1)
        place = self.run_folder.path / "profile", f"step_{self.step + 1:06d}"
        return traced(*place, self.display.say) if wanted else nullcontext()

    def _begin(self) -> None:
        recipe = self.recipe
        if recipe.run.trackers:
            self.accelerator.init_trackers(recipe.name, config={"recipe": recipe.name})
        counts = {
            "trainable": sum(p.numel() for p in self.learner.parameters),
            "all": sum(p.numel() for p in self.policy.transformer.parameters()),
        }
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        if self.main:
            dtype = str(self.policy.dtype).removeprefix("torch.")
            about: dict[str, Any] = {"name": recipe.name, "device": device, "dtype": dtype, "parameters": counts}
            shared = {"processes": self.world, "shared_out": self.learner.in_lockstep}
            started = {"started" if self.step == 0 else "resumed": now(), "finished": None, "stopped": None}
            self.run_folder.update_info(**about, **shared, **started, versions=versions(), command=command_line())
        self.display.begin(recipe, self.run_folder.path, counts, self.world)
        if self.main:
            trained = self.rows if self.store is None else self.store.rows
            for what, rows in (("training prompts", trained), ("evaluation prompts", self.evaluation_rows)):
                for sentence in cut_prompts(self.policy, (row.prompt for row in rows), what):
                    self.display.say(sentence)

    def _self_tested(self, checks: list[Check]) -> None:
        self.tested = True
        self.display.self_test(checks)
        if self.main:
            self.run_folder.update_info(self_test=[check._asdict() for check in checks])
        failed = [check for check in checks if not check.passed]
        if failed:
            raise CheckFailed(f"self-test failed: {failed[0].check}: {failed[0].detail}")

    def _evaluate(self) -> None:
        if self.evaluation_rows:
            try:
                self._evaluated()
            except _Leave:
                self._stop("in the evaluation ")

    def _evaluated(self) -> None:
        settings, started = self.recipe.evaluation, time.perf_counter()
        diverged = not_finite_explained(self.recipe, self.step, self.step > 0)
        with out_of_memory_explained("evaluation", self.recipe), diverged, self.averaged():
            evaluated = self._measure(self.evaluation_rows, settings)
            audit = None
            if self.guarding:
                if not self.guarding.bands:
                    with self.policy.reference():
                        self.guarding.learn(self.policy, self._measure, evaluated if self.step == 0 else None)
                audit = self.guarding.audit(self.policy, evaluated)
        about: dict[str, Any] = {
            "step": self.step,
            "minutes": self.minutes,
            "forwards": self.forwards,  # measuring is not part of the training budget
            "guidance": settings.guidance,
            "sampler_steps": settings.steps,
            "prompts": self.held_out.prompts,
            "trained_prompts": self.held_out.trained,
            "trained_rewards": self.trained_rewards,
            "seconds": time.perf_counter() - started,
        }
        answers = tally(self.evaluation_rewards, self.accelerator)
        if answers:
            about["answers"] = answers
        best: list[str] = []
        if self.guarding and audit:
            about["audit"] = audit.contents()
            best = self.guarding.conclude(about["audit"])
        if self.main:
            for name in best:  # before the evaluation is there, after which a resumed run does not make it again
                with self.averaged():
                    self.run_folder.keep_weights(name, self.policy.export, about)
            summary = self.run_folder.write_evaluation(self._name, evaluated, about)
            self.accelerator.log(evaluation_values(summary, about), step=self.step)
            self.display.evaluation(self.step, summary, about["seconds"], self.held_out)
        for sentence in unread(answers):
            self.display.say(f"evaluation at step {self.step}: {sentence}")
        if audit:
            self.display.audit(self.step, audit)
        self.evaluated_at = self.step
        self.accelerator.wait_for_everyone()

    def _measure(self, rows: Sequence[Row], settings: Evaluation) -> Evaluated:
        """The evaluation of rows with the weights as they are, shared among the processes, known to all of them."""
        shard, spare = processes.rows_of_process(rows, self.rank, self.world, self.learner.in_lockstep)
        observe, own = self.guarding.auditor.observe if self.guarding else None, None
        with self.display.evaluating(len(shard) * settings.images_per_prompt) as advance, suppress(_Leave):

            def progress(count: float) -> None:
                advance(count)
                if self._asked() if self.learner.in_lockstep else self.stop.is_set():  # others wait in lockstep alone
                    raise _Leave

            own = evaluate(self.policy, shard, self.evaluation_rewards, settings, self.size, progress, observe, spare)
        if self._asked():
            raise _Leave
        assert own is not None  # or this process was asked
        return own if self.world == 1 else evaluated_by_all(own, settings.pictures)

    def guarded(self) -> bool:
        """Whether the guard ends the run."""
        guard = self.recipe.guard
        return bool(guard and guard.stop and self.guarding and self.guarding.sustained)

    def _checkpoint(self) -> None:
        if self.main:
            counted = {"step": self.step, "update": self.learner.update, "forwards": self.forwards}
            counted |= {"idle": self.idle.in_a_row, "minutes": self.minutes}
            counters = {**counted, "scaler": self.learner.scaler.state_dict()}
            keep = self.recipe.run.keep_checkpoints
            memory = {"algorithm": self.recipe.algorithm.state, "rewards": self.judging.state()}
            save_checkpoint(self.run_folder.checkpoints, self.policy, self.learner.optimizer, memory, counters, keep)
            self.run_folder.update_info(checkpoint=self.step)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Go on from the last checkpoint; a run killed before its first begins again."""
        found = checkpoints(self.run_folder.checkpoints)
        if found:
            remember: dict[str, Restore] = {"rewards": self.judging.load_state}
            remember["algorithm"] = self.recipe.algorithm.state.update
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
    """Run a recipe from start to end and return its run folder; `options` are the Trainer's."""
    return Trainer(recipe, **options).run()
