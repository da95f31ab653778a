"""Checksums of a run's inputs: the prompts, reward files, adapters, heads, models and datasets that its recipe names.

The run folder keeps them, so that a run does not go on with other contents under the same names.
"""

import hashlib
import importlib.util
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flowalign.config import Recipe
from flowalign.config.base import UserError
from flowalign.config.renamed import of_today
from flowalign.disk.files import checksum, checksum_of
from flowalign.disk.starting import read_json
from flowalign.policies.folders import model_folder
from flowalign.rollout.prompts import load_prompts
from rewards.catalogue import module_named

Inputs = Mapping[str, Mapping[str, str]]  # the recipe's key -> file name -> checksum of the content

_WHOLE = 2**25  # bytes; of a larger file only _BLOCKS evenly spaced blocks are read: training changes weights in all
_BLOCKS, _BLOCK = 64, 2**16


def inputs_of(recipe: Recipe, policy: object | None = None, rewards: Mapping[str, Any] | None = None) -> Inputs:
    """The checksums of a recipe's inputs; a script's `policy` and `rewards` replace the recipe's."""
    found: dict[str, dict[str, str]] = {}
    for key, listed in (("prompts", recipe.prompts), ("evaluation.prompts", recipe.evaluation.prompts)):
        for place, source in _leaves(listed):
            rows = [[row.prompt, row.metadata] for row in (load_prompts(source) if source else ())]
            found[key + place] = {Path(source or "none").name: checksum_of(rows, sort_keys=True)}
    held_out = (recipe.guard and recipe.guard.rewards) or {}
    sections = {"rewards": recipe.rewards, "evaluation.rewards": recipe.evaluation.rewards or {}, "guard": held_out}
    for section, entries in sections.items():
        for name, entry in entries.items():
            own = (rewards or {}).get(name)
            found[f"{section}.{name}"] = _code(entry.loads(name)) if own is None else _given(own)
            for option, value in _leaves(entry.options):
                found[f"{section}.{name}.options{option}"] = _files(value)
            if entry.shaping and isinstance(entry.shaping.reference, str):
                found[f"{section}.{name}.shaping.reference"] = _dataset(Path(entry.shaping.reference), [name])
    found["model.path"] = _files(recipe.model.path) if policy is None else _given(policy)
    found["model.adapter"] = _files(recipe.model.adapter)
    found["guard.features.model"] = _files(recipe.guard and recipe.guard.features and recipe.guard.features.model)
    if recipe.dataset:
        found["dataset"] = _dataset(Path(recipe.dataset), list(recipe.rewards))
    return {key: files for key, files in found.items() if files}


def check_inputs(folder: Path, now: Inputs, *, resume: bool) -> Inputs:
    """Raises UserError for the first input that has changed since the run in the folder began.

    Returns all inputs of the run, new ones included.
    """
    if not resume:
        return now
    known = read_json(folder / "inputs.json", "to go on without comparing the inputs with the earlier ones")
    before = {".".join(of_today(tuple(key.split(".")))): files for key, files in known.items()}
    for key in before.keys() & now.keys():
        for name in sorted(before[key].keys() | now[key].keys()):
            if before[key].get(name) != now[key].get(name):
                raise UserError(
                    f"{key}: {name} is not what it was when the run in {folder} began; put it back as it was, or begin "
                    "another run"
                )
    return {**now, **before}


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values inside nested mappings and lists, each with its dotted key."""
    if isinstance(value, Mapping | list | tuple):
        for part, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(inner, f"{key}.{part}")
    else:
        yield key, value


def _code(load: str) -> dict[str, str]:
    """The file of "file.py:Name" or "package.module:Name"; empty for a built-in name, whose code is this package's."""
    source, colon, _ = load.rpartition(":")
    if not colon or "://" in load:
        return {}
    if source.endswith(".py"):
        return _files(source)
    try:
        spec = importlib.util.find_spec(module_named(source))
    except (ImportError, ValueError):
        return {}  # loading it reports the error
    return _files(spec.origin) if spec else {}


def _given(thing: Any) -> dict[str, str]:
    """The checksum of the source code of a script's object; that of an empty text where there is no source."""
    kind = thing if inspect.isroutine(thing) else type(thing)
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):
        code = ""
    return {f"{kind.__qualname__}, which a script gives,": hashlib.sha256(code.encode()).hexdigest()}


def _files(name: Any) -> dict[str, str]:
    """The checksum of a named file, or of each file in a named folder; empty for a name that is neither."""
    path = model_folder(name) if isinstance(name, str) and name else None
    if path is None:
        return {}
    if path.is_file():
        return {path.name: _digest(path)}
    files = (file for file in path.rglob("*") if file.is_file())
    shown = {file: file.relative_to(path) for file in files}
    return {str(part): _digest(file) for file, part in shown.items() if not any(p.startswith(".") for p in part.parts)}


def _dataset(path: Path, rewards: Sequence[str]) -> dict[str, str]:
    """The checksums of a dataset's prompts, of its scores by the rewards, and of the latents as its manifest says."""
    try:
        shards = json.loads((path / "manifest.json").read_text(encoding="utf-8")).get("shards")
    except (OSError, ValueError, AttributeError):
        return {}  # opening it reports the error
    names = ["rows.jsonl", *(f"rewards/{quote(name, safe='')}.json" for name in rewards)]
    files = [file for name in names for file in sorted(path.glob(f"shard_*/{name}"))]
    latents = {"latents": checksum_of(shards, sort_keys=True)}
    return latents | {str(file.relative_to(path)): _digest(file) for file in files}


def _digest(path: Path) -> str:
    size = path.stat().st_size
    if size <= _WHOLE:
        return checksum(path)
    with path.open("rb") as file:
        digest = hashlib.sha256(str(size).encode())
        for block in range(_BLOCKS):
            file.seek((size - _BLOCK) * block // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()
