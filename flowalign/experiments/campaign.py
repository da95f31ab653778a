"""Many runs, one after the other, that can be stopped and gone on with."""

import gc
from pathlib import Path

from flowalign.config import Recipe
from flowalign.disk.run_folder import RunFolder
from flowalign.disk.starting import refuse_changes
from flowalign.trainer import Trainer
from flowalign.training.display import Display


def train_unless_done(recipe: Recipe, *, display: Display | None = None) -> Path:
    """The run folder of a recipe, trained if it is not done yet, from where it was stopped; for scripts of many runs.

    Raises UserError where the folder holds the run of another recipe.
    """
    begun = (recipe.folder / "recipe.yaml").exists()
    if begun:
        run, saved = RunFolder.open(recipe.folder)
        refuse_changes(saved, recipe)
        if run.finished and saved.train.steps == recipe.train.steps:
            return recipe.folder
    folder = Trainer.from_recipe(recipe, resume=begun, display=display).run()
    gc.collect()  # a run's model and optimizer hold each other; the next run needs their memory
    return folder
