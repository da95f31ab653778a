"""The terminal: lines that show any text as it is, and bars of what is being done, which fit into 40 columns."""

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console, OverflowMethod
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

Advance = Callable[[float], None]
_ROOMY = 60  # columns from which on the time that has gone is shown too
_NAME = 10  # letters of the longest phase, so that bars begin in one place


def plain_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console for words that are not ours, such as prompts and paths: none of them is markup or an emoji's name.

    What a terminal's encoding lacks is printed as an escape, such as \\u65e5. Colours are given as `Text`.
    """
    tolerate(sys.stderr if stderr else sys.stdout)
    return Console(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)


def tolerate(stream: object) -> None:
    """Have a stream print what its encoding lacks as an escape, where it would raise UnicodeEncodeError."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def verdict(passed: bool | None, good: str = "pass", bad: str = "FAIL") -> Text:
    """A coloured word for a check; "-" for one that was not made."""
    return Text("-") if passed is None else Text(good, "green") if passed else Text(bad, "red")


def titled(
    title: str, *columns: str, left: Sequence[str] = (), overflow: OverflowMethod = "ellipsis", **style: Any
) -> Table:
    """A table under a title; numbers stand right, the columns `left` left, by default the first one."""
    table = Table(title=title, title_justify="left", caption_justify="left", **style)
    for name in columns:
        table.add_column(name, justify="left" if name in (left or columns[:1]) else "right", overflow=overflow)
    return table


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    names = list(columns)
    return "".join(markdown_row(line) + "\n" for line in [names, ["---"] * len(names), *rows])


def markdown_row(cells: Iterable[str]) -> str:
    """A line of such a table."""
    return f"| {' | '.join(cells)} |"


class _Count(ProgressColumn):
    """How many of how many; nothing where the end is not known."""

    def render(self, task: Task) -> Text:
        return Text(
            "" if task.total is None else f"{round(task.completed)}/{round(task.total)}", "green", justify="right"
        )


class _TimeLeft(ProgressColumn):
    """At the pace since this process began: however long a step takes, the second one knows."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        made = task.completed - task.fields.get("before", 0)
        if task.total is None or task.elapsed is None or made <= 0:
            return Text("-:--:-- left", "cyan")
        seconds = task.elapsed / made * (task.total - task.completed)
        return Text(f"{timedelta(seconds=max(0, round(seconds)))} left", "cyan")


class Bars:
    """Bars that are shown while there is something to do; none where the output is no terminal that can move them."""

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
        count, left = (column(Column(no_wrap=True)) for column in (_Count, _TimeLeft))  # the bar alone gives way
        columns = (name, BarColumn(bar_width=None), count, *elapsed, left)
        able = self.console.is_terminal and not self.console.is_dumb_terminal
        with Progress(*columns, console=self.console, expand=True, disable=not able) as self._progress:
            try:
                yield self._progress
            finally:
                self._progress = self._steps = self._phase = None

    @contextmanager
    def steps(self, total: int, done: int) -> Iterator[None]:
        """The bar of a run's steps."""
        with self._shown() as progress:
            self._steps = progress.add_task("step", total=total, completed=done, before=done)
            yield

    def step(self, done: int, total: int) -> None:
        """So many steps are done, of so many."""
        if self._progress is not None and self._steps is not None:
            self._progress.update(self._steps, completed=done, total=total)

    @contextmanager
    def phase(self, doing: str, total: float | None) -> Iterator[Advance]:
        """What is being done, and how much of it there is; yields the function that moves its bar."""
        with self._shown() as progress:
            if self._phase is not None:  # the one before stays until now, so that nothing flickers
                progress.remove_task(self._phase)
            task = self._phase = progress.add_task(doing, total=total)
            yield lambda count: progress.update(task, advance=count)


class Terminal:
    """Plain lines above bars with the time left, where the output is a terminal."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None):
        self.console = console or plain_console(quiet=quiet)
        self.bars = Bars(self.console)

    def say(self, text: str) -> None:
        """A plain line."""
        self.console.print(text, soft_wrap=True)

    def phase(self, doing: str, total: float | None = None) -> AbstractContextManager[Advance]:
        """The bar of a part of a step, of so many pictures or passes where that is known."""
        return self.bars.phase(doing, total)

    def evaluating(self, pictures: int, doing: str = "evaluating") -> AbstractContextManager[Advance]:
        """The bar while pictures are drawn and scored; yields the function that moves it."""
        return self.bars.phase(doing, pictures)
