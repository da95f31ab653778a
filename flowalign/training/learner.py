"""From a step's samples to optimizer updates: units in a counted order, micro-batches, one or several gradients."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from accelerate import Accelerator

from flowalign.algorithms.base import Algorithm
from flowalign.algorithms.batches import Batches, Turn
from flowalign.config import Train
from flowalign.config.base import UserError
from flowalign.policies.base import Policy
from flowalign.rollout.generate import Progress
from flowalign.rollout.stages import Weighted
from flowalign.sampling import counted_generator
from flowalign.sampling.noise import ITEMS
from flowalign.training.processes import Share, shares_of_updates, sum_gradients, summed
from flowalign.training.selftest import LOWEST_SCALE, SelfTest


def optimizer_class(name: Literal["adamw", "adamw8bit"]) -> Callable[..., torch.optim.Optimizer]:
    """AdamW, or bitsandbytes' AdamW with 8-bit averages (Dettmers et al. 2022). Raises UserError if that is absent."""
    if name == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "train.optimizer adamw8bit needs bitsandbytes; install it with pip install 'flowalign[bitsandbytes]', "
            "or use adamw"
        ) from error
    return AdamW8bit


class Learner:
    """Turns samples into optimizer updates; `update` counts them."""

    def __init__(
        self,
        train: Train,
        algorithm: Algorithm,
        policy: Policy,
        accelerator: Accelerator,
        *,
        seed: int,
        guidance: float,
        remedy: str,
    ):
        """guidance: the rollout's, for a `train` that names none; remedy: the advice that ends an error about NaN."""
        self.train, self.algorithm, self.policy, self.accelerator = train, algorithm, policy, accelerator
        self.seed, self.remedy = seed, remedy
        self.guidance = guidance if train.guidance is None else train.guidance
        self.parameters = list(policy.trainable_parameters().values())
        self.optimizer = optimizer_class(train.optimizer)(
            self.parameters, lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay
        )
        # A half-precision gradient is 0 below 6e-8 and infinite above 65504 (Micikevicius et al. 2018, section 3.2).
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.dtype == torch.float16)
        self.update = 0
        self.in_lockstep = policy.in_lockstep

    def learn(
        self, weighted: Weighted, step: int, test: SelfTest | None = None, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Train on the samples of training step `step`; returns the metrics to log.

        test: checks these updates. progress: called with each micro-batch's share of its update.

        Raises UserError for a loss or a gradient that is not finite. In half precision an update whose gradient
        overflows is skipped, and the loss scale is halved.
        """
        train, algorithm = self.train, self.algorithm
        metrics = StepMeans()
        norms: list[float | None] = []
        for turn in range(train.inner_epochs):
            batches = algorithm.batches(weighted, self._turn(step, turn))
            units = batches.units()
            generator = counted_generator(ITEMS, self.seed, step, 0, turn)
            count = torch.tensor([len(units)], device=self.accelerator.device)
            counts = self.accelerator.gather(count).tolist()
            for share in shares_of_updates(counts, self.accelerator.process_index, train.updates_per_step, generator):
                if share.total == 0:
                    continue
                chunks = self._chunks(batches, units, share)
                if test and not norms:
                    test.begin(batches.batch(chunks[0][0], self.update), self.scaler.get_scale())
                norms.append(self._update(batches, chunks, share.total, step, metrics, test, progress))
        taken = [norm for norm in norms if norm is not None]
        if taken:
            algorithm.after_update(self.policy, self.update)
        if test:
            test.end()
        means = metrics.means(self.accelerator)
        seen = {
            "loss": means.pop("loss", 0.0),
            "metrics": means,
            "grad_norm": sum(taken) / len(taken) if taken else 0.0,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        if self.scaler.is_enabled():
            seen |= {"skipped_updates": len(norms) - len(taken), "gradient_scale": self.scaler.get_scale()}
        return seen

    def _turn(self, step: int, turn: int) -> Turn:
        train, reference = self.train, self.train.reference_guidance
        return Turn(
            seed=self.seed,
            step=step,
            turn=turn,
            group_size=train.group_size,
            micro_batch=train.micro_batch,
            guidance=self.guidance,
            reference_guidance=self.guidance if reference is None else reference,
        )

    def _chunks(self, batches: Batches[Any], units: torch.Tensor, share: Share) -> list[tuple[torch.Tensor, int]]:
        """Micro-batches of whole units, each with the number of units that it counts for.

        Spare micro-batches that count for 0 units follow where other processes wait for this one. A process without
        units gets one, so that it has the same metrics and gradients to sum. With a sharded model every process gets as
        many micro-batches as the process with the most units.
        """
        own = units[share.places]
        size = max(1, self.train.micro_batch // units.shape[1])
        chunks = [(chunk, len(chunk)) for chunk in own.split(size) if len(chunk)]
        wanted = math.ceil(share.most / size) if self.in_lockstep else 1
        # A spare unit is as large as any other, since other processes wait for its passes.
        return chunks + [(own[:1] if len(own) else batches.spare(), 0)] * (wanted - len(chunks))

    def _update(
        self,
        batches: Batches[Any],
        chunks: Sequence[tuple[torch.Tensor, int]],
        total: int,
        step: int,
        metrics: "StepMeans",
        test: SelfTest | None,
        progress: Progress | None,
    ) -> float | None:
        """One optimizer update on the chunks; returns the gradient norm, or None if the update is skipped.

        total: the number of units in the update over all processes.
        """
        train = self.train
        gradients: torch.Tensor | float = 0.0
        finite = True
        for chunk, counted in chunks:
            loss, seen = self.algorithm.loss(self.policy, batches.batch(chunk, self.update))
            share = self.scaler.scale(loss * (counted / total))
            gradients = gradients + self._backward(share)
            finite = finite and bool(loss.isfinite().all())
            metrics.add({"loss": loss.detach(), **seen}, counted)
            if test:
                test.saw(chunk, counted, seen)
            if progress:
                progress(1 / len(chunks))
        if isinstance(gradients, torch.Tensor):
            self._join(gradients, metrics)
        else:
            sum_gradients(self.accelerator, self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, train.max_grad_norm))
        if not math.isfinite(norm):
            self._skip(norm, finite, step)
            return None
        if test:
            test.before_step()
        rise = min(1.0, (self.update + 1) / max(train.warmup_updates, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * rise
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.weights_changed()
        decay = train.ema_decay_at(self.update)
        self.update += 1
        if decay is not None:
            self.policy.blend("ema", decay)
        return norm

    def _skip(self, norm: float, finite: bool, step: int) -> None:
        """Skip an update whose gradient norm is not finite, in all processes alike, and halve the loss scale.

        finite: whether this process's losses are finite. Raises UserError where skipping does not help: for a loss that
        is not finite, in full precision, and at the lowest scale.
        """
        (broken,) = summed(self.accelerator, not finite)
        if broken:
            raise UserError(f"step {step + 1}: the loss is not finite, though the samples are; {self.remedy}")
        scale = self.scaler.get_scale()
        if not self.scaler.is_enabled():
            raise UserError(
                f"step {step + 1}: the gradient is {norm}, though loss and samples are finite; {self.remedy}"
            )
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.get_scale() == scale or scale <= LOWEST_SCALE:
            raise UserError(
                f"step {step + 1}: the gradient overflows in half precision at every loss scale, last at {scale:g}; "
                f"{self.remedy}"
            )

    @torch.profiler.record_function("backward")
    def _backward(self, losses: torch.Tensor) -> torch.Tensor | float:
        """The gradients (L, P) of losses (L,) on one graph; a single loss () gives them to the parameters."""
        if losses.ndim == 0:
            losses.backward()
            return 0.0
        rows = []
        for index, loss in enumerate(losses):
            kept = index < len(losses) - 1
            found = torch.autograd.grad(loss, self.parameters, retain_graph=kept, allow_unused=True)
            pairs = zip(found, self.parameters, strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
        return torch.stack(rows)

    def _join(self, gradients: torch.Tensor, metrics: "StepMeans") -> None:
        """Set the parameters' gradients to the algorithm's combination of the gradients (L, P)."""
        gradients = self.accelerator.reduce(gradients, "sum")
        weights = torch.ones(len(gradients))  # if a gradient is not finite, which the joined norm then shows
        seen: Mapping[str, float] = {}
        if gradients.isfinite().all():
            gram = gradients.double() @ gradients.double().T / self.scaler.get_scale() ** 2
            weights, seen = self.algorithm.join(gram.cpu())
        joined = weights.to(gradients) @ gradients
        parts = joined.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        metrics.add({name: torch.tensor(value) for name, value in seen.items()}, 1.0)


class StepMeans:
    """Means of metrics over the units of a step, from all its updates and processes."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.weights: dict[str, float] = defaultdict(float)

    def add(self, metrics: dict[str, torch.Tensor], weight: float) -> None:
        """Add metrics; the mean of each counts `weight` times."""
        for name, value in metrics.items():
            self.sums[name] += weight * value.mean().item()
            self.weights[name] += weight

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean of each metric over all processes."""
        names = sorted(self.sums)
        if not names:
            return {}
        both = torch.tensor([[self.sums[name], self.weights[name]] for name in names], dtype=torch.float64)
        if accelerator.num_processes > 1:
            both = accelerator.reduce(both.to(accelerator.device), "sum").cpu()
        return {name: total / weight for name, (total, weight) in zip(names, both.tolist(), strict=True)}
