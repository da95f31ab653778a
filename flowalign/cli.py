"""The command line: `flowalign COMMAND`; `flowalign --help` lists the commands."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from flowalign.cli_evaluate import data_app, eval_app
from flowalign.cli_model import model_app
from flowalign.cli_plan import plan
from flowalign.cli_sample import sample
from flowalign.command import RewardOptions, console, disk_mistake, memory_mistake, quiet_libraries, with_homes
from flowalign.command import device as _device
from flowalign.config.base import MOST, CheckFailed, UserError
from flowalign.terminal import plain_console, tolerate, verdict
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
app.add_typer(eval_app, name="eval")
app.add_typer(data_app, name="data")
app.add_typer(model_app, name="model")
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes to the recipe")]


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


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a bundled recipe's name, a YAML file or a run folder")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the run folder")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="begin anew over the run in the run folder")] = False,
    dry_run: Annotated[
        bool, typer.Option(help="print the resolved recipe and the batch arithmetic, load nothing")
    ] = False,
    profile: Annotated[bool, typer.Option(help="write a trace of a step into the run folder's profile/")] = False,
) -> None:
    """Train a model with a recipe."""
    from flowalign.config import dump_recipe, load_recipe
    from flowalign.disk.starting import check_start
    from flowalign.existing import check_recipe
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

    trainer = Trainer(resolved, resume=resume, overwrite=overwrite, profile=profile)
    folder = trainer.run()
    if trainer.main and (table := gain_table(folder)):
        console.print(table)
    if trainer.guarded():
        raise typer.Exit(1)


@app.command()
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
    from flowalign.config import load_recipe
    from flowalign.existing import check_recipe

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


app.command()(sample)
app.command()(plan)


@app.command()
def collect(recipe: Annotated[str, typer.Argument(help="a recipe with a store")], overrides: Overrides = None) -> None:
    """Draw and score groups into the recipe's store; what is there already is kept."""
    from flowalign.config import load_recipe
    from flowalign.existing import check_prompts, check_recipe

    resolved = load_recipe(recipe, overrides or [])
    if resolved.store is None:
        raise UserError("the recipe names no store; give store=FOLDER")
    check_recipe(resolved)
    check_prompts(resolved.prompts)
    quiet_libraries()
    import numpy as np

    from flowalign.scoring import collect_recipe

    store = collect_recipe(resolved, _device())
    table = Table("reward", "mean", "std", title=f"{store.path}: {len(store)} prompts", title_justify="left")
    for name, values in store.rewards.items():
        known = values[~np.isnan(values)]
        table.add_row(name, f"{known.mean():.4f}", f"{known.std():.4f}")
    console.print(table)


