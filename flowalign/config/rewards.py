"""The sections of a recipe about rewards: a reward, its shaping, and the combination of several into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from flowalign.config.base import Section


def _form(section: Any) -> Any:
    """The form that a section names; pydantic finds it alone only where no validator runs before."""
    return section.get("form") if isinstance(section, Mapping) else getattr(section, "form", None)


class _OfAForm(Section):
    """A section of which there are several forms."""

    earlier: ClassVar[Mapping[str, Any]]
    """Defaults of all forms, which earlier versions wrote into every recipe of a run: those of others are dropped."""

    @model_validator(mode="before")
    @classmethod
    def _without_other_forms(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        known, earlier = cls.model_fields, cls.earlier
        return {key: value for key, value in values.items() if key in known or earlier.get(key, cls) != value}


class _Shaped(_OfAForm):
    """How a reward is shaped before it is learnt from; `rewards.combine` names the sources."""

    earlier = {"scale": 1.0, "quantile": 0.85}
    form: str
    """The shape: standardise, sigmoid or log_sigmoid."""
    reference: str | Annotated[tuple[float, ...], Field(min_length=1)]
    """Scores of the model before training: a dataset of groups that has this reward, or numbers that hold for every
    prompt."""


class Standardise(_Shaped):
    """The reward in standard deviations of the references, from their mean."""

    form: Literal["standardise"]

    @field_validator("reference")
    @classmethod
    def _references_differ(cls, reference: str | tuple[float, ...]) -> str | tuple[float, ...]:
        if not isinstance(reference, str) and len(set(reference)) < 2:
            raise ValueError("standardise needs references that differ")
        return reference


class Sigmoid(_Shaped):
    """The mean over the references of sigmoid(scale (reward - reference)) (PAR)."""

    form: Literal["sigmoid"]
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the difference. Lower it for rewards of a wide range, so that the sigmoid does not saturate."""


class LogSigmoid(_Shaped):
    """log sigmoid(reward - q), with q a quantile of the references."""

    form: Literal["log_sigmoid"]
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Which quantile of the references the reward is compared with."""


Shaping = Annotated[
    Annotated[Standardise, Tag("standardise")]
    | Annotated[Sigmoid, Tag("sigmoid")]
    | Annotated[LogSigmoid, Tag("log_sigmoid")],
    Discriminator(_form),
]


class _Combination(_OfAForm):
    """How several rewards become the total that is learnt from; `rewards.combine` names the sources."""

    earlier = {"penalty": 1.0, "base": None, "bonus": None, "floor": 0.4}
    form: str
    """The combination: sum, worst, uncertainty or bonus."""
    disagreement: Annotated[float, Field(ge=0)] = 0.0
    """c: a sample on which the rewards disagree by U weighs exp(-c U) in the loss. Raise it to trust disagreement
    less; 0 gives every sample the same weight."""

    @property
    def needed(self) -> Mapping[str, str]:
        """The rewards that the combination needs, by their part in it."""
        return {}


class WeightedMean(_Combination):
    """The weighted mean of the rewards."""

    form: Literal["sum"] = "sum"


class Worst(_Combination):
    """The lowest of the rewards."""

    form: Literal["worst"]


class Uncertainty(_Combination):
    """The weighted mean of the rewards, less a multiple of their variance."""

    form: Literal["uncertainty"]
    penalty: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the variance. Raise it to trust samples less on which the rewards disagree."""


class BaseAndBonus(_Combination):
    """base (floor + (1 - floor) bonus)."""

    form: Literal["bonus"]
    base: str
    """The reward that multiplies all else."""
    bonus: str
    """The reward that raises what the base is worth."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """The share of the base that remains without the bonus: 0.4 for generation, 0.6 for editing."""

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
    """Weight in the total that is learnt from. Only the ratio to the other weights counts, so a single reward has 1. A
    reward of weight 0 is scored and logged, and never learnt from. Other weights lie between 1e-6 and 1e6."""
    load: str | None = None
    """A built-in name, "file.py:Name" or "package.module:Name"; null: the reward's key in the recipe."""
    options: dict[str, Any] = {}
    """Options that the reward is made with."""
    shaping: Shaping | None = None
    """How the reward is shaped before it is learnt from; evaluations measure it unshaped."""

    @field_validator("weight")
    @classmethod
    def _weighs(cls, weight: float) -> float:
        """Beyond these bounds a sum in float32 loses one of two rewards, or overflows."""
        if weight and not 1e-6 <= weight <= 1e6:
            raise ValueError(f"{weight:g} must be 0 or between 1e-6 and 1e6; only the ratio of weights counts")
        return weight

    def loads(self, key: str) -> str:
        """What `rewards.load` is given, for an entry under `key`."""
        return self.load or key

    def same_as(self, other: RewardSettings, key: str, other_key: str | None = None) -> bool:
        """Whether both give the same scores, whatever their weights."""
        return self.loads(key) == other.loads(other_key or key) and self.options == other.options


def _unshaped(rewards: dict[str, RewardSettings]) -> dict[str, RewardSettings]:
    """Rewards to measure by; ValueError for one with a shaping or a weight."""
    for name, entry in rewards.items():
        if key := entry.changed("shaping", "weight"):
            raise ValueError(f"{name}.{key}: an evaluation measures rewards as they are; leave it out")
    return rewards


Rewards = Annotated[dict[str, RewardSettings], Field(min_length=1)]
MeasuredRewards = Annotated[Rewards, AfterValidator(_unshaped)]
