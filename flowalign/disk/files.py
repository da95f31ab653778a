"""Files and folders that appear whole or not at all: each is written under a temporary name, then renamed."""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowalign.config.base import UserError


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; its file then replaces `path`. A failure leaves `path` as it was."""
    partial = path.with_name(f".partial_{os.getpid()}_{path.name}")  # another process may write the same file
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a file whole, in UTF-8.

    Bytes that are not UTF-8, such as those in file names of another encoding, are written as escapes.
    """
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def replace_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a value as JSON, whole."""
    replace_text(path, json.dumps(value, indent=indent) + "\n")


def replace_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write a file whole, with one value as JSON on each line."""
    replace_text(path, "".join(json.dumps(value) + "\n" for value in values))


def replace_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file whole, with the column names on its first line; None becomes an empty cell."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([columns, *rows])
    replace_text(path, buffer.getvalue())


def append_json_line(path: Path, value: Any) -> None:
    """Append a value as one line of JSON; a killed process may leave that line incomplete."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty temporary folder to fill; it then replaces `folder`. A failure leaves `folder` as it was."""
    partial = folder.with_name(f".partial_{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def make_folder(path: Path) -> Path:
    """Create a folder and its missing parents, and return it."""
    path.mkdir(parents=True, exist_ok=True)
    return path


def checksum(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` writes it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_of(value: Any, **how: Any) -> str:
    """SHA-256 of a value as JSON; `how` are options of `json.dumps`."""
    return hashlib.sha256(json.dumps(value, **how).encode()).hexdigest()
