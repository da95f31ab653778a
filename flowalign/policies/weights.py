"""Which weights learn: low-rank adapters, or all of the transformer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from flowalign.config import Lora
from flowalign.settings import UserError

if TYPE_CHECKING:
    from flowalign.policies.base import Policy


def train_lora_or_all(policy: "Policy", lora: Lora | None, targets: Mapping[str, Sequence[str]], seed: int) -> None:
    """Add seeded float32 adapters to a frozen transformer, or make all its weights float32 and trainable.

    `targets` are the adapter's named groups of modules. Full fine-tuning keeps a snapshot "reference".
    """
    transformer: Any = policy.module
    if lora is None:
        transformer.to(torch.float32).requires_grad_(True)
        policy.snapshot("reference")
        return
    endings = [ending for target in lora.targets for ending in targets.get(target, (target,))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian", target_modules=endings)
        try:
            transformer.add_adapter(config)
        except ValueError as error:
            known = ", ".join(targets)
            raise UserError(
                f"model.lora.targets: no module of the transformer ends in {', '.join(endings)}; "
                f"use the groups {known} or endings of module names"
            ) from error
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # autocast casts the small weights, not the large inputs
