"""From a model's path to a policy."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from flowalign.assets import asset
from flowalign.config import Model
from flowalign.policies.base import Policy
from flowalign.policies.sd3 import SD3Policy
from flowalign.settings import UserError

# Pipeline class in model_index.json -> policy(path, model settings, device, seed).
FAMILIES: dict[str, Callable[[Path | str, Model, torch.device, int], Policy]] = {
    "StableDiffusion3Pipeline": SD3Policy,
}


def load_policy(model: Model | str, device: torch.device | str = "cpu", seed: int = 0) -> Policy:
    """The policy of a model's settings, or of its path with default settings.

    Raises UserError for a missing folder, one that is no diffusers pipeline, or a class without an adapter.
    """
    if isinstance(model, str):
        model = toyworld_model() if model == "toyworld" else Model(path=model)
    path: Path | str = asset("toyworld/model") if model.path == "toyworld" else model.path
    name = _pipeline_class(path)
    if name not in FAMILIES:
        raise UserError(f"model.path {model.path!r} is a {name}; supported are {', '.join(FAMILIES)}")
    if model.adapter and not Path(model.adapter).exists():
        raise UserError(f"model.adapter: no folder {model.adapter!r}")
    return FAMILIES[name](path, model, torch.device(device), seed)


def toyworld_model() -> Model:
    """The settings that fit the embedded model."""
    return Model(path="toyworld", height=64, width=64, max_sequence_length=0)


def _pipeline_class(path: Path | str) -> str:
    index = Path(path) / "model_index.json"
    if not index.is_file():
        if Path(path).exists() or isinstance(path, Path) or str(path).count("/") != 1:
            what = "holds no model_index.json" if Path(path).exists() else "does not exist"
            raise UserError(f"model.path: {str(path)!r} {what}; give a diffusers pipeline folder or a hub id")
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            index = Path(hf_hub_download(str(path), "model_index.json"))
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            raise UserError(
                f"model.path: {str(path)!r} is no local folder, and the hub did not give it ({type(error).__name__}); "
                "check the name, log in for gated models, or give a folder"
            ) from error
    return str(json.loads(index.read_text())["_class_name"])
