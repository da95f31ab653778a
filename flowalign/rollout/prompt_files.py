"""Readers of prompt files: text with one prompt on each line, JSON, JSON lines, and tables, in any Unicode encoding.

A reader returns entries: the place of each ("line 3"), and a text or a mapping from columns to values. The column of
the prompts is found by its name, or the user gives it as FILE#COLUMN.
"""

import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowalign.config.base import UserError
from flowalign.config.paths import sought

Entry = tuple[str, Any]
# The first of these lines that names a column decides: PartiPrompts has Prompt, DrawBench Prompts, Pick-a-Pic caption,
# UniGenBench prompt_en, TIIF both descriptions.
_NAMES = (
    ("prompt", "prompts"),
    ("text", "texts", "caption", "captions"),
    ("prompt_en", "prompt_zh", "short_description", "long_description"),
)
# Datasets for editing name the image to edit so: image, images, source_image, input_img, image_path, ...
_IMAGE = re.compile(
    r"((source|src|input|init|initial|original|orig|cond|condition|conditioning|control|ref|reference|before|base)[_-]?)?"
    r"(image|img|picture|video)s?([_-]?(path|file|filename|url|name)s?)?"
)
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",  # after UTF-32, whose mark begins with the same bytes
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_prompt_file(path: Path, column: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The prompts of a file with the other columns of their rows, in the order of the file.

    column: the column of the prompts; None finds it by its name. Raises UserError for a file that cannot be read, for a
    column that is missing or ambiguous, for a row without a prompt, and, without `column`, for a row that names an
    image to edit.
    """
    text = _text(path)
    if not text.strip():
        raise UserError(f"prompts {str(path)!r} is empty; it needs a prompt on each line")
    entries = READERS[path.suffix.lower()](text, path)
    if not entries:
        raise UserError(f"prompts {str(path)!r} is empty; it needs a prompt on each line")
    columns = list(dict.fromkeys(key for _, value in entries if isinstance(value, dict) for key in value))
    if column is not None and column not in columns:
        known = f"its columns are {_listed(columns)}" if columns else "it has no columns"
        raise UserError(f"prompts {str(path)!r} has no column {column!r}; {known}")
    chosen = column or (_prompt_column(columns, path) if columns else "prompt")
    return [_prompt(f"{path}, {place}", value, chosen, given=column is not None) for place, value in entries]


def _prompt(where: str, value: Any, column: str, *, given: bool) -> tuple[str, dict[str, Any]]:
    row = {column: value} if isinstance(value, str) else value
    if not isinstance(row, dict) or not isinstance(row.get(column), str) or not row[column].strip():
        raise UserError(f'{where}: the row needs a text as its "{column}"')
    for key, named in row.items():
        if not given and key != column and _is_image(key, named):
            raise UserError(
                f"{where}: the row names an image to edit ({key} {named!r}), but samples are drawn from text alone; "
                f"to use the text nevertheless, name its column, as {where.rpartition(', ')[0]}#{column}"
            )
    check_characters(row[column], f"{where}: the prompt")
    return row[column], {key: other for key, other in row.items() if key != column}


def check_characters(text: str, what: str) -> None:
    """Raises UserError for a text with half a character, a byte of another encoding or a control character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds an invalid character ({error.reason}); write it anew in UTF-8") from error
    if controls := [one for one in text if unicodedata.category(one) == "Cc" and not one.isspace()]:
        raise UserError(f"{what} holds the control character U+{ord(controls[0]):04X}; remove it")


def _is_image(key: str, value: Any) -> bool:
    """Whether a column and its value in a row name an image to edit."""
    name = key.casefold()
    if not value or isinstance(value, int | float):  # "images: 4" is a count
        return False
    if _IMAGE.fullmatch(name):
        return True
    if name not in ("source", "src", "input", "original", "before"):
        return False
    from rewards.media import SUFFIXES  # imported late: it loads the libraries that open media

    return str(value).lower().endswith(SUFFIXES)


def _prompt_column(columns: Sequence[str], path: Path) -> str:
    for names in _NAMES:
        fitting = [name for name in columns if name.strip().casefold() in names]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise UserError(
                f"prompts {path}: {_listed(fitting)} may all hold the prompts; name one, as {path}#{fitting[0]}"
            )
    raise UserError(
        f"prompts {path}: none of its columns ({_listed(columns)}) is called prompt, text or caption; "
        f"name the column of the prompts, as {path}#{columns[0]}"
    )


def _listed(names: Sequence[str]) -> str:
    shown = [name if len(name) <= 40 else name[:37] + "..." for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def _text(path: Path) -> str:
    """A file's text with line ends "\\n".

    The first bytes tell the encoding, UTF-8 by default. Raises UserError for a file that cannot be read in it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        where = "" if path.exists() else sought(str(path))
        raise UserError(f"prompts {str(path)!r} cannot be read{where}: {error.strerror or error}") from error
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        guess = "" if encoding.startswith("utf-16") else ", but perhaps Windows-1252, as spreadsheets write a plain CSV"
        raise UserError(
            f"prompts {str(path)!r} cannot be read: line {line} is not {encoding.removesuffix('-sig').upper()}{guess}; "
            "save the file as UTF-8"
        ) from error
    if "\0" in text:
        raise UserError(f"prompts {str(path)!r} cannot be read: it holds NUL bytes; save the file as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(text: str) -> list[str]:
    # Not splitlines(): a JSON text may hold U+2028 and others, which do not end a line of the file.
    return text.rstrip().split("\n")


def _from_lines(text: str, path: Path) -> list[Entry]:
    lines = [(f"line {number}", line.strip()) for number, line in _filled(_lines(text), path)]
    if all(line.startswith('{"') and line.endswith("}") for _, line in lines):
        raise UserError(f"prompts {str(path)!r} holds lines of JSON; rename it to {path.with_suffix('.jsonl').name}")
    return lines


def _filled(lines: Sequence[str], path: Path) -> list[tuple[int, str]]:
    """The lines with their numbers. Raises UserError for an empty line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UserError(f"{path}, line {number}: the line is empty; remove it or write a prompt")
    return list(enumerate(lines, start=1))


def _from_json_lines(text: str, path: Path) -> list[Entry]:
    if text.lstrip().startswith("["):  # one list, whatever the file's suffix
        return _from_json(text, path)
    return [(f"line {number}", _parsed(line, path, number)) for number, line in _filled(_lines(text), path)]


def _from_json(text: str, path: Path) -> list[Entry]:
    """The entries of a list, a mapping of columns to lists, a mapping of rows, one row, or lines of JSON."""
    if not text.lstrip().startswith("["):
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            if getattr(error, "msg", "") == "Extra data":
                return _from_json_lines(text, path)
    return _entries(_parsed(text, path, 1), path)


def _parsed(text: str, path: Path, first: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line, column = getattr(error, "lineno", 1), getattr(error, "colno", 1)
        what = getattr(error, "msg", str(error))
        raise UserError(f"{path}, line {first + line - 1}: not JSON: {what} at column {column}") from error


def _entries(content: Any, path: Path) -> list[Entry]:
    if isinstance(content, dict) and not any(
        key.casefold() in names and isinstance(value, str) for key, value in content.items() for names in _NAMES
    ):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        if len({len(values) for values in lists.values()}) > 1:
            lengths = ", ".join(f"{key} {len(values)}" for key, values in lists.items())
            raise UserError(f"prompts {path}: its lists differ in length ({lengths})")
        if lists:
            rows = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
            whole = len(lists) == 1 and all(isinstance(next(iter(row.values())), dict) for row in rows)
            content = [value for row in rows for value in row.values()] if whole else rows
        elif content and all(isinstance(value, dict) for value in content.values()):
            content = list(content.values())
    listed = content if isinstance(content, list) else [content]
    return [(f"entry {number}", value) for number, value in enumerate(listed, start=1)]


def _from_table(text: str, path: Path) -> list[Entry]:
    """The entries of a table whose first line names its columns; commas, semicolons or tabs part the fields."""
    head = text.lstrip("\n").split("\n")[0]
    mark = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=head.count)
    quoted = mark != "\t" or _is_quoted(text)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=mark,
        skipinitialspace=True,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    rows: list[tuple[int, list[str]]] = []
    begins = 1
    try:
        for fields in reader:
            rows.append((begins, [field.strip() for field in fields]))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {begins}: {error}; put a field that holds quotes in quotes, and double the quotes inside it"
        ) from error
    while rows and not any(rows[-1][1]):
        rows.pop()
    while rows and not any(rows[0][1]):
        rows.pop(0)
    if not rows:
        return []
    (_, columns), *body = rows
    if twice := [name for name in columns if name and columns.count(name) > 1]:
        raise UserError(f"{path}: two columns are called {twice[0]!r}; rename one")
    return [(f"line {number}", _row(fields, columns, f"{path}, line {number}")) for number, fields in body]


def _row(fields: Sequence[str], columns: Sequence[str], where: str) -> dict[str, str]:
    """The fields that are not empty, by column; a row may have fewer fields than there are columns."""
    if not any(fields):
        raise UserError(f"{where}: the line is empty; remove it or write a prompt")
    if len(fields) > len(columns):
        raise UserError(
            f"{where}: {len(fields)} fields for {len(columns)} columns; put a field that holds commas in quotes"
        )
    return {name: field for name, field in zip(columns, fields, strict=False) if name and field}


def _is_quoted(text: str) -> bool:
    """Whether quotes in a table with tabs are syntax: whether csv, a spreadsheet, or quoting all fields writes it so.

    The registered format has no quoting, and PartiPrompts.tsv has bare quotes in its prompts.
    """
    lines = text.strip("\n")
    try:
        rows = list(csv.reader(io.StringIO(lines, newline=""), delimiter="\t", strict=True))
    except csv.Error:
        return False

    def written(marks: str | None) -> str:
        return "\n".join("\t".join(_quoted(field, marks) for field in row) for row in rows)

    return lines in (written('\t\n"'), written('\t\n",'), written(None))


def _quoted(field: str, marks: str | None) -> str:
    """A field in quotes if it holds one of the marks; None quotes every field."""
    needs = marks is None or any(mark in field for mark in marks)
    return '"' + field.replace('"', '""') + '"' if needs else field


READERS: Mapping[str, Callable[[str, Path], list[Entry]]] = {
    ".txt": _from_lines,
    ".jsonl": _from_json_lines,
    ".ndjson": _from_json_lines,
    ".json": _from_json,
    ".csv": _from_table,
    ".tsv": _from_table,
}
