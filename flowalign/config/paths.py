"""Paths that a person gives: ~ is the home folder, and a recipe's files may lie beside it."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Keys = tuple[str, ...]

_OURS = {"toyworld", "geneval"}  # what a bundled name begins with
_looked: dict[str, Path] = {}  # what was in neither place, and the folder of the recipe that named it

# Where a recipe names what is read, and what is written; between slashes the keys.
_READ = re.compile(
    r"model/(path|adapter)|prompts|dataset|evaluation/prompts|guard/features/model"
    r"|((evaluation|guard)/)?rewards/[^/]+/(load|shaping/reference)"
)
_OPTION = re.compile(r"((evaluation|guard)/)?rewards/[^/]+/options/.+")
_WRITTEN = re.compile(r"run/folder|model/cache_conditions")


def expanded(value: str) -> str:
    """The value with a leading ~ or ~NAME as that home folder; unchanged where there is none."""
    try:
        return str(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError:  # nobody of that name
        return value


def located(values: Any, places: Callable[[Keys], Sequence[Path]], keys: Keys = ()) -> Any:
    """A recipe's plain values with the files and folders that it names as absolute paths.

    `places` are the folders to look in, for each key. What is in none of them stays as it was, for whoever opens it to
    refuse, with `sought`; so do bundled names and hub ids.
    """
    if isinstance(values, dict):
        return {key: located(value, places, (*keys, str(key))) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(located(value, places, keys) for value in values)
    where = "/".join(key.replace("/", " ") for key in keys)
    is_name = keys[-1:] == ("load",) and isinstance(values, str) and ".py:" not in values
    if not isinstance(values, str) or not values or is_name or values.partition("/")[0] in _OURS:
        return values
    if _WRITTEN.fullmatch(where):
        return expanded(values)
    if _READ.fullmatch(where) or (_OPTION.fullmatch(where) and _is_like_a_path(values)):
        return _absolute(values, places(keys))
    return values


def _is_like_a_path(value: str) -> bool:
    return value.startswith("~") or os.sep in value or bool(re.fullmatch(r"[^\s:]+\.[A-Za-z]\w*", value))


def _absolute(value: str, places: Sequence[Path]) -> str:
    """Of FILE, of FILE.py:NAME, or of FILE#COLUMN."""
    value = expanded(value)
    file, behind, name = re.fullmatch(r"(.*?)(?:(\.py:|#)(.*))?", value, re.DOTALL).groups("")  # type: ignore[union-attr]
    for place in places:
        for known, rest in ((value, ""), (f"{file}{behind[:-1]}", f"{behind[-1:]}{name}")):
            if os.path.exists(place / known):  # unlike Path's, not over a text of a thousand letters
                return f"{os.path.abspath(place / known)}{rest}"
    for beside in places:
        if beside != Path() and not Path(value).is_absolute():
            _looked[f"{file}{behind[:-1]}"] = beside
    return value


def sought(value: str) -> str:
    """Where a relative path was looked for, to stand behind it in an error; nothing for an absolute one."""
    if Path(value).is_absolute():
        return ""
    beside = f"beside the recipe in {os.path.abspath(_looked[value])} and in " if value in _looked else "in "
    return f" (looked {beside}the working folder {Path.cwd()})"
