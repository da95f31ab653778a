"""Pictures with their prompts: a folder's MANIFEST has a line {"file_name": ..., "prompt": ...} for each.

As folders of pictures are described to https://huggingface.co/docs/datasets/image_dataset#imagefolder.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flowalign.data import Row, load_prompts
from flowalign.settings import UserError

MANIFEST, FILE_NAME = "metadata.jsonl", "file_name"


def rows_of_files(folder: Path, source: str, paths: Sequence[Path]) -> tuple[list[Row], list[Path]]:
    """The rows of a list that names files, without the names, and the files; each of `paths` must be one of them."""
    rows: list[Row] = []
    named: list[Path] = []
    for row in load_prompts(source):
        name = row.metadata.get(FILE_NAME)
        if not isinstance(name, str) or not name:
            raise UserError(f"{source}: prompt {row.index + 1} ({row.prompt!r}) has no {FILE_NAME}, as others have")
        if not (folder / name).is_file():
            raise UserError(f"{source}: prompt {row.index + 1} is of {name}, which {folder} does not hold")
        if folder / name in named:
            raise UserError(f"{source}: two prompts are of {name}; each image has one")
        named.append(folder / name)
        rows.append(replace(row, metadata={key: value for key, value in row.metadata.items() if key != FILE_NAME}))
    if left := [path for path in paths if path not in set(named)]:
        raise UserError(f"{left[0]} is in no row of {source}; remove it, or add a row with its {FILE_NAME}")
    return rows, named
