"""Several processes as one: what they sum, agree on and divide. A single process sends nothing.

Every process holds the trained weights whole and sums their gradients with the others. It holds the frozen weights
whole too or, if the launcher is configured for FSDP 2, sharded: each block is gathered for its forward and backward
pass.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, parse_choice_from_env, parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from flowalign.advantages import RewardTable
from flowalign.config import Recipe
from flowalign.config.base import UserError
from flowalign.policies.base import forward_dtype
from flowalign.policies.devices import own_device
from flowalign.rollout.prompts import Row

MESSAGE = 2**25  # numbers in one message of a sum, 128 MiB in float32
_LOOKED_AT = 2**12  # first numbers of a frozen weight, enough to tell one model from another

# Settings of a launcher that have no effect here: variable -> (setting, its neutral value, what to use instead).
_NOT_FOLLOWED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "gradient_accumulation_steps",
        "1",
        "train.micro_batch splits an update",
    ),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "no", "model.compile does that"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "false", "model.gradient_checkpointing does"),
}


def accelerator_for(recipe: Recipe) -> Accelerator:
    """The Accelerator of this process, as the launcher configured it.

    Raises UserError when the processes cannot divide a step's prompts evenly.
    """
    accelerator = Accelerator(
        cpu=own_device().type == "cpu",
        log_with=list(recipe.run.trackers) or None,
        project_dir=str(recipe.folder),
    )
    prompts, processes = recipe.train.prompts_per_step, accelerator.num_processes
    if prompts % processes:
        raise UserError(f"train.prompts_per_step ({prompts}) must be a multiple of the {processes} processes")
    return accelerator


def refuse_launcher(recipe: Recipe) -> None:
    """Raises UserError, before anything loads, for a launcher's configuration that this loop does not follow."""
    for engine in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise UserError(
                f"accelerate is configured for {engine.lower()}; choose FSDP with fsdp_version 2, which shards the "
                "frozen weights of a model that trains adapters, or multi-GPU without FSDP"
            )
    for name, (key, neutral, why) in _NOT_FOLLOWED.items():
        value = parse_choice_from_env(name, neutral).lower()
        if value != neutral:
            raise UserError(f"accelerate is configured with {key} {value}; set it to {neutral}, since {why}")
    _refuse_precision(recipe)
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"accelerate is configured for FSDP {version}; set fsdp_version: 2 in its configuration")
    if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise UserError(
            "accelerate is configured with fsdp_cpu_ram_efficient_loading true, but here every process reads the "
            "model's files itself; set it to false"
        )
    refuse_all_trained(recipe)


def refuse_all_trained(recipe: Recipe) -> None:
    """Raises UserError for a recipe that leaves no weights frozen, since only frozen weights can be sharded."""
    if recipe.model.lora is None:
        raise UserError(
            "model.lora null trains all weights, but FSDP shards only frozen weights; give model.lora a rank, or "
            "choose multi-GPU without FSDP"
        )


def _refuse_precision(recipe: Recipe) -> None:
    asked = parse_choice_from_env("ACCELERATE_MIXED_PRECISION").lower()
    used = forward_dtype(recipe.model.dtype, own_device())
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if asked not in ("no", names.get(used)):
        raise UserError(
            f"accelerate is configured with mixed_precision {asked}, but model.dtype {recipe.model.dtype} computes in "
            f"{str(used).removeprefix('torch.')} here; set mixed_precision to 'no' or change model.dtype"
        )


