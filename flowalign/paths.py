"""Paths that a person gives: ~ is the home folder, and a recipe's files may lie beside it."""

from pathlib import Path

_looked: dict[str, Path] = {}  # what was found nowhere, and the recipe's folder in which it was looked for as well


def expanded(value: str) -> str:
    """The value with a leading ~ or ~NAME as that home folder; unchanged where there is none."""
    try:
        return str(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError:  # nobody of that name
        return value


def located(value: str, folder: Path | None) -> str:
    """The absolute path of a file or folder: beside a recipe in `folder`, else in the working folder.

    What is in neither place comes back as it was, for whoever opens it to refuse with `sought`.
    """
    value = expanded(value)
    for place in (folder, Path()):
        if place is not None and (place / value).exists():
            return str((place / value).absolute())
    if folder is not None and not Path(value).is_absolute():
        _looked[value] = folder.absolute()
    return value


def sought(value: str) -> str:
    """Where a relative path was looked for, to be put behind it in an error; nothing for an absolute one."""
    if Path(value).is_absolute():
        return ""
    here = f"the working folder {Path.cwd()}"
    return (
        f" (looked beside the recipe in {_looked[value]}, then in {here})"
        if value in _looked
        else f" (looked in {here})"
    )
