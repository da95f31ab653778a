"""`flowalign audit`: whether a model cheated its reward."""

from typing import Annotated

import typer

from flowalign.cli.console import Overrides, console, device, quiet_libraries


def audit(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="a run folder, or a model with --recipe")],
    overrides: Overrides = None,
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="the base model; the default is the one a run began as")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="a LoRA's file, folder or hub id for the model")] = None,
    recipe: Annotated[str | None, typer.Option(help="for a model: whose evaluation and guard say how")] = None,
) -> None:
    """Ask whether a model bought its reward with what the reward does not see. Exit code 1 if anything alarms."""
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
