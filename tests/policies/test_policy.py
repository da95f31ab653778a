"""The SD3 policy against the pipeline it is made of, and what training needs of it."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from flowalign.config import Lora, Model, Rollout, Sampler
from flowalign.config.base import UserError
from flowalign.policies.base import Policy, forward_dtype
from flowalign.policies.loading import load_policy
from flowalign.policies.request import MediaRequest
from flowalign.rollout.generate import rollout
from flowalign.rollout.prompts import Row
from flowalign.rollout.stages import RolloutRequest
from flowalign.sampling import counted_noise

PROMPTS = ["a photo of a red star", 'a sign that says "AB CD"', "a photo of two rings"]
ROWS = [Row(index, prompt) for index, prompt in enumerate(PROMPTS)]
REQUEST = MediaRequest(64, 64)
KEY = (0, 7, 0)


def settings(folder: Path, **changes: object) -> Model:
    base = Model(path=str(folder), height=64, width=64, dtype="fp32", max_sequence_length=0)
    return base.model_copy(update=changes)


def plain_pipeline(path: Path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        path, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_images(pipeline: StableDiffusion3Pipeline, guidance: float, steps: int) -> torch.Tensor:
    latents = counted_noise([(*KEY, row.index, 0, 0) for row in ROWS], (4, 16, 16), "cpu")
    return pipeline(
        PROMPTS,
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=latents,
        max_sequence_length=0,
        output_type="pt",
    ).images


def nudge(policy: Policy, scale: float = 0.05) -> None:
    """Move the trainable weights away from where they start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.trainable_parameters().values():
            weight += scale * torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("steps", [1, 7])
def test_a_rollout_without_noise_is_the_pipelines_own_output(tiny_model: Path, guidance: float, steps: int) -> None:
    policy = load_policy(settings(tiny_model))
    drawn = rollout(policy, RolloutRequest(ROWS, 1, Sampler(steps=steps, guidance=guidance), REQUEST, KEY, batch=2))
    torch.testing.assert_close(
        drawn.media, pipeline_images(plain_pipeline(tiny_model), guidance, steps), atol=1e-4, rtol=0
    )


def test_an_sde_with_vanishing_noise_follows_the_ode(tiny_model: Path) -> None:
    policy = load_policy(settings(tiny_model))
    noisy = Rollout(steps=6, noise_level=1e-6, window=(0, 5))
    with_sde = rollout(policy, RolloutRequest(ROWS, 1, noisy, REQUEST, KEY, batch=8)).latents
    torch.testing.assert_close(
        with_sde, rollout(policy, RolloutRequest(ROWS, 1, Sampler(steps=6), REQUEST, KEY, batch=8)).latents
    )


def test_a_sample_does_not_depend_on_its_batch(tiny_model: Path) -> None:
    policy = load_policy(settings(tiny_model))
    sampler = Rollout(steps=4)
    whole = rollout(policy, RolloutRequest(ROWS, 2, sampler, REQUEST, KEY, batch=64))
    parts = rollout(policy, RolloutRequest(ROWS[1:], 2, sampler, REQUEST, KEY, batch=1))
    torch.testing.assert_close(whole.latents[2:], parts.latents, atol=1e-5, rtol=1e-5)


def test_the_trajectory_is_the_window_and_its_log_probabilities_replay(tiny_model: Path) -> None:
    from flowalign.sampling import sde_step

    policy = load_policy(settings(tiny_model))
    sampler = Rollout(steps=5, window=(1, 3), noise_level=0.8)
    drawn = rollout(policy, RolloutRequest(ROWS, 2, sampler, REQUEST, KEY, batch=4), keep={"trajectory"})
    path = drawn.trajectory
    assert path is not None
    assert path.states.shape[:2] == (6, 3)
    assert torch.equal(path.sigmas, policy.sigmas(5)[1:4])
    for step in range(2):
        x, sigma = path.states[:, step], path.sigmas[step].expand(6)
        velocity = policy.guided_velocity(x, sigma, drawn.condition[drawn.groups], 1.0)
        again = sde_step(
            velocity, x, path.sigmas[step], path.sigmas[step + 1], noise_level=0.8, next_sample=path.states[:, step + 1]
        )
        torch.testing.assert_close(again.log_prob, path.log_probs[:, step], atol=1e-5, rtol=1e-5)


