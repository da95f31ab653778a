"""Align diffusion and flow models with rewards: train, measure and audit them.

`flowalign COMMAND --help` explains a command.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flowalign.cli.audit import audit
from flowalign.cli.collect import collect
from flowalign.cli.compare import compare
from flowalign.cli.console import console, disk_mistake, memory_mistake, with_homes
from flowalign.cli.doctor import doctor
from flowalign.cli.evaluate import data_app, eval_app
from flowalign.cli.model import model_app
from flowalign.cli.plan import plan
from flowalign.cli.recipes import recipes_app
from flowalign.cli.report import report
from flowalign.cli.rewards import rewards_app
from flowalign.cli.sample import sample
from flowalign.cli.score import score
from flowalign.cli.serve import serve
from flowalign.cli.train import train
from flowalign.config.base import CheckFailed, UserError
from flowalign.terminal import plain_console, tolerate
from flowalign.training.interrupt import Interrupted
from rewards.errors import RewardError

EXIT_CODES = (
    "Exit codes: 0 success; 1 an alarm or a failed check (of an audit, a run that its guard stopped, a self-test, a "
    "reward, a model, a plan, this machine); 2 the command could not run; 130 interrupted."
)


ENTRY_POINT_GROUP = "flowalign.commands"


def _installed() -> dict[str, Any]:
    """The commands that installed packages add, by name: functions, or Typer applications with several commands."""
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _missing(why: str) -> Callable[[], None]:
    """A command that fails with this reason, so that one broken package leaves the other commands usable."""

    def command() -> None:
        raise UserError(why)

    command.__doc__ = f"{why}."
    return command


class _Commands(TyperGroup):
    """Adds the commands of installed packages, and ends an interrupted command with one line and exit code 130."""

    def list_commands(self, ctx: Any) -> list[str]:
        own = super().list_commands(ctx)
        return [*own, *(name for name in sorted(_installed()) if name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        entry = None if own else _installed().get(cmd_name)
        if entry is None:
            return own
        try:
            found = entry.load()
        except Exception as error:
            found = _missing(f"command {cmd_name!r} cannot be imported ({entry.value}): {error}")
        if not isinstance(found, typer.Typer):
            found, function = typer.Typer(add_completion=False), found
            found.command()(function)
        return typer.main.get_command(found)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Interrupted, KeyboardInterrupt) as stopped:
            console.print(str(stopped) or "interrupted; what is done is kept", soft_wrap=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help=__doc__,
    epilog=EXIT_CODES,
)


def _show_version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        console.print(f"flowalign {importlib.metadata.version('flowalign')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


for command in (train, compare, sample, plan, collect, score, audit, report, serve, doctor):
    app.command()(command)
for name, group in (("eval", eval_app), ("data", data_app), ("model", model_app), ("rewards", rewards_app)):
    app.add_typer(group, name=name)
app.add_typer(recipes_app, name="recipes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command: a user's mistake prints one sentence and exits with 2, a failed check exits with 1."""
    for stream in (sys.stdout, sys.stderr):
        tolerate(stream)
    try:
        app(args=with_homes(sys.argv[1:] if arguments is None else arguments), standalone_mode=True)
    except (UserError, RewardError) as error:
        _say_error(str(error))
        raise SystemExit(1 if isinstance(error, CheckFailed) else 2) from None
    except Exception as error:
        text = disk_mistake(error) if isinstance(error, OSError) else memory_mistake(error)
        if text is None:
            sys.excepthook(*sys.exc_info())  # a defect of this package: its traceback is shown
        else:
            _say_error(text)
        raise SystemExit(2) from None


def _say_error(text: str) -> None:
    plain_console(stderr=True).print(f"error: {text}", soft_wrap=True)
