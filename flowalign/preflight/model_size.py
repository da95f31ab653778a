"""The number of a model's weights and the cost of its passes, from its configuration files alone.

The pipeline is built on the meta device, where tensors have shapes but no memory, and the policy's own forward pass
runs there. PyTorch's counter sums the floating point operations, and the bytes of all live storages give a peak. The
meta device has neither autocast nor fused attention kernels; `_AsOnADevice` imitates both.
"""

import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from flowalign.config import Model
from flowalign.config.base import UserError
from flowalign.policies.base import Condition
from flowalign.policies.diffusers_pipeline import PipelinePolicy
from flowalign.policies.folders import loading, part_class
from flowalign.policies.loading import find_family

DTYPES = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Line(NamedTuple):
    """Bytes as a function of rows: each + fixed."""

    each: float
    fixed: float

    def at(self, rows: float) -> float:
        """Bytes of `rows` rows."""
        return self.each * rows + self.fixed


def meta_policy(model: Model) -> PipelinePolicy:
    """The policy of a model's settings on the meta device, with adapters; no weights are read.

    Raises UserError as `load_policy` does, and for a folder that lacks the configuration of a part.
    """
    family, path = find_family(model)
    folder = _configurations(path)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    dtype = DTYPES[model.dtype]
    parts: dict[str, Any] = {}
    for name, entry in index.items():
        if isinstance(entry, list):
            library, kind = entry
            parts[name] = _part(folder / name, library, kind, torch.float32 if name == "vae" else dtype)
    pipeline = family.pipeline_class(**parts)
    precision = "bf16" if model.dtype == "auto" else model.dtype
    plain = {
        "attention": "native",
        "dtype": precision,
        "adapter": None,
        "gradient_checkpointing": False,
        "compile": False,
    }
    return family(pipeline, model.model_copy(update=plain), torch.device("meta"), 0)


def _configurations(path: Path | str) -> Path:
    """The folder of a pipeline's configuration files; for a hub id only these files are downloaded."""
    if Path(path).exists():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*config.json", "model_index.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"model.path: the hub did not give the configuration files of {path} ({type(error).__name__})"
        ) from error


def _part(folder: Path, library: str | None, kind: str | None, dtype: torch.dtype) -> Any:
    """A part of a pipeline: a module on the meta device, the real scheduler, None for a tokenizer."""
    if library is None or kind is None or folder.name.startswith(("tokenizer", "feature_extractor")):
        return None
    source = part_class(folder.name, library, kind)
    with loading(folder.parent, folder.name):
        if folder.name == "scheduler":
            return source.from_pretrained(folder)
        with torch.device("meta"), _default_dtype(dtype):
            if library == "diffusers":
                return source.from_config(source.load_config(folder))
            return source(source.config_class.from_pretrained(folder))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def parameters(policy: PipelinePolicy) -> dict[str, int]:
    """The number of weights of each part of the pipeline, without adapters; "trainable" counts the weights that learn.

    "buffers" counts the constants of the trained modules, such as the table of 147,456 positions in SD 3.5 medium.
    """
    counts = {name: _weights(part) for name, part in _parts(policy).items()}
    buffers = sum(buffer.numel() for module in policy.modules.values() for buffer in module.buffers())
    return counts | {"trainable": sum(p.numel() for p in policy.trainable_parameters().values()), "buffers": buffers}


def _parts(policy: PipelinePolicy) -> dict[str, torch.nn.Module]:
    parts = (policy.pipeline.components | dict(policy.modules)).items()
    return {name: part for name, part in parts if isinstance(part, torch.nn.Module)}


def _weights(part: torch.nn.Module) -> int:
    return sum(p.numel() for key, p in part.named_parameters() if "lora_" not in key)


def whole_at_once(policy: PipelinePolicy) -> int:
    """The weights of the trained modules, without adapters, that a process holds whole at once if they are sharded.

    These are two blocks, since the next block is fetched while one computes, and all weights outside the blocks.
    """
    modules: Mapping[str, Any] = policy.modules
    blocks = [
        _weights(block)
        for module in modules.values()
        for block in module.modules()
        if type(block).__name__ in (module._no_split_modules or ())
    ]
    return sum(map(_weights, modules.values())) - sum(blocks) + sum(sorted(blocks)[-2:])


