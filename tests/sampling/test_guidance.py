"""Guidance between two velocities: closed forms, and the lines of diffusers' own pipelines."""

import inspect
import re
import textwrap

import pytest
import torch
from diffusers import QwenImagePipeline

from flowalign.sampling import guided


def velocities() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)


def test_plain_guidance_extrapolates_from_the_negative_through_the_positive_velocity() -> None:
    positive, negative = velocities()
    assert torch.equal(guided(positive, negative, 3.0), negative + 3.0 * (positive - negative))
    assert torch.equal(guided(positive, negative, 0.0), negative)
    torch.testing.assert_close(guided(positive, negative, 1.0), positive)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_rescaled_guidance_is_qwen_images_own(guidance: float) -> None:
    positive, negative = velocities()
    source = inspect.getsource(QwenImagePipeline.__call__)
    lines = re.search(r"^ *comb_pred = .*?^ *noise_pred = comb_pred .*?$", source, re.MULTILINE | re.DOTALL)
    assert lines is not None
    names = {"torch": torch, "noise_pred": positive, "neg_noise_pred": negative, "true_cfg_scale": guidance}
    exec(textwrap.dedent(lines[0]), names)
    assert torch.equal(guided(positive, negative, guidance, "rescaled"), names["noise_pred"])


def test_rescaled_guidance_keeps_the_norm_of_every_token_and_0_stays_0() -> None:
    positive, negative = velocities()
    negative[0, 0], positive[0, 0] = 2.0, 1.0  # 2 + 2 (1 - 2) = 0
    velocity = guided(positive, negative, 2.0, "rescaled")
    assert not velocity[0, 0].any()
    torch.testing.assert_close(velocity[:, 1:].norm(dim=-1), positive[:, 1:].norm(dim=-1))
