"""Stable Diffusion 3 and 3.5 as a policy."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict

from flowalign.config import Model
from flowalign.policies.attention import use_attention
from flowalign.policies.base import Condition, Grid, Policy, forward_dtype
from flowalign.policies.weights import merge_adapter, train_lora_or_all

TARGETS = {
    "attention": (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ),
    "feed_forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
}
_T5 = ("text_encoder_3", "tokenizer_3")


class SD3Policy(Policy):
    """A StableDiffusion3Pipeline; one without a T5 (as save_pretrained leaves it) is loaded without one."""

    def __init__(self, path: Path | str, model: Model, device: torch.device, seed: int):
        super().__init__()
        self.device = device
        self.dtype = forward_dtype(model.dtype, device)
        self.max_sequence_length = model.max_sequence_length
        precision = {"vae": torch.float32, "default": self.dtype}  # a VAE in half precision shows in the pictures
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(path, dtype=precision, **_absent(path))
        if model.adapter:
            merge_adapter(self.pipeline, model.adapter)
        for part in (self.pipeline.vae, self.pipeline.transformer, *self._text_encoders()):
            part.requires_grad_(False).eval()
        self.pipeline.to(device)
        self.pipeline.vae.to(memory_format=torch.channels_last)
        self.transformer = self.pipeline.transformer
        use_attention(self.transformer, model.attention, device, self.dtype)
        if model.gradient_checkpointing:
            self.pipeline.transformer.enable_gradient_checkpointing()
        train_lora_or_all(self, model.lora, TARGETS, seed)

    def _text_encoders(self) -> list[torch.nn.Module]:
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        return [encoder for name in names if (encoder := getattr(self.pipeline, name)) is not None]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """As the pipeline encodes them: "embeds" (B, L, D) and "pooled" (B, P)."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Condition({"embeds": embeds, "pooled": pooled})

    def _forward(self, x: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        return self.transformer(
            hidden_states=x,
            timestep=sigma * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=condition.tensors["embeds"],
            pooled_projections=condition.tensors["pooled"],
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), a few at a time: activations that fit the cache are three times as fast."""
        vae = self.pipeline.vae
        latents = latents.float() / vae.config.scaling_factor + vae.config.shift_factor
        pixels = latents[0, 0].numel() * self.pipeline.vae_scale_factor**2
        at_once = max(1, (16 * 64**2 if self.device.type == "cpu" else 8 * 512**2) // pixels)
        images = torch.cat([vae.decode(part, return_dict=False)[0] for part in latents.split(at_once)])
        return (images / 2 + 0.5).clamp(0, 1).contiguous()

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(channels, height / 8, width / 8) of the published models."""
        transformer: Any = self.module
        factor: int = self.pipeline.vae_scale_factor
        return (int(transformer.config.in_channels), height // factor, width // factor)

    def sigmas(self, steps: int, grid: Grid = "model") -> torch.Tensor:
        """The pipeline's schedule, or the scheduler's shift of evenly spaced values."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        even = torch.linspace(1, 1 / steps, steps).tolist()
        scheduler.set_timesteps(sigmas=even) if grid == "uniform" else scheduler.set_timesteps(steps)
        return scheduler.sigmas.float().cpu()

    def export(self, folder: Path) -> None:
        """What `pipe.load_lora_weights` takes, or the transformer's folder."""
        transformer: Any = self.module
        if "reference" in self.snapshots:
            transformer.save_pretrained(folder / "transformer")
            return
        weights = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(transformer).items()}
        StableDiffusion3Pipeline.save_lora_weights(
            folder, transformer_lora_layers=weights, **_collate_lora_metadata({"transformer": transformer})
        )


def _absent(path: Path | str) -> dict[str, None]:
    """The T5 parts that a local folder does not hold, as from_pretrained wants them named."""
    index = Path(path) / "model_index.json"
    if not index.is_file():
        return {}
    present = json.loads(index.read_text())
    return {name: None for name in _T5 if present.get(name, [None])[0] is None}
