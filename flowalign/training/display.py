"""The output of a run in the terminal."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowalign.terminal import Terminal, table_of, titled, verdict

if TYPE_CHECKING:
    from flowalign.config import Recipe
    from flowalign.evaluate.audit.audit import Audit
    from flowalign.evaluate.held_out import HeldOut
    from flowalign.evaluate.intervals import Interval
    from flowalign.training.selftest import Check

Summary = Mapping[str, Mapping[str, Any]]


class Display(Terminal):
    """Prints a line for each step and evaluation of a run, above its progress bars."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None):
        super().__init__(quiet=quiet, console=console)
        self._first_summary: Summary | None = None
        self._max_minutes: float | None = None
        self._steps = 0

    def begin(self, recipe: "Recipe", folder: Path, parameters: Mapping[str, int], processes: int) -> None:
        """Print what the run trains, and its batch arithmetic."""
        self._max_minutes = recipe.run.max_minutes
        share = f"{parameters['trainable'] / 1e6:.2f} of {parameters['all'] / 1e6:.2f} million weights"
        trained = ", ".join(name for name, entry in recipe.rewards.items() if entry.weight > 0)
        measured = ", ".join(name for name, entry in recipe.rewards.items() if entry.weight == 0)
        trained += f" (only measured: {measured})" if measured else ""
        self.say(f"{recipe.name}: {recipe.algorithm.name} on {trained}, {share}, into {folder}")
        self.console.print(arithmetic_table(recipe, processes))

    def self_test(self, checks: "Sequence[Check]") -> None:
        """Print the start-up checks."""
        for check in checks:
            mark = verdict(check.passed, "ok  ")
            self.console.print(mark, f"{check.check}: {check.detail}", soft_wrap=True)

    @contextmanager
    def training(self, steps: int, done: int) -> Iterator[None]:
        """Show the bar of a run's steps while the block runs."""
        self._steps = steps
        with self.bars.steps(steps, done):
            yield

    def step(self, line: Mapping[str, Any]) -> None:
        """Print the metrics of a finished training step."""
        rewards = " ".join(f"{name} {value:.3f}" for name, value in line["reward"].items())
        total = self._steps
        if self._max_minutes is not None:  # time may end the run first: its last step at the pace so far
            pace = math.ceil(line["step"] * self._max_minutes / line["minutes"])
            total = min(total, max(pace, line["step"]))
        self.bars.step(line["step"], total)
        seconds = " ".join(f"{name} {value:.1f} s" for name, value in line["seconds"].items())
        metrics = " ".join(f"{name} {value:.2g}" for name, value in line["metrics"].items())
        self.say(f"step {line['step']}: {rewards} | {metrics} | {seconds}")

    def evaluation(self, step: int, summary: Summary, seconds: float, held_out: "HeldOut") -> None:
        """Print an evaluation's means and their changes since the first evaluation of this process."""
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
        """Print the result of an evaluation's audit."""
        panel = "" if audit.panel is None else f"held-out rewards {audit.panel:+.2f} seed deviations, "
        kind = "ALARM" if audit.alarms else "audit"
        self.say(f"{kind} at step {step}: {audit.verdict}  [{panel}KL {audit.kl:.1f} nats]")

    def finished(self, folder: Path, report: Path) -> None:
        """Print the paths of the run folder and the report."""
        self.say(f"run folder {folder}\nreport     {report}")


def arithmetic_table(recipe: "Recipe", processes: int = 1) -> Table:
    """The batch arithmetic of a recipe."""
    return table_of((), recipe.arithmetic(processes), show_header=False, box=None, padding=(0, 2))


def gain_table(folder: Path) -> Table | None:
    """The first and last evaluation of a run side by side, trained rewards first; None without two evaluations."""
    from flowalign.evaluate.intervals import FEW
    from flowalign.evaluate.report.report import changes

    found = changes(folder)
    if found is None:
        return None
    held_out, rows = found
    title = f"{held_out.words if held_out.trained else held_out.word + ' prompts'}, same noise"
    columns = ("reward", "is", "before", "after", "gain ± s.e.", "95 %")
    table = titled(title, *columns, left=columns[:2], overflow="fold", box=SIMPLE_HEAD, pad_edge=False)
    for name, trained, change in sorted(rows, key=lambda row: not row[1]):
        error = "" if math.isnan(change.standard_error) else f" ± {change.standard_error:.3f}"
        kind = "trained" if trained else "held out"
        ends = (
            f"{change.before:.3f}",
            f"{change.after:.3f}",
            f"{change.gain:+.3f}{error}",
            _between(change.interval, "+.3f"),
        )
        table.add_row(name, kind, *ends)
    if any(change.prompts < FEW for *_, change in rows):
        table.caption = f"fewer than {FEW} prompts, so the intervals are rough"
    return table


def summary_table(title: str, summary: Summary) -> Table:
    """The means of an evaluation and of its GenEval tasks, with standard errors and intervals."""
    from flowalign.evaluate.intervals import FEW

    table = titled(title, "reward", "task", "mean", "± s.e.", "95 %", "images", left=("reward", "task"))
    for name, result in summary.items():
        for task, row in [("all", result), *result.get("tasks", {}).items()]:
            error = "" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
            table.add_row(name, task, f"{row['mean']:.4f}", error, _between(row["interval"]), str(row["count"]))
            if row["prompts"] < FEW:
                table.caption = f"fewer than {FEW} prompts, in all or in a task, so the intervals are rough"
        if "overall" in result:
            table.add_row(
                name, "mean of tasks", f"{result['overall']:.4f}", "", _between(result["overall_interval"]), ""
            )
    return table


def _between(interval: "Interval", style: str = ".4f") -> str:
    return "none" if interval is None else f"{interval[0]:{style}} to {interval[1]:{style}}"


def audit_table(title: str, audit: "Audit") -> Table:
    """Every measure of an audit with its band."""
    table = titled(title, "measure", "base", "now", "band", "state", left=("measure", "state"))
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
