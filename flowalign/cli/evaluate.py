"""`flowalign eval`: measure a model. `flowalign data`: write prompt lists."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from flowalign.cli.console import Overrides, RewardOptions, console, device, quiet_libraries
from flowalign.cli.options import (
    BenchmarkOptions,
    Images,
    ModelArgument,
    OptionalModel,
    Prompts,
    with_options,
)
from flowalign.config.base import MOST, UserError, counted
from flowalign.config.paths import expanded
from flowalign.terminal import titled

if TYPE_CHECKING:
    from flowalign.evaluate.benchmark import Benchmark
    from flowalign.evaluate.drawing import Drawing

eval_app = typer.Typer(no_args_is_help=True, help="Measure a model on prompts or a benchmark, with 95 % intervals.")
data_app = typer.Typer(no_args_is_help=True, help="Write lists of training prompts.")

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
EXACT_DETECTOR = "flowalign.toyworld.detector:ExactDetector"


@eval_app.command("recipe")
def evaluate_recipe(
    target: Annotated[
        str,
        typer.Argument(
            help="a recipe, to measure its untrained model, or a run folder, to measure its last checkpoint"
        ),
    ],
    overrides: Overrides = None,
) -> None:
    """Measure a model on a recipe's evaluation prompts with the recipe's rewards."""
    from flowalign.cli.existing import check_recipe
    from flowalign.config import load_recipe

    target = expanded(target)
    folder = Path(target) if Path(target).is_dir() else None
    if folder is not None and not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no recipe.yaml")
    recipe = load_recipe(folder / "recipe.yaml" if folder else target, overrides or [])
    check_recipe(recipe)
    quiet_libraries()
    from flowalign.cli.scoring import evaluate_recipe as evaluate
    from flowalign.disk.run_folder import RunFolder
    from flowalign.training.display import summary_table

    title, summary = evaluate(recipe, None if folder is None else RunFolder.open(folder)[0], device())
    console.print(summary_table(title, summary))


@eval_app.command("geneval")
@with_options
def evaluate_geneval(
    *,
    model: OptionalModel = None,
    images: Images = None,
    prompts: Prompts = None,
    detector: Annotated[
        str | None,
        typer.Option(
            help="the object detector: module:Name, file.py:Name, or a Mask2Former's folder or hub id; default: "
            f"{DETECTOR}, or an exact detector for toyworld"
        ),
    ] = None,
    detector_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="an option of the detector, such as clip=FOLDER; repeatable"),
    ] = None,
    check_detector: Annotated[
        bool, typer.Option(help="first check that the detector finds what a bundled image shows")
    ] = True,
    how: BenchmarkOptions,
) -> None:
    """Draw GenEval's prompts and judge by detection whether the images show what was asked.

    An interrupted evaluation continues when the same command is given again.
    """
    _check(model, images, prompts)
    quiet_libraries()
    from flowalign.config.options import parse_options
    from flowalign.evaluate.geneval import evaluate_geneval as evaluate
    from flowalign.evaluate.geneval import load_judge

    benchmark = _benchmark(model, images, prompts, how, "toyworld/shapes_test", "geneval")
    spec = detector or (EXACT_DETECTOR if benchmark.embedded else DETECTOR)
    judging = load_judge(spec, parse_options([spec], detector_option or [], "--detector-option")[spec])
    summary, folder = evaluate(benchmark, judging, check_detector=check_detector)
    table = titled(f"GenEval of {model or images}", "task", "score", "95 %", "prompts")
    for task, row in summary["tasks"].items():
        table.add_row(task, *_score(row, row["prompts"]), str(row["prompts"]))
    table.add_section()
    least = min(row["prompts"] for row in summary["tasks"].values())  # one task with few prompts makes the mean rough
    table.add_row("overall, the mean of the tasks", *_score(summary["overall"], least), str(summary["prompts"]))
    counts = summary["prompts"], f"{summary['images']} images"
    table.add_row("mean of all images", *_score(summary["image_mean"], counts[0]), counts[1])
    table.add_row("prompts with any success", *_score(summary["any_success"], counts[0]), "")
    _finish(table, summary, folder, f"judged by {summary['detector']} ({summary['checksum'][:12]})")


@eval_app.command("ocr")
@with_options
def evaluate_ocr(
    *,
    model: OptionalModel = None,
    images: Images = None,
    prompts: Prompts = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="page finds text in photographs, lines reads small images of text alone; default: page, or lines for "
            "toyworld"
        ),
    ] = None,
    recogniser: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="the model that reads: a language, such as cyrillic, or an .onnx file"),
    ] = None,
    keys: Annotated[
        str | None, typer.Option(metavar="FILE", help="the characters that the recogniser knows, one per line")
    ] = None,
    how: BenchmarkOptions,
) -> None:
    """Draw prompts that quote a text and measure how much of it can be read in the images.

    An interrupted evaluation continues when the same command is given again.
    """
    _check(model, images, prompts)
    quiet_libraries()
    from flowalign.evaluate.ocr import SCORES
    from flowalign.evaluate.ocr import evaluate_ocr as evaluate

    benchmark = _benchmark(model, images, prompts, how, "toyworld/words_test", None)
    summary, folder = evaluate(benchmark, mode or ("lines" if benchmark.embedded else "page"), recogniser, keys)
    table = titled(f"OCR of {model or images}", "letters", "score", "mean", "95 %", "prompts")
    for length, row in {"all": summary, **summary["lengths"]}.items():
        for place, name in enumerate(SCORES):
            shown, prompts_of = ("", "") if place else (length, str(row["prompts"]))
            last = place == len(SCORES) - 1
            table.add_row(shown, name, *_score(row[name], row["prompts"]), prompts_of, end_section=last)
    note = "accuracy is the published score; similarity and exact also count text around the target as wrong"
    _finish(table, summary, folder, note)


@eval_app.command("panel")
@with_options
def evaluate_panel(
    *,
    model: ModelArgument,
    prompts: Annotated[str, typer.Option(metavar="FILE[#COLUMN]", help="a prompt list, or a bundled name")],
    reward: Annotated[
        list[str],
        typer.Option(help="a reward: a built-in name, file.py:Name, package.module:Name or http://...; repeatable"),
    ],
    option: RewardOptions = None,
    how: BenchmarkOptions,
) -> None:
    """Score a model with any rewards, with and without guidance, and compare a fine-tuned model with its base."""
    _check(model, None, prompts, reward)
    quiet_libraries()
    from flowalign.config.options import parse_options
    from flowalign.evaluate.panel import BASE, TUNED
    from flowalign.evaluate.panel import evaluate_panel as evaluate
    from flowalign.experiments.scaling import load_by_name

    tuned = _drawing(model, how)
    options = parse_options(reward, option or [])
    loaded = load_by_name(reward, options, device())
    base = replace(tuned, model=tuned.model.model_copy(update={"adapter": None}))
    drawings = {
        name: [
            replace(one, sampler=one.sampler.model_copy(update={"guidance": level}))
            for level in dict.fromkeys((one.sampler.guidance, 1.0))
        ]
        for name, one in ({BASE: base, TUNED: tuned} if tuned.model.adapter else {BASE: base}).items()
    }
    about = {"rewards": {name: options[spec] for name, spec in zip(loaded, reward, strict=True)}, "specs": list(reward)}
    summary, folder = evaluate(drawings, prompts, how.count, loaded, about, how.output)
    table = _panel_table(f"{model} on {prompts}", summary)
    _finish(table, summary, folder, f"{counted(summary['prompts'], 'prompt')}, the same noise for all models")


@data_app.command("geneval")
def write_geneval_prompts(
    output: Annotated[Path, typer.Argument(help="the .jsonl file to write")],
    count: Annotated[int, typer.Option(min=1, max=MOST, help="number of prompts to write")] = 50_000,
    seed: Annotated[int, typer.Option(min=-(2**62), max=2**62, help="seed of the random choice of prompts")] = 0,
    exclude: Annotated[
        Path | None, typer.Option(help="a prompt list, such as a test list, whose prompts are not written")
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option(
            metavar="TASK=SHARE,...",
            help="the share of each task, such as position=.7,counting=.3; default: the mix of Flow-GRPO",
        ),
    ] = None,
) -> None:
    """Write training prompts in GenEval's format."""
    from flowalign.evaluate.geneval_prompts import PUBLISHED_MIX, write_training_prompts

    if output.exists():
        raise UserError(f"{output} exists; choose another name")
    write_training_prompts(output, count, seed, exclude, PUBLISHED_MIX if mix is None else _mix(mix))
    console.print(f"wrote {count} prompts to {output}")


