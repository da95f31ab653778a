"""The way of every benchmark: pictures drawn or given, judged one by one into results.jsonl."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.data import Row, load_prompts
from flowalign.display import Display
from flowalign.evaluate.drawing import Drawing, Picture, draw, listed
from flowalign.evaluate.results import EVALUATION, RESULTS, Line, Stopwatch, check_folder, continued, keep_settings
from flowalign.settings import UserError

BATCH = 16  # pictures that are judged at once


@dataclass(frozen=True)
class Benchmark:
    """What is judged, and where that goes."""

    source: Drawing | Path
    """How to draw, or a folder of pictures in GenEval's layout."""
    images: int
    """Pictures of a prompt."""
    output: Path
    prompts: str | None
    """A prompt list; None takes the prompts of a folder of pictures from its metadata."""
    count: int | None = None
    """Only the first prompts of the list."""

    def rows(self) -> list[Row]:
        """The prompts, those of a folder of pictures where no list is given; UserError where they cannot be had."""
        if self.prompts is not None:
            return load_prompts(self.prompts, self.count)
        if isinstance(self.source, Drawing):
            raise UserError("--prompts is missing; there is no list that suits this model by itself")
        return [picture.row for picture in listed(self.source, self.images)[:: self.images]]

    def where(self, row: Row) -> str:
        """Where a mistake in a row's prompt is, to begin a sentence with."""
        if self.prompts is None:
            return f"{self.source}/{row.index:05d}/metadata.jsonl"
        return f"prompts {self.prompts}, line {row.index + 1}"

    def judged(
        self,
        rows: Sequence[Row],
        settings: Mapping[str, Any],
        judge: Callable[[Sequence[Picture]], Sequence[Line]],
    ) -> list[Line]:
        """The lines of results.jsonl, a picture each, after whatever was missing is drawn and judged.

        `settings` are what decides the judge's answers; a folder of others is refused with a UserError.
        """
        given = self.source if isinstance(self.source, Path) else None
        settings = {**settings, "images": str(given.resolve()) if given else "drawn"}
        check_folder(self.output, EVALUATION, settings, made=RESULTS)
        stopwatch = Stopwatch(self.output)
        if isinstance(self.source, Drawing):
            with Display().evaluating(len(rows) * self.images, "drawing") as progress:
                draw(self.output, self.source, rows, stopwatch, progress)
        pictures = listed(given or self.output, self.images, rows)
        keep_settings(self.output, EVALUATION, settings)

        def judge_places(places: range) -> Sequence[Line]:
            lines = judge([pictures[place] for place in places])
            stopwatch.lap("judge")
            return lines

        stopwatch.start()
        with Display().evaluating(len(pictures), "judging") as progress:
            return continued(self.output / RESULTS, len(pictures), BATCH, judge_places, progress)
