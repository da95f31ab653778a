"""The command line: `flowalign COMMAND`; `flowalign --help` lists the commands."""

import sys
from collections.abc import Sequence
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
    "Exit codes: 0 good; 1 an alarm or a failed check (of an audit, a run that its guard ended, a self-test, a reward, "
    "a model, a plan, this machine); 2 it could not run; 130 interrupted."
)


class _Commands(TyperGroup):
    """Says that it was interrupted, and ends with the exit code of Ctrl-C."""

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
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and end")
    ] = False,
) -> None:
    pass


for command in (train, compare, sample, plan, collect, score, audit, report, serve, doctor):
    app.command()(command)
for name, group in (("eval", eval_app), ("data", data_app), ("model", model_app), ("rewards", rewards_app)):
    app.add_typer(group, name=name)
app.add_typer(recipes_app, name="recipes")


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: a person's mistake is one sentence and exit code 2, a check that fails one and exit code 1."""
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
            sys.excepthook(*sys.exc_info())  # a defect of ours, with its traceback
        else:
            _say_error(text)
        raise SystemExit(2) from None


def _say_error(text: str) -> None:
    plain_console(stderr=True).print(f"error: {text}", soft_wrap=True)
