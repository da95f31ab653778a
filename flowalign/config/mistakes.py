"""Turn a mistake in a recipe into one sentence: where it stands, what is wrong, what would be right."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ValidationError
from rapidfuzz.distance import OSA, Indel

from flowalign.config.paths import Keys
from rewards.errors import nearest as most_like

_TYPE_TAGS = {"str", "tuple[str, ...]", "tuple[float, ...]"}  # pydantic names a union's branch in an error's place


Origins = dict[Keys, tuple[Path, int]]  # the file and the line of each key


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or all of them."""
    near = most_like(name, known) if known else ""
    if near and (OSA.distance(name, near) == 1 or Indel.normalized_similarity(name, near) >= 0.5):
        return f"; did you mean {near!r}?"
    return f"; known are {', '.join(known)}"


def key_lines(node: yaml.Node | None, prefix: Keys = ()) -> dict[Keys, int]:
    """The line of every key of a YAML mapping; ValueError for a key that stands twice, of which YAML keeps the last."""
    lines: dict[Keys, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            if path in lines:
                twice = f"lines {lines[path]} and {key.start_mark.line + 1}"
                raise ValueError(f"{twice}: {'.'.join(path)} is given twice; keep one")
            lines[path] = key.start_mark.line + 1
            lines |= key_lines(value, path)
    return lines


def origin_of(keys: Keys, origins: Origins) -> tuple[Path, int] | None:
    """The file and the line of a key, or of the section around one that is not there."""
    return next((origins[keys[:size]] for size in range(len(keys), 0, -1) if keys[:size] in origins), None)


class _Place(NamedTuple):
    """Where in a recipe an error stands: its keys, the section around it, all sections of its union by form."""

    keys: Keys
    section: type[BaseModel]
    union: list[type[BaseModel]]


def explain(
    error: ValidationError,
    model: type[BaseModel],
    path: Path,
    origins: Origins,
    given: Mapping[Keys, str],
    algorithm: type[BaseModel] | None = None,
) -> str:
    """One sentence for the first mistake: where it stands, what is wrong, what would be right.

    `path` is the recipe's file, `given` has the overrides, `algorithm` is the section of the one that it names.
    """
    # An unknown key first: it is often why another one is missing.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    if first["loc"] and first["loc"][-1] in _TYPE_TAGS:  # of a union's branches the one that was come furthest in
        within = first["loc"][:-1]
        first = max(
            (found for found in error.errors() if found["loc"][: len(within)] == within),
            key=lambda found: len(found["loc"]),
        )
    keys, section, union = _place_of(first["loc"], model, algorithm)
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        keys = (*keys, "form")
    shown = ".".join(keys) or "the recipe"
    override = next(
        (text for where, text in given.items() if keys and (keys[: len(where)] == where or where[: len(keys)] == keys)),
        None,
    )
    origin = origin_of(keys, origins)
    where = f"override {override!r}" if override else f"{origin[0]}, line {origin[1]}" if origin else f"{path}"
    if first["type"] == "extra_forbidden":
        owners = [_form_of(one) for one in union if keys[-1] in one.model_fields]
        if owners:
            belongs = f"belongs to form {' or '.join(owners)}, not to {_form_of(section)}"
            return f"{where}: {'.'.join(keys[:-1])}: {keys[-1]} {belongs}; leave it out"
        known = dict.fromkeys(field for one in union or [section] for field in one.model_fields)
        return f"{where}: unknown key {shown!r}{nearest(keys[-1], known)}"
    if first["type"] in ("missing", "union_tag_not_found"):
        need = f"; form {_form_of(section)} needs it" if union else ""
        return f"{where}: {shown} is missing{need}"
    if first["type"] == "union_tag_invalid":
        forms, _, last = first["ctx"]["expected_tags"].rpartition(", ")
        return f"{where}: {shown} should be {forms} or {last}, not {first['ctx']['tag']!r}"
    message = first["msg"].removeprefix("Value error, ")
    value = f", not {first['input']!r}" if isinstance(first["input"], int | float | str | bool) else ""
    if message.startswith("Input should"):
        message = message.replace("Input should", "should", 1)
        return f"{where}: {shown} {message}{value}"
    return f"{where}: {shown}: {message}"


def _place_of(location: Sequence[int | str], model: type[BaseModel], algorithm: type[BaseModel] | None) -> _Place:
    """Of an error's location, in which pydantic names a union's branch too."""
    keys: Keys = ()
    section = model
    union: list[type[BaseModel]] = []
    branches: list[type[BaseModel]] = []
    for part in map(str, location):
        if branches:  # the form, by which one of them was chosen
            section, union, branches = next(one for one in branches if _form_of(one) == part), branches, []
        elif part not in _TYPE_TAGS:
            keys = (*keys, part)
            found = _sections_in(section.model_fields[part].annotation) if part in section.model_fields else []
            if part == "algorithm" and algorithm:
                found = [algorithm]
            if len(found) == 1:
                section, union = found[0], []
            branches = found if len(found) > 1 else []
    return _Place(keys, section, union)


def _form_of(section: type[BaseModel]) -> str:
    return get_args(section.model_fields["form"].annotation)[0]


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections inside an annotation such as `Lora | None` or `dict[str, RewardSettings]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]
