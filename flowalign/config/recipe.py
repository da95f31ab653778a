"""A recipe: the typed settings of one run, read from YAML, checked before anything loads."""

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from flowalign.config.algorithm import BUILT_IN, AlgorithmSettings, algorithm_names, settings_class
from flowalign.config.base import Section, UserError
from flowalign.config.mistakes import Origins, explain, key_lines, nearest, origin_of
from flowalign.config.paths import Keys, expanded, located
from flowalign.config.renamed import of_today, with_names_of_today
from flowalign.config.rewards import Combine, Rewards, RewardSettings, WeightedMean
from flowalign.config.sections import (
    Collect,
    Evaluation,
    Guard,
    Model,
    Rollout,
    Run,
    Train,
)


class Recipe(Section):
    """Everything that decides a run."""

    name: Annotated[str, Field(min_length=1, pattern=r"^\w[\w.-]*$")]
    """The run's name, and its folder's."""
    model: Model = Model()
    prompts: str | tuple[str, ...]
    """Prompt list(s) to train on: bundled names, or files .txt, .csv, .tsv, .json, .jsonl, with #COLUMN where it is not
    found by its name."""
    rewards: Rewards
    combine: Combine = WeightedMean()
    algorithm: SerializeAsAny[AlgorithmSettings]
    dataset: str | None = None
    """The folder of a dataset of groups to learn from in place of rollouts (`flowalign collect` makes one); null:
    rollouts."""
    collect: Collect = Collect()
    rollout: Rollout = Rollout()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    guard: Guard | None = Guard()
    """The audit; null: none."""
    run: Run = Run()

    @model_validator(mode="before")
    @classmethod
    def _ode_where_no_trajectory_is_needed(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        kind, rollout = _algorithm_of(values), values.get("rollout", {})
        if isinstance(rollout, Rollout):
            rollout = rollout.model_dump(include=rollout.model_fields_set)
        if kind is None or kind.needs != "final" or not isinstance(rollout, Mapping) or "dynamics" in rollout:
            return values
        return {**values, "rollout": {**rollout, "dynamics": "ode"}}

    @field_validator("rewards", mode="before")
    @classmethod
    def _numbers_are_weights(cls, value: Any) -> Any:
        return _with_weights(value)

    @field_validator("evaluation", "guard", mode="before")
    @classmethod
    def _measured_numbers_are_weights(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("rewards"), Mapping):
            return {**value, "rewards": _with_weights(value["rewards"])}
        return value

    @field_validator("algorithm", mode="before")
    @classmethod
    def _algorithm_by_name(cls, value: Any) -> Any:
        if isinstance(value, AlgorithmSettings):
            return value
        settings = {"name": value} if isinstance(value, str) else value
        if not isinstance(settings, Mapping) or "name" not in settings:
            raise ValueError(f"algorithm needs a name, one of {', '.join(algorithm_names())}")
        return settings_class(str(settings["name"])).model_validate(settings)

    @model_validator(mode="after")
    def _parts_agree(self) -> "Recipe":
        if self.algorithm.needs == "trajectory" and self.rollout.dynamics == "ode":
            raise ValueError(f"rollout.dynamics ode leaves no stochastic step to {self.algorithm.name}")
        if self.dataset is not None and not self.algorithm.offline:
            able = ", ".join(name for name in BUILT_IN if settings_class(name).offline)
            raise ValueError(
                f"dataset: {self.algorithm.name} learns from its own rollouts; from a dataset learns {able}"
            )
        for key, name in self.combine.needed.items():
            if name not in self.rewards:
                raise ValueError(f"combine.{key}: there is no reward {name!r}{nearest(name, self.rewards)}")
        if self.combine.form != "sum" and self.algorithm.parts_rewards:
            raise ValueError(f"combine.form {self.combine.form}: {self.algorithm.name} takes each reward by itself")
        if self.combine.disagreement and not self.algorithm.has_advantages:
            raise ValueError(f"combine.disagreement weighs advantages; {self.algorithm.name} has none")
        if self.combine.disagreement and len(self.trained_rewards) < 2:
            raise ValueError("combine.disagreement needs two rewards or more")
        self.algorithm.check(self.rollout, self.train, len(self.trained_rewards))
        return self

    @model_validator(mode="after")
    def _weights_are_weighed(self) -> "Recipe":
        trained, form = self.trained_rewards, self.combine.form
        if not trained:
            raise ValueError("rewards: every weight is 0, so nothing is learnt from; give one a weight above 0")
        for name, entry in self.rewards.items():
            if form == "bonus" and entry.weight != (name in self.combine.needed.values()):
                raise ValueError(
                    f"rewards.{name}.weight: combine.form bonus takes 1 of base and bonus, 0 of all others"
                )
            if name in trained and entry.weight != 1 and (len(trained) == 1 or form == "worst"):
                why = "combine.form worst weighs" if form == "worst" else "one reward alone is weighed against"
                raise ValueError(f"rewards.{name}.weight: {why} nothing; leave it out")
        return self

    @model_validator(mode="after")
    def _evaluation_happens(self) -> "Recipe":
        settings, guard = self.evaluation, self.guard
        if settings.prompts is None:
            name = settings.changed(*type(settings).model_fields)
            if name and "prompts" not in settings.model_fields_set:  # null says that there is to be none
                raise ValueError(f"evaluation.{name}: without evaluation.prompts nothing is evaluated; name a list")
            if guard and guard.stop:
                raise ValueError("guard.stop: without evaluation.prompts nothing is audited; name a list")
        return self

    @model_validator(mode="after")
    def _held_out_rewards_are_held_out(self) -> "Recipe":
        held_out = (self.guard and self.guard.rewards) or {}
        for name, entry in held_out.items():
            for trained, other in self.rewards.items():
                if entry.loads(name) == other.loads(trained):
                    own = f"{entry.loads(name)} is trained on (rewards.{trained})"
                    raise ValueError(f"guard.rewards.{name}: {own}; an audit needs others")
            measured = (self.evaluation.rewards or self.rewards).get(name)
            if measured is not None and not entry.same_as(measured, name):
                raise ValueError(f"guard.rewards.{name}: the evaluation measures another reward {name!r}; rename one")
        corrected = self.guard and self.guard.corrected
        if corrected and corrected.reward not in self.rewards:
            raise ValueError(f"guard.corrected.reward: {corrected.reward!r} is none of rewards")
        if corrected and corrected.quality not in held_out:
            raise ValueError(f"guard.corrected.quality: {corrected.quality!r} is none of guard.rewards")
        return self

    def measured(self) -> tuple[dict[str, RewardSettings], dict[str, str]]:
        """The rewards that evaluations measure, by name, and under which of these names each training reward is.

        With a guard they are the evaluation's, the training rewards and the held-out ones, each once.
        """
        found = dict(self.evaluation.rewards or self.rewards)
        names = {}
        for trained, entry in self.rewards.items():
            same = [name for name, other in found.items() if entry.same_as(other, trained, name)]
            if same:
                names[trained] = same[0]
            elif self.guard:
                names[trained] = f"{trained} (trained)" if trained in found else trained
                found[names[trained]] = entry.model_copy(update={"load": entry.loads(trained)})
        return found | ((self.guard and self.guard.rewards) or {}), names

    @model_validator(mode="after")
    def _items_suffice(self) -> "Recipe":
        if self.train.updates_per_step > self.items_per_step:
            raise ValueError(
                f"train.updates_per_step ({self.train.updates_per_step}) exceeds the "
                f"{self.items_per_step} items of a step"
            )
        return self

    @property
    def trained_rewards(self) -> dict[str, RewardSettings]:
        """The rewards that are learnt from; a reward of weight 0 is only scored and logged."""
        return {name: entry for name, entry in self.rewards.items() if entry.weight > 0}

    @property
    def samples_per_step(self) -> int:
        """Samples drawn in a training step."""
        return self.train.prompts_per_step * self.train.group_size

    @property
    def items_per_step(self) -> int:
        """Samples times trained denoising steps or noise levels."""
        return self.samples_per_step * self.algorithm.draws(self.rollout)

    @property
    def unit_items(self) -> int:
        """How many items one loss needs together: one, a group at a level, or a group with all its trained steps."""
        group = self.train.group_size
        return {"item": 1, "group": group, "path": group * self.algorithm.draws(self.rollout)}[self.algorithm.unit]

    @property
    def in_parts(self) -> bool:
        """Whether a unit exceeds a micro-batch, so that its forward passes are computed a second time."""
        return self.train.micro_batch < self.unit_items

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.folder or f"runs/{self.name}")

    def arithmetic(self, processes: int = 1) -> list[tuple[str, str]]:
        """The batch arithmetic, as rows of a quantity and how it is computed."""
        train, sampler, draws = self.train, self.rollout, self.algorithm.draws(self.rollout)
        first, end = sampler.sde_window
        within = f"steps {first} to {end - 1} of {sampler.steps}"
        within = f"{draws} at a time, from {within}" if sampler.window_size else within
        trained = within if self.algorithm.needs == "trajectory" else f"{draws} levels"
        until = f"as many as {self.run.max_minutes:g} minutes hold" if self.run.max_minutes else f"{train.steps}"
        items = math.ceil(self.items_per_step / train.updates_per_step)
        unit, own = self.unit_items, f"{items} / {processes} process(es)"
        units = math.ceil(items / processes / unit)
        if self.in_parts:
            parts = math.ceil(unit / train.micro_batch)
            passes = f"{own} / {unit} x {parts} parts = {units * parts}, each with a second forward pass"
        else:
            size = train.micro_batch // unit
            passes = f"{own} / {size * unit} = {math.ceil(units / size)}"
        forwards = self.samples_per_step * sampler.steps * (2 if sampler.guidance > 1 else 1)
        return [
            ("samples per step", f"{train.prompts_per_step} prompts x {train.group_size} = {self.samples_per_step}"),
            ("trained noise levels", trained),
            ("items per step", f"{self.samples_per_step} x {draws} = {self.items_per_step}"),
            ("items per update", f"{self.items_per_step} / {train.updates_per_step} updates = {items}"),
            ("micro-batches per update", passes),
            ("rollout forwards per step", "none, from the dataset" if self.dataset else f"{forwards}"),
            ("training steps", f"{until} x {train.inner_epochs * train.updates_per_step} updates"),
        ]


