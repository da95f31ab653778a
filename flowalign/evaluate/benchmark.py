"""The steps that all benchmarks share: draw or take images, judge each one, write results.jsonl."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flowalign.config.base import UserError
from flowalign.disk.media import MANIFEST
from flowalign.evaluate.drawing import Drawing, Sample, draw, folder_name, listed, seen_by_size
from flowalign.evaluate.held_out import said_of
from flowalign.evaluate.results import EVALUATION, RESULTS, Line, Stopwatch, check_folder, continued, keep_settings
from flowalign.rollout.manifest import manifest_of
from flowalign.rollout.prompts import Row, load_prompts
from flowalign.terminal import Terminal

BATCH = 16  # images that are judged at once


@dataclass(frozen=True)
class Benchmark:
    """The images to judge, and where the results go."""

    source: Drawing | Path
    """How to draw, or a folder of images in GenEval's layout or with a MANIFEST."""
    images: int
    """Images per prompt."""
    output: Path | None
    """The folder of the results; None: `placed` chooses one under runs/."""
    prompts: str | None
    """A prompt list; None: the metadata of the folder of images gives the prompts."""
    count: int | None = None
    """Use only this many prompts, from the start of the list."""

    def rows(self) -> list[Row]:
        """The rows of the prompt list or, without one, of the folder of images; UserError if there is neither."""
        if self.prompts is not None:
            return load_prompts(self.prompts, self.count)
        if isinstance(self.source, Drawing):
            raise UserError("--prompts is missing; this benchmark has no list of its own for this model")
        return [sample.row for sample in listed(self.source, self.images)[:: self.images]]

    def placed(self, kind: str, about: Mapping[str, Any]) -> "Benchmark":
        """This benchmark with a folder under runs/ if none was given; `about` are the settings of the judge."""
        if self.output is not None:
            return self
        if isinstance(self.source, Drawing):
            name = self.source.name(self.rows(), about)
        else:
            name = folder_name([self.source.resolve().name], {**about, **self._given(self.source)})
        return replace(self, output=Path("runs") / kind / name)

    def _given(self, folder: Path) -> dict[str, Any]:
        """The folder of given images and a checksum of them, so that results of changed images are refused."""
        digest = hashlib.sha256()
        for sample in listed(folder, self.images):
            digest.update(sample.name.encode() + sample.path.read_bytes())
        return {"images": str(folder.resolve()), "pictures": digest.hexdigest()}

    @property
    def embedded(self) -> bool:
        """Whether the images are drawn with the embedded model."""
        return isinstance(self.source, Drawing) and self.source.embedded

    def about(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What a summary says about its images and prompts."""
        if not isinstance(self.source, Drawing):
            return {"drawn": None}
        return {"drawn": self.source.words, **said_of(self.source.model.adapter, rows)}

    @property
    def folder(self) -> Path:
        """The folder of the results; only after `placed`."""
        assert self.output is not None
        return self.output

    def where(self, row: Row) -> str:
        """The place of a row's prompt, to begin an error's sentence with."""
        if self.prompts is None:
            folder = Path(str(self.source))
            whole = manifest_of(folder)
            return f"{whole}, prompt {row.index + 1}" if whole else str(folder / f"{row.index:05d}" / MANIFEST)
        return f"prompts {self.prompts}, prompt {row.index + 1}"

    def judged(
        self,
        rows: Sequence[Row],
        settings: Mapping[str, Any],
        see: Callable[[torch.Tensor], Sequence[Any]],
        line_of: Callable[[Sample, Any], Line],
    ) -> list[Line]:
        """Draw and judge the missing images; returns the lines of results.jsonl, one per image.

        `line_of` gives a line from what `see` finds in an image of a batch (B, 3, H, W) in [0, 1]; `settings` decide
        its answers. Raises UserError for a folder of results with other settings.
        """
        given = self.source if isinstance(self.source, Path) else None
        settings = {**settings, **(self._given(given) if given else {"images": "drawn"})}
        check_folder(self.folder, EVALUATION, settings, made=RESULTS)
        stopwatch = Stopwatch(self.folder)
        if isinstance(self.source, Drawing):
            with Terminal().evaluating(len(rows) * self.images, "drawing") as progress:
                draw(self.folder, self.source, rows, stopwatch, progress)
        samples = listed(given or self.folder, self.images, rows)
        keep_settings(self.folder, EVALUATION, settings)

        def judge_places(places: range) -> Sequence[Line]:
            chosen = [samples[place] for place in places]
            lines = list(map(line_of, chosen, seen_by_size(chosen, see)))
            stopwatch.lap("judge")
            return lines

        stopwatch.start()
        with Terminal().evaluating(len(samples), "judging") as progress:
            return continued(self.folder / RESULTS, len(samples), BATCH, judge_places, progress)
