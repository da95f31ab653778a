"""Checks that what a user names exists: models, prompt lists, rewards, folders of images.

This module imports no heavy library, so a command that cannot work fails at once.
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
    """Raises UserError or RewardError if a prompt list, the model or a reward of the recipe does not exist."""
    check_prompts(None if recipe.dataset else recipe.prompts, recipe.evaluation.prompts)
    for entries in (recipe.rewards, recipe.evaluation.rewards, recipe.guard and recipe.guard.rewards):
        check_rewards([entry.loads(name) for name, entry in (entries or {}).items()])
    check_model(recipe.model.path)


def check_model(name: str | None) -> None:
    """Raises UserError unless the name is a pipeline folder, a run folder or a possible hub id; None passes."""
    if name is None or name == EMBEDDED:
        return
    path = Path(expanded(name))
    if not os.path.isfile(path / "recipe.yaml") and (os.path.exists(path) or not is_hub_id(name)):
        pipeline_index(path)


def check_prompts(*lists: str | Sequence[str] | None) -> None:
    """Raises UserError for a prompt list that cannot be read; None passes."""
    for sources in lists:
        if sources is not None:
            load_prompts(sources)


def check_rewards(names: Sequence[str]) -> None:
    """Raises RewardError for an unknown reward or a missing reward file."""
    for name in names:
        check_name(name)


def check_images(folder: Path | None) -> None:
    """Raises UserError unless the path is a folder; None passes."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"--images {folder} is not a folder")


def check_scores(file: Path | None) -> None:
    """Raises UserError for a file of scores that could not be written at the end; None passes."""
    if file is None:
        return
    if file.suffix not in (".csv", ".jsonl") or file.is_dir():
        raise UserError(f"--output {file}: use a .csv or .jsonl file")
    if not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
        raise UserError(f"--output {file}: {file.parent} is not a folder that can be written to; choose another")
