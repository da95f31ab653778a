"""The way of every benchmark: pictures drawn or given, judged one by one into results.jsonl."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowalign.config.base import UserError
from flowalign.disk.media import MANIFEST
from flowalign.evaluate.drawing import Drawing, Picture, draw, folder_name, listed
from flowalign.evaluate.held_out import said_of
from flowalign.evaluate.results import EVALUATION, RESULTS, Line, Stopwatch, check_folder, continued, keep_settings
from flowalign.rollout.manifest import manifest_of
from flowalign.rollout.prompts import Row, load_prompts
from flowalign.terminal import Terminal

BATCH = 16  # pictures that are judged at once


@dataclass(frozen=True)
class Benchmark:
    """What is judged, and where that goes."""

    source: Drawing | Path
    """How to draw, or a folder of pictures in GenEval's layout or with a MANIFEST."""
    images: int
    """Pictures of a prompt."""
    output: Path | None
    """None is a folder of its own, see `placed`."""
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

    def placed(self, kind: str, about: Mapping[str, Any]) -> "Benchmark":
        """With a folder of its own under runs/ where none was given: `about` are what decides the judge's answers."""
        if self.output is not None:
            return self
        if isinstance(self.source, Drawing):
            name = self.source.name(self.rows(), about)
        else:
            name = folder_name([self.source.resolve().name], {**about, **self._given(self.source)})
        return replace(self, output=Path("runs") / kind / name)

    def _given(self, folder: Path) -> dict[str, Any]:
        """Whose pictures are judged; others in the same place are not those of which there are results."""
        digest = hashlib.sha256()
        for picture in listed(folder, self.images):
            digest.update(picture.name.encode() + picture.path.read_bytes())
        return {"images": str(folder.resolve()), "pictures": digest.hexdigest()}

    def about(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What a summary says of its pictures and prompts."""
        if not isinstance(self.source, Drawing):
            return {"drawn": None}
        return {"drawn": self.source.words, **said_of(self.source.model.adapter, rows)}

    @property
    def folder(self) -> Path:
        """Where it goes, once it is placed."""
        assert self.output is not None
        return self.output

    def where(self, row: Row) -> str:
        """Where a mistake in a row's prompt is, to begin a sentence with."""
        if self.prompts is None:
            folder = Path(str(self.source))
            whole = manifest_of(folder)
            return f"{whole}, prompt {row.index + 1}" if whole else str(folder / f"{row.index:05d}" / MANIFEST)
        return f"prompts {self.prompts}, prompt {row.index + 1}"

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
        settings = {**settings, **(self._given(given) if given else {"images": "drawn"})}
        check_folder(self.folder, EVALUATION, settings, made=RESULTS)
        stopwatch = Stopwatch(self.folder)
        if isinstance(self.source, Drawing):
            with Terminal().evaluating(len(rows) * self.images, "drawing") as progress:
                draw(self.folder, self.source, rows, stopwatch, progress)
        pictures = listed(given or self.folder, self.images, rows)
        keep_settings(self.folder, EVALUATION, settings)

        def judge_places(places: range) -> Sequence[Line]:
            lines = judge([pictures[place] for place in places])
            stopwatch.lap("judge")
            return lines

        stopwatch.start()
        with Terminal().evaluating(len(pictures), "judging") as progress:
            return continued(self.folder / RESULTS, len(pictures), BATCH, judge_places, progress)
