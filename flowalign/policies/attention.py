"""Attention backends. diffusers' SD3 processor calls PyTorch's attention directly and ignores the dispatcher; this one
asks it."""

import hashlib
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import nn

from flowalign.config.base import UserError

CANDIDATES = ("native", "_native_cudnn", "flash", "_flash_3", "xformers")
"""Backends that are exact and have gradients, among which auto chooses."""
_SAVES = 0.95
_PACKAGES = ("torch", "diffusers", "xformers", "flash_attn", "flash_attn_3")
_CANNOT_RUN = (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError)


class JointAttention:
    """Joint attention of image and text tokens through diffusers' dispatcher (Esser et al. 2024, section 4)."""

    _attention_backend: str | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """hidden_states (B, L, D), and with text (B, T, D) both streams' outputs."""

        def heads(x: torch.Tensor, norm: nn.Module | None = None) -> torch.Tensor:
            x = x.unflatten(-1, (attn.heads, -1))
            return x if norm is None else norm(x)

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(hidden_states), attn.norm_k)
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            query = torch.cat([query, heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)], dim=1)
            key = torch.cat([key, heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)], dim=1)
            value = torch.cat([value, heads(attn.add_v_proj(encoder_hidden_states))], dim=1)
        mixed = dispatch_attention_fn(query, key, value, backend=self._attention_backend).flatten(2).to(query.dtype)
        length = hidden_states.shape[1]
        image = attn.to_out[1](attn.to_out[0](mixed[:, :length]))
        if encoder_hidden_states is None:
            return image
        text = mixed[:, length:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def use_attention(transformer: Any, backend: str, device: torch.device, dtype: torch.dtype, tokens: int = 1024) -> None:
    """Set a transformer's attention backend; UserError in one sentence when it cannot run here.

    auto is the choice of `fastest_backend` for so many tokens.
    """
    for module in transformer.modules():
        if isinstance(getattr(module, "processor", None), JointAttnProcessor2_0):
            module.set_processor(JointAttention())
    processors = [getattr(module, "processor", None) for module in transformer.modules()]
    exchangeable = any(hasattr(processor, "_attention_backend") for processor in processors)
    if backend == "auto":
        heads = [transformer.config.get(name) for name in ("num_attention_heads", "attention_head_dim")]
        known = device.type == "cuda" and all(heads) and exchangeable  # a processor has kernels for native alone
        backend = fastest_backend((tokens, *heads), device, dtype) if known else "native"
    names = [name.value for name in AttentionBackendName]
    if backend not in names:
        raise UserError(f"model.attention: unknown backend {backend!r}; choose auto or one of {', '.join(names)}")
    if backend != "native" and not exchangeable:
        raise UserError(f"model.attention: the attention of {type(transformer).__name__} is not exchangeable; use auto")
    try:
        _set_backend(transformer, backend, device, dtype)
    except _CANNOT_RUN as error:
        why = str(error).strip().splitlines()[0].rstrip(".")
        missing = backend == "xformers" and importlib.util.find_spec("xformers") is None
        hint = "; install it with pip install 'flowalign[xformers]'" if missing else ""
        raise UserError(f"model.attention: {backend} cannot run on {device.type} here ({why}){hint}") from error


def _set_backend(transformer: Any, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Try it on a few numbers, which is when most that are missing something say so."""
    try:
        transformer.set_attention_backend(backend)
        attention_seconds(backend, (8, 1, 32), device, dtype, turns=1)
    except _CANNOT_RUN:
        transformer.set_attention_backend("native")
        raise


@torch.inference_mode(False)
def attention_seconds(
    backend: str, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, turns: int = 5
) -> float:
    """The least time of a forward and backward pass over two pictures of `shape` (tokens, heads, numbers a head).

    Raises one of the errors in which the backends say that they cannot run here.
    """
    _check_attention_backend_requirements(AttentionBackendName(backend))
    tensors = [torch.ones(2, *shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(turns):
        synchronize()
        started = time.perf_counter()
        dispatch_attention_fn(*tensors, backend=AttentionBackendName(backend)).sum().backward()
        synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def fastest_backend(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, candidates: Sequence[str] = CANDIDATES
) -> str:
    """The fastest of the candidates that run here; native unless another saves a twentieth.

    Backends round differently. So that a run goes on and is evaluated with the one that it began with, the choice is
    made once and kept in the user's cache folder, by device, versions, shape and dtype; `model.attention` overrules it.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = [_version(package) for package in _PACKAGES]
    key = (name, *versions, shape, str(dtype), tuple(candidates))
    file = _cache() / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.txt"
    with suppress(OSError):
        return file.read_text(encoding="utf-8")
    seconds: dict[str, float] = {}
    for candidate in candidates:
        with suppress(*_CANNOT_RUN):
            seconds[candidate] = attention_seconds(candidate, shape, device, dtype)
    fastest = min(seconds, key=lambda name: seconds[name] * (_SAVES if name == "native" else 1))
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(fastest, encoding="utf-8")
        os.link(partial, file)  # the first of several processes decides for all
    except FileExistsError:
        return file.read_text(encoding="utf-8")
    except OSError:  # a home that cannot be written to costs the timing anew at every start
        return fastest
    finally:
        with suppress(OSError):
            partial.unlink()
    return fastest


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowalign" / "attention"
