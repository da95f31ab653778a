"""A recipe: the typed settings of one run, read from YAML, checked before anything loads."""

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from flowalign.algorithms import ALGORITHMS, Algorithm
from flowalign.mistakes import Keys, explain, key_lines, nearest
from flowalign.sampling.noise import WINDOW, counted_generator
from flowalign.sampling.steps import Dynamics
from flowalign.settings import Section, UserError

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(gt=0, lt=1)]


class Lora(Section):
    """Low-rank adapters, the trainable weights unless `model.lora` is null."""

    rank: Positive = 32
    """Rank of every adapter."""
    alpha: Rate = 64
    """Scale: the adapters' output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("attention",)
    """What is adapted: the groups attention and feed_forward, or endings of module names."""


class Model(Section):
    """The model to align."""

    path: str = "toyworld"
    """A diffusers pipeline folder, a hub id, or toyworld, the embedded model."""
    adapter: str | None = None
    """A LoRA folder in diffusers format to start from; it is merged into the weights."""
    height: Positive = 512
    """Pixels."""
    width: Positive = 512
    """Pixels."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the forward passes; auto is bf16 where the device multiplies it itself. Trainable weights and all
    probabilities stay float32."""
    attention: str = "auto"
    """Attention backend: auto, native, xformers, or any other name of diffusers' dispatcher."""
    max_sequence_length: NotNegative = 256
    """Tokens of the T5 encoder; a pipeline without T5 gets as many zero tokens, so give what it was trained with."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    lora: Lora | None = Lora()
    """The adapters to train; null trains all weights of the transformer."""


class Sampler(Section):
    """How pictures are drawn."""

    steps: Positive = 10
    """Denoising steps."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance; 1 is without, and costs half."""
    grid: Literal["model", "uniform"] = "model"
    """The scheduler's own sigmas, or evenly spaced ones (before its shift) that skip its nearly empty last step."""
    solver: Literal["euler", "dpm++"] = "euler"
    """Of the ODE: Euler, or DPM-Solver++ (2M) for good pictures in few steps."""


