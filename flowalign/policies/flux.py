"""FLUX.1 as a policy: dev, whose distilled guidance is an input of the transformer, and schnell, which has none."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import nn

from flowalign.config import Model
from flowalign.config.base import UserError
from flowalign.policies.adapters import in_blocks
from flowalign.policies.base import Condition
from flowalign.policies.diffusers_pipeline import PipelinePolicy

EMBEDDED_GUIDANCE = 3.5  # of the pipeline and of the field's training recipes, in rollouts and losses alike

# The names of Black Forest Labs' own code, which ComfyUI and kohya's LoRA files have.
NATIVE = {
    **in_blocks(
        "double_blocks.*",
        "transformer_blocks.*",
        {
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "img_attn.proj": ("attn.to_out.0",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "img_mod.lin": ("norm1.linear",),
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "txt_attn.proj": ("attn.to_add_out",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
            "txt_mod.lin": ("norm1_context.linear",),
        },
    ),
    **in_blocks(
        "single_blocks.*",
        "single_transformer_blocks.*",
        {
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation.lin": ("norm.linear",),
        },
    ),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}


class FluxPolicy(PipelinePolicy):
    """A FluxPipeline. Latents stay (B, 16, h, w); they are packed into tokens around the transformer alone."""

    pipeline_class = FluxPipeline
    targets = {
        "attention": (
            *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
            *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        ),
        # A single block's proj_out takes its attention and its feed-forward part together.
        "feed_forward": (
            *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
            *("single_transformer_blocks.*.proj_mlp", "single_transformer_blocks.*.proj_out"),
        ),
    }
    native = NATIVE
    usual = (28, 1.0)  # the embedded guidance is enough; a second pass is for who asks for it
    t5 = "text_encoder_2"
    sample_size = 128
    even_sigmas = True
    patch = 2

    def _check(self, model: Model) -> None:
        super()._check(model)
        takes = self.pipeline.transformer.config.guidance_embeds
        if model.embedded_guidance is not None and not takes:
            raise UserError("model.embedded_guidance: this model takes none (as FLUX.1-schnell); leave it out")
        given = EMBEDDED_GUIDANCE if model.embedded_guidance is None else model.embedded_guidance
        self.embedded_guidance: float | None = given if takes else None

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """As the pipeline encodes them: T5's "embeds" (B, L, D) and CLIP's "pooled" (B, P)."""
        embeds, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.max_sequence_length
        )
        return Condition({"embeds": embeds, "pooled": pooled})

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """The T5's tokens alone."""
        config = self.pipeline.transformer.config
        embeds = (self.max_sequence_length, config.joint_attention_dim)
        return {"embeds": embeds, "pooled": (config.pooled_projection_dim,)}

    def _forward(self, module: nn.Module, x: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        rows, _, height, width = x.shape
        embeds = condition.tensors["embeds"]
        guidance = None if self.embedded_guidance is None else torch.full_like(sigma, self.embedded_guidance)
        tokens = module(
            hidden_states=self._pack(x),
            timestep=sigma,
            guidance=guidance,
            pooled_projections=condition.tensors["pooled"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x.device),
            img_ids=self.pipeline._prepare_latent_image_ids(rows, height // 2, width // 2, x.device, torch.float32),
            return_dict=False,
        )[0]
        factor = self.pipeline.vae_scale_factor
        return self.pipeline._unpack_latents(tokens, height * factor, width * factor, factor)

    def _pack(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, h / 2 * w / 2, 4 C)."""
        rows, channels, height, width = latents.shape
        return self.pipeline._pack_latents(latents.contiguous(), rows, channels, height, width)

    def pipeline_arguments(self, latents: torch.Tensor, guidance: float) -> dict[str, Any]:
        """`guidance` is that between two passes; the embedded one is a setting of the model."""
        embedded = {} if self.embedded_guidance is None else {"guidance_scale": self.embedded_guidance}
        return {
            "latents": self._pack(latents),
            "negative_prompt": [""] * len(latents),
            "true_cfg_scale": guidance,
            "max_sequence_length": self.max_sequence_length,
            **embedded,
        }
