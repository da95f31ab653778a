"""Pictures with their prompts: a folder's MANIFEST has a line {"file_name": ..., "prompt": ...} for each.

Other tools write the same as a table. As folders of pictures are described to https://huggingface.co/docs/datasets/image_dataset#imagefolder.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flowalign.config.base import UserError
from flowalign.disk.media import FILE_NAME, MANIFEST
from flowalign.rollout.prompts import Row, load_prompts

TABLE = "metadata.csv"


def manifest_of(folder: Path) -> Path | None:
    """The file that says whose a folder's pictures are, if it has one; UserError if it has two."""
    found = [folder / name for name in (MANIFEST, TABLE) if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} has a {MANIFEST} and a {TABLE}; remove the one that does not hold")
    return found[0] if found else None


def rows_of_files(folder: Path, source: str, paths: Sequence[Path]) -> tuple[list[Row], list[Path]]:
    """The rows of a list that names files, without the names, and the files; each of `paths` must be one of them."""
    rows: list[Row] = []
    named: dict[Path, None] = {}
    for row in load_prompts(source):
        name = row.metadata.get(FILE_NAME)
        if not isinstance(name, str) or not name:
            raise UserError(f"{source}: prompt {row.index + 1} ({row.prompt!r}) has no {FILE_NAME}, as others have")
        if not (folder / name).is_file():
            raise UserError(f"{source}: prompt {row.index + 1} is of {name}, which {folder} does not hold")
        if folder / name in named:
            raise UserError(f"{source}: two prompts are of {name}; each image has one")
        named[folder / name] = None
        rows.append(replace(row, metadata={key: value for key, value in row.metadata.items() if key != FILE_NAME}))
    if left := [path for path in paths if path not in named]:
        raise UserError(f"{left[0]} is in no row of {source}; remove it, or add a row with its {FILE_NAME}")
    return rows, list(named)
