"""Terminal output: lines that show any text unchanged, and progress bars that fit into 40 columns."""

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console, OverflowMethod, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

Advance = Callable[[float], None]
_ROOMY = 60  # columns of a terminal that is wide enough for the elapsed time too
_NAME = 10  # letters of the longest phase, so that all bars begin in one column


def plain_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that prints prompts, paths and other text literally, without markup or names of emoji.

    Characters that the terminal's encoding lacks are printed as escapes, such as \\u65e5. Colours are given as `Text`.
    """
    tolerate(sys.stderr if stderr else sys.stdout)
    return Console(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)


def tolerate(stream: object) -> None:
    """Make a stream print characters that its encoding lacks as escapes, instead of raising UnicodeEncodeError."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def verdict(passed: bool | None, good: str = "pass", bad: str = "FAIL") -> Text:
    """A coloured word for a check; "-" for a check that did not run."""
    return Text("-") if passed is None else Text(good, "green") if passed else Text(bad, "red")


def titled(
    title: str, *columns: str, left: Sequence[str] = (), overflow: OverflowMethod = "ellipsis", **style: Any
) -> Table:
    """A table under a title. Columns are right-aligned, except those named in `left`, by default the first one."""
    table = Table(title=title, title_justify="left", caption_justify="left", **style)
    for name in columns:
        table.add_column(name, justify="left" if name in (left or columns[:1]) else "right", overflow=overflow)
    return table


def table_of(columns: Sequence[str | Column], rows: Iterable[Iterable[RenderableType]], **style: Any) -> Table:
    """A table of rows, with its columns aligned to the left."""
    table = Table(*columns, title_justify="left", **style)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    names = list(columns)
    return "".join(markdown_row(line) + "\n" for line in [names, ["---"] * len(names), *rows])


def markdown_row(cells: Iterable[str]) -> str:
    """A line of such a table."""
    return f"| {' | '.join(cells)} |"


class _Count(ProgressColumn):
    """The number done and the total, such as 3/8; nothing if the total is unknown."""

    def render(self, task: Task) -> Text:
        return Text(
            "" if task.total is None else f"{round(task.completed)}/{round(task.total)}", "green", justify="right"
        )


class _TimeLeft(ProgressColumn):
    """The time left, from the pace since this process began; it is known once the first step is done."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields.get("before", 0)
        if task.total is None or task.elapsed is None or done <= 0:
            return Text("-:--:-- left", "cyan")
        seconds = task.elapsed / done * (task.total - task.completed)
        return Text(f"{timedelta(seconds=max(0, round(seconds)))} left", "cyan")


class Bars:
    """Progress bars, shown while work is under way; none if the output is not a terminal that can redraw them."""

    def __init__(self, console: Console):
        self.console = console
        self._progress: Progress | None = None
        self._steps: TaskID | None = None
        self._phase: TaskID | None = None

    @contextmanager
    def _shown(self) -> Iterator[Progress]:
        if self._progress is not None:
            yield self._progress
            return
        elapsed = [TimeElapsedColumn()] if self.console.width >= _ROOMY else []
        name = TextColumn(f"{{task.description:{_NAME}}}", markup=False)
        count, left = (column(Column(no_wrap=True)) for column in (_Count, _TimeLeft))  # only the bar shrinks
        columns = (name, BarColumn(bar_width=None), count, *elapsed, left)
        able = self.console.is_terminal and not self.console.is_dumb_terminal
        with Progress(*columns, console=self.console, expand=True, disable=not able) as self._progress:
            try:
                yield self._progress
            finally:
                self._progress = self._steps = self._phase = None

    @contextmanager
    def steps(self, total: int, done: int) -> Iterator[None]:
        """Show the bar of a run's steps while the block runs."""
        with self._shown() as progress:
            self._steps = progress.add_task("step", total=total, completed=done, before=done)
            yield

    def step(self, done: int, total: int) -> None:
        """Move the bar of the steps to `done` of `total`."""
        if self._progress is not None and self._steps is not None:
            self._progress.update(self._steps, completed=done, total=total)

    @contextmanager
    def phase(self, doing: str, total: float | None) -> Iterator[Advance]:
        """Show the bar of a phase of length `total`, None if unknown; yields the function that advances it."""
        with self._shown() as progress:
            if self._phase is not None:  # the bar before stays until now, so that nothing flickers
                progress.remove_task(self._phase)
            task = self._phase = progress.add_task(doing, total=total)
            yield lambda count: progress.update(task, advance=count)


class Terminal:
    """Plain lines, above progress bars with the time left if the output is a terminal."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None):
        self.console = console or plain_console(quiet=quiet)
        self.bars = Bars(self.console)

    def say(self, *texts: str) -> None:
        """Print plain lines."""
        for text in texts:
            self.console.print(text, soft_wrap=True)

    def phase(self, doing: str, total: float | None = None) -> AbstractContextManager[Advance]:
        """The bar of a part of a step; total: its samples or updates, None if unknown."""
        return self.bars.phase(doing, total)

    def evaluating(self, images: int, doing: str = "evaluating") -> AbstractContextManager[Advance]:
        """The bar while images are drawn and scored; yields the function that advances it."""
        return self.bars.phase(doing, images)
