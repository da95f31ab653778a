"""Where a training step's time goes: `python scripts/bench.py RECIPE [key=value ...]`.

Prints images/s of the rollout, items/s of training, milliseconds by phase, reward milliseconds per image, the floor
(the same forward and backward passes alone, on the same batches), the ratio of step to floor, peak memory, and how the
time of a step grows with group size and denoising steps. With `--overlap` it compares instead two ways of scoring:
while the next images are drawn, and after all images are drawn. Under `accelerate launch --num_processes N` it measures
the step of N processes. Ratios within one run are reliable; absolute times depend on the machine.
"""

import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from flowalign.cli.console import quiet_libraries
from flowalign.config import Recipe, load_recipe
from flowalign.preflight.step_time import time_steps
from flowalign.trainer import Trainer
from flowalign.training.display import Display

console = Console(highlight=False, quiet=os.environ.get("RANK", "0") != "0")


@contextmanager
def _trainer(recipe: Recipe) -> Iterator[Trainer]:
    """A trainer whose run folder is temporary."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {"folder": f"{folder}/run", "trackers": ()}
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update=changes)})
        yield Trainer.from_recipe(recipe, display=Display(quiet=True))


def overlap(recipe: Recipe, repeats: int) -> Table:
    """Medians of a step with the reward scored beside the rollout and after it: `repeats` of each, in turns."""
    rows: dict[str, list[tuple[float, float, float]]] = {"beside the rollout": [], "after the rollout": []}
    with _trainer(recipe) as trainer:
        trainer.tested = True
        begin = trainer.scorer.judge
        for step in range(2 * repeats + 2):
            name = list(rows)[step % 2]
            trainer.scorer.judge = begin if step % 2 == 0 else _later  # type: ignore[method-assign]
            started = time.perf_counter()
            trainer._train_step()
            whole = time.perf_counter() - started
            if step >= 2:  # the first step of each kind warms up
                rows[name].append((whole, trainer.seconds["rollout"], trainer.seconds["reward"]))
    table = Table("reward scored", "step", "rollout", "waiting for the reward", title=recipe.name, title_justify="left")
    medians = {name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in rows.items()}
    for name, found in medians.items():
        table.add_row(name, *(f"{1000 * seconds:.0f} ms" for seconds in found))
    first, second = (found[0] for found in medians.values())
    table.caption = f"scoring beside the rollout takes {first / second:.3f} of the time of scoring after it"
    return table


def _later(media: torch.Tensor, rows: object) -> None:
    """Starts no scoring, so that all images are scored after the rollout."""


def measure(recipe: Recipe, repeats: int) -> dict[str, float]:
    """The results of `time_steps` in a temporary run folder."""
    with _trainer(recipe) as trainer:
        return time_steps(trainer, repeats, warm_ups=2 if recipe.model.compile else 1)


def beside(recipe: Recipe, changed: Recipe, repeats: int) -> tuple[float, float]:
    """Medians of the changed recipe's step time, in seconds and relative to the recipe's own, measured in turns."""
    pairs = []
    with _trainer(recipe) as first, _trainer(changed) as second:
        first.tested = second.tested = True
        for _ in range(repeats + 1):
            seconds = []
            for trainer in (first, second):
                started = time.perf_counter()
                trainer._train_step()
                seconds.append(time.perf_counter() - started)
            pairs.append((seconds[1], seconds[1] / seconds[0]))
    step, ratio = (statistics.median(column) for column in zip(*pairs[1:], strict=True))  # the first pair warms up
    return step, ratio


def _table(recipe: Recipe, seconds: dict[str, float]) -> Table:
    images, items = recipe.samples_per_step, recipe.items_per_step
    table = Table("quantity", "value", title=recipe.name, title_justify="left")
    if seconds["decode"]:  # a step from a dataset of groups draws nothing
        table.add_row("rollout", f"{images / seconds['rollout']:.1f} images/s (decoding included)")
    table.add_row("training", f"{items / seconds['train']:.1f} items/s")
    table.add_row("reward", f"{1000 * seconds['scores'] / images:.2f} ms/image alone")
    for phase, name in (("rollout", "rollout"), ("reward", "waiting for the reward"), ("train", "training")):
        table.add_row(f"{name} time", f"{1000 * seconds[phase]:.0f} ms")
    table.add_row("step time", f"{1000 * seconds['step']:.0f} ms")
    inside, decode = seconds["floor"] - seconds["decode"], seconds["decode"]
    table.add_row("inside the transformer", f"{inside / seconds['step']:.1%} of the step")
    parts = f"transformer {1000 * inside:.0f}, decoding {1000 * decode:.0f}"
    table.add_row("floor", f"{1000 * seconds['floor']:.0f} ms: the same passes alone, {parts}")
    table.add_row("step / floor", f"{seconds['ratio']:.3f}")
    whole = seconds["floor"] + seconds["scores"]
    table.add_row("step / (floor and scoring alone)", f"{seconds['step'] / whole:.3f}")
    if torch.cuda.is_available():
        table.add_row("peak memory", f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the device")
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        table.add_row("peak memory", f"{peak:.2f} GiB of the process")
    return table


def main(
    recipe: Annotated[str, typer.Argument(help="a bundled recipe's name or a YAML file")] = "toyworld_ocr",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes to it")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="number of measured steps")] = 3,
    only_overlap: Annotated[
        bool, typer.Option("--overlap", help="only compare scoring during the rollout with scoring after it")
    ] = False,
    growth: Annotated[
        bool, typer.Option(help="also measure how the step time grows with group size and denoising steps")
    ] = True,
) -> None:
    """Measure a recipe's training step."""
    quiet_libraries()
    resolved = load_recipe(recipe, overrides or [])
    if only_overlap:
        console.print(overlap(resolved, repeats))
        return
    console.print(_table(resolved, measure(resolved, repeats)))
    if not growth:
        return
    table = Table("change", "step time", "relative to the recipe", title="growth", title_justify="left")
    group, steps = resolved.train.group_size, resolved.rollout.steps
    cases = [("train.group_size", max(2, group // 2)), ("train.group_size", 2 * group)]
    cases += [("rollout.steps", 2 * steps), ("rollout.steps", 4 * steps)]
    for key, value in cases:
        window = [f"rollout.window={list(resolved.rollout.sde_window)}"] if resolved.rollout.dynamics != "ode" else []
        changed = load_recipe(recipe, [*(overrides or []), f"{key}={value}", *window])
        step, ratio = beside(resolved, changed, repeats)
        table.add_row(f"{key}={value}", f"{1000 * step:.0f} ms", f"{ratio:.2f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
