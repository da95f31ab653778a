"""Attention backends. diffusers' SD3 processor calls PyTorch's attention directly and ignores the dispatcher; this one
asks it."""

import importlib.util
import time
from collections.abc import Callable
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
"""Backends that are exact and have gradients; they round differently, so that a recipe names the one it wants."""
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


def use_attention(transformer: Any, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Set a transformer's attention backend; UserError in one sentence when it cannot run here."""
    for module in transformer.modules():
        if isinstance(getattr(module, "processor", None), JointAttnProcessor2_0):
            module.set_processor(JointAttention())
    processors = [getattr(module, "processor", None) for module in transformer.modules()]
    exchangeable = any(hasattr(processor, "_attention_backend") for processor in processors)
    names = [name.value for name in AttentionBackendName]
    if backend not in names:
        raise UserError(f"model.attention: unknown backend {backend!r}; choose one of {', '.join(names)}")
    if backend != "native" and not exchangeable:
        raise UserError(
            f"model.attention: the attention of {type(transformer).__name__} is not exchangeable; use native"
        )
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
    """The least time of a forward and backward pass over two images of `shape` (tokens, heads, numbers a head).

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
