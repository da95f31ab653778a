"""The files in an evaluation's folder, with which a killed evaluation continues and ends with the same bytes.

drawing.json, evaluation.json   the settings that it started with; other settings are refused
results.jsonl                   one line per image, in order, written as soon as the image is judged
summary.json                    scores and intervals
timing.json                     seconds of each phase over all starts; a file of its own because they always differ
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowalign.config.base import UserError
from flowalign.config.renamed import with_names_of_today
from flowalign.disk.files import append_json_line, make_folder, replace_json, whole_lines, writing
from flowalign.evaluate.report.html import parsed
from flowalign.rollout.generate import Progress
from rewards.base import grouped

Line = dict[str, Any]
DRAWING, EVALUATION, RESULTS = "drawing.json", "evaluation.json", "results.jsonl"
SETTINGS = (DRAWING, EVALUATION)


def check_folder(folder: Path, name: str, settings: Mapping[str, Any], made: str) -> None:
    """Check that results with these settings may go into `folder`; its file `name` holds the settings it has now.

    `made` is a glob of the files that the settings decide; while none exists, new settings may replace the old ones.
    Raises UserError for a folder of other files, and for other settings, with the first key that differs.
    """
    there = [path for path in folder.glob("*") if not path.name.startswith(".")] if folder.is_dir() else []
    if (folder.exists() and not folder.is_dir()) or (there and not any(path.name in SETTINGS for path in there)):
        raise UserError(f"{folder} is neither empty nor a folder of an evaluation; choose another --output")
    if any(path.stat().st_size for path in folder.glob(made)):
        begun = with_names_of_today(parsed(folder / name, json.loads), ("rollout",))  # where a sampler's keys stand
        _refuse_other(folder / name, begun, json.loads(json.dumps(settings)))


def keep_settings(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Write the settings to the file `name` of a folder, which is created if missing; UserError if that fails."""
    with writing(folder / name):
        replace_json(make_folder(folder) / name, settings)


def _refuse_other(path: Path, begun: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in (*wanted, *begun):
        if begun.get(key) != wanted.get(key):
            raise UserError(
                f"{path} was started with {key} {_short(begun.get(key))}, not {_short(wanted.get(key))}; "
                "choose another --output, or use the same setting to continue"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def continued(
    path: Path, count: int, batch: int, judge: Callable[[range], Sequence[Line]], progress: Progress | None = None
) -> list[Line]:
    """The `count` lines of a results file; `judge` gives the lines that are missing, from their indices.

    The batches of indices do not depend on which lines exist, since a model's last digits may depend on its batch. A
    last line that a kill cut short is written again. Raises UserError for a file with other lines.
    """
    done = _whole_lines(path)
    if len(done) > count:
        raise UserError(f"{path} holds {len(done)} lines for {count} images; remove it to judge them again")
    if progress and done:
        progress(len(done))
    first = len(done)
    for start in range(first // batch * batch, count if first < count else 0, batch):
        places = range(start, min(start + batch, count))
        for place, line in zip(places, judge(places), strict=True):
            if place >= first:
                append_json_line(path, line)
                done.append(json.loads(json.dumps(line)))
        if progress:
            progress(len(places) - max(0, first - start))
    return done


def by_prompt(lines: Sequence[Line], prompt_of: Callable[[Line], Any]) -> list[list[Line]]:
    """The lines of each prompt, in the order in which the prompts first appear; equal rows count as one prompt."""
    return list(grouped((prompt_of(line), line) for line in lines).values())


def _whole_lines(path: Path) -> list[Line]:
    """The complete lines of a file, parsed; an incomplete last line is removed from the file."""
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error.msg}; remove the file to judge again") from error
    return lines


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json as a whole."""
    replace_json(folder / "summary.json", summary)


class Stopwatch:
    """The seconds that each phase of an evaluation took, over all its starts; a kill loses those since the last lap."""

    def __init__(self, folder: Path):
        self.path = folder / "timing.json"
        self.seconds: dict[str, float] = parsed(self.path, json.loads)
        self._began = time.perf_counter()

    def start(self) -> None:
        """Start the clock; the time before belongs to no phase."""
        self._began = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to a phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._began
        self._began = now
        replace_json(self.path, self.seconds, indent=None)