def test_the_reference_is_the_model_before_training(tiny_model: Path) -> None:
    for lora in (Lora(rank=4), None):
        policy = load_policy(settings(tiny_model, lora=lora))
        x, sigma = torch.randn(3, 4, 16, 16), torch.rand(3)
        condition = policy.encode_prompts(PROMPTS)
        with torch.no_grad():
            before = policy.velocity(x, sigma, condition)
            nudge(policy)
            after = policy.velocity(x, sigma, condition)
            with policy.reference():
                reference = policy.velocity(x, sigma, condition)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(reference, before)


def test_snapshots_are_used_blended_and_left(tiny_model: Path) -> None:
    policy = load_policy(settings(tiny_model))
    start = policy.trainable_state()
    policy.snapshot("old")
    nudge(policy)
    moved = policy.trainable_state()
    with policy.using("old"):
        assert all(torch.equal(p, start[name]) for name, p in policy.trainable_parameters().items())
    assert all(torch.equal(p, moved[name]) for name, p in policy.trainable_parameters().items())
    policy.blend("old", 0.75)
    for name, kept in policy.snapshots["old"].items():
        torch.testing.assert_close(kept, 0.75 * start[name] + 0.25 * moved[name])
    policy.blend("old", 0.0)
    assert all(torch.equal(kept, moved[name]) for name, kept in policy.snapshots["old"].items())


def test_adapters_start_as_nothing_and_depend_on_the_seed(tiny_model: Path) -> None:
    first, again, other = (load_policy(settings(tiny_model), seed=seed) for seed in (3, 3, 4))
    names = list(first.trainable_parameters())
    assert names
    assert all(weight.dtype == torch.float32 for weight in first.trainable_parameters().values())
    same = [torch.equal(first.trainable_parameters()[n], again.trainable_parameters()[n]) for n in names]
    assert all(same)
    assert not all(torch.equal(first.trainable_parameters()[n], other.trainable_parameters()[n]) for n in names)


def test_the_exported_lora_draws_the_same_pictures_in_plain_diffusers(tiny_model: Path, tmp_path: Path) -> None:
    policy = load_policy(settings(tiny_model, lora=Lora(rank=4, alpha=16, targets=("attention", "feed_forward"))))
    nudge(policy)
    policy.export(tmp_path / "lora")
    pipeline = plain_pipeline(tiny_model)
    untrained = pipeline_images(pipeline, 1.0, 3)
    pipeline.load_lora_weights(tmp_path / "lora")
    trained = pipeline_images(pipeline, 1.0, 3)
    ours = rollout(policy, RolloutRequest(ROWS, 1, Sampler(steps=3), REQUEST, KEY, batch=8)).media
    assert (trained - untrained).abs().max() > 1e-3
    torch.testing.assert_close(ours, trained, atol=1e-4, rtol=0)
    merged = load_policy(settings(tiny_model, adapter=str(tmp_path / "lora"), lora=None))
    torch.testing.assert_close(
        rollout(merged, RolloutRequest(ROWS, 1, Sampler(steps=3), REQUEST, KEY, batch=8)).media,
        trained,
        atol=1e-4,
        rtol=0,
    )


def test_half_precision_keeps_trainable_weights_and_velocities_in_float32(tiny_model: Path) -> None:
    policy = load_policy(settings(tiny_model, dtype="bf16"))
    velocity = policy.velocity(torch.randn(3, 4, 16, 16), torch.rand(3), policy.encode_prompts(PROMPTS))
    assert velocity.dtype == torch.float32
    velocity.square().mean().backward()
    assert all(p.dtype == torch.float32 for p in policy.trainable_parameters().values())
    assert any(p.grad is not None and p.grad.any() for p in policy.trainable_parameters().values())


