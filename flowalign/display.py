"""What a person sees of a run in the terminal."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from flowalign.command import plain_console, verdict

if TYPE_CHECKING:
    from flowalign.config import Recipe
    from flowalign.evaluate.hacking import Audit
    from flowalign.evaluate.held_out import HeldOut
    from flowalign.selftest import Check

Summary = Mapping[str, Mapping[str, Any]]


class Display:
    """Progress with time left and the reward as it moves; a line a step where the output is no terminal."""

    def __init__(self, *, quiet: bool = False):
        self.console = plain_console(quiet=quiet)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._first_summary: Summary | None = None
        self._max_minutes: float | None = None
        self._steps = 0

    def say(self, text: str) -> None:
        """A plain line."""
        self.console.print(text, soft_wrap=True)

    def begin(self, recipe: "Recipe", folder: Path, parameters: Mapping[str, int], processes: int) -> None:
        """What is about to be trained, and the batch arithmetic."""
        self._max_minutes = recipe.run.max_minutes
        share = f"{parameters['trainable'] / 1e6:.2f} of {parameters['all'] / 1e6:.2f} million weights"
        trained = ", ".join(name for name, entry in recipe.rewards.items() if entry.weight > 0)
        beside = ", ".join(name for name, entry in recipe.rewards.items() if entry.weight == 0)
        trained += f" (measured beside: {beside})" if beside else ""
        self.say(f"{recipe.name}: {recipe.algorithm.name} on {trained}, {share}, into {folder}")
        self.console.print(arithmetic_table(recipe, processes))

    def self_test(self, checks: "Sequence[Check]") -> None:
        """The start-up checks."""
        for check in checks:
            mark = verdict(check.passed, "ok  ")
            self.console.print(mark, f"{check.check}: {check.detail}", soft_wrap=True)

    @contextmanager
    def training(self, steps: int, done: int) -> Iterator[None]:
        """The progress bar of a run."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._steps = steps
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            self._progress, self._task = progress, progress.add_task("training", total=steps, completed=done, note="")
            yield
        self._progress = self._task = None

    @contextmanager
    def evaluating(self, pictures: int, doing: str = "evaluating") -> Iterator[Callable[[int], None]]:
        """A second bar while pictures are drawn and scored; yields the function that moves it."""
        if self._progress is None:
            with self.training(0, 0), self.evaluating(pictures, doing) as advance:
                yield advance
            return
        progress = self._progress
        task = progress.add_task(doing, total=pictures, note="")
        yield lambda count: progress.update(task, advance=count)
        progress.remove_task(task)

    def step(self, line: Mapping[str, Any]) -> None:
        """A finished training step."""
        rewards = " ".join(f"{name} {value:.3f}" for name, value in line["reward"].items())
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=line["step"], note=rewards)
            if self._max_minutes is not None:  # the end that is in sight: the time's, at the pace so far
                pace = math.ceil(line["step"] * self._max_minutes / line["minutes"])
                self._progress.update(self._task, total=min(self._steps, max(pace, line["step"])))
        if not self.console.is_terminal:
            seconds = " ".join(f"{name} {value:.1f} s" for name, value in line["seconds"].items())
            figures = " ".join(f"{name} {value:.2g}" for name, value in line["figures"].items())
            self.say(f"step {line['step']}: {rewards} | {figures} | {seconds}")

    def evaluation(self, step: int, summary: Summary, seconds: float, held_out: "HeldOut") -> None:
        """An evaluation's means, and how far they are from the first one of this process."""
        parts = []
        for name, result in summary.items():
            text = f"{name} {result['mean']:.4f}"
            if result["standard_error"]:
                text += f" ± {result['standard_error']:.4f}"
            if self._first_summary is not None and name in self._first_summary:
                text += f" ({result['mean'] - self._first_summary[name]['mean']:+.4f})"
            parts.append(text)
        self._first_summary = self._first_summary or summary
        on = "" if held_out.trained == 0 else f" ({held_out.words})"
        self.say(f"evaluation at step {step}{on}: {', '.join(parts)}  [{seconds:.0f} s]")

    def audit(self, step: int, audit: "Audit") -> None:
        """What an evaluation's audit found."""
        panel = "" if audit.panel is None else f"held-out rewards {audit.panel:+.2f} seed deviations, "
        kind = "ALARM" if audit.alarms else "audit"
        self.say(f"{kind} at step {step}: {audit.verdict}  [{panel}KL {audit.kl:.1f} nats]")

    def finished(self, folder: Path, report: Path) -> None:
        """Where to look."""
        self.say(f"run folder {folder}\nreport     {report}")


def arithmetic_table(recipe: "Recipe", processes: int = 1) -> Table:
    """The batch arithmetic of a recipe."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    for quantity, how in recipe.arithmetic(processes):
        table.add_row(quantity, how)
    return table


def summary_table(title: str, summary: Summary) -> Table:
    """Means, standard errors and GenEval tasks of an evaluation."""
    table = Table(title=title, title_justify="left")
    for column in ("reward", "task", "mean", "± s.e.", "pictures"):
        table.add_column(column, justify="left" if column in ("reward", "task") else "right")
    for name, result in summary.items():
        rows = [("all", result), *result.get("tasks", {}).items()]
        for task, row in rows:
            error = "" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
            table.add_row(name, task, f"{row['mean']:.4f}", error, str(row["count"]))
        if "overall" in result:
            table.add_row(name, "mean of tasks", f"{result['overall']:.4f}", "", "")
    return table


def audit_table(title: str, audit: "Audit") -> Table:
    """Every measure of an audit with its band."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in ("measure", "base", "now", "band", "state"):
        table.add_column(column, justify="left" if column in ("measure", "state") else "right")
    for name, band in audit.bands.items():
        value = audit.values[name]
        bounds = f">= {band.low:.4g}" if band.high == math.inf else f"{band.low:.4g} to {band.high:.4g}"
        state = audit.state(name)
        table.add_row(
            name, f"{band.center:.4g}", f"{value:.4g}", bounds, Text(state, "red" if state == "alarm" else "")
        )
    panel = "" if audit.panel is None else f"held-out rewards {audit.panel:+.2f} seed deviations, "
    table.caption = f"training reward {audit.proxy:.4f}, {panel}KL {audit.kl:.2f} nats"
    return table
