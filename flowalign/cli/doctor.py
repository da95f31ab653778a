"""`flowalign doctor`: what works on this machine."""

import typer
from rich.table import Table
from rich.text import Text

from flowalign.cli.console import console, quiet_libraries


def doctor() -> None:
    """Show what works on this machine, and why the rest does not. Exit code 1 if an indispensable part is missing."""
    quiet_libraries()
    from flowalign.preflight.doctor import NEEDED, diagnose

    table, found = Table("part", "state", "detail"), diagnose()
    for part, works, detail in found:
        table.add_row(part, Text("works", "green") if works else Text("missing", "yellow"), detail)
    console.print(table)
    if any(part in NEEDED and not works for part, works, _ in found):
        raise typer.Exit(1)
