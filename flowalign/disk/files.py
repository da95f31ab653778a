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

PARTIAL = ".partial_"  # before the names of what is half-written


@contextmanager
def replaced_file(path: Path, *, contended: bool = False) -> Iterator[Path]:
    """A temporary path to write to; its file then replaces `path`. A failure leaves `path` as it was.

    What a killed process left is written over the next time. Several processes may write a `contended` file at once,
    so each has a temporary path of its own.
    """
    partial = path.with_name(f"{PARTIAL}{os.getpid()}_{path.name}") if contended else _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_bytes(path: Path, contents: bytes) -> None:
    """Write a file whole."""
    with replaced_file(path) as partial:
        partial.write_bytes(contents)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole, in UTF-8.

    Bytes that are not UTF-8, such as those in file names of another encoding, are written as escapes.
    """
    replace_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def replace_json(path: Path, value: Any, indent: int | None = 2, sort_keys: bool = False) -> None:
    """Write a value as JSON, whole."""
    replace_text(path, json.dumps(value, indent=indent, sort_keys=sort_keys) + "\n")


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


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that grows by lines; what a kill left behind the last of them is cut off."""
    contents = path.read_bytes()
    whole = contents[: contents.rfind(b"\n") + 1]
    if len(whole) < len(contents):
        os.truncate(path, len(whole))
    return whole.decode("utf-8", "replace").split("\n")[:-1]


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
    partial = _partial(folder)
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


def remove(path: Path) -> None:
    """Remove a file or a folder, where it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; a kill leaves no torn one under its name."""
    shutil.rmtree(folder.rename(_partial(folder)))


def remove_partial_folders(folder: Path) -> None:
    """Remove those that killed processes left half-written in a folder."""
    for left in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def sync(*paths: Path) -> None:
    """Have the disk hold files and folders, whatever happens next."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _partial(path: Path) -> Path:
    return path.with_name(f"{PARTIAL}{path.name}")


def checksum(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` writes it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_of(value: Any, **how: Any) -> str:
    """SHA-256 of a value as JSON; `how` are options of `json.dumps`."""
    return hashlib.sha256(json.dumps(value, **how).encode()).hexdigest()
