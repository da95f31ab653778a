"""Which weights learn: low-rank adapters, or all of the transformer; and adapters merged before that."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open

from flowalign.config import Lora
from flowalign.mistakes import nearest
from flowalign.settings import UserError

if TYPE_CHECKING:
    from flowalign.policies.base import Policy


def train_lora_or_all(policy: "Policy", lora: Lora | None, targets: Mapping[str, Sequence[str]], seed: int) -> None:
    """Add seeded float32 adapters to a frozen transformer, or make all its weights float32 and trainable.

    `targets` are the adapter's named groups of modules. Full fine-tuning keeps a snapshot "reference".
    """
    transformer: Any = policy.transformer
    if lora is None:
        transformer.to(torch.float32).requires_grad_(True)
        policy.snapshot("reference")
        return
    modules, names = [name for name, _ in transformer.named_modules()], []
    for target in lora.targets:
        found = target_modules(modules, target, targets)
        if not found:
            known = [*targets, *(ending for group in targets.values() for ending in group)]
            raise UserError(
                f"model.lora.targets: no module of the transformer ends in {target}{nearest(target, known)}"
            )
        names += found
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian", target_modules=names)
        try:
            transformer.add_adapter(config)
        except ValueError as error:
            raise UserError(
                f"model.lora.targets: {', '.join(lora.targets)} name modules that take no adapter; "
                f"use the groups {', '.join(targets)} or endings of linear layers' names"
            ) from error
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # autocast casts the small weights, not the large inputs


def target_modules(names: Iterable[str], target: str, targets: Mapping[str, Sequence[str]]) -> list[str]:
    """Which of these names of modules a group or an ending stands for; a * in an ending stands for any text."""
    endings = targets.get(target, (target,))
    return [name for name in names if any(fnmatchcase(f".{name}", f"*.{ending}") for ending in endings)]


def merge_adapter(pipeline: Any, folder: str) -> None:
    """Merge a LoRA folder in diffusers format into a pipeline's weights.

    Raises UserError for a folder without one, a damaged file, or an adapter of another model: diffusers loads one that
    has nothing for the transformer without a word.
    """
    file = Path(folder) / "pytorch_lora_weights.safetensors"
    if not file.is_file():
        raise UserError(f"model.adapter: {folder!r} holds no {file.name}; give a LoRA folder, such as a run's lora/")
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)  # it would print every weight that does not fit
    try:
        with safe_open(file, "pt") as opened:
            if not any(key.startswith("transformer.") for key in opened.keys()):  # noqa: SIM118 - no mapping
                raise ValueError("nothing in it is for the transformer")
        pipeline.load_lora_weights(folder)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        what = " ".join(str(error).split())
        what = what if len(what) <= 160 else what[:157] + "..."
        raise UserError(f"model.adapter: {folder!r} is no adapter of this model: {what}") from error
    finally:
        diffusers_logging.set_verbosity(verbosity)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
