"""The FLUX.1 policy against the pipeline it is made of."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from flowalign.config import Lora, Model, Sampler
from flowalign.config.base import UserError
from flowalign.policies.loading import load_policy
from flowalign.policies.request import MediaRequest
from flowalign.rollout.generate import rollout
from flowalign.rollout.prompts import Row
from flowalign.rollout.stages import RolloutRequest
from flowalign.sampling import counted_noise

PROMPTS = ["a photo of a red star", "a photo of two rings"]
ROWS = [Row(index, prompt) for index, prompt in enumerate(PROMPTS)]
REQUEST = MediaRequest(32, 48)  # not square, so that rows and columns of tokens cannot change places
KEY = (0, 7, 0)
Flux = Callable[[bool], Path]


def settings(folder: Path, **changes: object) -> Model:
    base = Model(path=str(folder), height=REQUEST.height, width=REQUEST.width, dtype="fp32", max_sequence_length=12)
    return base.model_copy(update=changes)


def pipeline_images(pipeline: FluxPipeline, steps: int, guidance: float, embedded: float) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = counted_noise([(*KEY, row.index, 0, 0) for row in ROWS], (4, 8, 12), "cpu")
    return pipeline(
        PROMPTS,
        negative_prompt=[""] * len(PROMPTS),
        true_cfg_scale=guidance,
        guidance_scale=embedded,
        height=REQUEST.height,
        width=REQUEST.width,
        num_inference_steps=steps,
        latents=FluxPipeline._pack_latents(noise, 2, 4, 8, 12),
        max_sequence_length=12,
        output_type="pt",
    ).images


@pytest.mark.parametrize(
    ("distilled", "guidance", "embedded"), [(True, 1.0, None), (True, 4.0, 2.0), (False, 1.0, None), (False, 4.0, None)]
)
def test_a_rollout_is_the_pipelines_own_output(
    tiny_flux: Flux, distilled: bool, guidance: float, embedded: float | None
) -> None:
    folder = tiny_flux(distilled)
    policy = load_policy(settings(folder, embedded_guidance=embedded))
    ours = rollout(policy, RolloutRequest(ROWS, 1, Sampler(steps=3, guidance=guidance), REQUEST, KEY, batch=2)).media
    theirs = pipeline_images(FluxPipeline.from_pretrained(folder), 3, guidance, embedded or 3.5)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_embedded_guidance_reaches_the_transformer(tiny_flux: Flux) -> None:
    velocities = []
    for embedded in (None, 3.5, 1.0):
        policy = load_policy(settings(tiny_flux(True), embedded_guidance=embedded))
        with torch.no_grad():
            x = torch.ones(1, *policy.latent_shape(REQUEST))
            velocities.append(policy.velocity(x, torch.tensor([0.5]), policy.encode_prompts(PROMPTS[:1])))
    assert torch.equal(velocities[0], velocities[1])
    assert not torch.allclose(velocities[1], velocities[2])


def test_the_schedule_shifts_with_the_size_and_another_size_is_refused(tiny_flux: Flux) -> None:
    small, large = (load_policy(settings(tiny_flux(True), height=side, width=side)) for side in (32, 512))
    assert (small.sigmas(4)[1:-1] < large.sigmas(4)[1:-1]).all()
    fixed = [load_policy(settings(tiny_flux(False), height=side, width=side)).sigmas(4) for side in (32, 512)]
    assert torch.equal(*fixed)
    with pytest.raises(ValueError, match="of 32 x 32 images"):
        small.latent_shape(MediaRequest(512, 512))


def test_the_exported_lora_draws_the_same_pictures_in_plain_diffusers(tiny_flux: Flux, tmp_path: Path) -> None:
    policy = load_policy(settings(tiny_flux(True), lora=Lora(rank=2, alpha=8, targets=("attention", "feed_forward"))))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.trainable_parameters().values():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    policy.export(tmp_path)
    pipeline = FluxPipeline.from_pretrained(tiny_flux(True))
    untrained = pipeline_images(pipeline, 2, 1.0, 3.5)
    pipeline.load_lora_weights(tmp_path)
    trained = pipeline_images(pipeline, 2, 1.0, 3.5)
    assert (trained - untrained).abs().max() > 1e-3
    ours = rollout(policy, RolloutRequest(ROWS, 1, Sampler(steps=2), REQUEST, KEY, batch=2)).media
    torch.testing.assert_close(ours, trained, atol=1e-4, rtol=0)


def test_adapters_are_in_the_blocks_alone_and_in_both_kinds(tiny_flux: Flux) -> None:
    groups = {"attention": 8 + 3, "feed_forward": 4 + 2}  # of a double and of a single block, two of each
    for group, count in groups.items():
        policy = load_policy(settings(tiny_flux(True), lora=Lora(rank=2, targets=(group,))))
        adapted = {name.split(".lora_")[0] for name in policy.trainable_parameters()}
        assert len(adapted) == 2 * count
        assert all("transformer_blocks." in name for name in adapted)


def test_an_explicit_attention_backend_keeps_the_rotary_embedding(tiny_flux: Flux) -> None:
    velocities = []
    for attention in ("native", "_native_math"):
        policy = load_policy(settings(tiny_flux(True), attention=attention))
        with torch.no_grad():
            x = counted_noise([(0,)], policy.latent_shape(REQUEST), "cpu")
            velocities.append(policy.velocity(x, torch.tensor([0.5]), policy.encode_prompts(PROMPTS[:1])))
    torch.testing.assert_close(*velocities, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_gives_nearly_the_same_velocity_and_reaches_every_adapter(tiny_flux: Flux, dtype: str) -> None:
    velocities = []
    for precision in ("fp32", dtype):
        policy = load_policy(settings(tiny_flux(True), dtype=precision))
        x = counted_noise([(0,), (1,)], policy.latent_shape(REQUEST), "cpu")
        velocities.append(policy.velocity(x, torch.tensor([0.5, 0.5]), policy.encode_prompts(PROMPTS)))
    assert velocities[1].dtype == torch.float32
    assert (velocities[1] - velocities[0]).norm() < 0.05 * velocities[0].norm()
    velocities[1].square().mean().backward()
    ends = [weight for name, weight in policy.trainable_parameters().items() if "lora_B" in name]
    assert all(weight.grad is not None and weight.grad.any() for weight in ends)


@pytest.mark.parametrize(
    ("distilled", "changes", "message"),
    [
        (False, {"embedded_guidance": 3.5}, "this model takes none"),
        (True, {"height": 50}, "model.height 50: this model's sides are multiples of 8; give 48"),
        (True, {"max_sequence_length": 0}, "this model has a T5 encoder; give 1 to 512"),
        (True, {"lora": Lora(targets=("attn.to_qq",))}, "did you mean 'attn.to_q'"),
        (True, {"lora": Lora(targets=("attention", "image_attention"))}, "ends in image_attention; did you mean"),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    tiny_flux: Flux, distilled: bool, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_policy(settings(tiny_flux(distilled), **changes))
    assert "\n" not in str(caught.value)
