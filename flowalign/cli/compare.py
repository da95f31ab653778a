"""`flowalign compare`: recipes under one budget."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flowalign.cli.console import console, quiet_libraries
from flowalign.config.base import MOST


def compare(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="bundled recipes' names or YAML files")],
    budget: Annotated[float, typer.Option(metavar="MINUTES", help="training minutes of every run")],
    seeds: Annotated[str, typer.Option(help="every recipe is trained with each of them, such as 1,2,3")] = "0",
    output: Annotated[Path, typer.Option(help="folder for the runs and the comparison")] = Path("runs/comparison"),
    target: Annotated[float | None, typer.Option(help="a reward whose price in minutes and forwards is asked")] = None,
    reward: Annotated[
        str | None, typer.Option(help="the reward that ranks; the default is the evaluation's first")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a change to every recipe; repeatable")
    ] = None,
    best_of: Annotated[
        int, typer.Option(max=MOST, metavar="N", help="show what best of 1 to N give without training; 0 is none")
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="keep finished runs, go on with the others")] = False,
) -> None:
    """Train recipes under one budget, from the same model, prompts and seeds, and write one report of them."""
    from flowalign.cli.existing import check_recipe
    from flowalign.config import load_recipe

    for one in recipes:
        check_recipe(load_recipe(one, changes or []))
    quiet_libraries()
    from flowalign.evaluate.report.comparison import leaderboard, legend
    from flowalign.experiments import compare as comparison

    result = comparison.compare(
        recipes,
        budget,
        output,
        seeds=comparison.parse_seeds(seeds),
        reward=reward,
        target=target,
        overrides=changes or [],
        best_of=best_of,
        resume=resume,
    )
    columns, rows = leaderboard(result)
    shown = [place for place, name in enumerate(columns) if name in ("recipe", "after", "gain") or " to " in name]
    table = Table()
    for place in shown:
        table.add_column(columns[place], no_wrap=columns[place] == "recipe")
    for row in rows:
        table.add_row(*(row[place] for place in shown))
    console.print(table)
    console.print(f"{legend(result)}\nwrote comparison.json, .md and .html into {output}", soft_wrap=True)
