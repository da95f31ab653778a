"""`flowalign collect`: draw and score a dataset of groups."""

from typing import Annotated

import typer

from flowalign.cli.console import Overrides, console, device, quiet_libraries
from flowalign.config.base import UserError
from flowalign.terminal import table_of


def collect(
    recipe: Annotated[str, typer.Argument(help="a recipe whose key `dataset` names the folder of the dataset")],
    overrides: Overrides = None,
) -> None:
    """Draw and score groups of images into the dataset that a recipe names. Groups that exist already are kept."""
    from flowalign.cli.existing import check_prompts, check_recipe
    from flowalign.config import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    if resolved.dataset is None:
        raise UserError("the recipe names no dataset of groups; give dataset=FOLDER")
    check_recipe(resolved)
    check_prompts(resolved.prompts)
    quiet_libraries()
    import numpy as np

    from flowalign.cli.scoring import collect_recipe

    dataset = collect_recipe(resolved, device())
    known = {name: values[~np.isnan(values)] for name, values in dataset.rewards.items()}
    rows = [(name, f"{values.mean():.4f}", f"{values.std():.4f}") for name, values in known.items()]
    console.print(table_of(("reward", "mean", "std"), rows, title=f"{dataset.path}: {len(dataset)} prompts"))