def _algorithm_of(values: Mapping[str, Any]) -> type[AlgorithmSettings] | None:
    """The settings' class of the algorithm that a recipe's plain values name; None where the name is unknown."""
    given = values.get("algorithm")
    name = given.get("name") if isinstance(given, Mapping) else getattr(given, "name", given)
    return settings_class(name) if isinstance(name, str) and name in algorithm_names() else None


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
    """The recipe of a bundled name, a YAML file or a run folder, with `key.sub=value` overrides.

    A recipe may name a `base`, another one: it changes the keys that it names and keeps the others, but `rewards` and a
    section of another `name` or `form` are taken whole. Of a run folder it is the run's own, with this folder. Files
    that it names are looked for beside it, then in the working folder; those of an override or a run the other way
    round. Raises UserError with the file, the line and the key of the first mistake.
    """
    run = Path(source) / "recipe.yaml"
    is_run = str(source) not in bundled_recipes() and run.is_file()
    values, origins = _read_recipe(run if is_run else source, ())
    if is_run:  # it may have been moved
        _set(values, ("run", "folder"), str(source), f"run.folder={source}")
    given = {}
    for override in overrides:
        keys, value = _parse_override(override)
        _set(values, keys, value, override)
        given[keys] = override

    def places(keys: Keys) -> list[Path]:
        origin = origin_of(keys, origins)
        folder = origin[0].parent if origin else Path()
        overridden = any(keys[: len(one)] == one for one in given)
        return [Path(), folder] if overridden or (folder / "run.json").is_file() else [folder, Path()]

    try:
        return Recipe.model_validate(located(values, places))
    except ValidationError as error:
        path = run if is_run else _file_of(source)
        raise UserError(explain(error, Recipe, path, origins, given, _algorithm_of(values))) from None


