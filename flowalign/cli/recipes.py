"""`flowalign recipes`: list and copy the bundled recipes."""

from pathlib import Path
from typing import Annotated

import typer

from flowalign.cli.console import console
from flowalign.config.base import UserError
from flowalign.terminal import table_of

recipes_app = typer.Typer(help="List and copy the bundled recipes.", invoke_without_command=True)


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the bundled recipes."""
    if context.invoked_subcommand is None:
        from flowalign.config import bundled_recipes

        first = {name: path.read_text(encoding="utf-8").splitlines()[0] for name, path in bundled_recipes().items()}
        rows = ((name, line.removeprefix("# ")) for name, line in first.items())
        console.print(table_of(("recipe", "what it does"), rows))


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="a bundled recipe's name")],
    to: Annotated[Path, typer.Argument(help="the file to write, or a folder to write it into")] = Path("."),
) -> None:
    """Copy a bundled recipe to a file that you can edit."""
    from flowalign.config import bundled_recipes, load_recipe
    from flowalign.disk.files import replace_text, writing

    load_recipe(name)
    source = bundled_recipes().get(name)
    if source is None:
        raise UserError(f"{name!r} is not a bundled recipe; the bundled recipes are {', '.join(bundled_recipes())}")
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise UserError(f"{target} exists; choose another name")
    with writing(target):
        replace_text(target, source.read_text(encoding="utf-8"))
    console.print(f"wrote {target}")
