"""Attention backends. diffusers' SD3 processor calls PyTorch's attention directly and ignores the dispatcher; this one
asks it."""

import importlib.util
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import nn

from flowalign.settings import UserError


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
    """Set a transformer's attention backend; UserError in one sentence when it cannot run here.

    auto is set to native by name: without one, diffusers takes the backend of whichever model was set last.
    """
    for module in transformer.modules():
        if isinstance(getattr(module, "processor", None), JointAttnProcessor2_0):
            module.set_processor(JointAttention())
    if backend in ("auto", "native"):
        transformer.set_attention_backend("native")
        return
    names = [name.value for name in AttentionBackendName]
    if backend not in names:
        raise UserError(f"model.attention: unknown backend {backend!r}; choose auto or one of {', '.join(names)}")
    probe = torch.zeros(1, 8, 1, 32, device=device, dtype=dtype)
    try:
        transformer.set_attention_backend(backend)
        dispatch_attention_fn(probe, probe, probe, backend=AttentionBackendName(backend))
    except (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        transformer.set_attention_backend("native")
        why = str(error).strip().splitlines()[0].rstrip(".")
        missing = backend == "xformers" and importlib.util.find_spec("xformers") is None
        hint = "; install it with pip install 'flowalign[xformers]'" if missing else ""
        raise UserError(f"model.attention: {backend} cannot run on {device.type} here ({why}){hint}") from error
