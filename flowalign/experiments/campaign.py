"""Many runs, one after the other, that can be stopped and continued."""

import gc
from pathlib import Path

import torch

from flowalign.config import Recipe
from flowalign.disk.run_folder import RunFolder
from flowalign.disk.starting import read_info, refuse_changes
from flowalign.trainer import Trainer
from flowalign.training.display import Display


def train_unless_done(recipe: Recipe, *, display: Display | None = None) -> Path:
    """Train a recipe unless its run is done, continuing a stopped run; returns the run folder.

    For scripts of many runs. Raises UserError if the folder holds the run of another recipe.
    """
    if is_done(recipe):
        return recipe.folder
    folder = Trainer.from_recipe(recipe, resume=_is_begun(recipe), display=display).run()
    gc.collect()  # a run's model and optimizer refer to each other; the next run needs their memory
    torch.cuda.empty_cache()
    return folder


def is_done(recipe: Recipe) -> bool:
    """Whether the recipe's run has ended: after its steps, after its minutes, or because its guard stopped it.

    Raises UserError if the folder holds the run of another recipe.
    """
    if not _is_begun(recipe):
        return False
    run, saved = RunFolder.open(recipe.folder)
    refuse_changes(saved, recipe)
    info, limit = read_info(run.path), recipe.run.max_minutes
    ended = info.get("checkpoint") == recipe.train.steps or "stopped" in info
    in_time = limit is not None and info.get("minutes", 0) >= limit
    return run.finished and saved.train.steps == recipe.train.steps and (limit is None or ended or in_time)


def _is_begun(recipe: Recipe) -> bool:
    return (recipe.folder / "recipe.yaml").exists()
