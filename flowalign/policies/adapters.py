"""LoRA files: those of all common trainers are read and merged, and ours are written so that every reader agrees.

A file is a list of pairs A (r, in), B (out, r) and of scales: W <- W + scale B A. Trainers differ in how they name
modules (diffusers', PEFT's, kohya's, the original code's, which joins queries, keys and values) and in where they say
the scale: nowhere (1), in a tensor `alpha` (alpha / r), in the header or in a file beside it. Of every tensor is known
where it went, or the file is refused: diffusers' own loader leaves out what it does not know.
"""

import copy
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.models.normalization import AdaLayerNormContinuous
from peft import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import nn

from flowalign.config.base import UserError
from flowalign.config.paths import expanded, sought
from flowalign.disk.files import replace_json
from flowalign.policies.weightfiles import PICKLES, damage

CONFIG = "adapter_config.json"  # PEFT's, beside its adapter_model.safetensors and beside what we export
_NAMES = (LORA_WEIGHT_NAME_SAFE, "adapter_model.safetensors")

# A name of a joined weight in the model's original code, and the modules here whose rows it stacks; * is a block.
Native = Mapping[str, Sequence[str]]

_PARTS = {
    "A": ("lora_A.weight", "lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight"),
    "B": ("lora_B.weight", "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight"),
    "alpha": ("alpha",),
}
# How a file calls a part of the pipeline; what begins otherwise is the transformer's.
_PREFIXES = {
    **dict.fromkeys(("transformer.", "diffusion_model.", "model.diffusion_model."), "transformer"),
    **dict.fromkeys(("lora_unet_", "lora_transformer_", "lycoris_"), "transformer"),
    **dict.fromkeys(("text_encoder.", "lora_te_", "lora_te1_", "text_encoders.clip_l.transformer."), "text_encoder"),
    **dict.fromkeys(("text_encoder_2.", "lora_te2_", "text_encoders.clip_g.transformer."), "text_encoder_2"),
    **dict.fromkeys(("text_encoder_3.", "lora_te3_", "text_encoders.t5xxl.transformer."), "text_encoder_3"),
}
_OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"hada_w|hada_t": "LoHa",
    r"lokr_w|lokr_t": "LoKr",
    r"oft_|boft_": "OFT",
    r"\.diff(_b)?$": "weight differences",
    r"lora_[AB]\.bias$": "biases of LoRA",
}
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "eva")  # ways of starting that PEFT does again on loading


def in_blocks(original: str, ours: str, weights: Native) -> dict[str, tuple[str, ...]]:
    """The part of a `Native` table that is within blocks of this name in the original code, and that one here."""
    return {f"{original}.{name}": tuple(f"{ours}.{part}" for part in parts) for name, parts in weights.items()}


def adapter_files(adapter: str) -> list[Path]:
    """The weights, and a configuration that says their scale where there is one.

    `adapter` is a file, a folder that holds one, or on the hub OWNER/NAME or OWNER/NAME/FILE. Raises UserError for
    anything else, in a sentence that says what is there.
    """
    path = Path(expanded(adapter))
    if not os.path.exists(path) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", adapter):
        path = _from_hub(adapter)
    if not os.path.exists(path):  # unlike Path's, not over a text of a thousand letters
        _refuse(
            adapter,
            f"does not exist{sought(adapter)}; give a LoRA's file or folder, such as a run's lora/, or a hub id",
        )
    file = path if path.is_file() else _only_file(adapter, path)
    if file.suffix.lower() != ".safetensors":
        _refuse(adapter, damage(file) if file.suffix.lower() in PICKLES else "is no .safetensors file")
    return [file, *(beside for beside in (file.with_name(CONFIG),) if beside.is_file())]


def further_adapters(adapter: str) -> dict[str, str]:
    """Folders of LoRAs within a folder of one, by their names; `export` writes those of further modules so."""
    found = Path(expanded(adapter)).glob(f"*/{LORA_WEIGHT_NAME_SAFE}")
    return {path.parent.name: str(path.parent) for path in sorted(found)}


