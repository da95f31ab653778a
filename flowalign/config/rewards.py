"""The sections of a recipe about its rewards: each one, how it is bent, and how several become one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from flowalign.config.base import Section


class Shaping(Section):
    """How a reward is bent before it is learnt from; sources in `rewards.combine`."""

    form: Literal["standardise", "sigmoid", "log_sigmoid"]
    """In deviations from the references' mean; PAR's sigmoid of the difference to them; or log sigmoid of it."""
    reference: str | Annotated[tuple[float, ...], Field(min_length=1)]
    """Scores of the model before training: a store of groups that has this reward, or numbers for every prompt."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Of the difference, in sigmoid."""
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Of the references, in log_sigmoid."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Shaping:
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
    def _nothing_is_ignored(self) -> Combine:
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