@app.command()
def score(
    reward: Annotated[str, typer.Argument(help="a built-in name, file.py:Name or package.module:Name")],
    images: Annotated[
        Path | None, typer.Option(help="folder of pictures, in the order of their names as people count: 9 before 10")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE[#COLUMN]", help="a row for each image; left out, the folder's metadata.jsonl says"),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="in place of images: a store of groups, which keeps them")] = None,
    name: Annotated[str | None, typer.Option(help="the reward's name in the store; the default is its own")] = None,
    option: RewardOptions = None,
    output: Annotated[Path | None, typer.Option(help="write the scores to this .csv or .jsonl file")] = None,
) -> None:
    """Score pictures, or the groups of a store, with a reward."""
    from flowalign.existing import check_pictures, check_prompts, check_rewards, check_scores

    check_rewards([reward])
    check_pictures(images)
    check_prompts(prompts)
    check_scores(output)
    import numpy as np

    from flowalign.scoring import read_images, rescore_store, score_images, write_scores

    if store is not None:
        if images or prompts or output:
            raise UserError(
                "--store holds pictures and prompts and keeps the scores; leave --images, --prompts, --output out"
            )
        values = rescore_store(store, reward, option or [], name)
        console.print(f"mean {np.nanmean(values):.4f} of {np.isfinite(values).sum()} pictures, now in {store}")
        return
    if images is None:
        raise UserError("give --images, or --store")
    if name is not None:
        raise UserError("--name is the reward's name in a store; give --store with it")
    rows, paths = read_images(images, prompts)
    scores = score_images(reward, option or [], rows, paths)
    table = Table("image", "prompt", "score")
    for path, row, value in zip(paths, rows, scores, strict=True):
        table.add_row(path.name, row.prompt, "left out" if value is None else f"{value:.4f}")
    console.print(table)
    known = [value for value in scores if value is not None]
    if not known:
        raise UserError(f"reward {reward} left out all {len(scores)} images")
    console.print(f"mean {sum(known) / len(known):.4f} of {len(known)} images")
    if output is not None:
        write_scores(output, paths, rows, scores)


@app.command()
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
    from flowalign.auditing import audit as audited
    from flowalign.training.display import audit_table

    title, found = audited(
        target, against=against, adapter=adapter, recipe=recipe, overrides=overrides or [], device=_device()
    )
    console.print(audit_table(title, found))
    for line in (*(f"ALARM: {alarm}" for alarm in found.alarms), found.remark):
        console.print(line, soft_wrap=True, end="\n" if line else "")
    if found.alarms:
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs or of comparisons")],
) -> None:
    """Write the report.html of runs, and the comparison.html of comparisons, anew from what is on disk."""
    from flowalign.evaluate.report.comparison import rewrite_comparison_page
    from flowalign.evaluate.report.report import write_report

    for folder in runs:
        compared = (folder / "comparison.json").is_file()
        written = rewrite_comparison_page(folder) if compared else write_report(folder)
        console.print(f"wrote {written}", soft_wrap=True)


@app.command()
def serve(
    rewards: Annotated[list[str], typer.Argument(metavar="REWARD...", help="built-in names, file.py:Name, ...")],
    host: Annotated[str, typer.Option(help="beyond loopback it needs a token in FLOWALIGN_TOKEN")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    option: RewardOptions = None,
) -> None:
    """Serve rewards over HTTP, for recipes that name them as http://host:port/REWARD."""
    from flowalign.existing import check_rewards

    check_rewards(rewards)
    quiet_libraries()
    import rewards as zoo
    from flowalign.config.options import parse_options
    from rewards.http.server import serve as run_server

    options = parse_options(rewards, option or [])
    served = [name.rpartition(":")[2] for name in rewards]
    for name in served:
        if served.count(name) > 1:
            raise UserError(f"two rewards would be served as {name!r}; serve one of them at another port")
    loaded = {short: zoo.load_on(_device(), name, **options[name]) for short, name in zip(served, rewards, strict=True)}
    run_server(loaded, host=host, port=port)


rewards_app = typer.Typer(help="List the rewards, and check that one keeps the contract.", invoke_without_command=True)
app.add_typer(rewards_app, name="rewards")


@rewards_app.callback()
def list_rewards(context: typer.Context) -> None:
    """List the rewards that a recipe can name, built in and installed."""
    if context.invoked_subcommand is None:
        from rewards.catalogue import available, describe

        table = Table("reward", "what it judges")
        for name in available():
            table.add_row(name, describe(name))
        console.print(table)


@rewards_app.command("check")
def check_reward(
    reward: Annotated[str, typer.Argument(help="a built-in name, file.py:Name, package.module:Name or http://...")],
    images: Annotated[Path | None, typer.Option(help="folder of pictures to try it on; by default drawn ones")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[#COLUMN]", help="a row for each picture; left out, the folder's metadata.jsonl says"
        ),
    ] = None,
    option: RewardOptions = None,
) -> None:
    """Try a reward: order, batch size, determinism, range, prompts, known scores. Exit code 1 if a check fails."""
    from flowalign.existing import check_pictures, check_prompts, check_rewards

    check_rewards([reward])
    check_pictures(images)
    check_prompts(prompts)
    quiet_libraries()
    from flowalign.scoring import check_reward as findings_of

    if images is None and prompts is not None:
        raise UserError("--prompts are of --images; give these too")
    findings = findings_of(reward, option or [], images, prompts)
    table = Table("check", "result", "detail", title=reward, title_justify="left")
    for check, passed, detail in findings:
        table.add_row(check, verdict(passed), detail)
    console.print(table)
    if any(finding.passed is False for finding in findings):
        raise typer.Exit(1)


recipes_app = typer.Typer(help="List and copy the bundled recipes.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the bundled recipes."""
    if context.invoked_subcommand is None:
        from flowalign.config import bundled_recipes

        table = Table("recipe", "what it does")
        for name, path in bundled_recipes().items():
            table.add_row(name, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
        console.print(table)


@recipes_app.command("copy")
def copy_recipe(name: str, to: Annotated[Path, typer.Argument(help="the file to write")] = Path(".")) -> None:
    """Copy a bundled recipe, to be edited."""
    from flowalign.config import bundled_recipes, load_recipe

    load_recipe(name)
    source = bundled_recipes().get(name)
    if source is None:
        raise UserError(f"{name!r} is a file of your own; the bundled recipes are {', '.join(bundled_recipes())}")
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise UserError(f"{target} exists; choose another name")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        target.unlink(missing_ok=True)  # of a full disk there is an empty one
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    console.print(f"wrote {target}")


@app.command()
def doctor() -> None:
    """Say what works on this machine, and why not. Exit code 1 if a part is missing that everything needs."""
    quiet_libraries()
    from flowalign.preflight.doctor import NEEDED, diagnose

    table, found = Table("part", "state", "detail"), diagnose()
    for part, works, detail in found:
        table.add_row(part, Text("works", "green") if works else Text("not here", "yellow"), detail)
    console.print(table)
    if any(part in NEEDED and not works for part, works, _ in found):
        raise typer.Exit(1)


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


if __name__ == "__main__":
    main()
