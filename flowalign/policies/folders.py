"""A model's folder: found, whole, and loaded part by part, so that a fault is one sentence that names the part."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from flowalign.config.base import UserError
from flowalign.config.paths import sought
from flowalign.disk.assets import EMBEDDED, asset
from flowalign.lazy import torch
from flowalign.policies.weightfiles import PICKLES, damage

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ORIGINALS = {"joint_blocks.": "StableDiffusion3Pipeline", "double_blocks.": "FluxPipeline"}


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist can be the name of somebody's repository."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None


def pipeline_index(path: Path | str) -> dict[str, Any]:
    """What a pipeline's model_index.json says; of a hub id it is fetched. Raises UserError for what is no pipeline."""
    place = Path(path)
    if os.path.isfile(place):  # unlike Path's, not over a name of a thousand letters
        raise UserError(f"model.path: {str(path)!r} {_single_file(place)}")
    index = place / "model_index.json"
    if not os.path.isfile(index):
        if os.path.exists(place) or not is_hub_id(str(path)):
            what = "holds no model_index.json" if os.path.exists(place) else f"does not exist{sought(str(path))}"
            raise UserError(f"model.path: {str(path)!r} {what}; give a diffusers pipeline folder or a hub id")
        index = _fetched(str(path), "model_index.json")
    try:
        contents = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {index} is no JSON ({error}); fetch it again") from error
    if not isinstance(contents, dict) or not isinstance(contents.get("_class_name"), str):
        raise UserError(f"model.path: {index} names no pipeline class (_class_name); fetch it again")
    return contents


def _single_file(file: Path) -> str:
    if file.suffix == ".safetensors" and not damage(file):
        with safe_open(file, "pt") as opened:
            keys = " ".join(opened.keys())
        if "lora_" in keys:
            return "is a LoRA, not a model; give it as the adapter"
        kind = next((kind for part, kind in _ORIGINALS.items() if part in keys), None)
        if kind is not None:
            return (
                f'is a checkpoint in one file; convert it once with python -c "from diffusers import {kind}; '
                f"{kind}.from_single_file('{file}').save_pretrained('FOLDER')\" and give FOLDER"
            )
    why = damage(file) if file.suffix in (".safetensors", *PICKLES) else "is a file"
    return f"{why or 'is a file'}; give a diffusers pipeline folder or a hub id"


def _fetched(name: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(name, file))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"model.path: {name!r} is no local folder{sought(name)}, and the hub did not give it "
            f"({type(error).__name__}); check the name, log in for gated models, or give a folder"
        ) from error


def part_config(path: Path | str, name: str) -> dict[str, Any]:
    """The configuration of a pipeline's part; of a hub id it is fetched. Raises UserError for one that is no JSON."""
    there = Path(path).exists()
    file = Path(path) / name / "config.json" if there else _fetched(str(path), f"{name}/config.json")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {file} is missing or no JSON ({error}); fetch it") from error
    return config


def part_class(name: str, library: str, kind: str) -> Any:
    """The class of a part of a pipeline; None for one of neither diffusers nor transformers."""
    if library not in ("diffusers", "transformers"):
        return None
    import diffusers
    import transformers

    found = getattr(diffusers if library == "diffusers" else transformers, kind, None)
    if found is None:
        raise UserError(
            f"model.path: its {name} is a {kind}, which the installed {library} does not have; update {library}"
        )
    return found


def load_part(folder: Path, name: str, kind: Any, dtype: torch.dtype) -> torch.nn.Module:
    """A network of a pipeline with all its weights; UserError where its files are not whole, or not all of it."""
    variant = _check_part(folder / name)
    with loading(folder, name):
        part, found = kind.from_pretrained(
            folder, subfolder=name, dtype=dtype, variant=variant, output_loading_info=True
        )
    kinds = {"missing_keys": "lack", "mismatched_keys": "have in another shape"}
    if name == "transformer":  # deeper than its configuration it would be cut; encoders have weights that nobody reads
        kinds["unexpected_keys"] = "have, and its configuration has not,"
    for key, what in kinds.items():
        if found[key]:
            raise UserError(
                f"model.path: {folder / name}: the weights {what} {min(map(str, found[key]))}; fetch it again"
            )
    loaded: torch.nn.Module = part
    return loaded


@contextmanager
def loading(path: Path | str, name: str) -> Iterator[None]:
    """What a library raises over somebody's files as one sentence that names the part."""
    try:
        yield
    except Exception as error:  # of many kinds, by what the files hold
        what = " ".join(str(error).split())
        what = what if len(what) <= 200 else what[:197] + "..."
        raise UserError(f"model.path: {str(path)!r}: its {name} cannot be loaded: {what}") from error


def _check_part(folder: Path) -> str | None:
    """The variant of a part's weights, None for the plain ones; UserError unless its files are all there and whole."""
    part_config(folder.parent, folder.name)
    found = {path.name: path for path in folder.iterdir()}
    names = "|".join(_STEMS)
    pattern = re.compile(rf"({names})(\.(?P<a>\w+))?(-\d+-of-\d+)?(\.(?P<b>\w+))?\.safetensors")
    weights = list(filter(None, map(pattern.fullmatch, found)))
    variants = sorted({match["a"] or match["b"] or "" for match in weights})
    if not variants:
        if any(path.suffix in PICKLES for path in found.values()):
            return None  # the libraries read these with weights_only
        left = sorted(name for name in found if name.endswith((".incomplete", ".part", ".tmp", ".lock")))
        why = f"only {left[0]} of a download that was stopped" if left else "no weights (.safetensors)"
        raise UserError(f"model.path: {folder} holds {why}; fetch it again")
    chosen = variants[0]
    for match in weights:
        if (match["a"] or match["b"] or "") == chosen and (wrong := damage(folder / match[0])):
            raise UserError(f"model.path: {folder / match[0]} {wrong}")
    for index in folder.glob(f"*.safetensors.index*{chosen}*.json" if chosen else "*.safetensors.index.json"):
        with loading(folder.parent, f"{folder.name}/{index.name}"):
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for shard in shards:
            if shard not in found:
                raise UserError(f"model.path: {folder / shard} is missing, which {index.name} names; fetch it again")
    return chosen or None


def model_folder(name: str) -> Path | None:
    """The file or folder of a name: the embedded model's, one on this disk, or what the hub gave before."""
    path = asset("toyworld/model") if name == EMBEDDED else Path(name).expanduser()
    try:
        if path.exists():
            return path
    except (OSError, ValueError):  # too long for a name, as a prompt among a reward's options may be
        return None
    if name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(name, "model_index.json")
    except HFValidationError:
        return None
    return Path(index).parent if isinstance(index, str) else None
