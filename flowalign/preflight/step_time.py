"""The time of a training step by phase, compared with its floor: the same passes of the models and nothing else.

The floor is measured by repeating every forward and backward pass of the trained modules in the step, and the decoding
of the same latents, with the same inputs in the same order. The time of a step above the floor is the toolkit's own
(schedules, noise, losses, the optimizer) and the wait for the rewards.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from flowalign.rollout.prompts import Row
from flowalign.trainer import Trainer
from rewards.combine import score_all


@dataclass
class Forward:
    """A call of a trained module."""

    module: torch.nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    gradient: bool
    adapters: bool


@dataclass
class Backward:
    """The gradients of `losses` losses through the transformer calls since the last backward pass."""

    losses: int


@dataclass
class Decoding:
    """Latents decoded to media."""

    latents: torch.Tensor


@dataclass
class Scoring:
    """Media given to the rewards."""

    media: torch.Tensor
    rows: Sequence[Row]


Passes = list[Forward | Backward | Decoding | Scoring]


@contextmanager
def recorded(trainer: Trainer) -> Iterator[Passes]:
    """Record the passes of the trainer's models while the block runs, in order."""
    passes: Passes = []
    policy = trainer.policy

    def called(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        passes.append(Forward(module, arguments, dict(keywords), torch.is_grad_enabled(), not policy._adapters_off))

    with ExitStack() as stack:

        def watch(owner: Any, name: str, seen: Callable[..., Forward | Backward | Decoding | Scoring]) -> None:
            function = getattr(owner, name)

            def watched(*args: Any, **kwargs: Any) -> Any:
                passes.append(seen(*args, **kwargs))
                return function(*args, **kwargs)

            setattr(owner, name, watched)
            stack.callback(setattr, owner, name, function)

        for module in policy.modules.values():
            stack.callback(module.register_forward_pre_hook(called, with_kwargs=True).remove)
        watch(trainer.learner, "_backward", lambda losses: Backward(losses.numel()))
        watch(policy, "decode", Decoding)
        watch(trainer.scorer, "judge", Scoring)
        yield passes


def play(trainer: Trainer, passes: Passes) -> None:
    """Repeat the recorded passes; the weights do not change, and nothing is scored."""
    policy = trainer.policy
    half = torch.autocast(policy.device.type, policy.dtype, enabled=policy.dtype != torch.float32)
    outputs: list[torch.Tensor] = []
    for one in passes:
        if isinstance(one, Forward):
            with torch.set_grad_enabled(one.gradient), nullcontext() if one.adapters else policy.reference(), half:
                output = one.module(*one.arguments, **one.keywords)
            if one.gradient:
                outputs.append(output[0] if isinstance(output, tuple) else output)
        elif isinstance(one, Backward):
            gradients = [torch.ones_like(output) for output in outputs]
            for turn in range(one.losses):
                torch.autograd.backward(outputs, gradients, retain_graph=turn < one.losses - 1)
            outputs = []
        elif isinstance(one, Decoding):
            policy.decode(one.latents)
    for parameter in trainer.learner.parameters:
        parameter.grad = None


def score(trainer: Trainer, passes: Passes) -> None:
    """Score the recorded media again, one batch after another, and do nothing else."""
    for one in passes:
        if isinstance(one, Scoring):
            texts, metadata = [row.prompt for row in one.rows], [row.metadata for row in one.rows]
            score_all(trainer.scorer.rewards, one.media, texts, metadata)


def time_steps(trainer: Trainer, repeats: int, warm_ups: int = 1) -> dict[str, float]:
    """Medians over `repeats` training steps, each followed by its floor; `warm_ups` pairs before them do not count.

    In seconds: the phases "rollout", "reward" (the wait for rewards) and "train", the whole "step", its "floor", the
    decoding in it ("decode"), and scoring alone ("scores"). "ratio" is the median of step / floor over the pairs.
    """
    trainer.tested = True  # the self-test is no part of a step
    rows: list[dict[str, float]] = []
    for repeat in range(warm_ups + repeats):
        with recorded(trainer) as passes:
            step = seconds_of(trainer._train_step)
        phases = dict(trainer.seconds)
        floor = seconds_of(partial(play, trainer, passes))
        decode = seconds_of(partial(play, trainer, [one for one in passes if isinstance(one, Decoding)]))
        scores = seconds_of(partial(score, trainer, passes))
        if repeat >= warm_ups:
            row = {**phases, "step": step, "floor": floor, "decode": decode, "scores": scores}
            rows.append({**row, "ratio": step / floor})
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def seconds_of(function: Callable[[], Any]) -> float:
    """The seconds of a call, including the work that it gives to the device."""
    _synchronize()
    started = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
