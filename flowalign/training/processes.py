"""Several processes as one: what they sum, agree on and divide. A single process sends nothing.

Every process holds the trained weights whole and sums their gradients with the others. It holds the frozen weights
whole too or, if the launcher is configured for FSDP 2, sharded: each block is gathered for its forward and backward
pass.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    TorchDynamoPlugin,
    parse_choice_from_env,
    parse_flag_from_env,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from flowalign.advantages import RewardTable
from flowalign.config import Recipe
from flowalign.config.base import UserError
from flowalign.policies.base import Policy, forward_dtype
from flowalign.rollout.prompts import Row
from rewards.devices import chosen_device

MESSAGE = 2**25  # numbers in one message of a sum, 128 MiB in float32
_LOOKED_AT = 2**12  # first numbers of a frozen weight, enough to tell one model from another


def accelerator_for(recipe: Recipe) -> Accelerator:
    """The Accelerator of this process, as the launcher configured it.

    Raises UserError when the processes cannot divide a step's prompts evenly.
    """
    accelerator = Accelerator(
        cpu=chosen_device().type == "cpu",
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
    # What no plugin of accelerate's tells before there is an Accelerator is read as the launcher hands it on.
    steps = parse_choice_from_env("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    _refuse_all_but("1", "gradient_accumulation_steps", steps, "train.micro_batch parts an update")
    _refuse_all_but("no", "dynamo_backend", TorchDynamoPlugin().backend.value, "model.compile does that")
    _refuse_precision(recipe)
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    version = parse_choice_from_env("FSDP_VERSION", "1")
    if version != "2":  # whose plugin needs a graphics card to be made
        raise UserError(f"accelerate is configured for FSDP {version}; set fsdp_version: 2 in its configuration")
    fsdp = FullyShardedDataParallelPlugin()
    loading, checkpointing = str(fsdp.cpu_ram_efficient_loading), str(fsdp.activation_checkpointing)
    _refuse_all_but("false", "fsdp_cpu_ram_efficient_loading", loading, "every process reads the model's files itself")
    _refuse_all_but("false", "fsdp_activation_checkpointing", checkpointing, "model.gradient_checkpointing does that")
    refuse_all_trained(recipe)


def _refuse_all_but(neutral: str, key: str, value: str, why: str) -> None:
    if value.lower() != neutral:
        raise UserError(f"accelerate is configured with {key} {value.lower()}; set it to {neutral}, since {why}")


def refuse_all_trained(recipe: Recipe) -> None:
    """Raises UserError for a recipe that leaves no weights frozen, since only frozen weights can be sharded."""
    if recipe.model.lora is None:
        raise UserError(
            "model.lora null trains all weights, but FSDP shards only frozen weights; give model.lora a rank, or "
            "choose multi-GPU without FSDP"
        )


def _refuse_precision(recipe: Recipe) -> None:
    asked = parse_choice_from_env("ACCELERATE_MIXED_PRECISION").lower()
    used = forward_dtype(recipe.model.dtype, chosen_device())
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if asked not in ("no", names.get(used)):
        raise UserError(
            f"accelerate is configured with mixed_precision {asked}, but model.dtype {recipe.model.dtype} computes in "
            f"{str(used).removeprefix('torch.')} here; set mixed_precision to 'no' or change model.dtype"
        )


def shards_weights() -> bool:
    """Whether the launcher is configured to shard a model over several processes."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and PartialState().num_processes > 1


def prepare(accelerator: Accelerator, policy: Policy) -> None:
    """Compare the policies of all processes, and shard their frozen weights if the launcher is configured for it.

    Raises UserError when the transformers differ, cannot be trained here, or have no frozen weights to shard.
    """
    weights = policy.named_weights()
    _refuse_untrainable(weights)
    if accelerator.num_processes > 1:
        _refuse_different(accelerator, weights.values())
    if shards_weights() and not policy.in_lockstep:  # a script's policy is sharded from its first run on
        for module in policy.modules.values():
            shard(module, accelerator.device, accelerator.num_processes)


def _refuse_untrainable(weights: Mapping[str, nn.Parameter]) -> None:
    for name, weight in weights.items():
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


def _refuse_different(accelerator: Accelerator, weights: Iterable[nn.Parameter]) -> None:
    """Raises UserError when processes begin with different weights.

    No process sends its weights: each reads the same files and draws its adapters from the same seed.
    """
    own = torch.stack([_checksum(weight) for weight in weights]).to(accelerator.device)
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


def shard(transformer: nn.Module, device: torch.device, processes: int) -> None:
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


def sum_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Sum each gradient over the processes, in place; where only some had rows for a module, all take its sum."""
    if accelerator.num_processes == 1:
        return
    having = summed(accelerator, *(weight.grad is not None for weight in parameters))
    gradients = []
    for weight, processes in zip(parameters, having, strict=True):
        if processes:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            gradients.append(weight.grad)
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


def shares_of_updates(counts: Sequence[int], rank: int, updates: int, generator: torch.Generator) -> list[Share]:
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
