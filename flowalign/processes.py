"""Several processes as one: what they sum, agree on and share out. With one process nothing is sent."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flowalign.config import Recipe
from flowalign.settings import UserError


def accelerator_for(recipe: Recipe) -> Accelerator:
    """The engine of a run, set up by its launcher; every process makes its own.

    Raises UserError for a launcher's way of sharing out a model that this loop would train wrongly.
    """
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=list(recipe.run.trackers) or None,
        project_dir=str(recipe.folder),
    )
    refuse_sharded(accelerator.distributed_type)
    return accelerator


def refuse_sharded(kind: DistributedType) -> None:
    """Raises UserError where a launcher shares out one model: snapshots, norms and checkpoints are of whole weights.

    Accelerate prepares such models only together with their optimizer, or leaves their gradients apart.
    """
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"accelerate is configured for {kind.value}, which shares out one model, and here every process holds a "
            "whole one: choose multi-GPU without it in `accelerate config`, with LoRA where memory is short"
        )


def prepared(accelerator: Accelerator, transformer: nn.Module) -> nn.Module:
    """The transformer as the engine trains it.

    Its buffers are the same everywhere and not broadcast before forward passes: a process without pictures to evaluate
    makes no forward pass and would leave the others waiting.
    """
    model: nn.Module = accelerator.prepare_model(transformer)
    if isinstance(model, DistributedDataParallel):
        model.broadcast_buffers = False
    return model


def summed(accelerator: Accelerator, *values: float) -> list[float]:
    """Each number summed over the processes, in float64."""
    own = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    found: list[float] = accelerator.reduce(own, "sum").tolist()
    return found


def gathered(accelerator: Accelerator, part: torch.Tensor) -> torch.Tensor:
    """The samples of all processes along the last axis, of a tensor (N,) or (K, N) of this process's."""
    whole: torch.Tensor = accelerator.gather(part.movedim(-1, 0).contiguous())
    return whole.movedim(0, -1)


def shared_out(
    counts: Sequence[int], rank: int, updates: int, generator: torch.Generator
) -> list[tuple[torch.Tensor, int]]:
    """For each update the places of process `rank` among its own units, and the units of all processes.

    counts: the units of each process. An update is made of the same units however many processes share them.
    """
    first = sum(counts[:rank])
    order = torch.randperm(sum(counts), generator=generator)
    return [
        (part[(part >= first) & (part < first + counts[rank])] - first, len(part))
        for part in order.tensor_split(updates)
    ]
