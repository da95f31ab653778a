"""What a recipe needs, before any weights are loaded: memory by part, forwards, floating point operations, hours.

The recipe describes a step over all processes (prompts, group size, updates). A plan computes the share of each process
and refuses what cannot work, with the nearest setting that does. Estimated peaks of forward and backward passes agree
with measured ones to 0.3 % on a CPU in float32 (tests/preflight/test_planning.py); they were not measured on a GPU.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

from flowalign.algorithms.base import algorithm_of
from flowalign.config import Recipe
from flowalign.config.base import CheckFailed, UserError
from flowalign.policies.diffusers_pipeline import PipelinePolicy
from flowalign.preflight.forwards import Forwards, Snapshots, step_forwards
from flowalign.preflight.model_size import (
    Line,
    condition_rows,
    decode_pass,
    meta_policy,
    parameters,
    transformer_pass,
    whole_at_once,
)
from flowalign.rollout.prompts import load_prompts
from flowalign.training.processes import MESSAGE, refuse_all_trained

GIB = 2**30
RUNTIME = 1.5 * GIB  # assumed: the device's context, libraries' workspaces, fragmentation
TFLOPS = 150.0  # assumed: the rate that a data-centre GPU sustains in bf16, at most a third of an H100's dense rate


class Part(NamedTuple):
    """A part of the memory that one process holds all the time."""

    name: str
    bytes: float
    how: str


@dataclass(frozen=True)
class Plan:
    """The memory, compute and time of a recipe on a number of GPUs."""

    recipe: Recipe
    gpus: int
    vram: float  # bytes
    parts: list[Part]
    phases: dict[str, float]  # the peak of each phase in bytes, including all parts
    largest_micro_batch: int
    forwards: Forwards  # of each step from the second on
    step_flops: float
    evaluation_flops: float | None  # of one evaluation; None if its prompts do not exist yet
    tflops: float

    @property
    def step_seconds(self) -> float:
        """Seconds of a step for the model alone, without rewards."""
        return self.step_flops / (self.gpus * self.tflops * 1e12)

    @property
    def hours(self) -> float:
        """Hours of all training steps and evaluations, without rewards."""
        train, every = self.recipe.train, self.recipe.evaluation.every
        evaluations = 2 + (math.ceil(train.steps / every) - 1 if every else 0)
        measured = evaluations * (self.evaluation_flops or 0) / (self.gpus * self.tflops * 1e12)
        return (train.steps * self.step_seconds + measured) / 3600


class Costs:
    """The costs of a model's passes, computed on first use; its frozen weights are sharded over `shares` processes."""

    def __init__(self, policy: PipelinePolicy, shares: int = 1):
        self.policy, self.shares = policy, shares
        self.counts = parameters(policy)
        self.element = policy.dtype.itemsize
        self.latent = 4 * math.prod(policy.latent_shape(policy.request))
        self.image = 4 * 3 * policy.request.height * policy.request.width
        self.condition = sum(x.nbytes for x in condition_rows(policy, 1).tensors.values())
        self.decoding = cache(lambda images: decode_pass(policy, images))
        self._pass = cache(partial(transformer_pass, policy))

    def flops(self, *, backward: bool, checkpointing: bool = False) -> float:
        """Floating point operations of one row."""
        return self._pass(1, backward=backward, checkpointing=checkpointing).flops

    def bytes(self, *, backward: bool, checkpointing: bool = False) -> Line:
        """Bytes as a function of rows, without weights and gradients."""
        one, two = (self._pass(rows, backward=backward, checkpointing=checkpointing).peak for rows in (1, 2))
        return Line(two - one, 2 * one - two)