def test_an_explicit_backend_equals_the_default(tiny_model: Path) -> None:
    x, sigma = torch.randn(3, 4, 16, 16), torch.rand(3)
    velocities = []
    for attention in ("native", "_native_math"):
        policy = load_policy(settings(tiny_model, attention=attention))
        with torch.no_grad():
            velocities.append(policy.velocity(x, sigma, policy.encode_prompts(PROMPTS)))
    torch.testing.assert_close(*velocities, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "xformers"}, r"model\.attention: xformers cannot run on cpu here .*flowalign\[xformers\]"),
        ({"attention": "fast"}, "unknown backend 'fast'"),
        ({"lora": Lora(targets=("nothing",))}, "no module of the transformer ends in nothing"),
        ({"path": "/no/such/folder"}, "does not exist"),
        ({"adapter": "/no/such/lora"}, "'/no/such/lora' does not exist"),
    ],
)
def test_a_wrong_model_setting_is_one_sentence(tiny_model: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_policy(settings(tiny_model, **changes))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_supported_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model_index\.json"):
        load_policy(Model(path=str(tmp_path)))
    (tmp_path / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    with pytest.raises(UserError, match="is a OtherPipeline; supported are StableDiffusion3Pipeline"):
        load_policy(Model(path=str(tmp_path)))


def test_shared_noise_leaves_only_the_stochastic_steps_to_tell_members_apart(tiny_model: Path) -> None:
    policy = load_policy(settings(tiny_model))
    sampler = Rollout(steps=3, window=(0, 1), shared_noise=True)
    drawn = rollout(policy, RolloutRequest(ROWS, 2, sampler, REQUEST, KEY, batch=4), keep={"trajectory"})
    assert drawn.trajectory is not None
    starts = drawn.trajectory.states[:, 0]
    assert torch.equal(starts[0::2], starts[1::2])
    assert not torch.equal(starts[0], starts[2])
    assert len(torch.unique(drawn.latents.flatten(1), dim=0)) == 6


def test_auto_precision_is_the_one_that_the_processor_computes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for able, wanted in (({"avx2": True}, torch.float32), ({"amx_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        monkeypatch.delenv("FLOWALIGN_AUTO_DTYPE", raising=False)
        assert forward_dtype("auto", cpu) == wanted
        monkeypatch.setenv("FLOWALIGN_AUTO_DTYPE", "fp16")
        assert forward_dtype("auto", cpu) == torch.float16
        assert forward_dtype("bf16", cpu) == torch.bfloat16
        assert forward_dtype("fp32", cpu) == torch.float32


def test_a_model_keeps_its_own_attention_whichever_is_set_after_it(tiny_model: Path) -> None:
    settings = Model(path=str(tiny_model), height=64, width=64, max_sequence_length=0)
    first = load_policy(settings)
    load_policy(settings.model_copy(update={"attention": "_native_math"}))
    own = {str(getattr(p, "_attention_backend", None)) for p in first.transformer.attn_processors.values()}
    assert own == {"AttentionBackendName.NATIVE"}


def test_a_gradient_of_the_media_comes_back_to_the_latents_where_it_is_asked_for(tiny_model: Path) -> None:
    """Along a direction it is the difference quotient of the decoder in float64."""
    policy = load_policy(settings(tiny_model, lora=None))
    latents = counted_noise([(0, 0), (0, 1)], policy.latent_shape(REQUEST), "cpu")
    weight, direction = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for shape in ((2, 3, 64, 64), latents.shape)
    )
    assert not policy.decode(latents.clone().requires_grad_(True)).requires_grad
    given = latents.clone().requires_grad_(True)
    media = policy.decode(given, gradients=True)
    assert torch.equal(media.detach(), policy.decode(latents))
    (gradient,) = torch.autograd.grad((media.double() * weight).sum(), given)
    assert all(part.grad is None for part in policy.pipeline.vae.parameters())
    vae, config = policy.pipeline.vae.double(), policy.pipeline.vae.config

    def loss(step: float) -> torch.Tensor:
        scaled = (latents.double() + step * direction) / config.scaling_factor + (config.shift_factor or 0)
        return ((vae.decode(scaled).sample / 2 + 0.5).clamp(0, 1) * weight).sum()

    with torch.no_grad():
        quotient = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert (gradient.double() * direction).sum().item() == pytest.approx(quotient.item(), rel=1e-3)
