"""Stable Diffusion 3 and 3.5, medium and large, as a policy (Esser et al. 2024)."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import nn

from flowalign.config import Model
from flowalign.config.base import UserError
from flowalign.policies.adapters import in_blocks
from flowalign.policies.base import Condition
from flowalign.policies.diffusers_pipeline import PipelinePolicy
from flowalign.policies.request import MediaRequest

# The names of Stability's own code, which ComfyUI and kohya's LoRA files have.
NATIVE = {
    **in_blocks(
        "joint_blocks.*",
        "transformer_blocks.*",
        {
            "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "x_block.attn.proj": ("attn.to_out.0",),
            "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "x_block.attn2.proj": ("attn2.to_out.0",),
            "x_block.mlp.fc1": ("ff.net.0.proj",),
            "x_block.mlp.fc2": ("ff.net.2",),
            "x_block.adaLN_modulation.1": ("norm1.linear",),
            "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "context_block.attn.proj": ("attn.to_add_out",),
            "context_block.mlp.fc1": ("ff_context.net.0.proj",),
            "context_block.mlp.fc2": ("ff_context.net.2",),
            "context_block.adaLN_modulation.1": ("norm1_context.linear",),
        },
    ),
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}


class SD3Policy(PipelinePolicy):
    """A StableDiffusion3Pipeline; one without a T5 (as save_pretrained leaves it) is loaded without one."""

    pipeline_class = StableDiffusion3Pipeline
    targets = {
        "attention": (
            *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
            *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        ),
        # The second, image-only attention of 3.5 medium's first blocks, which the field's recipes leave alone.
        "image_attention": ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
        "feed_forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    }
    native = NATIVE
    optional_parts = ("text_encoder_3", "tokenizer_3")
    t5 = "text_encoder_3"

    def _check(self, model: Model) -> None:
        super()._check(model)
        if model.embedded_guidance is not None:
            raise UserError("model.embedded_guidance: this model takes none; leave it out and use guidance instead")

    @property
    def patch(self) -> int:
        """As configured, 2 in the published models."""
        transformer: Any = self.transformer
        return int(transformer.config.patch_size)

    def latent_shape(self, request: MediaRequest) -> tuple[int, ...]:
        """(16, height / 8, width / 8) of the published models; UserError beyond the table of learnt positions."""
        transformer: Any = self.transformer
        largest = transformer.config.pos_embed_max_size * self.patch * self.pipeline.vae_scale_factor
        if max(request.height, request.width) > largest:
            raise UserError(
                f"model.height, model.width: this model draws at most {largest} pixels a side, not "
                f"{request.height} x {request.width}"
            )
        return super().latent_shape(request)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
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

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """CLIP's tokens come before the T5's."""
        config, clip = self.pipeline.transformer.config, self.pipeline.text_encoder.config
        length = clip.max_position_embeddings + self.max_sequence_length
        return {"embeds": (length, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def _forward(self, module: nn.Module, x: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        return module(
            hidden_states=x,
            timestep=sigma * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=condition.tensors["embeds"],
            pooled_projections=condition.tensors["pooled"],
            return_dict=False,
        )[0]

    def pipeline_arguments(self, latents: torch.Tensor, guidance: float) -> dict[str, Any]:
        """The pipeline's own negative prompt is the empty one."""
        return {
            "latents": latents,
            "guidance_scale": guidance,
            "max_sequence_length": self.max_sequence_length,
        }
