"""Rewards that are formulas of pixels: compressibility and colourfulness."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import rewards


def pictures():
    """A flat grey one, smooth colours, noise: ever harder to compress."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 32).expand(32, 32)
    return torch.stack(
        [
            torch.full((3, 32, 32), 0.5),
            torch.stack([ramp, ramp.T, 1 - ramp]),
            torch.rand(3, 32, 32, generator=generator),
        ]
    )


def scores(name, media, **options):
    return rewards.score(rewards.load(name, **options), media, ["x"] * len(media))


def test_compressibility_is_minus_the_files_size_by_pixel():
    media = pictures()
    found = scores("compressibility", media)
    assert found[0] > found[1] > found[2]
    file = io.BytesIO()
    levels = (media[2] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(file, format="JPEG", quality=95)
    assert found[2].item() == pytest.approx(-len(file.getvalue()) / 32**2)
    torch.testing.assert_close(scores("compressibility", media, reverse=True), -found)
    assert (scores("compressibility", media, quality=20) > found)[1:].all()  # a flat picture is all header


def test_colorfulness_is_the_published_formula():
    media = pictures()
    found = scores("colorfulness", media)
    assert found[0] == pytest.approx(0, abs=1e-6)
    red, green, blue = media[1].double().numpy()
    rg, yb = red - green, (red + green) / 2 - blue
    expected = np.sqrt(rg.var() + yb.var()) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
    assert found[1].item() == pytest.approx(expected, rel=1e-5)


def test_colorfulness_of_pure_red_is_known_and_checked():
    reward = rewards.load("colorfulness")
    assert reward.golden().scores == pytest.approx([0, 0.33541], abs=1e-5)
    assert [finding.passed for finding in rewards.check(reward) if finding.check == "golden scores"] == [True]


@pytest.mark.parametrize("name", ["compressibility", "colorfulness"])
def test_a_video_scores_as_the_mean_of_its_frames(name):
    frames = pictures()
    torch.testing.assert_close(scores(name, frames[None])[0], scores(name, frames).mean())


def test_a_quality_outside_jpegs_range_is_refused():
    with pytest.raises(rewards.RewardError, match="quality must lie in 1 to 100, not 0"):
        rewards.load("compressibility", quality=0)
