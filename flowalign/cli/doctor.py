"""`flowalign doctor`: what works on this machine."""

import typer
from rich.text import Text

from flowalign.cli.console import console, quiet_libraries
from flowalign.terminal import table_of


def doctor() -> None:
    """Show what works on this machine, and why the rest does not. Exit code 1 if an indispensable part is missing."""
    quiet_libraries()
    from flowalign.preflight.doctor import NEEDED, diagnose

    found = diagnose()
    words = {True: Text("works", "green"), False: Text("missing", "yellow")}
    console.print(table_of(("part", "state", "detail"), ((part, words[works], how) for part, works, how in found)))
    if any(part in NEEDED and not works for part, works, _ in found):
        raise typer.Exit(1)
