"""What a recipe may say of its algorithm, and how the algorithm's class is found by its name."""

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
    """The settings that all algorithms share. The class variables say what else a recipe must fit."""

    needs: ClassVar[Literal["trajectory", "final"]]
    unit: ClassVar[Literal["item", "group", "path"]] = "item"
    """What a loss never parts: nothing, a group at one noise level, or a group with all its trained steps."""
    offline: ClassVar[bool] = False
    """Whether it can learn from a store of groups that another policy drew."""
    has_advantages: ClassVar[bool] = True
    """Whether it learns from advantages, or from the rewards themselves."""

    strength: ClassVar[tuple[str, ...]] = ("kl_weight",)
    """The settings to lower where the policy diverges."""

    name: str
    """As a recipe gives it."""
    advantage: Literal["total", "summed"] = "total"
    """Advantages of the weighted total, or the weighted sum of each reward's own advantages (GDPO)."""
    advantage_std: Scale = "global"
    """Divide advantages by the standard deviation of the whole step's rewards, of the group's, or by none."""
    advantage_clip: Annotated[float, Field(gt=0)] = 5.0
    """Advantages are clipped to [-this, this]."""
    equal_groups: Literal["skip", "keep"] = "skip"
    """Whether groups whose rewards are all equal are left out of a step."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL to the reference; 0 spends no forward on it."""

    @property
    def parts_rewards(self) -> bool:
        """Whether it learns from each reward apart and not from their total."""
        return self.advantage == "summed"

    def draws(self, rollout: Rollout) -> int:
        """Items that each sample makes."""
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
        """Raises ValueError for the first of the settings that is not at its default: it would be ignored."""
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
    """The class of an algorithm, a `flowalign.algorithms.base.Algorithm`; its `Settings` are what a recipe says of it.

    Raises ValueError for a name that is none's, and UserError for an installed one that cannot be imported.
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
    """What a recipe may say of an algorithm; raises as `algorithm_class` does."""
    found: type[AlgorithmSettings] = algorithm_class(name).Settings
    return found
