"""The one training loop, for every algorithm: rollout, score, advantages, loss, update, evaluate, checkpoint."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flowalign.advantages import group_advantages, has_spread
from flowalign.algorithms import Batch, Transition
from flowalign.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from flowalign.config import Evaluation, Recipe
from flowalign.data import load_prompts, step_rows
from flowalign.display import Display
from flowalign.evaluate.evaluation import check_prompts, evaluate, gathered, load_rewards
from flowalign.evaluate.report import write_report
from flowalign.interrupt import Interrupted, asked_to_stop
from flowalign.policies.base import Policy
from flowalign.policies.loading import load_policy
from flowalign.rollout import Samples, rollout
from flowalign.runs import RunFolder, command_line, now, versions
from flowalign.sampling import counted_generator
from flowalign.sampling.noise import ITEMS, ROLLOUT
from flowalign.selftest import self_test
from flowalign.settings import UserError
from rewards import Reward, as_reward
from rewards.combine import score_all, weighted_sum


class Trainer:
    """A run of a recipe. Everything that can be wrong is found out before the first step, in the cheapest order."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        resume: bool = False,
        display: Display | None = None,
        policy: Policy | None = None,
        rewards: Mapping[str, Reward | Callable[..., Any]] | None = None,
    ):
        """`policy` and `rewards`, of a script's own, take the place of the recipe's model and rewards."""
        self.recipe = recipe
        if rewards is None:
            self.rewards = load_rewards(recipe.rewards)
        else:
            self.rewards = {name: as_reward(reward, name) for name, reward in rewards.items()}
        self.weights = {name: recipe.rewards[name].weight if name in recipe.rewards else 1.0 for name in self.rewards}
        self.rows = load_prompts(recipe.prompts)
        check_prompts(self.rows, self.rewards, recipe.prompts)
        step_rows(self.rows, recipe.train.prompts_per_step, 0, 0)
        settings = recipe.evaluation
        self.evaluation_rows = load_prompts(settings.prompts, settings.count) if settings.prompts else []
        self.evaluation_rewards = load_rewards(settings.rewards) if settings.rewards else self.rewards
        check_prompts(self.evaluation_rows, self.evaluation_rewards, settings.prompts)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            log_with=list(recipe.run.trackers) or None,
            project_dir=str(recipe.folder),
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if recipe.train.prompts_per_step % self.world:
            raise UserError(
                f"train.prompts_per_step ({recipe.train.prompts_per_step}) must be a multiple "
                f"of the {self.world} processes"
            )
        self.main = self.accelerator.is_main_process
        self.display = display or Display(quiet=not self.main)
        self.policy = policy or load_policy(recipe.model, self.accelerator.device, recipe.run.seed)
        self.policy.sigmas(recipe.rollout.steps, recipe.rollout.grid)
        self.policy.transformer = self.accelerator.prepare_model(self.policy.transformer)
        self.parameters = list(self.policy.trainable_parameters().values())
        train = recipe.train
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay
        )
        if train.ema_decay:
            self.policy.snapshot("ema")
        self.step = self.update = 0
        self.minutes = 0.0
        self.seconds: dict[str, float] = defaultdict(float)
        self.tested = False
        if self.main:
            self.run_folder = RunFolder.create(recipe, resume=resume)
        self.accelerator.wait_for_everyone()
        self.run_folder = RunFolder(recipe.folder)
        if resume:
            self._resume()

    @property
    def size(self) -> tuple[int, int]:
        """Pixels of the pictures, (height, width)."""
        return self.recipe.model.height, self.recipe.model.width

    def run(self) -> Path:
        """Train to the end and write evaluation, weights and report; returns the run folder.

        Raises Interrupted after Ctrl-C or SIGTERM, when the step in progress is finished and saved.
        """
        recipe, train = self.recipe, self.recipe.train
        self._begin()
        with asked_to_stop(self.display.say) as self.stop, self.display.training(train.steps, self.step):
            if self.step == 0:
                self._evaluate()
            while self.step < train.steps and not self._out_of_time():
                self._train_step()
                due = recipe.evaluation.every and self.step % recipe.evaluation.every == 0
                if due and self.step < train.steps:
                    self._evaluate()
                if self.step % recipe.run.checkpoint_every == 0 or self.stop.is_set():
                    self._checkpoint()
                if self.stop.is_set():
                    self._report(stopped="asked to stop")
                    raise Interrupted(f"stopped after step {self.step} of {train.steps}; go on with --resume")
            self._evaluate()
            self._checkpoint()
            if self.main:
                with self.averaged():
                    self.policy.export(self.run_folder.adapter)
        self._report(finished=now(), minutes=self.minutes)
        if recipe.run.trackers:
            self.accelerator.end_training()
        return self.run_folder.path

    def averaged(self) -> AbstractContextManager[None]:
        """The weights to evaluate and export: the average where one is kept."""
        return self.policy.using("ema") if "ema" in self.policy.snapshots else nullcontext()

    # One training step, in the order of the design's line.

    def _train_step(self) -> None:
        started = time.perf_counter()
        self.seconds.clear()
        with self._phase("rollout"):
            samples = self._rollout()
        with self._phase("reward"):
            figures = self._score(samples)
        with self._phase("train"):
            figures |= self._learn(samples)
        self.step += 1
        self.minutes += (time.perf_counter() - started) / 60
        line = {
            "step": self.step,
            "minutes": self.minutes,
            "forwards": self.policy.forwards * self.world,
            **figures,
            "seconds": dict(self.seconds),
        }
        if self.main:
            self.run_folder.log_step(line)
            self.accelerator.log({f"reward/{k}": v for k, v in figures["reward"].items()}, step=self.step)
        self.display.step(line)

    def _rollout(self) -> Samples:
        recipe = self.recipe
        rows = step_rows(self.rows, recipe.train.prompts_per_step, recipe.run.seed, self.step)
        share = len(rows) // self.world
        return rollout(
            self.policy,
            rows[self.rank * share : (self.rank + 1) * share],
            recipe.train.group_size,
            recipe.rollout,
            self.size,
            (ROLLOUT, recipe.run.seed, self.step),
            batch=recipe.rollout.batch,
            keep_trajectory=recipe.algorithm.needs == "trajectory",
        )

    def _score(self, samples: Samples) -> dict[str, Any]:
        """Rewards and advantages of the samples; statistics over all processes."""
        scores = score_all(self.rewards, samples.media, samples.prompts, samples.metadata)
        total = weighted_sum(scores, self.weights)
        samples.rewards = {name: score.values for name, score in scores.items()} | {"total": total}
        everyone = self.accelerator.gather(total)
        groups = torch.arange(self.recipe.train.prompts_per_step, device=total.device)
        groups = groups.repeat_interleave(self.recipe.train.group_size)
        global_std = getattr(self.recipe.algorithm, "global_std", False)
        advantages = group_advantages(everyone, groups, global_std=global_std)
        own = slice(self.rank * len(total), (self.rank + 1) * len(total))
        samples.advantages = advantages[own].to(total.device)
        samples.has_spread = has_spread(everyone, groups)[own]
        means, stds = {"total": everyone.mean().item()}, {"total": everyone.std().item()}
        for name, score in scores.items():
            applying = self.accelerator.gather(score.applies)
            values = self.accelerator.gather(score.values)[applying]
            if len(values) > 1:
                means[name], stds[name] = values.mean().item(), values.std().item()
        left_out = 1 - has_spread(everyone, groups).float().mean().item()
        return {"reward": means, "reward_std": stds, "zero_spread": left_out}

    def _learn(self, samples: Samples) -> dict[str, Any]:
        """The updates of one step: items in a counted order, split evenly between the updates."""
        train = self.recipe.train
        first, end = self.recipe.rollout.sde_window
        places = torch.cartesian_prod(torch.arange(len(samples)), torch.arange(end - first))
        places = places[samples.has_spread.cpu()[places[:, 0]]]
        sums: dict[str, float] = defaultdict(float)
        norms: list[float] = []
        items = 0
        for turn in range(train.passes):
            generator = counted_generator(ITEMS, self.recipe.run.seed, self.step, self.rank, turn)
            parts = places[torch.randperm(len(places), generator=generator)].tensor_split(train.updates_per_step)
            counts = torch.tensor([len(part) for part in parts], device=self.accelerator.device)
            for part, total in zip(parts, self.accelerator.reduce(counts, "sum").tolist(), strict=True):
                if total == 0:
                    continue
                if not self.tested:
                    self._self_test(samples, part)
                norms.append(self._update(samples, part, total, sums))
                items += total
        figures = {name: value / items for name, value in self._summed(sums).items()} if items else {}
        return {
            "loss": figures.pop("loss", 0.0),
            "figures": figures,
            "grad_norm": sum(norms) / len(norms) if norms else 0.0,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def _update(self, samples: Samples, places: torch.Tensor, total: int, sums: dict[str, float]) -> float:
        """One optimizer update on the items at `places` of `total` over all processes; returns the gradient norm."""
        algorithm, train = self.recipe.algorithm, self.recipe.train
        weight = 1.0
        if not len(places):  # this process has no item, but its gradients are awaited
            places, weight = torch.zeros(1, 2, dtype=torch.long), 0.0
        chunks = places.split(train.micro_batch)
        for index, chunk in enumerate(chunks):
            last = index == len(chunks) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.policy.transformer):
                loss, figures = algorithm.loss(self.policy, self.batch(samples, chunk))
                share = weight * len(chunk) / total
                self.accelerator.backward(loss * share * self.world)
            for name, figure in {"loss": loss.detach(), **figures}.items():
                sums[name] += weight * len(chunk) * figure.mean().item()
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, train.max_grad_norm))
        if not math.isfinite(norm):
            raise UserError(
                f"step {self.step + 1}: the gradient is {norm}; lower train.learning_rate or set model.dtype=fp32"
            )
        rise = min(1.0, (self.update + 1) / max(train.warmup_updates, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * rise
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.update += 1
        algorithm.after_update(self.policy, self.update)
        if train.ema_decay:
            self.policy.blend("ema", train.ema_decay)
        return norm

    def batch(self, samples: Samples, places: torch.Tensor) -> Batch:
        """The items at (sample, window step) `places`, (n, 2)."""
        row, step = places.to(samples.latents.device).unbind(1)
        train, sampler = self.recipe.train, self.recipe.rollout
        guidance = sampler.guidance if train.guidance is None else train.guidance
        assert samples.advantages is not None, "advantages are set before a batch is taken"
        transition = None
        if (path := samples.trajectory) is not None:
            sigmas = path.sigmas.to(row.device)
            transition = Transition(
                sigma=sigmas[step],
                sigma_next=sigmas[step + 1],
                sigma_max=path.sigma_max,
                state=path.states[row, step],
                next_state=path.states[row, step + 1],
                log_prob=path.log_probs[row, step],
                dynamics=path.dynamics,
                noise_level=path.noise_level,
            )
        return Batch(
            condition=samples.condition[samples.groups[row]],
            advantages=samples.advantages[row],
            groups=samples.groups[row],
            latents=samples.latents[row],
            guidance=guidance,
            reference_guidance=guidance if train.reference_guidance is None else train.reference_guidance,
            transition=transition,
        )

    # What surrounds the steps.

    def _begin(self) -> None:
        recipe = self.recipe
        if recipe.run.trackers:
            self.accelerator.init_trackers(recipe.name, config={"recipe": recipe.name})
        counts = {
            "trainable": sum(p.numel() for p in self.parameters),
            "all": sum(p.numel() for p in self.policy.module.parameters()),
        }
        device = torch.cuda.get_device_name() if self.accelerator.device.type == "cuda" else "cpu"
        if self.main:
            about = {"name": recipe.name, "versions": versions(), "command": command_line(), "device": device}
            started = {"started": now()} if self.step == 0 else {"resumed": now()}
            self.run_folder.update_info(**about, **started, parameters=counts, finished=None, stopped=None)
        self.display.begin(recipe, self.run_folder.path, counts, self.world)

    def _self_test(self, samples: Samples, places: torch.Tensor) -> None:
        self.tested = True
        items = self.batch(
            samples, places[: self.recipe.train.micro_batch] if len(places) else torch.zeros(1, 2).long()
        )
        forwards = self.policy.forwards
        results = self_test(self.policy, self.recipe.algorithm, items, samples)
        self.policy.forwards = forwards
        self.display.self_test(results)
        if self.main:
            self.run_folder.update_info(self_test=[result._asdict() for result in results])
        failed = [result for result in results if not result.passed]
        if failed:
            raise UserError(f"self-test failed: {failed[0].check}: {failed[0].detail}")

    def _evaluate(self) -> None:
        settings: Evaluation = self.recipe.evaluation
        if not self.evaluation_rows:
            return
        started = time.perf_counter()
        forwards = self.policy.forwards
        shard = self.evaluation_rows[self.rank :: self.world]
        with self.averaged(), self.display.evaluating(len(shard) * settings.images_per_prompt) as progress:
            own = evaluate(self.policy, shard, self.evaluation_rewards, settings, self.size, progress)
        self.policy.forwards = forwards  # measuring is not part of the training budget
        evaluated = own if self.world == 1 else gathered(own, settings.pictures)
        about = {
            "step": self.step,
            "minutes": self.minutes,
            "forwards": forwards * self.world,
            "guidance": settings.guidance,
            "sampler_steps": settings.steps,
            "seconds": time.perf_counter() - started,
        }
        if self.main:
            summary = self.run_folder.write_evaluation(f"step_{self.step:06d}", evaluated, about)
            self.display.evaluation(self.step, summary, about["seconds"])
        self.accelerator.wait_for_everyone()

    def _checkpoint(self) -> None:
        if self.main:
            counters = {
                "step": self.step,
                "update": self.update,
                "minutes": self.minutes,
                "forwards": self.policy.forwards,
            }
            keep = self.recipe.run.keep_checkpoints
            save_checkpoint(self.run_folder.checkpoints, self.policy, self.optimizer, counters, keep)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Go on from the last checkpoint; a run killed before its first begins again."""
        found = checkpoints(self.run_folder.checkpoints)
        if found:
            counters = load_checkpoint(found[-1], self.policy, self.optimizer)
            self.step, self.update = counters["step"], counters["update"]
            self.minutes, self.policy.forwards = counters["minutes"], counters["forwards"]
        if self.main:
            self.run_folder.forget_after(self.step)

    def _report(self, **info: Any) -> None:
        if self.main:
            self.run_folder.update_info(**info)
            self.display.finished(self.run_folder.path, write_report(self.run_folder.path))
        self.accelerator.wait_for_everyone()

    def _summed(self, sums: dict[str, float]) -> dict[str, float]:
        if self.world == 1 or not sums:
            return dict(sums)
        names = sorted(sums)
        values = torch.tensor([sums[name] for name in names], device=self.accelerator.device)
        return dict(zip(names, self.accelerator.reduce(values, "sum").tolist(), strict=True))

    def _out_of_time(self) -> bool:
        limit = self.recipe.run.max_minutes
        return limit is not None and self.minutes >= limit

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - started


def train(recipe: Recipe, *, resume: bool = False, display: Display | None = None) -> Path:
    """Run a recipe from start to end (or go on with it) and return its run folder."""
    return Trainer(recipe, resume=resume, display=display).run()