def plan(recipe: Recipe, gpus: int, vram: float, tflops: float = TFLOPS, costs: Costs | None = None) -> Plan:
    """The plan of a recipe on `gpus` GPUs, each with `vram` bytes and a sustained rate of `tflops` TFLOP/s.

    `costs` may come from an earlier plan for the same model.

    Raises CheckFailed for a recipe that cannot run, with the nearest settings that can, and UserError as `load_policy`
    does for a model.
    """
    _refuse_uneven(recipe, gpus)
    costs = costs or Costs(meta_policy(recipe.model))
    if costs.shares > 1:
        refuse_all_trained(recipe)
    forwards = step_forwards(recipe)[-1]
    refuse_too_large(recipe, costs, gpus, vram, forwards)
    images = 0 if recipe.dataset else recipe.samples_per_step
    decode = costs.decoding(1).flops
    step = (forwards.rollout + forwards.fixed) * costs.flops(backward=False) + images * decode
    checkpointing = recipe.model.gradient_checkpointing
    step += forwards.trained * costs.flops(backward=True, checkpointing=checkpointing)
    return Plan(
        recipe,
        gpus,
        vram,
        held(recipe, costs, gpus),
        phases(recipe, costs, gpus, forwards),
        _largest_micro_batch(recipe, costs, gpus, vram, forwards),
        forwards,
        step,
        _evaluation_flops(recipe, costs, decode),
        tflops,
    )


def _refuse_uneven(recipe: Recipe, gpus: int) -> None:
    prompts = recipe.train.prompts_per_step
    if prompts % gpus == 0:
        return
    divisors = [n for n in range(1, prompts + 1) if prompts % n == 0]
    near = min(divisors, key=lambda n: (abs(n - gpus), n))
    multiple = max(gpus, round(prompts / gpus) * gpus)
    raise CheckFailed(
        f"train.prompts_per_step ({prompts}) must be a multiple of the {gpus} processes: use --gpus {near}, or "
        f"train.prompts_per_step={multiple}"
    )


def snapshots(recipe: Recipe) -> list[str]:
    """The names of a run's copies of the trained weights."""
    names = Snapshots(algorithm_of(recipe.algorithm)).names
    if recipe.train.ema_decay is not None:
        names.append("ema")
    return names + (["reference"] if recipe.model.lora is None else [])


def held(recipe: Recipe, costs: Costs, gpus: int) -> list[Part]:
    """The memory that one process holds all the time, by part."""
    counts, model, train = costs.counts, recipe.model, recipe.train
    full, weights = model.lora is None, counts["trainable"]
    texts = _text_encoders(costs)
    kept = snapshots(recipe)
    small = train.optimizer == "adamw8bit"
    element, text_bytes = 4 if full else costs.element, texts * costs.element
    released = f"released after encoding; {text_bytes / GIB:.2f} GiB while the run starts"
    per_process = recipe.samples_per_step // gpus
    modules = sum(counts[name] for name in costs.policy.modules)
    frozen = f"{modules:,} weights and {counts['buffers']:,} constants x {element} B"
    if costs.shares > 1:
        frozen = f"a share of {frozen}"
    parts = [
        Part(_modules(costs), (modules / costs.shares + counts["buffers"]) * element, frozen),
        Part("text encoders", 0, released)
        if model.cache_conditions
        else Part("text encoders", text_bytes, f"{texts:,} weights x {costs.element} B"),
        Part("autoencoder", counts["vae"] * 4, f"{counts['vae']:,} weights x 4 B"),
    ]
    if costs.shares > 1:
        together = whole_at_once(costs.policy)
        parts.append(Part("blocks put together", together * element, f"{together:,} weights x {element} B, two blocks"))
    if not full:
        parts.append(Part("adapters", weights * 4, f"{weights:,} weights x 4 B"))
    parts += [
        Part("gradients", weights * 4, "4 B per weight"),
        Part("optimizer", weights * (2 if small else 8), f"{train.optimizer}, {2 if small else 8} B per weight"),
        Part("snapshots", weights * 4 * len(kept), ", ".join(kept) or "none"),
    ]
    if gpus > 1:
        parts.append(Part("gradients sent", min(weights, MESSAGE) * 8, "8 B per weight of a message"))
    # Per loss: its gradient, their sum and their stack in float32, and two copies in float64 for the products.
    if algorithm_of(recipe.algorithm).cost(frozenset()).apart:
        losses = len(recipe.trained_rewards)
        parts.append(Part("gradients apart", weights * 28 * losses, f"{losses} losses x 28 B per weight"))
    parts.append(Part("a step's samples", _samples_bytes(recipe, costs, gpus), f"{per_process} latents and paths"))
    parts.append(Part("runtime", RUNTIME, "assumed"))
    return parts


