"""`flowalign train`: train a model with a recipe."""

import os
from typing import Annotated

import typer

from flowalign.cli.console import Overrides, console, quiet_libraries


def train(
    recipe: Annotated[str, typer.Argument(help="a bundled recipe's name, a YAML file or a run folder")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in the run folder")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in the run folder")] = False,
    dry_run: Annotated[
        bool, typer.Option(help="print the resolved recipe and the batch arithmetic, and load nothing")
    ] = False,
    profile: Annotated[
        bool, typer.Option(help="write a profiler trace of one step into the run folder's profile/")
    ] = False,
) -> None:
    """Train a model with a recipe."""
    from flowalign.cli.existing import check_recipe
    from flowalign.config import dump_recipe, load_recipe
    from flowalign.disk.starting import check_start
    from flowalign.training.display import arithmetic_table

    resolved = load_recipe(recipe, overrides or [])
    if dry_run:
        console.print(dump_recipe(resolved))
        console.print(arithmetic_table(resolved, int(os.environ.get("WORLD_SIZE", "1"))))
        return
    check_start(resolved, resume=resume, overwrite=overwrite)
    check_recipe(resolved)
    quiet_libraries()
    from flowalign.trainer import Trainer
    from flowalign.training.display import gain_table

    trainer = Trainer.from_recipe(resolved, resume=resume, overwrite=overwrite, profile=profile)
    folder = trainer.run()
    if trainer.main and (table := gain_table(folder)):
        console.print(table)
    if trainer.guarded():
        raise typer.Exit(1)
