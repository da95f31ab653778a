"""Turn a mistake in a recipe into one sentence: where it stands, what is wrong, what would be right."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from rapidfuzz.distance import OSA, Indel

from flowalign.config.paths import Keys

_TYPE_TAGS = {"str", "tuple[str, ...]", "tuple[float, ...]"}  # pydantic names a union's branch in an error's place


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or all of them."""
    near = min(known, key=lambda one: (OSA.distance(name, one), -Indel.normalized_similarity(name, one)), default=None)
    if near is not None and (OSA.distance(name, near) == 1 or Indel.normalized_similarity(name, near) >= 0.5):
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


def explain(
    error: ValidationError,
    model: type[BaseModel],
    path: Path,
    lines: Mapping[Keys, int],
    given: Mapping[Keys, str],
    algorithm: type[BaseModel] | None = None,
) -> str:
    """One sentence for the first mistake: where it stands, what is wrong, what would be right.

    `algorithm` is the section of the one that the recipe names.
    """
    # An unknown key first: it is often why another one is missing.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    if first["loc"] and first["loc"][-1] in _TYPE_TAGS:  # of a union's branches the one that was come furthest in
        within = first["loc"][:-1]
        first = max(
            (found for found in error.errors() if found["loc"][: len(within)] == within),
            key=lambda found: len(found["loc"]),
        )
    location = tuple(str(part) for part in first["loc"])
    keys = tuple(part for part in location if part not in _TYPE_TAGS)
    shown = ".".join(keys) or "the recipe"
    override = next(
        (text for where, text in given.items() if keys and (keys[: len(where)] == where or where[: len(keys)] == keys)),
        None,
    )
    line = next((lines[keys[:size]] for size in range(len(keys), 0, -1) if keys[:size] in lines), None)
    where = f"override {override!r}" if override else f"{path}, line {line}" if line else f"{path}"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {shown!r}{nearest(keys[-1], _fields_at(model, keys[:-1], algorithm))}"
    if first["type"] == "missing":
        return f"{where}: {shown} is missing"
    message = first["msg"].removeprefix("Value error, ")
    value = f", not {first['input']!r}" if isinstance(first["input"], int | float | str | bool) else ""
    if message.startswith("Input should"):
        message = message.replace("Input should", "should", 1)
        return f"{where}: {shown} {message}{value}"
    return f"{where}: {shown}: {message}"


def _fields_at(model: type[BaseModel], keys: Keys, algorithm: type[BaseModel] | None) -> list[str]:
    """The keys that the section at this place knows."""
    section = model
    for key in keys:
        if key == "algorithm" and algorithm:
            section = algorithm
        elif key in section.model_fields:  # else a reward's own name, whose section is RewardSettings already
            section = _section_of(section.model_fields[key].annotation) or section
    return list(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The Section inside an annotation such as `Lora | None` or `dict[str, RewardSettings]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _section_of(part)
        if found is not None:
            return found
    return None
