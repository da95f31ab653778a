"""Prompt lists: .txt with a prompt a line, .jsonl in GenEval's metadata format, or a bundled name."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flowalign.assets import asset
from flowalign.sampling.noise import PROMPTS, counted_generator
from flowalign.settings import UserError

BUNDLED = {
    "toyworld/words_train": "toyworld/prompts/words_train.txt",
    "toyworld/words_test": "toyworld/prompts/words_test.txt",
    "toyworld/shapes_train": "toyworld/prompts/shapes_train.jsonl",
    "toyworld/shapes_test": "toyworld/prompts/shapes_test.jsonl",
    "geneval": "geneval/prompts.jsonl",
}


@dataclass(frozen=True)
class Row:
    """A prompt and what rewards need to know of it; `index` is its place in the whole list, and counts its noise."""

    index: int
    prompt: str
    metadata: dict[str, Any] = field(default_factory=dict)


def load_prompts(sources: str | Sequence[str], count: int | None = None) -> list[Row]:
    """The rows of one list or of several, one after the other; `count` takes the first so many of each.

    Raises UserError for a missing or empty file and, with its line, for a line that is no prompt.
    """
    rows: list[Row] = []
    for source in [sources] if isinstance(sources, str) else sources:
        path = asset(BUNDLED[source]) if source in BUNDLED else Path(source)
        for prompt, metadata in _read(path)[:count]:
            rows.append(Row(len(rows), prompt, metadata))
    return rows


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"prompts {str(path)!r}: use a .txt or .jsonl file, or one of {', '.join(BUNDLED)}")
    try:
        # Not splitlines(): a JSON text may hold U+2028 and its like, which are no line's end.
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts {str(path)!r} cannot be read: {error}") from error
    if not any(line.strip() for line in lines):
        raise UserError(f"prompts {str(path)!r} is empty; it needs a prompt a line")
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1)]


def _parse(line: str, path: Path, number: int) -> tuple[str, dict[str, Any]]:
    where = f"{path}, line {number}"
    if not line.strip():
        raise UserError(f"{where}: the line is empty; remove it or write a prompt")
    if path.suffix == ".txt":
        return line.strip(), {}
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise UserError(f'{where}: needs a mapping with a "prompt" of text')
    return row["prompt"], {key: value for key, value in row.items() if key != "prompt"}


def step_rows(rows: Sequence[Row], count: int, seed: int, step: int) -> list[Row]:
    """The `count` different rows of training step `step`, counted from 0.

    The list is gone through in a new counted order each time round; what does not fill a step waits for another round.
    Raises UserError when the list is shorter than a step.
    """
    if count > len(rows):
        raise UserError(f"train.prompts_per_step ({count}) exceeds the {len(rows)} prompts of the list")
    turn, place = divmod(step, len(rows) // count)
    order = torch.randperm(len(rows), generator=counted_generator(PROMPTS, seed, turn)).tolist()
    return [rows[i] for i in order[place * count : (place + 1) * count]]
