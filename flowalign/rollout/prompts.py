"""Prompt lists: a file that `flowalign.rollout.prompt_files` reads, as FILE or FILE#COLUMN, or a bundled name."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowalign.config.base import UserError
from flowalign.config.paths import expanded
from flowalign.disk.assets import asset
from flowalign.lazy import torch
from flowalign.policies.request import Row as Row
from flowalign.rollout.prompt_files import READERS, read_prompt_file
from flowalign.sampling.noise import PROMPTS, counted_generator

BUNDLED = {
    "toyworld/words_train": "toyworld/prompts/words_train.txt",
    "toyworld/words_test": "toyworld/prompts/words_test.txt",
    "toyworld/shapes_train": "toyworld/prompts/shapes_train.jsonl",
    "toyworld/shapes_test": "toyworld/prompts/shapes_test.jsonl",
    "toyworld/moving_train": "toyworld/prompts/moving_train.jsonl",
    "toyworld/moving_test": "toyworld/prompts/moving_test.jsonl",
    "toyworld/moving_unseen": "toyworld/prompts/moving_unseen.jsonl",
    "geneval": "geneval/prompts.jsonl",
}


def load_prompts(sources: str | Sequence[str], count: int | None = None) -> list[Row]:
    """The rows of one list or of several, one after the other; `count` limits the rows of each list.

    Raises UserError for a missing or empty file and for a line without a prompt, which the error names.
    """
    rows: list[Row] = []
    for source in [sources] if isinstance(sources, str) else sources:
        for prompt, metadata in _read(source)[:count]:
            rows.append(Row(len(rows), prompt, metadata))
    return rows


def _read(source: str) -> list[tuple[str, dict[str, Any]]]:
    path, column = (asset(BUNDLED[source]), None) if source in BUNDLED else split_column(source)
    if path.suffix.lower() not in READERS:
        kinds = ", ".join(READERS)
        raise UserError(f"prompts {str(path)!r}: use a file of {kinds}, or one of {', '.join(BUNDLED)}")
    return read_prompt_file(path, column)


def split_column(source: str) -> tuple[Path, str | None]:
    """The file and the column of a prompt list FILE or FILE#COLUMN; an existing file's name may hold "#"."""
    whole = expanded(source)
    file, mark, column = whole.rpartition("#")
    return (Path(whole), None) if not mark or os.path.exists(whole) else (Path(file), column)


_PLAIN = dict.fromkeys((0x2018, 0x2019, 0x02BC), "'") | dict.fromkeys((0x201C, 0x201D, 0x201E), '"')  # curly quotes


def normalised(prompt: str) -> str:
    """A prompt for comparison with others: case, runs of spaces, kinds of quotes and forms of Unicode are ignored."""
    return " ".join(unicodedata.normalize("NFKC", prompt).translate(_PLAIN).casefold().split())


def shared_rows(rows: Sequence[Row], training_rows: Sequence[Row]) -> list[Row]:
    """The rows whose prompts are training prompts too."""
    trained = {normalised(row.prompt) for row in training_rows}
    return [row for row in rows if normalised(row.prompt) in trained]


def step_rows(rows: Sequence[Row], count: int, seed: int, step: int) -> list[Row]:
    """The `count` different rows of training step `step`, which counts from 0.

    Each round takes the list in a new counted order; rows that do not fill a step wait for a later round. Raises
    UserError when the list is shorter than a step.
    """
    if count > len(rows):
        raise UserError(f"train.prompts_per_step ({count}) exceeds the {len(rows)} prompts of the list")
    turn, place = divmod(step, len(rows) // count)
    order = torch.randperm(len(rows), generator=counted_generator(PROMPTS, seed, turn)).tolist()
    return [rows[i] for i in order[place * count : (place + 1) * count]]