def _modules(costs: Costs) -> str:
    """Their names."""
    return " and ".join(costs.policy.modules)


def _text_encoders(costs: Costs) -> int:
    """The number of weights in the text encoders."""
    return sum(number for name, number in costs.counts.items() if name.startswith("text_encoder"))


def _samples_bytes(recipe: Recipe, costs: Costs, gpus: int) -> float:
    algorithm, window = algorithm_of(recipe.algorithm), recipe.rollout.window_length
    states = 1
    if "trajectory" in algorithm.keep:
        states += window + 1 + window * ("means" in algorithm.keep)
    return (recipe.samples_per_step * states * costs.latent + recipe.train.prompts_per_step * costs.condition) / gpus


def phases(recipe: Recipe, costs: Costs, gpus: int, forwards: Forwards) -> dict[str, float]:
    """The peak memory of one process in each phase, in bytes, including what it holds all the time."""
    parts = {part.name: part.bytes for part in held(recipe, costs, gpus)}
    base, samples, found = sum(parts.values()), parts["a step's samples"], {}
    if recipe.model.cache_conditions:  # the text encoders stay in memory until all prompts are encoded
        loaded = (_modules(costs), "autoencoder", "adapters", "runtime")
        found["start"] = sum(parts.get(name, 0) for name in loaded) + _text_encoders(costs) * costs.element
    if not recipe.dataset:
        found["rollout"] = base + _drawing(recipe.rollout.batch, recipe.rollout.guidance, costs)
    found["train"] = base + _learning(recipe, costs, forwards).at(recipe.train.micro_batch) + _unit(recipe, costs)
    if recipe.evaluation.prompts:
        evaluation = recipe.evaluation
        found["evaluation"] = base - samples + _drawing(evaluation.batch, evaluation.guidance, costs)
    return found


def _drawing(batch: int, guidance: float, costs: Costs) -> float:
    """Bytes to draw a batch: the larger of a forward pass and of decoding."""
    rows = batch * (2 if guidance > 1 else 1)
    forward = costs.bytes(backward=False).at(rows) + rows * (2 * costs.latent + costs.condition)
    return float(max(forward, costs.decoding(batch).peak))


def _learning(recipe: Recipe, costs: Costs, forwards: Forwards) -> Line:
    """Bytes of a micro-batch as a function of its items: the backward pass, and a forward pass of the reference."""
    own = recipe.rollout.guidance if recipe.train.guidance is None else recipe.train.guidance
    rows = 2 if own > 1 else 1
    kept = costs.bytes(backward=True, checkpointing=recipe.model.gradient_checkpointing)
    fixed = costs.bytes(backward=False) if forwards.fixed else Line(0, 0)
    inputs = 4 * costs.latent + costs.condition
    return Line(rows * (kept.each + fixed.each + inputs), kept.fixed + fixed.fixed)


def _unit(recipe: Recipe, costs: Costs) -> float:
    """Bytes of the states, velocities and conditions of a unit's other items, if a micro-batch is a part of a unit."""
    others = recipe.unit_items - recipe.train.micro_batch
    return max(0, others) * (4 * costs.latent + costs.condition)


