"""The adapters on the published models' configurations, on meta tensors: shapes without weights."""

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from flowalign.config import Lora, Model
from flowalign.policies.adapters import module_places
from flowalign.policies.base import Condition
from flowalign.policies.diffusers_pipeline import PipelinePolicy
from flowalign.policies.flux import FluxPolicy
from flowalign.policies.sd3 import SD3Policy
from flowalign.policies.weights import target_modules

SD35: dict[str, Any] = {
    "attention_head_dim": 64,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
    "sample_size": 128,
}
MEDIUM = SD35 | {
    "caption_projection_dim": 1536,
    "dual_attention_layers": tuple(range(13)),
    "num_attention_heads": 24,
    "num_layers": 24,
    "pos_embed_max_size": 384,
}
LARGE = SD35 | {
    "caption_projection_dim": 2432,
    "dual_attention_layers": (),
    "num_attention_heads": 38,
    "num_layers": 38,
    "pos_embed_max_size": 192,
}
FLUX_DEV: dict[str, Any] = {
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
FLUX_SCHEDULE = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
# Modules of each LoRA group: of SD3's last block neither text outputs nor a text feed-forward.
MODELS = {
    "medium": (2.24e9, {"attention": 24 * 8 - 1, "image_attention": 13 * 4, "feed_forward": 24 * 4 - 2}),
    "large": (8.06e9, {"attention": 38 * 8 - 1, "feed_forward": 38 * 4 - 2}),
    "flux": (11.9e9, {"attention": 19 * 8 + 38 * 3, "feed_forward": 19 * 4 + 38 * 2}),
}


def pipeline(name: str) -> Any:
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=16,
            layers_per_block=2,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        if name == "flux":
            transformer: Any = FluxTransformer2DModel(**FLUX_DEV)
        else:
            transformer = SD3Transformer2DModel(**(MEDIUM if name == "medium" else LARGE))
    texts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    if name == "flux":
        scheduler = FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULE)
        return FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **texts)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    texts |= dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    return StableDiffusion3Pipeline(scheduler=scheduler, vae=vae, transformer=transformer, **texts)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_published_model_has_its_size_shapes_and_lora_modules(name: str) -> None:
    parameters, modules = MODELS[name]
    plain = pipeline(name)
    assert sum(p.numel() for p in plain.transformer.parameters()) == pytest.approx(parameters, rel=0.01)
    family: type[PipelinePolicy] = FluxPolicy if name == "flux" else SD3Policy
    lora = Lora(rank=4, targets=tuple(modules))
    model = Model(path=name, height=1024, width=1024, dtype="fp32", lora=lora)
    policy = family(plain, model, torch.device("meta"), 0)
    adapted = {key.split(".lora_")[0] for key in policy.trainable_parameters()}
    assert len(adapted) == sum(modules.values())
    shape = policy.latent_shape(policy.request)
    assert shape == (16, 128, 128)
    tokens = {"embeds": (2, 256, 4096), "pooled": (2, 768 if name == "flux" else 2048)}
    condition = Condition({key: torch.empty(size, device="meta") for key, size in tokens.items()})
    # Not `velocity`: there is no autocast for meta tensors, not even one that is off.
    x, sigma = torch.empty(2, *shape, device="meta"), torch.empty(2, device="meta")
    velocity = policy._forward(policy.transformer, x, sigma, condition)
    assert velocity.shape == (2, *shape)
    if name == "flux":  # 4096 tokens, where the shift ends
        even, shift = torch.linspace(1, 0.25, 4), torch.tensor(1.15).exp()
        torch.testing.assert_close(policy.sigmas(4)[:-1], shift / (shift + 1 / even - 1))


@pytest.mark.parametrize("name", list(MODELS))
def test_every_module_that_a_lora_can_have_has_rows_of_its_own_in_the_original_code(name: str) -> None:
    """ComfyUI and kohya know the original names: what is exported has one, and joined weights are filled exactly."""
    family: type[PipelinePolicy] = FluxPolicy if name == "flux" else SD3Policy
    transformer = pipeline(name).transformer
    names = {known.replace("*", str(block)).replace(".", "_") for known in family.native for block in range(40)}
    places = {known: found for known, found in module_places(transformer, family.native).items() if known in names}
    covered: dict[str, int] = {}
    for found in places.values():
        rows = sorted((piece.start, piece.stop) for place in found for piece in place.rows)
        ends = [0, *(stop for _, stop in rows)]
        assert [start for start, _ in rows] == ends[:-1]
        for place in found:
            covered[place.module] = sum(piece.stop - piece.start for piece in place.rows)
    modules = dict(transformer.named_modules())
    wanted = [found for group in family.targets for found in target_modules(modules, group, family.targets)]
    assert len(wanted) == sum(MODELS[name][1].values())
    assert all(covered[module] == len(modules[module].weight) for module in wanted)
