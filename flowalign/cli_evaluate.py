"""The commands `flowalign eval` and `flowalign data`."""

from pathlib import Path
from typing import Annotated

import typer

from flowalign.command import console, device, quiet_libraries

eval_app = typer.Typer(no_args_is_help=True, help="Say how good a model is, with intervals.")
data_app = typer.Typer(no_args_is_help=True, help="Write prompt lists.")


@eval_app.command("recipe")
def evaluate_recipe(
    target: Annotated[str, typer.Argument(help="a recipe (its model as it is) or a run folder (its last checkpoint)")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes to the recipe")
    ] = None,
) -> None:
    """Measure a model on a recipe's held-out prompts with its rewards."""
    quiet_libraries()
    from flowalign.config import load_recipe
    from flowalign.display import summary_table
    from flowalign.runs import RunFolder
    from flowalign.scoring import evaluate_recipe as evaluate

    if Path(target).is_dir():
        run, _ = RunFolder.open(Path(target))
        recipe = load_recipe(run.path / "recipe.yaml", overrides or [])
        title, summary = evaluate(recipe, run, device())
    else:
        title, summary = evaluate(load_recipe(target, overrides or []), None, device())
    console.print(summary_table(title, summary))
