"""Whether an evaluation's prompts are held out: only prompts that the model was not trained on are called held-out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowalign.config import Recipe, load_recipe
from flowalign.config.base import UserError, counted
from flowalign.rollout.dataset import GroupDataset
from flowalign.rollout.prompts import Row, load_prompts, normalised, shared_rows


class HeldOut(NamedTuple):
    """How many of an evaluation's prompts were trained on; None if that is unknown."""

    trained: int | None
    prompts: int

    @property
    def word(self) -> str:
        """The adjective for these prompts."""
        return "held-out" if self.trained == 0 else "evaluation"

    @property
    def words(self) -> str:
        """The kind of these prompts, as a part of a sentence."""
        if self.trained == 0:
            return "held-out prompts"
        if self.trained is None:
            return "it is not known whether these prompts were trained on"
        are = "is" if self.trained == 1 else "are"
        return f"not held out: {self.trained:,} of {counted(self.prompts, 'prompt')} {are} trained on"


def held_out(rows: Sequence[Row], training_rows: Sequence[Row]) -> HeldOut:
    """Compare an evaluation's rows with the training rows."""
    shared = {normalised(row.prompt) for row in shared_rows(rows, training_rows)}
    return HeldOut(len(shared), _different(rows))


def held_out_from(recipe: Recipe, rows: Sequence[Row]) -> HeldOut:
    """Compare rows with the training prompts of a recipe, whose files may no longer exist."""
    try:
        training_rows = GroupDataset.open(Path(recipe.dataset)).rows if recipe.dataset else load_prompts(recipe.prompts)
    except UserError:
        return HeldOut(None, _different(rows))
    return held_out(rows, training_rows)


def _different(rows: Sequence[Row]) -> int:
    return len({normalised(row.prompt) for row in rows})


def said_of(adapter: str | None, rows: Sequence[Row]) -> dict[str, Any]:
    """What a summary says of rows that an adapter was trained on; empty if the adapter is not in a run folder."""
    recipe = Path(adapter).resolve().parent / "recipe.yaml" if adapter else None
    if recipe is None or not recipe.is_file():
        return {}
    known = held_out_from(load_recipe(recipe), rows)
    return {"trained_prompts": known.trained, "held_out": known.words}


def held_out_of(evaluation: Mapping[str, Any]) -> HeldOut:
    """What an evaluation or a comparison on disk says about its prompts; older versions wrote nothing."""
    return HeldOut(evaluation.get("trained_prompts"), evaluation.get("prompts", 0))