def condition_rows(policy: PipelinePolicy, rows: int) -> Condition:
    """The conditions of `rows` prompts as shapes; UserError as `PipelinePolicy.condition_shapes`."""
    shapes = policy.condition_shapes().items()
    return Condition({name: torch.empty(rows, *shape, dtype=policy.dtype, device="meta") for name, shape in shapes})


class Pass(NamedTuple):
    """The cost of a pass of the model."""

    flops: float
    peak: int  # bytes, without the weights and the inputs


@torch.inference_mode(False)
def transformer_pass(policy: PipelinePolicy, rows: int, *, backward: bool, checkpointing: bool = False) -> Pass:
    """The cost of `rows` rows through the first trained module, with a backward pass if asked for, on the meta device.

    Where there are several modules, they are alike.
    """
    transformer: Any = next(iter(policy.modules.values()))
    device = _AsOnADevice(policy.dtype)
    transformer.disable_gradient_checkpointing()
    if checkpointing:
        transformer.enable_gradient_checkpointing(device.checkpoint)
    x = torch.empty(rows, *policy.latent_shape(policy.request), dtype=policy.dtype, device="meta")
    sigma, condition = torch.empty(rows, device="meta"), condition_rows(policy, rows)

    def run() -> None:
        with torch.enable_grad() if backward else torch.no_grad():
            velocity = policy._forward(transformer, x, sigma, condition).float()
            if backward:
                velocity.mean().backward()

    held = [tensor for part in _parts(policy).values() for tensor in (*part.parameters(), *part.buffers())]
    found = _traced(run, device, [*held, x, sigma, *condition.tensors.values()])
    transformer.zero_grad(set_to_none=True)
    return found


def decode_pass(policy: PipelinePolicy, images: int) -> Pass:
    """The cost of decoding `images` images, in the policy's slices."""
    latents = torch.empty(images, *policy.latent_shape(policy.request), device="meta")
    known = [*policy.pipeline.vae.parameters(), *policy.pipeline.vae.buffers(), latents]
    return _traced(lambda: policy.decode(latents), _AsOnADevice(torch.float32), known)


def _traced(run: Callable[[], Any], device: "_AsOnADevice", known: list[torch.Tensor]) -> Pass:
    counted = Counted(known)
    with device, counted:
        run()
    return Pass(counted.flops + device.attention_flops, counted.peak)


class Counted(TorchDispatchMode):
    """Counts floating point operations and the largest number of bytes alive at once, without the `known` tensors."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.now, self.peak = 0.0, 0, 0
        self._alive: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


class _AsOnADevice(TorchFunctionMode):
    """Imitates a real device: autocast of linear layers and layer norms, and attention in one kernel."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.attention_flops = 0.0

    def checkpoint(self, module: Any, *arguments: Any) -> Any:
        """Run a block whose activations are recomputed; the recomputation enters this mode again.

        A backward pass runs outside the mode, so it would otherwise not be counted.
        """
        return torch.utils.checkpoint.checkpoint(
            module.__call__,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), self),
        )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
            query, key, value = (given[name].to(self.dtype) for name in ("query", "key", "value"))
            return _FusedAttention.apply(query, key, value, self)
        if func is F.linear:
            args = tuple(x.to(self.dtype) if isinstance(x, torch.Tensor) else x for x in args)
            kwargs = {key: x.to(self.dtype) if isinstance(x, torch.Tensor) else x for key, x in (kwargs or {}).items()}
        if func is F.layer_norm:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """Keeps what flash attention keeps for its backward pass (Dao 2023): inputs, output and a number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, counter: _AsOnADevice) -> Any:
        """The shape of the output."""
        mixed = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, mixed, query.new_empty(query.shape[:-1], dtype=torch.float32))
        ctx.counter = counter
        counter.attention_flops += sdpa_flop_count(query.shape, key.shape, value.shape)
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        """The shapes of the gradients."""
        query, key, value, *_ = ctx.saved_tensors
        ctx.counter.attention_flops += sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
