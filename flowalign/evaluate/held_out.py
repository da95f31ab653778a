"""Whether a model is measured on prompts that it was not trained on: only such prompts are called held-out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowalign.config import Recipe, load_recipe
from flowalign.config.base import UserError, counted
from flowalign.rollout.dataset import GroupDataset
from flowalign.rollout.prompts import Row, load_prompts, normalised, shared_rows


class HeldOut(NamedTuple):
    """How many of an evaluation's prompts are trained on; None where that is not known."""

    trained: int | None
    prompts: int

    @property
    def word(self) -> str:
        """What to call such prompts."""
        return "held-out" if self.trained == 0 else "evaluation"

    @property
    def words(self) -> str:
        """Of what kind the prompts are, as a part of a sentence."""
        if self.trained == 0:
            return "held-out prompts"
        if self.trained is None:
            return "it is not known whether these prompts were trained on"
        are = "is" if self.trained == 1 else "are"
        return f"not held out: {self.trained:,} of {counted(self.prompts, 'prompt')} {are} trained on"


def held_out(rows: Sequence[Row], training_rows: Sequence[Row]) -> HeldOut:
    """Of an evaluation's rows beside those of the training."""
    shared = {normalised(row.prompt) for row in shared_rows(rows, training_rows)}
    return HeldOut(len(shared), _different(rows))


def held_out_from(recipe: Recipe, rows: Sequence[Row]) -> HeldOut:
    """Of rows beside what the recipe trains on, which may be gone by now."""
    try:
        training_rows = GroupDataset.open(Path(recipe.dataset)).rows if recipe.dataset else load_prompts(recipe.prompts)
    except UserError:
        return HeldOut(None, _different(rows))
    return held_out(rows, training_rows)


def _different(rows: Sequence[Row]) -> int:
    return len({normalised(row.prompt) for row in rows})


def said_of(adapter: str | None, rows: Sequence[Row]) -> dict[str, Any]:
    """What a summary says of rows beside what the run trained on that an adapter lies in; nothing for others."""
    recipe = Path(adapter).resolve().parent / "recipe.yaml" if adapter else None
    if recipe is None or not recipe.is_file():
        return {}
    known = held_out_from(load_recipe(recipe), rows)
    return {"trained_prompts": known.trained, "held_out": known.words}


def held_out_of(evaluation: Mapping[str, Any]) -> HeldOut:
    """What an evaluation or a comparison on disk says; older versions did not."""
    return HeldOut(evaluation.get("trained_prompts"), evaluation.get("prompts", 0))
