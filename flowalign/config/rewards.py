"""The sections of a recipe about its rewards: each one, how it is bent, and how several become one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from flowalign.config.base import Section


def _form(section: Any) -> Any:
    """The form that a section names. pydantic reads it by itself only where no validator sees it first."""
    return section.get("form") if isinstance(section, Mapping) else getattr(section, "form", None)


def _own(section: type[Section], values: Any, earlier: Mapping[str, Any]) -> Any:
    """Values without the defaults of other forms, which earlier versions wrote into every recipe of a run."""
    if not isinstance(values, Mapping):
        return values
    known = section.model_fields
    return {key: value for key, value in values.items() if key in known or earlier.get(key, section) != value}


class _Bend(Section):
    """How a reward is bent before it is learnt from; sources in `rewards.combine`."""

    form: str
    """What it is compared by: standardise, sigmoid or log_sigmoid."""
    reference: str | Annotated[tuple[float, ...], Field(min_length=1)]
    """Scores of the model before training: a store of groups that has this reward, or numbers for every prompt."""

    @model_validator(mode="before")
    @classmethod
    def _without_other_forms(cls, values: Any) -> Any:
        return _own(cls, values, {"scale": 1.0, "quantile": 0.85})


class Standardise(_Bend):
    """In deviations from the references' mean."""

    form: Literal["standardise"]

    @field_validator("reference")
    @classmethod
    def _references_differ(cls, reference: str | tuple[float, ...]) -> str | tuple[float, ...]:
        if not isinstance(reference, str) and len(set(reference)) < 2:
            raise ValueError("standardise needs references that differ")
        return reference


class Sigmoid(_Bend):
    """PAR's sigmoid of the difference to the references."""

    form: Literal["sigmoid"]
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Of the difference."""


class LogSigmoid(_Bend):
    """Log sigmoid of the difference to the references."""

    form: Literal["log_sigmoid"]
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Of the references."""


Shaping = Annotated[
    Annotated[Standardise, Tag("standardise")]
    | Annotated[Sigmoid, Tag("sigmoid")]
    | Annotated[LogSigmoid, Tag("log_sigmoid")],
    Discriminator(_form),
]


class _Combination(Section):
    """How several rewards become the one that advantages are made of; sources in `rewards.combine`."""

    form: str
    """What is made of them: sum, worst, uncertainty or bonus."""
    disagreement: Annotated[float, Field(ge=0)] = 0.0
    """Samples on which the rewards disagree by U teach exp(-this U) as much; 0 leaves that out."""

    @model_validator(mode="before")
    @classmethod
    def _without_other_forms(cls, values: Any) -> Any:
        return _own(cls, values, {"penalty": 1.0, "base": None, "bonus": None, "floor": 0.4})

    @property
    def needed(self) -> Mapping[str, str]:
        """The rewards without which there is no total, by their part in it."""
        return {}


class WeightedMean(_Combination):
    """The weighted mean."""

    form: Literal["sum"] = "sum"


class Worst(_Combination):
    """The lowest."""

    form: Literal["worst"]


class Uncertainty(_Combination):
    """The weighted mean less the variance."""

    form: Literal["uncertainty"]
    penalty: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the variance."""


class BaseAndBonus(_Combination):
    """base (floor + (1 - floor) bonus)."""

    form: Literal["bonus"]
    base: str
    """The reward without which nothing counts."""
    bonus: str
    """The reward that adds to it."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """What the base is worth without the bonus: 0.4 for generation, 0.6 for editing."""

    @model_validator(mode="after")
    def _two_rewards(self) -> BaseAndBonus:
        if self.base == self.bonus:
            raise ValueError("form bonus needs two rewards, base and bonus")
        return self

    @property
    def needed(self) -> Mapping[str, str]:
        return {"base": self.base, "bonus": self.bonus}


Combine = Annotated[
    Annotated[WeightedMean, Tag("sum")]
    | Annotated[Worst, Tag("worst")]
    | Annotated[Uncertainty, Tag("uncertainty")]
    | Annotated[BaseAndBonus, Tag("bonus")],
    Discriminator(lambda section: _form(section) or "sum"),
]


class RewardSettings(Section):
    """One reward of a recipe."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Its part in the total that is learnt from, beside the other weights: ratios count, not sizes, so one reward alone
    has 1. Of 0: scored and logged, never learnt from. Others lie between 1e-6 and 1e6."""
    load: str | None = None
    """A built-in name, "file.py:Name" or "package.module:Name"; left out, the reward's key is its name."""
    options: dict[str, Any] = {}
    """Passed to the reward."""
    shaping: Shaping | None = None
    """How it is bent before it is learnt from; it is measured as it is."""

    @field_validator("weight")
    @classmethod
    def _weighs(cls, weight: float) -> float:
        """Beyond these bounds sums in float32 lose one of two rewards, or overflow."""
        if weight and not 1e-6 <= weight <= 1e6:
            raise ValueError(f"{weight:g} must be 0 or between 1e-6 and 1e6; only the ratio of weights counts")
        return weight

    def loads(self, key: str) -> str:
        """What `rewards.load` is given, for an entry under `key`."""
        return self.load or key

    def same_as(self, other: RewardSettings, key: str, other_key: str | None = None) -> bool:
        """Whether both score alike, whatever their weights."""
        return self.loads(key) == other.loads(other_key or key) and self.options == other.options


Rewards = Annotated[dict[str, RewardSettings], Field(min_length=1)]


def unshaped(rewards: dict[str, RewardSettings] | None) -> dict[str, RewardSettings] | None:
    """Rewards to measure by; ValueError for one with a shaping or a weight."""
    for name, entry in (rewards or {}).items():
        if key := entry.changed("shaping", "weight"):
            raise ValueError(f"{name}.{key}: an evaluation measures rewards as they are; leave it out")
    return rewards
