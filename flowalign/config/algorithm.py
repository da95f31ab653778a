"""The settings that all algorithms share, and how an algorithm's class is found by its name."""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from flowalign.advantages import Scale
from flowalign.config.base import Section, UserError
from flowalign.config.mistakes import nearest

if TYPE_CHECKING:
    from flowalign.config.sections import Rollout, Train

ENTRY_POINT_GROUP = "flowalign.algorithms"
BUILT_IN = {
    "flow_grpo": "flowalign.algorithms.flow_grpo:FlowGRPO",
    "nft": "flowalign.algorithms.nft:NFT",
    "gdro": "flowalign.algorithms.gdro:GDRO",
    "crd": "flowalign.algorithms.crd:CRD",
    "marble": "flowalign.algorithms.marble:Marble",
    "prdp": "flowalign.algorithms.prdp:PRDP",
}


class AlgorithmSettings(Section):
    """The settings that all algorithms share. The class variables say what else a recipe must agree with."""

    needs: ClassVar[Literal["trajectory", "final"]]
    unit: ClassVar[Literal["item", "group", "path"]] = "item"
    """The items that one loss needs together: one, a group at one noise level, or a group with all its trained
    steps."""
    offline: ClassVar[bool] = False
    """Whether it can learn from a dataset of groups that another policy drew."""
    has_advantages: ClassVar[bool] = True
    """Whether it learns from advantages, and not from the rewards themselves."""

    strength: ClassVar[tuple[str, ...]] = ("kl_weight",)
    """The settings to lower where the policy diverges."""

    name: str
    """The algorithm's name."""
    advantage: Literal["total", "summed"] = "total"
    """total: advantages of the weighted total. summed: the weighted sum of each reward's own advantages (GDPO),
    which keeps a reward with a small spread from being drowned."""
    advantage_std: Scale = "global"
    """The standard deviation that advantages are divided by: that of the whole step's rewards, of the group's, the
    largest of a group's (LongCat-Video), or none."""
    advantage_clip: Annotated[float, Field(gt=0)] = 5.0
    """Advantages are clipped to between minus this value and this value."""
    equal_groups: Literal["skip", "keep"] = "skip"
    """Leave groups whose rewards are all equal out of a step, or keep them."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL to the reference model. Raise it to stay closer to that model; 0 spends no forward pass on
    it."""

    @property
    def parts_rewards(self) -> bool:
        """Whether it learns from each reward by itself and not from their total."""
        return self.advantage == "summed"

    def draws(self, rollout: Rollout) -> int:
        """How many items a sample makes."""
        return rollout.window_length

    def check(self, rollout: Rollout, train: Train, rewards: int) -> None:
        """Raises ValueError, in one sentence, for settings that do not go together.

        `rewards` is the number of those that are learnt from.
        """
        if not self.kl_weight and self.has_advantages and train.reference_guidance is not None:
            raise ValueError(
                "train.reference_guidance: with algorithm.kl_weight 0 no reference takes part; leave it out"
            )

    def refuse(self, why: str, *settings: str) -> None:
        """Raises ValueError for the first of these settings that is not at its default, since it would be ignored."""
        if name := self.changed(*settings):
            raise ValueError(f"algorithm.{name}: {why}")


def installed() -> dict[str, EntryPoint]:
    """The algorithms that installed packages add, by name."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def algorithm_names() -> list[str]:
    """The algorithms that a recipe may name: those of this package first."""
    return [*BUILT_IN, *(name for name in sorted(installed()) if name not in BUILT_IN)]


@cache
def algorithm_class(name: str) -> Any:
    """The class of an algorithm (a `flowalign.algorithms.base.Algorithm`), whose `Settings` are its part of a recipe.

    Raises ValueError for an unknown name, and UserError for an installed algorithm that cannot be imported.
    """
    if name in BUILT_IN:
        module, _, kind = BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(module), kind)
    found = installed().get(name)
    if found is None:
        raise ValueError(f"unknown algorithm {name!r}{nearest(name, algorithm_names())}")
    try:
        made = found.load()
    except Exception as error:
        raise UserError(f"algorithm {name!r} cannot be imported ({found.value}): {error}") from error
    settings = getattr(made, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, AlgorithmSettings)) or inspect.isabstract(made):
        raise UserError(f"algorithm {name!r}: {found.value} is no class of an Algorithm that has a loss")
    return made


def settings_class(name: str) -> type[AlgorithmSettings]:
    """The class of an algorithm's settings; raises as `algorithm_class` does."""
    found: type[AlgorithmSettings] = algorithm_class(name).Settings
    return found