def _mix(text: str) -> dict[str, float]:
    shares = {}
    for part in text.split(","):
        task, _, share = part.partition("=")
        try:
            shares[task.strip()] = float(share)
        except ValueError:
            raise UserError(f"--mix {text!r}: {part!r} must be written TASK=SHARE, such as position=.7") from None
    return shares


def _check(model: str | None, images: Path | None, prompts: str | None, rewards: Sequence[str] = ()) -> None:
    """The checks of a benchmark's sources that need no heavy import; raises UserError or RewardError."""
    from flowalign.cli.existing import check_images, check_model, check_prompts, check_rewards

    if (model is None) is (images is None):
        raise UserError("give either MODEL, to draw images with it, or --images, to judge existing ones")
    check_model(model)
    check_images(images)
    check_prompts(prompts)
    check_rewards(rewards)


def _drawing(model: str, how: BenchmarkOptions) -> "Drawing":
    """How to draw."""
    from flowalign.evaluate.drawing import drawing_of

    drawing = drawing_of(model, how.adapter, device=device(), images=how.images_per_prompt, **how.given())
    console.print(drawing.words, markup=False, soft_wrap=True)
    return drawing


def _benchmark(
    model: str | None, images: Path | None, prompts: str | None, how: BenchmarkOptions, toyworld: str, usual: str | None
) -> "Benchmark":
    """What to judge; `toyworld` and `usual` are the benchmark's own lists, for the embedded model and for others."""
    from flowalign.evaluate.benchmark import Benchmark

    if model is None:
        for name, value in {"adapter": how.adapter, **how.given()}.items():
            if value is not None:
                raise UserError(f"--{name.replace('_', '-')} changes how images are drawn; leave it out with --images")
        assert images is not None  # one of the two was given
        source: Drawing | Path = images
    else:
        source = _drawing(model, how)
        prompts = prompts or (toyworld if source.embedded else usual)
    if prompts is None and how.count is not None:
        raise UserError("--count takes the first prompts of a list; give --prompts with it")
    return Benchmark(source, how.images_per_prompt, how.output, prompts, how.count)


