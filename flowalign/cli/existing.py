"""Whether what a person names is there: models, prompt lists, rewards, folders of pictures.

Nothing heavy is imported, so that a command that cannot work says so at once.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from flowalign.config import Recipe
from flowalign.config.base import UserError
from flowalign.config.paths import expanded
from flowalign.disk.assets import EMBEDDED
from flowalign.policies.folders import is_hub_id, pipeline_index
from flowalign.rollout.prompts import load_prompts
from rewards.catalogue import check_name


def check_recipe(recipe: Recipe) -> None:
    """Raises UserError or RewardError for a prompt list, model or reward of the recipe that is not there."""
    check_prompts(None if recipe.dataset else recipe.prompts, recipe.evaluation.prompts)
    for entries in (recipe.rewards, recipe.evaluation.rewards, recipe.guard and recipe.guard.rewards):
        check_rewards([entry.loads(name) for name, entry in (entries or {}).items()])
    check_model(recipe.model.path)


def check_model(name: str | None) -> None:
    """Raises UserError for what is neither a pipeline's nor a run's folder and cannot be a hub id; None is fine."""
    if name is None or name == EMBEDDED:
        return
    path = Path(expanded(name))
    if not os.path.isfile(path / "recipe.yaml") and (os.path.exists(path) or not is_hub_id(name)):
        pipeline_index(path)


def check_prompts(*lists: str | Sequence[str] | None) -> None:
    """Raises UserError for a prompt list that cannot be read; None is fine."""
    for sources in lists:
        if sources is not None:
            load_prompts(sources)


def check_rewards(names: Sequence[str]) -> None:
    """Raises RewardError for a name that is no reward's, or a file that is not there."""
    for name in names:
        check_name(name)


def check_pictures(folder: Path | None) -> None:
    """Raises UserError for what is no folder; None is fine."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"--images {folder} is no folder")


def check_scores(file: Path | None) -> None:
    """Raises UserError for a file of scores that could not be written once they are there; None is fine."""
    if file is None:
        return
    if file.suffix not in (".csv", ".jsonl") or file.is_dir():
        raise UserError(f"--output {file}: use a .csv or .jsonl file")
    if not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
        raise UserError(f"--output {file}: {file.parent} is no folder that can be written to; choose another")