def _only_file(adapter: str, folder: Path) -> Path:
    if (folder / "recipe.yaml").is_file() and (folder / "lora").is_dir():
        _refuse(adapter, f"is a run folder; give its adapter, {folder / 'lora'}")
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    safe = [path for path in there if path.suffix.lower() == ".safetensors"]
    found = safe or [path for path in there if path.suffix.lower() in PICKLES]
    if not found:
        _refuse(adapter, "holds no .safetensors file; give a LoRA's folder, such as a run's lora/")
    if len(found) > 1:
        _refuse(adapter, f"holds {len(found)} files ({', '.join(path.name for path in found[:4])}, ...); name one")
    return found[0]


def _from_hub(adapter: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repository, file = "/".join(adapter.split("/")[:2]), "/".join(adapter.split("/")[2:])
    try:
        if file:
            return Path(hf_hub_download(repository, file))
        wanted = ["*.safetensors", CONFIG]
        return Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        _refuse(
            adapter,
            f"is no local file or folder{sought(adapter)}, and the hub did not give it ({type(error).__name__})",
        )


@dataclass
class _Lora:
    """A pair of a file, under the name it has there."""

    component: str
    name: str
    keys: dict[str, str] = field(default_factory=dict)  # the file's, by part
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where rows of a B go: a module, and its rows in the file, in the order in which they become the module's."""

    module: str
    rows: tuple[slice, ...]


def merge_adapter(pipeline: Any, adapter: str, native: Native) -> None:
    """Add a LoRA to the weights of a pipeline's transformer and text encoders; `native` as the family has it.

    Those in it for further modules (`further_adapters`) are added to these. Raises UserError, with the key, unless all
    of a file is understood, finite, and fits.
    """
    _merge({name: getattr(pipeline, name, None) for name in dict.fromkeys(_PREFIXES.values())}, adapter, native)
    for name, further in further_adapters(adapter).items():
        if isinstance(part := getattr(pipeline, name, None), nn.Module):
            _merge({"transformer": part}, further, native)


def _merge(parts: Mapping[str, nn.Module | None], adapter: str, native: Native) -> None:
    """Add a LoRA's file to the parts of a pipeline, by the names that its keys give them."""
    file, *beside = adapter_files(adapter)
    if wrong := damage(file):
        _refuse(adapter, wrong if adapter.endswith(file.name) else f"{file.name} {wrong}")
    with safe_open(file, "pt") as opened:
        header = opened.metadata() or {}
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
    if not tensors:
        _refuse(adapter, "holds no weights")
    loras = _pairs(adapter, tensors)
    configurations = list(_configurations(adapter, header, beside))
    places = {
        name: module_places(part, native if name == "transformer" else {})
        for name, part in parts.items()
        if part is not None
    }
    changes: dict[nn.Parameter, tuple[Place, _Lora, float]] = {}
    for lora in loras:
        part = parts.get(lora.component)
        if part is None:
            _refuse(adapter, f"{lora.keys['A']} is for a {lora.component}, which this model has not")
        scale = _scale(adapter, lora, configurations)
        for place in _find(adapter, lora, part, places[lora.component]):
            weight = part.get_parameter(f"{place.module}.weight")
            if weight in changes:
                _refuse(adapter, f"holds one weight twice, as {changes[weight][1].keys['A']} and {lora.keys['A']}")
            changes[weight] = place, lora, scale
    for weight, (place, lora, scale) in changes.items():
        _add(weight, place, lora, scale)
        if not weight.isfinite().all():
            _refuse(adapter, f"makes weights that are not finite, of {lora.keys['A']} times {scale:g}")


def export_lora(
    pipeline_class: Any, transformer: Any, state: dict[str, torch.Tensor], base: str | None, folder: Path
) -> None:
    """Write a transformer's adapter, whose weights are `state`, as diffusers, ComfyUI and the rest read it alike.

    Many readers know no other scale than 1, so alpha / rank goes into B, in float32, and the header and the file beside
    it say alpha = rank. `base`: the name on the hub of what it was trained on.
    """
    config = copy.deepcopy(transformer.peft_config["default"])
    weights = get_peft_model_state_dict(transformer, state)
    scale = config.lora_alpha / config.r
    weights = {name: (w * scale if ".lora_B." in name else w).contiguous() for name, w in weights.items()}
    config.lora_alpha, config.base_model_name_or_path = config.r, base
    config.target_modules = sorted({name.split(".lora_")[0] for name in weights})  # PEFT's own endings name more
    about = config.to_dict()
    pipeline_class.save_lora_weights(
        folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=dict(about)
    )
    replace_json(folder / CONFIG, about, sort_keys=True)


def module_places(component: nn.Module, native: Native) -> dict[str, list[Place]]:
    """By every name that a file may have for a weight, with its dots as underscores: whose rows it holds."""
    layers = {name: layer for name, layer in component.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    places: dict[str, list[Place]] = {}
    for name, layer in layers.items():
        own = name.removeprefix("text_model.")  # which releases of transformers have, or have not
        for known in (own, f"text_model.{own}"):
            places[_flat(known)] = [Place(name, (slice(0, len(layer.weight)),))]
    for joined, parts in native.items():
        first = re.compile(re.escape(parts[0]).replace(r"\*", r"(?P<block>\d+)"))
        for found in filter(None, map(first.fullmatch, layers)):
            block = found.groupdict().get("block", "")
            own_parts = [part.replace("*", block) for part in parts]
            places[_flat(joined.replace("*", block))] = list(_stacked(component, own_parts))
    return places


def _stacked(component: nn.Module, names: Sequence[str]) -> Iterator[Place]:
    start = 0
    for name in names:
        end = start + len(component.get_parameter(f"{name}.weight"))
        rows: tuple[slice, ...] = (slice(start, end),)
        if isinstance(component.get_submodule(name.rpartition(".")[0]), AdaLayerNormContinuous):
            half = (start + end) // 2  # the original code has the shift first, diffusers the scale
            rows = (slice(half, end), slice(start, half))
        yield Place(name, rows)
        start = end


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _pairs(adapter: str, tensors: Mapping[str, torch.Tensor]) -> list[_Lora]:
    """The file's tensors, each in its place of a whole and finite pair."""
    loras: dict[tuple[str, str], _Lora] = {}
    for key, tensor in tensors.items():
        component, name, part = _parsed(adapter, key)
        lora = loras.setdefault((component, _flat(name)), _Lora(component, name))
        if part in lora.keys:
            _refuse(adapter, f"holds one weight twice, as {lora.keys[part]} and {key}")
        if part != "alpha" and not tensor.is_floating_point():
            _refuse(adapter, f"holds {tensor.dtype} in {key}, so it is quantised; give it in floating point")
        if not tensor.float().isfinite().all():
            _refuse(adapter, f"holds numbers that are not finite, in {key}")
        lora.keys[part], lora.tensors[part] = key, tensor
    for lora in loras.values():
        for part, other in (("A", "B"), ("B", "A")):
            if part not in lora.keys:
                key = lora.keys.get(other) or lora.keys["alpha"]
                missing = _PARTS[part][0] if other in lora.keys else "pair"
                _refuse(adapter, f"is incomplete: {key} has no {missing} beside it")
    return list(loras.values())


def _parsed(adapter: str, key: str) -> tuple[str, str, str]:
    """The component, the module's name in the file, and the part that a key is."""
    for pattern, kind in _OTHER_KINDS.items():
        if re.search(pattern, key):
            _refuse(adapter, f"holds {kind} ({key}); this reads plain LoRA, so merge it with the tool that made it")
    part, ending = next(
        ((part, ending) for part, endings in _PARTS.items() for ending in endings if key.endswith(f".{ending}")),
        (None, ""),
    )
    if part is None:
        _refuse(adapter, f"is no LoRA that this reads: {key} is neither a lora_A, a lora_B (or down and up) nor alpha")
    name = key.removesuffix(f".{ending}").removeprefix("base_model.model.")
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return _PREFIXES.get(prefix, "transformer"), name.removeprefix(prefix), part


def _find(adapter: str, lora: _Lora, component: nn.Module, places: Mapping[str, list[Place]]) -> list[Place]:
    """The places of a pair that fits them."""
    found = places.get(_flat(lora.name))
    if found is None:
        _refuse(adapter, f"is no adapter of this model: its {lora.component} has no module for {lora.keys['A']}")
    a, b = (lora.tensors[part] for part in "AB")
    shape = component.get_parameter(f"{found[0].module}.weight").shape
    rows = sum(part.stop - part.start for place in found for part in place.rows)
    wanted = (rows, *shape[1:])
    if b.ndim < 2 or a.ndim < 2 or (b.flatten(1).shape[0], *a.shape[1:]) != wanted or b.flatten(1).shape[1] != len(a):
        shapes = f"{tuple(b.shape)} and {tuple(a.shape)}"
        _refuse(
            adapter,
            f"is no adapter of this model: {lora.keys['B']} and its lora_A are {shapes}, for a weight of {wanted}",
        )
    return found


Configuration = tuple[str, str, Mapping[str, Any]]  # where it stands, the component that it is for, its settings


def _configurations(adapter: str, header: Mapping[str, str], beside: Sequence[Path]) -> Iterator[Configuration]:
    """What the header and the file beside it say of a component's scale; UserError for what this cannot merge."""
    try:
        given = json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}"))
        kept = [json.loads(path.read_text(encoding="utf-8")) for path in beside]
    except (OSError, ValueError) as error:
        _refuse(adapter, f"has a configuration that is not JSON: {error}")
    if not all(isinstance(settings, dict) for settings in (given, *kept)):
        _refuse(adapter, "has a configuration that is no mapping of keys to values")
    found = []
    for component in dict.fromkeys(_PREFIXES.values()):
        own = {k.removeprefix(f"{component}."): v for k, v in given.items() if k.startswith(f"{component}.")}
        found.append(("its header", component, own))
    found += [(CONFIG, "transformer", settings) for settings in kept]
    for where, component, settings in found:
        start = str(settings.get("init_lora_weights", ""))
        if settings.get("use_dora") or settings.get("peft_type", "LORA") != "LORA":
            kind = "DoRA" if settings.get("use_dora") else settings["peft_type"]
            _refuse(adapter, f"is {kind} by {where}; this reads plain LoRA")
        if start.startswith(_CHANGES_THE_BASE):
            _refuse(adapter, f"was begun with {start} by {where}, which changes the base too; convert it to plain LoRA")
        for key in ("rank_pattern", "alpha_pattern"):
            if not _is_pattern(settings.get(key) or {}):
                _refuse(adapter, f"has in {where} as {key} what is no mapping of names to numbers: {settings[key]!r}")
        scale = settings.get("r"), settings.get("lora_alpha")
        if any(number is not None for number in scale):
            if not isinstance(scale[0], int) or not isinstance(scale[1], int | float):
                _refuse(adapter, f"has in {where} r {scale[0]!r} and lora_alpha {scale[1]!r}, which must be numbers")
            yield where, component, settings


def _is_pattern(given: Any) -> bool:
    """Whether these are numbers by names, which are regular expressions."""
    try:
        return all(isinstance(number, int | float) and bool(re.compile(name)) for name, number in given.items())
    except (AttributeError, re.error):
        return False


def _scale(adapter: str, lora: _Lora, configurations: Sequence[Configuration]) -> float:
    """What B A is multiplied by: 1 where nothing says another; UserError where two say it differently."""
    rank = len(lora.tensors["A"])
    found: dict[str, float] = {}
    if "alpha" in lora.tensors:
        if lora.tensors["alpha"].numel() != 1:
            _refuse(adapter, f"{lora.keys['alpha']} must be one number")
        found[lora.keys["alpha"]] = lora.tensors["alpha"].item() / rank
    for where, component, settings in configurations:
        if component == lora.component:
            ranks: dict[str, Any] = settings.get("rank_pattern") or {}
            alphas: dict[str, Any] = settings.get("alpha_pattern") or {}
            said = ranks.get(get_pattern_key(ranks, lora.name), settings["r"])
            if said != rank:
                _refuse(adapter, f"says rank {said} in {where}, and {lora.keys['A']} has {rank}")
            alpha: Any = alphas.get(get_pattern_key(alphas, lora.name), settings["lora_alpha"])
            found[where] = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    if len(set(found.values())) > 1:
        said = " and ".join(f"{scale:g} in {where}" for where, scale in found.items())
        _refuse(adapter, f"says two scales for {lora.keys['A']}: {said}; remove one")
    return next(iter(found.values()), 1.0)


@torch.no_grad()
def _add(weight: torch.Tensor, place: Place, lora: _Lora, scale: float) -> None:
    a, b = (lora.tensors[part].to(weight.device, torch.float32).flatten(1) for part in "AB")
    change = torch.cat([b[rows] for rows in place.rows]) @ a * scale
    weight.copy_(weight.float() + change.view_as(weight))


def _refuse(adapter: str, what: str | None) -> NoReturn:
    raise UserError(f"model.adapter: {adapter!r} {what}")