def _score(row: Mapping[str, Any], prompts: int) -> tuple[str, str]:
    """A score and its interval as texts; `prompts` is the number of prompts that were scored."""
    return f"{row['score']:.3f}", _interval(row["interval"], prompts)


def _interval(interval: Sequence[float] | None, prompts: int, digits: int = 3) -> str:
    from flowalign.evaluate.intervals import FEW

    words = "none" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"
    return f"{words}, few" if prompts < FEW else words


def _panel_table(title: str, summary: Mapping[str, Any]) -> Table:
    """A section per reward and guidance: the base model, and the fine-tuned model and the difference if it exists."""
    table = titled(title, "reward", "guidance", "model", "mean", "95 %")
    lines = [(row["reward"], row["guidance"], row["model"], f"{row['mean']:.4f}", row) for row in summary["means"]]
    lines += [
        (row["reward"], row["guidance"], "tuned - base", f"{row['mean']:+.4f}", row) for row in summary["differences"]
    ]
    rewards = list(dict.fromkeys(line[0] for line in lines))
    lines.sort(key=lambda line: (rewards.index(line[0]), -line[1]))  # the sort is stable: the models keep their order
    shown: tuple[str, float] | None = None
    for reward, guidance, model, mean, row in lines:
        if shown is not None and shown != (reward, guidance):
            table.add_section()
        names = ("", "") if shown == (reward, guidance) else (reward, f"{guidance:g}")
        shown = (reward, guidance)
        table.add_row(*names, model, mean, _interval(row["interval"], row["prompts"], 4))
    return table


def _finish(table: Table, summary: Mapping[str, Any], folder: Path, note: str) -> None:
    from flowalign.evaluate.intervals import FEW, FEW_WORDS
    from flowalign.evaluate.results import Stopwatch

    console.print(table)
    notes = [note]
    parts = [summary, *summary.get("tasks", {}).values(), *summary.get("lengths", {}).values()]
    if min(row["prompts"] for row in [*parts, *summary.get("means", [])]) < FEW:
        notes.append(FEW_WORDS)
    if "held_out" in summary:
        notes.append(summary["held_out"])
    seconds = ", ".join(f"{phase} {spent:.0f} s" for phase, spent in Stopwatch(folder).seconds.items())
    console.print("\n".join([*notes, f"{seconds}; all results are in {folder}"]), markup=False, soft_wrap=True)
