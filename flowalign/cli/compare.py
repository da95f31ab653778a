"""`flowalign compare`: train several recipes under one budget and rank them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column

from flowalign.cli.console import console, quiet_libraries
from flowalign.config.base import MOST
from flowalign.terminal import table_of


def compare(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="names of bundled recipes, or YAML files")],
    budget: Annotated[float, typer.Option(metavar="MINUTES", help="training minutes of each run")],
    seeds: Annotated[str, typer.Option(help="seeds such as 1,2,3; every recipe is trained once with each")] = "0",
    output: Annotated[Path, typer.Option(help="folder for the runs and the comparison")] = Path("runs/comparison"),
    target: Annotated[
        float | None,
        typer.Option(help="a score of the ranking reward; show the minutes and forwards that each recipe needs for it"),
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="the reward that ranks the recipes; default: the evaluation's first reward")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a change to every recipe; repeatable")
    ] = None,
    best_of: Annotated[
        int,
        typer.Option(
            max=MOST, metavar="N", help="also measure best-of-1 to best-of-N of the untrained model; 0: do not"
        ),
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="keep finished runs and continue the others")] = False,
) -> None:
    """Train recipes for the same minutes, on the same model, prompts and seeds, and write a report that ranks them."""
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
    names = [Column(columns[place], no_wrap=columns[place] == "recipe") for place in shown]
    console.print(table_of(names, ([row[place] for place in shown] for row in rows)))
    console.print(f"{legend(result)}\nwrote comparison.json, .md and .html into {output}", soft_wrap=True)