def _file_of(source: str | Path) -> Path:
    return bundled_recipes().get(str(source), Path(expanded(str(source))))


def _read_recipe(source: str | Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    """A recipe's values over those of its base, and the file and line of each key."""
    path = _file_of(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = nearest(str(source), bundled_recipes())
        where = f"{above[-1]}: base: " if above else ""
        if path.is_dir():
            raise UserError(f"{where}{path} is a folder without a recipe.yaml, so no run; name a recipe") from error
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
    values = with_names_of_today(values)
    origins: Origins = {of_today(keys): (path, line) for keys, line in lines.items()}
    if base is None:
        return values, origins
    if not isinstance(base, str):
        raise UserError(f"{path}, line {lines[('base',)]}: base must be a recipe's name or file, not {base!r}")
    beside = path.parent / expanded(base)
    merged, below = _read_recipe(beside if beside.is_file() else base, (*above, path))
    _put_over(merged, values, below)
    return merged, below | origins


def _put_over(base: dict[str, Any], own: Mapping[str, Any], origins: Origins, within: Keys = ()) -> None:
    """Put a recipe's values over those of its base; the origins of values that are gone go too."""
    for key, value in own.items():
        keys = (*within, str(key))
        if key != "rewards" and _is_of_one_kind(base.get(key), value):
            _put_over(base[key], value, origins, keys)
            continue
        base[key] = value
        for gone in [one for one in origins if one[: len(keys)] == keys]:
            del origins[gone]


def _is_of_one_kind(below: Any, above: Any) -> bool:
    """Whether two sections can be merged: they have no different name or form."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return False
    return all(below[key] == above[key] for key in ("name", "form") if key in below and key in above)


def recipe_from_dict(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain values; raises UserError as `load_recipe` does."""
    try:
        return Recipe.model_validate(located(with_names_of_today(values), lambda _: [Path()]))
    except ValidationError as error:
        raise UserError(explain(error, Recipe, Path(where), {}, {}, _algorithm_of(values))) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)


def _parse_override(text: str) -> tuple[Keys, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override {text!r} must be written key=value, such as train.steps=50")
    try:
        keys = tuple(key.split("."))
        return of_today(keys), with_names_of_today(yaml.safe_load(value), keys)
    except (yaml.YAMLError, ValueError) as error:  # ValueError of a date that is none
        raise UserError(f"override {text!r}: the value is not YAML") from error


def _set(values: dict[str, Any], keys: Keys, value: Any, override: str) -> None:
    for position, key in enumerate(keys[:-1], start=1):
        if isinstance(values.get(key), int | float | str):
            raise UserError(f"override {override!r}: {'.'.join(keys[:position])} is a single value, not a section")
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = value
