"""Stable Diffusion 3.5's own parts: a T5, and blocks with a second attention."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from flowalign.config import Lora, Model, Sampler
from flowalign.config.base import UserError
from flowalign.policies.loading import load_policy
from flowalign.policies.request import MediaRequest
from flowalign.rollout.generate import rollout
from flowalign.rollout.prompts import Row
from flowalign.rollout.stages import RolloutRequest
from flowalign.sampling import counted_noise

PROMPTS = ["a photo of a red star", 'a sign that says "AB CD"']
ROWS = [Row(index, prompt) for index, prompt in enumerate(PROMPTS)]
REQUEST = MediaRequest(32, 48)
KEY = (0, 7, 0)


def settings(folder: Path, **changes: object) -> Model:
    base = Model(path=str(folder), height=REQUEST.height, width=REQUEST.width, dtype="fp32", max_sequence_length=12)
    return base.model_copy(update=changes)


@pytest.mark.parametrize(("guidance", "length"), [(1.0, 12), (4.5, 5)])
def test_a_rollout_is_the_pipelines_own_output(tiny_sd35: Path, guidance: float, length: int) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd35)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        height=REQUEST.height,
        width=REQUEST.width,
        num_inference_steps=3,
        guidance_scale=guidance,
        latents=counted_noise([(*KEY, row.index, 0, 0) for row in ROWS], (4, 8, 12), "cpu"),
        max_sequence_length=length,
        output_type="pt",
    ).images
    policy = load_policy(settings(tiny_sd35, max_sequence_length=length))
    drawn = rollout(policy, RolloutRequest(ROWS, 1, Sampler(steps=3, guidance=guidance), REQUEST, KEY, batch=2))
    torch.testing.assert_close(drawn.media, theirs, atol=1e-4, rtol=0)


def test_the_t5_is_read_to_the_length_that_is_asked_for(tiny_sd35: Path) -> None:
    policy = load_policy(settings(tiny_sd35))
    embeds = []
    for length in (5, 12):
        policy.max_sequence_length = length
        embeds.append(policy.encode_prompts(PROMPTS).tensors["embeds"])
    assert [part.shape[1] for part in embeds] == [20 + 5, 20 + 12]
    assert (embeds[1][:, 20:].std(dim=1) > 0).any()  # words, not the zeros of a pipeline without T5


def test_the_second_attention_is_a_target_of_its_own(tiny_sd35: Path) -> None:
    adapted = {}
    for group in ("attention", "image_attention"):
        policy = load_policy(settings(tiny_sd35, lora=Lora(rank=2, targets=(group,))))
        adapted[group] = {name.split(".lora_")[0] for name in policy.trainable_parameters()}
    assert len(adapted["image_attention"]) == 2 * 4
    assert not any("attn2" in name for name in adapted["attention"])


def test_a_setting_that_the_model_does_not_take_is_refused(tiny_sd35: Path) -> None:
    with pytest.raises(UserError, match="this model takes none"):
        load_policy(settings(tiny_sd35, embedded_guidance=3.5))
    with pytest.raises(UserError, match="give 1 to 512"):
        load_policy(settings(tiny_sd35, max_sequence_length=0))
    with pytest.raises(UserError, match="at most 128 pixels a side, not 32 x 136"):
        load_policy(settings(tiny_sd35)).latent_shape(MediaRequest(32, 136))


def test_half_precision_keeps_gradients_that_its_numbers_are_too_coarse_for(tiny_sd35: Path) -> None:
    gradients = []
    for dtype in ("fp32", "fp16"):
        policy = load_policy(settings(tiny_sd35, dtype=dtype))
        x = counted_noise([(0,), (1,)], policy.latent_shape(REQUEST), "cpu")
        velocity = policy.velocity(x, torch.tensor([0.3, 0.7]), policy.encode_prompts(PROMPTS))
        assert velocity.dtype == torch.float32
        # About 1e-9 an element; half precision ends at 6e-8, and the learner's scaler keeps it above that.
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == "fp16")
        scaler.scale(1e-6 * velocity.square().mean()).backward()
        weights = policy.trainable_parameters().values()
        assert all(weight.dtype == torch.float32 for weight in weights)
        kept = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])
        gradients.append(kept / scaler.get_scale())
    assert gradients[0].norm() > 0
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()
