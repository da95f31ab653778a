"""Images with their prompts: a folder's MANIFEST has one line {"file_name": ..., "prompt": ...} for each image.

Other tools write the same content as a table. Source: https://huggingface.co/docs/datasets/image_dataset#imagefolder.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flowalign.config.base import UserError
from flowalign.disk.media import FILE_NAME, MANIFEST
from flowalign.rollout.prompts import Row, load_prompts

TABLE = "metadata.csv"


def manifest_of(folder: Path) -> Path | None:
    """The file that lists a folder's images with their prompts, or None. Raises UserError when there are two."""
    found = [folder / name for name in (MANIFEST, TABLE) if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} has a {MANIFEST} and a {TABLE}; remove the one that is out of date")
    return found[0] if found else None


def rows_of_files(folder: Path, source: str, paths: Sequence[Path]) -> tuple[list[Row], list[Path]]:
    """The rows of a prompt list that names files, without the file names, and the files in the same order.

    Raises UserError for a row without a file of its own in `folder`, and for one of `paths` that no row names.
    """
    rows: list[Row] = []
    named: dict[Path, None] = {}
    for row in load_prompts(source):
        name = row.metadata.get(FILE_NAME)
        if not isinstance(name, str) or not name:
            raise UserError(f"{source}: prompt {row.index + 1} ({row.prompt!r}) has no {FILE_NAME}; others have one")
        if not (folder / name).is_file():
            raise UserError(f"{source}: prompt {row.index + 1} names {name}, which {folder} does not hold")
        if folder / name in named:
            raise UserError(f"{source}: two prompts name {name}; an image has one prompt")
        named[folder / name] = None
        rows.append(replace(row, metadata={key: value for key, value in row.metadata.items() if key != FILE_NAME}))
    if left := [path for path in paths if path not in named]:
        raise UserError(f"no row of {source} names {left[0]}; remove the image, or add a row with its {FILE_NAME}")
    return rows, list(named)
