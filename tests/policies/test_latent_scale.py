"""The scale of latents against what diffusers' pipelines give their autoencoders, and get from them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

from flowalign.config import Model
from flowalign.config.base import UserError
from flowalign.policies.latent_scale import LatentScale
from flowalign.policies.loading import load_policy
from flowalign.sampling import counted_noise

CHANNELS = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [2.0, 0.5, 1.5, 3.0]}
SMALL = {"z_dim": 4, "base_dim": 8, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
Flux = Callable[[bool], Path]


def flux2_autoencoder() -> AutoencoderKLFlux2:
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "latent_channels": 2, "norm_num_groups": 4}
    autoencoder = AutoencoderKLFlux2(**kinds, **sizes, batch_norm_eps=1e-2).eval()
    autoencoder.bn.running_mean.copy_(torch.linspace(-1, 1, 8))
    autoencoder.bn.running_var.copy_(torch.linspace(0.1, 3, 8))
    return autoencoder


def pipeline(kind: str) -> Any:
    torch.manual_seed(0)
    parts: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler(), "text_encoder": None, "tokenizer": None}
    width = {"num_attention_heads": 2, "num_layers": 1}
    if kind == "wan":
        vae = AutoencoderKLWan(**SMALL, **CHANNELS, scale_factor_temporal=1, scale_factor_spatial=2)
        sizes = {"attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16, "ffn_dim": 32}
        return WanPipeline(**parts, vae=vae, transformer=WanTransformer3DModel(**width, **sizes, freq_dim=16))
    if kind == "qwen":
        sizes = {"attention_head_dim": 16, "in_channels": 16, "out_channels": 4, "joint_attention_dim": 16}
        transformer = QwenImageTransformer2DModel(**width, **sizes, axes_dims_rope=(4, 6, 6))
        return QwenImagePipeline(**parts, vae=AutoencoderKLQwenImage(**SMALL, **CHANNELS), transformer=transformer)
    sizes = {"attention_head_dim": 16, "in_channels": 8, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4, 4)}
    transformer = Flux2Transformer2DModel(**width, **sizes, num_single_layers=1, timestep_guidance_channels=16)
    return Flux2KleinPipeline(**parts, vae=flux2_autoencoder(), transformer=transformer, is_distilled=True)


@pytest.mark.parametrize("kind", ["wan", "qwen", "flux2"])
def test_the_autoencoder_gets_what_the_pipeline_gives_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(kind)
    seen: dict[str, torch.Tensor] = {}
    decode = pipe.vae.decode

    def watched(latents: torch.Tensor, **options: Any) -> Any:
        seen["theirs"] = latents
        return decode(latents, **options)

    def keep(_pipe: Any, _step: int, _time: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen["model"] = tensors["latents"]
        return {}

    monkeypatch.setattr(pipe.vae, "decode", watched)
    pipe.set_progress_bar_config(disable=True)
    more: dict[str, Any] = {"num_frames": 3, "guidance_scale": 1.0} if kind == "wan" else {}
    if kind == "qwen":
        more = {"prompt_embeds_mask": torch.ones(2, 3, dtype=torch.long), "true_cfg_scale": 1.0}
    text = torch.randn(2, 3, 16)
    pipe(
        prompt_embeds=text,
        height=32,
        width=16,
        num_inference_steps=1,
        output_type="pt",
        callback_on_step_end=keep,
        **more,
    )
    latents = seen["model"]
    if kind == "qwen":  # which packs squares of tokens
        latents = pipe._unpack_latents(latents, 32, 16, pipe.vae_scale_factor)
    elif kind == "flux2":  # whose tokens are the patches
        latents = latents.mT.unflatten(-1, (32 // pipe.vae_scale_factor // 2, -1))
    scale = LatentScale.of(pipe.vae)
    ours = scale.to_autoencoder(latents)
    torch.testing.assert_close(ours, seen["theirs"])
    torch.testing.assert_close(scale.to_model(ours), latents)


@pytest.mark.parametrize("kind", ["qwen", "flux2"])
def test_the_model_gets_of_a_picture_what_the_pipeline_makes_of_it(kind: str) -> None:
    image = torch.rand(2, 3, 32, 16) * 2 - 1
    if kind == "qwen":
        vae, image = AutoencoderKLQwenImage(**SMALL, **CHANNELS).eval(), image[:, :, None]
        theirs: Any = QwenImageEditPipeline._encode_vae_image
    else:
        vae, theirs = flux2_autoencoder(), Flux2Pipeline._encode_vae_image
    pipe = SimpleNamespace(vae=vae, latent_channels=4, _patchify_latents=Flux2Pipeline._patchify_latents)
    with torch.no_grad():
        mode = vae.encode(image).latent_dist.mode()
        ours = LatentScale.of(vae).to_model(mode)
        torch.testing.assert_close(ours, theirs(pipe, image, None))
    torch.testing.assert_close(LatentScale.of(vae).to_autoencoder(ours), mode)


@pytest.mark.parametrize("shape", [(2, 4, 6, 2), (2, 4, 3, 6, 2)])
def test_numbers_of_channels_go_along_pictures_and_videos(shape: tuple[int, ...]) -> None:
    scale, latents = LatentScale.of(AutoencoderKLWan(**SMALL, **CHANNELS)), torch.randn(shape)
    for channel, (mean, std) in enumerate(zip(CHANNELS["latents_mean"], CHANNELS["latents_std"], strict=True)):
        torch.testing.assert_close(scale.to_model(latents)[:, channel], (latents[:, channel] - mean) / std)
        torch.testing.assert_close(scale.to_autoencoder(latents)[:, channel], latents[:, channel] * std + mean)


@pytest.mark.parametrize("shift", [0.1, None])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_one_number_is_what_stable_diffusion_3_and_flux_1_have_to_the_bit(
    tiny_model: Path, tiny_flux: Flux, family: str, shift: float | None
) -> None:
    folder = tiny_model if family == "sd3" else tiny_flux(True)
    policy = load_policy(
        Model(path=str(folder), height=64, width=64, dtype="fp32", max_sequence_length=8 if family == "flux" else 0)
    )
    vae = policy.pipeline.vae
    vae.register_to_config(shift_factor=shift)
    policy.latent_scale = LatentScale.of(vae)
    latents = counted_noise([(0, 0), (0, 1)], policy.latent_shape(policy.request), "cpu")
    with torch.no_grad():
        raw = latents / vae.config.scaling_factor + (shift or 0)  # as the pipelines have it
        assert torch.equal(policy.latent_scale.to_autoencoder(latents), raw)
        media = policy.decode(latents)
        assert torch.equal(media, (vae.decode(raw, return_dict=False)[0] / 2 + 0.5).clamp(0, 1))
        mode = vae.encode(media * 2 - 1).latent_dist.mode()
        assert torch.equal(policy.encode_media(media), (mode - (shift or 0)) * vae.config.scaling_factor)
    torch.testing.assert_close(policy.latent_scale.to_model(raw), latents)


def test_an_autoencoder_that_says_no_scale_is_refused() -> None:
    with pytest.raises(UserError, match="the configuration of its SimpleNamespace says no scale of latents"):
        LatentScale.of(SimpleNamespace(config={}))