def shares_out() -> bool:
    """Whether the launcher is configured to shard a model over several processes."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and PartialState().num_processes > 1


def prepare(accelerator: Accelerator, transformer: nn.Module) -> None:
    """Compare the transformers of all processes, and shard their frozen weights if the launcher is configured for it.

    Raises UserError when the transformers differ, cannot be trained here, or have no frozen weights to shard.
    """
    _refuse_untrainable(transformer)
    if accelerator.num_processes > 1:
        _refuse_different(accelerator, transformer)
    if shares_out() and not is_shared_out(transformer):  # a script's policy is sharded from its first run on
        share_out(transformer, accelerator.device, accelerator.num_processes)


def _refuse_untrainable(transformer: nn.Module) -> None:
    for name, weight in transformer.named_parameters():
        if weight.is_inference():
            raise UserError(
                f"the policy's weight {name} was made under torch.inference_mode() and cannot be trained; "
                "make the policy outside of it"
            )
        if weight.requires_grad and isinstance(weight, DTensor):
            raise UserError(
                f"the policy's trained weight {name} is sharded among the processes already; every process holds "
                "trained weights whole here, and FSDP shards only frozen weights"
            )


def _refuse_different(accelerator: Accelerator, transformer: nn.Module) -> None:
    """Raises UserError when processes begin with different weights.

    No process sends its weights: each reads the same files and draws its adapters from the same seed.
    """
    own = torch.stack([_checksum(weight) for weight in transformer.parameters()]).to(accelerator.device)
    for rank, other in enumerate(accelerator.gather(own[None])):
        if not torch.equal(other, own):
            raise UserError(
                f"process {accelerator.process_index} began with other weights than process {rank}; give every node "
                "the same model files, recipe and versions of the libraries"
            )


def _checksum(weight: torch.Tensor) -> torch.Tensor:
    """The int64 sum of a weight's bits, which no order of addition changes; a frozen weight's first numbers suffice."""
    part = weight.detach().flatten()
    part = part if weight.requires_grad else part[:_LOOKED_AT]
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[part.element_size()]
    return part.view(bits).sum(dtype=torch.int64)


def share_out(transformer: nn.Module, device: torch.device, processes: int) -> None:
    """Shard a transformer's frozen weights over the processes, as the launcher's FSDP settings say (FSDP2).

    From then on a forward or a backward pass waits for the same pass of every process. Trained weights stay whole, as
    plain tensors, so that their snapshots, gradients and checkpoints are those of one process. Blocks are moved to the
    device one by one: it never holds the whole transformer. Raises UserError when all weights are trained.
    """
    # accelerate's own preparation needs an optimizer whose weights it replaces, and has no FSDP on CPUs.
    plugin = FullyShardedDataParallelPlugin()
    trained = {weight for weight in transformer.parameters() if weight.requires_grad}
    if len(trained) == len(list(transformer.parameters())):
        raise UserError("this policy trains all its weights, but FSDP shards only frozen weights; choose multi-GPU")
    for weight in trained:
        weight.data = weight.data.to(device)
    try:
        wraps = fsdp2_prepare_auto_wrap_policy(plugin, transformer)
    except ValueError as error:
        raise UserError(f"accelerate's fsdp_transformer_layer_cls_to_wrap: {error}") from error
    mesh = init_device_mesh(device.type, (processes,))

    def split(module: nn.Module) -> None:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=plugin.reshard_after_forward,
            offload_policy=plugin.cpu_offload,
            ignored_params=trained,
        )

    for module in [*transformer.modules()][:0:-1]:  # a block's parts before the block
        if wraps is not None and wraps(module) and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            split(module)
    split(transformer)


def is_shared_out(transformer: nn.Module) -> bool:
    """Whether a transformer is sharded, so that its passes wait for those of other processes."""
    return isinstance(transformer, FSDPModule)


def sum_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Sum each gradient over the processes, in place. Every process has gradients of the same parameters."""
    if accelerator.num_processes == 1:
        return
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    while gradients:
        count = size = 0
        while count < len(gradients) and (count == 0 or size + gradients[count].numel() <= MESSAGE):
            size += gradients[count].numel()
            count += 1
        together, gradients = gradients[:count], gradients[count:]
        flat = torch.cat([gradient.flatten() for gradient in together])
        parts = accelerator.reduce(flat, "sum").split([gradient.numel() for gradient in together])
        for gradient, part in zip(together, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def summed(accelerator: Accelerator, *values: float) -> list[float]:
    """The sum of each number over the processes, in float64."""
    own = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    found: list[float] = accelerator.reduce(own, "sum").tolist()
    return found


def summed_counts(accelerator: Accelerator, own: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Counts under two names each, summed over the processes; every process has the same names."""
    if not own:
        return {}
    totals = iter(summed(accelerator, *(count for counts in own.values() for count in counts.values())))
    return {name: {key: int(next(totals)) for key in counts} for name, counts in own.items()}


def any_of(accelerator: Accelerator, value: bool) -> bool:
    """Whether the value is true in any process; every process gets the same answer."""
    return summed(accelerator, value) != [0]


def gathered(accelerator: Accelerator, part: torch.Tensor) -> torch.Tensor:
    """A tensor (B,) or (K, B) of this process's samples joined with those of the others, (N,) or (K, N)."""
    whole: torch.Tensor = accelerator.gather(part.movedim(-1, 0).contiguous())
    return whole.movedim(0, -1)


def all_scored(accelerator: Accelerator, own: RewardTable) -> RewardTable:
    """The scored samples of all processes, in the order of the processes."""
    together = partial(gathered, accelerator)
    return own._replace(
        total=together(own.total),
        values=together(own.values),
        applies=together(own.applies),
        measured=None if own.measured is None else together(own.measured),
        previews=None if own.previews is None else accelerator.gather(own.previews),
        trust=None if own.trust is None else together(own.trust),
    )


def rows_of_process(
    rows: Sequence[Row], rank: int, world: int, in_lockstep: bool
) -> tuple[Sequence[Row], Sequence[Row]]:
    """The rows that process `rank` scores, and those that it only draws, since in lockstep all draw equally many."""
    own = rows[rank::world]
    return own, rows[: -(-len(rows) // world) - len(own)] if in_lockstep else ()


class Share(NamedTuple):
    """The part of an update that one process computes."""

    places: torch.Tensor  # indices among the process's own units
    total: int  # the number of units over all processes
    most: int  # the number of units of the process that has the most


def shared_out(counts: Sequence[int], rank: int, updates: int, generator: torch.Generator) -> list[Share]:
    """The share of process `rank` in each update.

    counts: the number of units of each process. An update has the same units, however many processes divide them.
    """
    ends = torch.tensor(counts).cumsum(0)
    order = torch.randperm(sum(counts), generator=generator)
    shares = []
    for part in order.tensor_split(updates):
        owners = torch.bucketize(part, ends, right=True)
        most = int(owners.bincount(minlength=len(counts)).max())
        shares.append(Share(part[owners == rank] - sum(counts[:rank]), len(part), most))
    return shares
