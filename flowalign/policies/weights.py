"""Which weights learn: low-rank adapters, or all of the modules."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from flowalign.config import Lora
from flowalign.config.base import UserError
from flowalign.config.mistakes import nearest

if TYPE_CHECKING:
    from flowalign.policies.base import Policy


def train_lora_or_all(policy: "Policy", lora: Lora | None, targets: Mapping[str, Sequence[str]], seed: int) -> None:
    """Add seeded float32 adapters to frozen modules, or make all their weights float32 and trainable.

    `targets` are the adapter's named groups of layers. Full fine-tuning keeps a snapshot "reference".
    """
    modules = policy.modules
    if lora is None:
        for module in modules.values():
            module.to(torch.float32).requires_grad_(True)
        policy.snapshot("reference")
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # once, so that alike modules begin with different numbers
        for name, module in modules.items():
            _add_adapter(name, module, lora, targets)


def _add_adapter(name: str, module: Any, lora: Lora, targets: Mapping[str, Sequence[str]]) -> None:
    layers, names = [layer for layer, _ in module.named_modules()], []
    for target in lora.targets:
        found = target_modules(layers, target, targets)
        if not found:
            known = [*targets, *(ending for group in targets.values() for ending in group)]
            raise UserError(f"model.lora.targets: no module of the {name} ends in {target}{nearest(target, known)}")
        names += found
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian", target_modules=names)
    try:
        module.add_adapter(config)
    except ValueError as error:
        raise UserError(
            f"model.lora.targets: {', '.join(lora.targets)} name modules that take no adapter; "
            f"use the groups {', '.join(targets)} or endings of linear layers' names"
        ) from error
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = False  # autocast casts the small weights, not the large inputs


def target_modules(names: Iterable[str], target: str, targets: Mapping[str, Sequence[str]]) -> list[str]:
    """Which of these names of modules a group or an ending stands for; a * in an ending stands for any text."""
    endings = targets.get(target, (target,))
    return [name for name in names if any(fnmatchcase(f".{name}", f"*.{ending}") for ending in endings)]