class Rollout(Sampler):
    """How the pictures to learn from are drawn."""

    dynamics: Literal[Dynamics, "ode"] = "flow_sde"
    """The stochastic step: flow_sde, dance_sde, cps or memoryless; ode is the default where no trajectory is needed."""
    noise_level: Annotated[float, Field(gt=0)] | None = 0.7
    """Its noise: a of flow_sde, eta of dance_sde, a in (0, 1) of cps; none for memoryless and ode."""
    window: tuple[NotNegative, NotNegative] | None = None
    """First stochastic step and the one after the last; all others are ODE steps. Null: all but the last."""
    window_size: Positive | None = None
    """Only so many steps of the window are stochastic at a time; null: all of them."""
    window_moves: Literal["random", "sliding"] = "random"
    """Where these are: drawn anew for every training step, or sliding on by one (MixGRPO)."""
    window_interval: Positive = 25
    """Training steps after which a sliding window moves."""
    shared_noise: bool = False
    """All pictures of a prompt start from the same noise and differ by their stochastic steps alone."""
    batch: Positive = 64
    """Pictures drawn at once."""

    @model_validator(mode="after")
    def _window_fits(self) -> "Rollout":
        first, end = self.sde_window
        if not first < end <= self.steps:
            raise ValueError(f"window [{first}, {end}] must lie within the {self.steps} steps and hold one at least")
        if self.window_size and self.window_size > end - first:
            raise ValueError(
                f"window_size {self.window_size} exceeds the {end - first} steps of window [{first}, {end}]"
            )
        if self.dynamics in ("cps", "memoryless") and end == self.steps:
            raise ValueError(f"window must end before step {self.steps}, where a {self.dynamics} step has no noise")
        if self.dynamics == "cps" and not (self.noise_level and self.noise_level < 1):
            raise ValueError("noise_level of cps must be below 1")
        if self.dynamics in ("memoryless", "ode"):
            if self.noise_level and "noise_level" in self.model_fields_set:
                raise ValueError(f"dynamics {self.dynamics} takes no noise_level; leave it out")
            object.__setattr__(self, "noise_level", None)
        elif self.noise_level is None:
            raise ValueError(f"dynamics {self.dynamics} needs a noise_level")
        if self.shared_noise and self.dynamics == "ode":
            raise ValueError("shared_noise makes the pictures of a prompt all alike with dynamics ode; leave it out")
        if self.solver != "euler" and self.dynamics != "ode":
            raise ValueError(f"solver {self.solver} follows the ODE; it cannot take stochastic steps ({self.dynamics})")
        return self

    @property
    def sde_window(self) -> tuple[int, int]:
        """The steps that may be stochastic, as [first, end)."""
        return self.window or (0, max(self.steps - 1, 1))

    @property
    def window_length(self) -> int:
        """How many steps are stochastic at a time."""
        first, end = self.sde_window
        return self.window_size or end - first

    def window_at(self, seed: int, step: int) -> tuple[int, int]:
        """The stochastic steps [first, end) of a training step, the same for all its samples; none for the ODE."""
        first, end = self.sde_window
        if self.dynamics == "ode":
            return first, first
        places = end - first - self.window_length + 1
        if self.window_moves == "sliding":
            first += (step // self.window_interval) % places
        else:
            first += int(torch.randint(places, (), generator=counted_generator(WINDOW, seed, step)))
        return first, first + self.window_length


class Shaping(Section):
    """How a reward is bent before it is learnt from; sources in `rewards.combine`."""

    form: Literal["standardise", "sigmoid", "log_sigmoid"]
    """In deviations from the references' mean; PAR's sigmoid of the difference to them; or log sigmoid of it."""
    reference: str | Annotated[tuple[float, ...], Field(min_length=1)]
    """Scores of the model before training: a store of groups that has this reward, or numbers for every prompt."""
    scale: Rate = 1.0
    """Of the difference, in sigmoid."""
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Of the references, in log_sigmoid."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "Shaping":
        _refuse_unused(self, {"scale": "sigmoid", "quantile": "log_sigmoid"})
        if self.form == "standardise" and not isinstance(self.reference, str) and len(set(self.reference)) < 2:
            raise ValueError("standardise needs references that differ")
        return self


class Combine(Section):
    """How several rewards become the one that advantages are made of; sources in `rewards.combine`."""

    form: Literal["sum", "worst", "uncertainty", "bonus"] = "sum"
    """Weighted mean; lowest; mean less variance; or base (floor + (1 - floor) bonus)."""
    penalty: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the variance, in uncertainty."""
    base: str | None = None
    """The reward without which nothing counts, in bonus."""
    bonus: str | None = None
    """The reward that adds to it, in bonus."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """What the base is worth without the bonus, in bonus: 0.4 for generation, 0.6 for editing."""
    disagreement: Annotated[float, Field(ge=0)] = 0.0
    """Samples on which the rewards disagree by U teach exp(-this U) as much; 0 leaves that out."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "Combine":
        _refuse_unused(self, {"penalty": "uncertainty", "base": "bonus", "bonus": "bonus", "floor": "bonus"})
        if self.form == "bonus" and (self.base is None or self.bonus is None or self.base == self.bonus):
            raise ValueError("form bonus needs two rewards, base and bonus")
        return self


def _refuse_unused(section: Any, used_by: Mapping[str, str]) -> None:
    """Raises ValueError for a setting that the section's form would ignore."""
    for name, form in used_by.items():
        if form != section.form and getattr(section, name) != type(section).model_fields[name].default:
            raise ValueError(f"{name} belongs to form {form}, not to {section.form}; leave it out")


class RewardSettings(Section):
    """One reward of a recipe."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Its weight in the total that the advantages are made of."""
    load: str | None = None
    """A built-in name, "file.py:Name" or "package.module:Name"; left out, the reward's key is its name."""
    options: dict[str, Any] = {}
    """Passed to the reward."""
    shaping: Shaping | None = None
    """How it is bent before it is learnt from; it is measured as it is."""


Rewards = Annotated[dict[str, RewardSettings], Field(min_length=1)]


class Train(Section):
    """How much is learnt, how fast; the batch arithmetic follows from it."""

    steps: Positive = 100
    """Training steps: one rollout and its updates each."""
    prompts_per_step: Positive = 48
    """Different prompts in a step, over all processes."""
    group_size: Annotated[int, Field(ge=2)] = 24
    """Pictures of each prompt; their rewards are compared with one another."""
    updates_per_step: Positive = 2
    """Optimizer updates in a pass over a step's items; each sees its own part of them."""
    passes: Positive = 1
    """Times that every item of a step is learnt from."""
    micro_batch: Positive = 32
    """Items (a picture at one denoising step) in a forward and backward pass."""
    learning_rate: Rate = 3e-4
    """Of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Of AdamW."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Of AdamW."""
    warmup_updates: NotNegative = 0
    """Updates over which the learning rate rises linearly."""
    max_grad_norm: Rate = 1.0
    """Gradients are clipped to this norm."""
    guidance: Annotated[float, Field(ge=1)] | None = None
    """Guidance of the trained policy in the loss; null: the rollout's."""
    reference_guidance: Annotated[float, Field(ge=1)] | None = None
    """Guidance of the reference in the KL; null: as in training."""
    ema_decay: Decay | None = None
    """Keep an exponential average of the weights, for evaluation and export."""


class Evaluation(Sampler):
    """How progress is measured: the same prompts and the same noise every time."""

    prompts: str | tuple[str, ...] | None = None
    """Prompt list(s), held out from training; null: no evaluation."""
    count: Positive | None = None
    """The first so many prompts of each list; null: all."""
    images_per_prompt: Positive = 1
    """Pictures drawn for each prompt."""
    every: NotNegative = 10
    """Training steps between evaluations; before and after training there is always one. 0: only those two."""
    batch: Positive = 64
    """Pictures drawn at once."""
    rewards: Rewards | None = None
    """What is measured; null: the training rewards."""
    pictures: NotNegative = 12
    """Fixed prompts whose pictures are kept at every evaluation."""
    seed: int = 0
    """Of the noise."""

    @field_validator("rewards")
    @classmethod
    def _measured_as_they_are(cls, rewards: dict[str, RewardSettings] | None) -> dict[str, RewardSettings] | None:
        for name, entry in (rewards or {}).items():
            if entry.shaping is not None:
                raise ValueError(f"{name}.shaping: an evaluation measures rewards as they are; leave it out")
        return rewards


class Run(Section):
    """Where the run lives and when it ends."""

    folder: str | None = None
    """The run folder; null: runs/ and the recipe's name."""
    seed: int = 0
    """Of prompts, noise and initial weights."""
    checkpoint_every: Positive = 10
    """Training steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """The last so many are kept."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """End after the step in which this much training time has passed."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Accelerate trackers to log to as well."""


class Collect(Section):
    """How `flowalign collect` fills the store, with the rollout's sampler."""

    prompts: Positive | None = None
    """The first so many prompts of the list; null: all."""
    group_size: Annotated[int, Field(ge=2)] = 16
    """Pictures of each prompt."""
    shard_prompts: Positive = 32
    """Prompts drawn and written at once; what a kill can cost."""


class Recipe(Section):
    """Everything that decides a run."""

    name: Annotated[str, Field(min_length=1, pattern=r"^\w[\w.-]*$")]
    """The run's name, and its folder's."""
    model: Model = Model()
    prompts: str | tuple[str, ...]
    """Prompt list(s) to train on: bundled names, .txt or .jsonl files."""
    rewards: Rewards
    combine: Combine = Combine()
    algorithm: SerializeAsAny[Algorithm]
    store: str | None = None
    """A store of groups to learn from in place of rollouts (`flowalign collect` makes one)."""
    collect: Collect = Collect()
    rollout: Rollout = Rollout()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    run: Run = Run()

    @model_validator(mode="before")
    @classmethod
    def _ode_where_no_trajectory_is_needed(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given, rollout = values.get("algorithm"), values.get("rollout", {})
        name = given.get("name") if isinstance(given, Mapping) else getattr(given, "name", given)
        kind = ALGORITHMS.get(name) if isinstance(name, str) else None
        if isinstance(rollout, Rollout):
            rollout = rollout.model_dump(include=rollout.model_fields_set)
        if kind is None or kind.needs != "final" or not isinstance(rollout, Mapping) or "dynamics" in rollout:
            return values
        return {**values, "rollout": {**rollout, "dynamics": "ode"}}

    @field_validator("rewards", mode="before")
    @classmethod
    def _numbers_are_weights(cls, value: Any) -> Any:
        return _with_weights(value)

    @field_validator("evaluation", mode="before")
    @classmethod
    def _evaluation_numbers_are_weights(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("rewards"), Mapping):
            return {**value, "rewards": _with_weights(value["rewards"])}
        return value

    @field_validator("algorithm", mode="before")
    @classmethod
    def _algorithm_by_name(cls, value: Any) -> Any:
        if isinstance(value, Algorithm):
            return value
        settings = {"name": value} if isinstance(value, str) else value
        if not isinstance(settings, Mapping) or "name" not in settings:
            raise ValueError(f"algorithm needs a name, one of {', '.join(ALGORITHMS)}")
        name = settings["name"]
        if name not in ALGORITHMS:
            raise ValueError(f"unknown algorithm {name!r}{nearest(str(name), ALGORITHMS)}")
        return ALGORITHMS[name].model_validate(settings)

    @model_validator(mode="after")
    def _parts_agree(self) -> "Recipe":
        if self.algorithm.needs == "trajectory" and self.rollout.dynamics == "ode":
            raise ValueError(f"rollout.dynamics ode leaves no stochastic step to {self.algorithm.name}")
        if self.store is not None and not self.algorithm.offline:
            able = ", ".join(name for name, kind in ALGORITHMS.items() if kind.offline)
            raise ValueError(f"store: {self.algorithm.name} learns from its own rollouts; from a store learns {able}")
        for key in ("base", "bonus"):
            name = getattr(self.combine, key)
            if name is not None and name not in self.rewards:
                raise ValueError(f"combine.{key}: there is no reward {name!r}{nearest(name, self.rewards)}")
        if self.combine.form != "sum" and self.algorithm.parts_rewards:
            raise ValueError(f"combine.form {self.combine.form}: {self.algorithm.name} takes each reward by itself")
        if self.combine.disagreement and not self.algorithm.has_advantages:
            raise ValueError(f"combine.disagreement weighs advantages; {self.algorithm.name} has none")
        if self.combine.disagreement and len(self.rewards) < 2:
            raise ValueError("combine.disagreement needs two rewards or more")
        self.algorithm.check(self.rollout, self.train, len(self.rewards))
        return self

    @model_validator(mode="after")
    def _items_suffice(self) -> "Recipe":
        if self.train.updates_per_step > self.items_per_step:
            raise ValueError(
                f"train.updates_per_step ({self.train.updates_per_step}) exceeds the "
                f"{self.items_per_step} items of a step"
            )
        return self

    @property
    def samples_per_step(self) -> int:
        """Pictures drawn in a training step."""
        return self.train.prompts_per_step * self.train.group_size

    @property
    def items_per_step(self) -> int:
        """Pictures times trained denoising steps or noise levels."""
        return self.samples_per_step * self.algorithm.draws(self.rollout)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.folder or f"runs/{self.name}")

    def arithmetic(self, processes: int = 1) -> list[tuple[str, str]]:
        """The batch arithmetic, as rows of a quantity and how it comes about."""
        train, sampler, draws = self.train, self.rollout, self.algorithm.draws(self.rollout)
        first, end = sampler.sde_window
        within = f"{draws} of steps {first} to {end - 1}" if sampler.window_size else f"{first} to {end - 1}"
        trained = f"steps {within} of {sampler.steps}" if self.algorithm.needs == "trajectory" else f"{draws} levels"
        until = f"as many as {self.run.max_minutes:g} minutes hold" if self.run.max_minutes else f"{train.steps}"
        items = math.ceil(self.items_per_step / train.updates_per_step)
        passes = math.ceil(items / processes / train.micro_batch)
        forwards = self.samples_per_step * sampler.steps * (2 if sampler.guidance > 1 else 1)
        return [
            ("pictures per step", f"{train.prompts_per_step} prompts x {train.group_size} = {self.samples_per_step}"),
            ("trained noise levels", trained),
            ("items per step", f"{self.samples_per_step} x {draws} = {self.items_per_step}"),
            ("items per update", f"{self.items_per_step} / {train.updates_per_step} updates = {items}"),
            ("micro-batches per update", f"{items} / {processes} process(es) / {train.micro_batch} = {passes}"),
            ("rollout forwards per step", "none, from the store" if self.store else f"{forwards}"),
            ("training steps", f"{until} x {train.passes * train.updates_per_step} updates"),
        ]


def _with_weights(rewards: Any) -> Any:
    """`ocr: 0.5` is short for `ocr: {weight: 0.5}`."""
    if not isinstance(rewards, Mapping):
        return rewards
    numbers = {name: {"weight": v} for name, v in rewards.items() if isinstance(v, int | float)}
    return {**rewards, **numbers}


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("flowalign.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a bundled name or a YAML file, with `key.sub=value` overrides.

    A recipe may name a `base`, another one whose sections it takes wherever it has none of its own. Raises UserError
    with the file, the line and the key of the first mistake.
    """
    values, origins = _read_recipe(source, ())
    given = {}
    for override in overrides:
        keys, value = _parse_override(override)
        _set(values, keys, value, override)
        given[keys] = override
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        section = str(next((found["loc"][0] for found in error.errors() if found["loc"]), ""))
        path, lines = origins.get(section, origins["name"] if "name" in origins else next(iter(origins.values())))
        raise UserError(explain(error, Recipe, path, lines, given)) from None


Origins = dict[str, tuple[Path, dict[Keys, int]]]


def _read_recipe(source: str | Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    """A recipe's values with those of its base, and where each section stands: the file and the lines of its keys."""
    path = bundled_recipes().get(str(source), Path(source))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = nearest(str(source), bundled_recipes())
        where = f"{above[-1]}: base: " if above else ""
        raise UserError(
            f"{where}no recipe {str(source)!r}: neither a readable file nor a bundled name{known}"
        ) from error
    if path in above:
        raise UserError(f"{above[-1]}: base: {source} is based on this recipe itself")
    try:
        values = yaml.safe_load(text)
        lines = key_lines(yaml.compose(text, yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{at}: not YAML: {getattr(error, 'problem', None) or error}") from error
    except ValueError as error:
        raise UserError(f"{path}, {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    base = values.pop("base", None)
    origins: Origins = {str(section): (path, lines) for section in values}
    if base is None:
        return values, origins
    if not isinstance(base, str):
        raise UserError(f"{path}, line {lines[('base',)]}: base must be a recipe's name or file, not {base!r}")
    beside = path.parent / base
    below, places = _read_recipe(beside if beside.is_file() else base, (*above, path))
    return {**below, **values}, {**places, **origins}


def recipe_from_dict(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain values; raises UserError as `load_recipe` does."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, Recipe, Path(where), {}, {})) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)


def _parse_override(text: str) -> tuple[Keys, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override {text!r} must be written key=value, such as train.steps=50")
    try:
        return tuple(key.split(".")), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: the value is not YAML") from error


def _set(values: dict[str, Any], keys: Keys, value: Any, override: str) -> None:
    for position, key in enumerate(keys[:-1], start=1):
        if isinstance(values.get(key), int | float | str):
            raise UserError(f"override {override!r}: {'.'.join(keys[:position])} is a single value, not a section")
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = value
