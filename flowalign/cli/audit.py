"""`flowalign audit`: check whether a model hacked its reward."""

from typing import Annotated

import typer

from flowalign.cli.console import Overrides, console, device, quiet_libraries
from flowalign.cli.options import Adapter


def audit(
    target: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="a run folder, or a model together with --against and --recipe")
    ],
    overrides: Overrides = None,
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="the base model; default: the model that the run started from")
    ] = None,
    adapter: Adapter = None,
    recipe: Annotated[
        str | None, typer.Option(help="for a model: the recipe with the evaluation and guard settings of the audit")
    ] = None,
) -> None:
    """Check whether a model paid for its reward with what the reward does not see. Exit code 1 on an alarm."""
    quiet_libraries()
    from flowalign.cli.auditing import audit as audited
    from flowalign.training.display import audit_table

    title, found = audited(
        target, against=against, adapter=adapter, recipe=recipe, overrides=overrides or [], device=device()
    )
    console.print(audit_table(title, found))
    for line in (*(f"ALARM: {alarm}" for alarm in found.alarms), found.remark):
        console.print(line, soft_wrap=True, end="\n" if line else "")
    if found.alarms:
        raise typer.Exit(1)