def _largest_micro_batch(recipe: Recipe, costs: Costs, gpus: int, vram: float, forwards: Forwards) -> int:
    """The largest number of items that fits, at most the items of an update on one process; 0 if not one fits.

    The number is in whole units. If not one unit fits, it is the largest part of a unit that does.
    """
    base = sum(part.bytes for part in held(recipe, costs, gpus))
    unit, needed = recipe.unit_items, _learning(recipe, costs, forwards)
    most = math.ceil(recipe.items_per_step / recipe.train.updates_per_step / gpus / unit) * unit
    fit = math.floor((vram - base - needed.fixed) / needed.each)
    if fit >= unit:
        return min(most, fit // unit * unit)
    others = 4 * costs.latent + costs.condition
    return max(0, math.floor((vram - base - needed.fixed - unit * others) / (needed.each - others)))


def refuse_too_large(recipe: Recipe, costs: Costs, gpus: int, vram: float, forwards: Forwards) -> None:
    """Raises CheckFailed if a phase does not fit, with the nearest settings that do."""
    needs = phases(recipe, costs, gpus, forwards)
    worst = max(needs, key=lambda name: needs[name])
    if needs[worst] <= vram:
        return
    text = f"the {worst} phase needs {needs[worst] / GIB:.1f} GiB, but a GPU has {vram / GIB:.1f} GiB"
    least = math.inf
    for changes in _alternatives(recipe):
        tried = _changed(recipe, changes)
        fitting = _batches_that_fit(tried, costs, gpus, vram, forwards)
        if fitting is not None:
            settings = " ".join(f"{key}={value}" for key, value in {**changes, **fitting}.items())
            raise CheckFailed(f"{text}; what fits: {settings}")
        small = _changed(tried, {"train.micro_batch": 1})
        small = _changed(small, {"rollout.batch": 1, "evaluation.batch": 1})
        least = min(least, max(phases(small, costs, gpus, forwards).values()))
    raise CheckFailed(
        f"{text}; with the smallest batches, gradient checkpointing, cached conditions and the 8-bit optimizer the run "
        f"still needs {least / GIB:.1f} GiB; use larger GPUs or a lower model.lora.rank"
    )


def _alternatives(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Changes of other settings than the batches: none, then one more at a time."""
    changes: dict[str, Any] = {}
    yield dict(changes)
    for key, wanted in (
        ("model.gradient_checkpointing", "true"),
        ("model.cache_conditions", "conditions"),
        ("train.optimizer", "adamw8bit"),
    ):
        section, name = key.split(".")
        if getattr(getattr(recipe, section), name) in (False, None, "adamw"):
            changes[key] = wanted
            yield dict(changes)


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    for key, value in changes.items():
        section, name = key.split(".")
        part = getattr(recipe, section).model_copy(update={name: True if value == "true" else value})
        recipe = recipe.model_copy(update={section: part})
    return recipe


def _batches_that_fit(
    recipe: Recipe, costs: Costs, gpus: int, vram: float, forwards: Forwards
) -> dict[str, int] | None:
    """The batches to lower, with their new sizes; None if not even the smallest fit."""
    found: dict[str, int] = {}
    micro_batch = min(recipe.train.micro_batch, _largest_micro_batch(recipe, costs, gpus, vram, forwards))
    if micro_batch == 0:
        return None
    if micro_batch < recipe.train.micro_batch and phases(recipe, costs, gpus, forwards)["train"] > vram:
        found["train.micro_batch"] = micro_batch
    for phase in ("rollout", "evaluation"):
        batch = getattr(recipe, phase).batch
        while batch and phases(_changed(recipe, {f"{phase}.batch": batch}), costs, gpus, forwards).get(phase, 0) > vram:
            batch //= 2
        if batch == 0:
            return None
        if batch < getattr(recipe, phase).batch:
            found[f"{phase}.batch"] = batch
    fits = max(phases(_changed(recipe, found), costs, gpus, forwards).values()) <= vram
    return found if fits else None


def _evaluation_flops(recipe: Recipe, costs: Costs, decode: float) -> float | None:
    settings = recipe.evaluation
    if settings.prompts is None:
        return 0.0
    try:
        images = len(load_prompts(settings.prompts, settings.count)) * settings.images_per_prompt
    except UserError:  # a recipe can be planned before its prompts exist
        return None
    rows = settings.steps * (2 if settings.guidance > 1 else 1)
    return images * (rows * costs.flops(backward=False) + decode)
