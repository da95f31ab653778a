"""Rewards that learn: the artifact head, the discriminator on DINO features, the tuned PickScore."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.models import save_for_hf
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

import rewards
from flowalign.disk.assets import asset
from rewards import Reward, RewardError, TrainableReward
from rewards.adversarial_dino import AdversarialDINO, hinge_loss
from rewards.adversarial_pickscore import PATIENCE, AdversarialPickScore
from rewards.artifact import Artifact, fit, image_logits, save_head, unlabelled_loss
from rewards.backbones.preprocessing import Preprocessing
from rewards.backbones.vit import VisionBackbone
from rewards.learning import Head

PROMPTS = ["a red sky", "a blue sea"]


def save_images(folder: Path, pictures: torch.Tensor) -> Path:
    folder.mkdir()
    for index, picture in enumerate(pictures):
        levels = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(levels).save(folder / f"{index:02d}.png")
    return folder


def smooth(count: int, seed: int) -> torch.Tensor:
    """Pictures (count, 3, 32, 32) of one colour each."""
    colours = torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(seed))
    return (0.2 + 0.6 * colours).expand(count, 3, 32, 32).clone()


def spotted(count: int, seed: int) -> torch.Tensor:
    """The same with a box of noise in the upper left quarter."""
    pictures = smooth(count, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    pictures[:, :, 2:14, 2:14] = torch.rand(count, 3, 12, 12, generator=generator)
    return pictures


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit") / "vit"
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **options)
    config = {"input_size": (3, 32, 32), "fixed_input_size": True, "crop_pct": 1.0}
    save_for_hf(model, str(folder), model_config=config, model_args=options)
    return folder


@pytest.fixture
def references(tmp_path: Path) -> Path:
    return save_images(tmp_path / "references", smooth(12, seed=1))


def dino(vit: Path, references: Path, **options: Any) -> AdversarialDINO:
    settings: dict[str, Any] = {"hidden": 32, "batch": 8, "learning_rate": 3e-3, "updates": 10, **options}
    reward = rewards.load("adversarial_dino", model=str(vit), references=str(references), **settings)
    assert isinstance(reward, AdversarialDINO)
    return reward


def all_pass(reward: Reward, items: rewards.Items | None = None) -> None:
    assert [finding for finding in rewards.check(reward, items) if finding.passed is False] == []


def test_the_hinge_loss_is_the_one_of_the_paper() -> None:
    real, generated = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.25])
    assert hinge_loss(real, generated).item() == pytest.approx((0.25 + 0.625) / 2)


def test_an_untrained_discriminator_scores_zero_and_a_trained_one_prefers_the_references(
    vit: Path, references: Path
) -> None:
    reward, bad, good = dino(vit, references), spotted(12, seed=5), smooth(4, seed=9)
    assert rewards.score(reward, bad, ["any"] * 12).abs().max() == 0
    figures = [reward.update(bad, ["any"] * 12, [{}] * 12, step) for step in range(20)]
    assert figures[-1]["loss"] < 0.5 * figures[0]["loss"] and figures[-1]["accuracy"] > 0.8
    assert rewards.score(reward, good, ["any"] * 4).mean() > rewards.score(reward, bad, ["any"] * 12).mean() + 0.5


def test_the_discriminator_keeps_the_contract(vit: Path, references: Path) -> None:
    reward = dino(vit, references)
    reward.update(spotted(8, seed=5), ["any"] * 8, [{}] * 8, 0)
    all_pass(reward)


def test_a_discriminator_resumes_exactly_from_its_state(vit: Path, references: Path) -> None:
    whole, half = dino(vit, references), dino(vit, references)
    for step in range(4):
        whole.update(spotted(6, seed=step), ["any"] * 6, [{}] * 6, step)
        if step < 2:
            half.update(spotted(6, seed=step), ["any"] * 6, [{}] * 6, step)
    resumed = dino(vit, references)
    resumed.load_state_dict(half.state_dict())
    for step in (2, 3):
        resumed.update(spotted(6, seed=step), ["any"] * 6, [{}] * 6, step)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.slow
def test_a_saturated_and_a_collapsed_discriminator_raise_different_alarms(vit: Path, references: Path) -> None:
    keen, lame = dino(vit, references, updates=150, learning_rate=2e-2), dino(vit, references, learning_rate=1e-9)
    for step in range(5):
        for reward in (keen, lame):
            reward.update(spotted(8, seed=5), ["any"] * 8, [{}] * 8, step)
    assert keen.alarm is not None and keen.alarm.startswith("saturated")
    assert lame.alarm is not None and lame.alarm.startswith("collapsed")


def test_every_and_buffer_decide_what_a_discriminator_learns_from(vit: Path, references: Path) -> None:
    reward = dino(vit, references, every=2, buffer=10)
    assert reward.update(spotted(6, 0), ["any"] * 6, [{}] * 6, 1) == {}
    assert reward.update(spotted(6, 1), ["any"] * 6, [{}] * 6, 2)["loss"] > 0
    assert reward.state_dict()["buffer.class"].shape[0] == 10 and reward.taken == 10


SHAPES = [(32, 80), (80, 32), (32, 40), (27, 48)]
CORNERS = [(slice(0, 12), slice(0, 12)), (slice(-12, None), slice(-12, None))]


def wide(count: int, seed: int, shape: tuple[int, int]) -> torch.Tensor:
    """`smooth` pictures of another shape."""
    return smooth(count, seed)[..., :1, :1].expand(count, 3, *shape).clone()


def spoilt(pictures: torch.Tensor, rows: slice, columns: slice, seed: int = 3) -> torch.Tensor:
    """Pictures with a box of noise."""
    result = pictures.clone()
    place = result[:, :, rows, columns]
    place.copy_(torch.rand(place.shape, generator=torch.Generator().manual_seed(seed)))
    return result


def test_the_discriminator_sees_images_that_are_not_square_whole(vit: Path, tmp_path: Path) -> None:
    folder = save_images(tmp_path / "square", smooth(8, seed=1))
    for number, other in enumerate(SHAPES):  # references of several shapes, in one folder
        (picture,) = save_images(tmp_path / f"shape{number}", wide(1, number, other)).iterdir()
        picture.rename(folder / f"other{number}.png")
    reward = dino(vit, folder, learning_rate=1e-2, updates=20)
    for step in range(12):
        reward.update(spotted(12, seed=step), ["any"] * 12, [{}] * 12, step)
    for shape in SHAPES:
        clean = wide(6, 11, shape)
        for rows, columns in CORNERS:
            bad = spoilt(clean, rows, columns)
            assert (rewards.score(reward, clean, ["any"] * 6) - rewards.score(reward, bad, ["any"] * 6)).mean() > 0.1
    assert reward.update(clean, ["any"] * 6, [{}] * 6, 12)["loss"] > 0


# The artifact head


@pytest.fixture(scope="module")
def head(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = VisionBackbone(str(vit))
    clean, artifacts = (backbone.features(pictures)[1] for pictures in (smooth(64, 1), spotted(64, 2)))
    made = Head(backbone.dim, 16)
    fit(made, clean, artifacts, steps=150, learning_rate=1e-2)
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_head(made, str(vit), path)
    return path


def test_the_artifact_head_recognises_artifacts_in_new_images_and_shows_where(head: Path) -> None:
    reward = rewards.load("artifact", head=str(head))
    clean, bad = smooth(8, seed=31), spotted(8, seed=32)
    assert rewards.score(reward, clean, ["any"] * 8).mean() > rewards.score(reward, bad, ["any"] * 8).mean() + 0.4
    maps = reward.maps(bad)
    assert maps is not None and maps.shape == (8, 32, 32)
    assert (maps[:, :16, :16].mean((1, 2)) > 3 * maps[:, 16:, 16:].mean((1, 2))).all()
    all_pass(reward)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_artifact_is_located_in_images_that_are_not_square(head: Path, shape: tuple[int, int]) -> None:
    reward, clean = rewards.load("artifact", head=str(head)), wide(6, 31, shape)
    for rows, columns in CORNERS:
        bad = spoilt(clean, rows, columns)
        assert (rewards.score(reward, clean, ["any"] * 6) > rewards.score(reward, bad, ["any"] * 6) + 0.2).all()
        maps = reward.maps(bad)
        assert maps is not None and maps.shape == (6, *shape)
        for found in maps:
            row, column = divmod(int(found.argmax()), shape[1])
            assert abs(row - range(shape[0])[rows][6]) < 10 and abs(column - range(shape[1])[columns][6]) < 10


def test_the_frames_of_a_wide_video_are_seen_whole(head: Path) -> None:
    reward, clean = rewards.load("artifact", head=str(head), frames=2), wide(4, 31, (32, 80))
    bad = torch.stack([clean, spoilt(clean, *CORNERS[0])], dim=1)
    scores = rewards.score(reward, bad, ["any"] * 4)
    each = [rewards.score(reward, frames, ["any"] * 4) for frames in bad.unbind(1)]
    torch.testing.assert_close(scores, torch.stack(each).mean(0))
    assert (scores < each[0] - 0.1).all()


def test_square_images_are_scored_and_mapped_as_the_models_own_preprocessing_shows_them(head: Path) -> None:
    reward, pictures = rewards.load("artifact", head=str(head)), spotted(5, seed=32)
    assert isinstance(reward, Artifact)
    reward.backbone.preprocessing = reward.backbone.preprocessing._replace(resize=(32, 32))
    for images in (pictures, torch.nn.functional.interpolate(pictures, (56, 56))):
        logits = reward.head(reward.backbone.features(images)[1])
        assert torch.equal(rewards.score(reward, images, ["any"] * 5), (-image_logits(logits)).sigmoid())
        local = logits.sigmoid().view(5, 1, 4, 4)
        side = images.shape[-1]
        expected = torch.nn.functional.interpolate(local, size=(side, side), mode="bilinear", align_corners=False)
        assert torch.equal(reward.maps(images), expected[:, 0])


def test_a_map_covers_only_the_middle_if_the_model_sees_only_the_middle(vit: Path) -> None:
    backbone = VisionBackbone(str(vit))
    backbone.preprocessing = backbone.preprocessing._replace(resize=(40, 40))
    found = backbone.maps(torch.ones(1, 1, 16), 80, 80)[0]
    assert (found[8:72, 8:72] == 1).all() and found.sum() == 64 * 64
    everywhere = backbone.maps(torch.ones(1, len(backbone.preprocessing.corners(80, 200)), 16), 80, 200)
    assert (everywhere == 1).all()
    padded = backbone.preprocessing._replace(resize=(32, 32), mode="longest")
    assert padded.corners(16, 32) == [(-8, 0)]
    backbone.preprocessing = padded
    values = torch.arange(16.0).view(1, 1, 16)
    assert backbone.maps(values, 16, 32).shape == (1, 16, 32) and backbone.maps(values, 16, 32).min() > 0


@given(st.integers(8, 400), st.integers(8, 400), st.sampled_from([32, 36]), st.sampled_from(["shortest", "longest"]))
def test_tiles_cover_every_pixel_of_images_that_are_not_square(height: int, width: int, side: int, mode: Any) -> None:
    preprocessing = Preprocessing((side, side), (32, 32), (0.5,) * 3, (0.5,) * 3, mode=mode)
    rows, columns = preprocessing.resized(height, width)
    seen = torch.zeros(rows, columns)
    for top, left in preprocessing.corners(height, width):
        seen[max(top, 0) : top + 32, max(left, 0) : left + 32] = 1
    assert height == width or seen.all()


def test_one_bad_patch_among_many_lowers_the_score() -> None:
    logits = torch.full((2, 64), -5.0)
    logits[1, 7] = 5.0
    clean, bad = image_logits(logits)
    assert clean.item() == pytest.approx(-5) and bad.item() > 3.9


def test_the_unlabelled_risk_is_the_one_of_kiryo() -> None:
    clean, unlabelled = torch.tensor([-2.0, 1.0]), torch.tensor([0.5])
    softplus = torch.nn.functional.softplus
    rest = softplus(-unlabelled).mean() - 0.3 * softplus(-clean).mean()
    wanted = 0.3 * softplus(clean).mean() + max(rest.item(), 0)
    assert unlabelled_loss(clean, unlabelled, 0.3).item() == pytest.approx(wanted.item())


def test_a_refresh_learns_an_artifact_that_the_head_had_not_seen(head: Path, tmp_path: Path) -> None:
    (other,) = save_images(tmp_path / "wide", wide(1, 5, (32, 80))).iterdir()
    clean = save_images(tmp_path / "clean", smooth(24, 3))
    other.rename(clean / "wide.png")
    folders = {
        "clean": str(clean),
        "artifacts": str(save_images(tmp_path / "bad", spotted(24, 4))),
    }
    reward = rewards.load("artifact", head=str(head), refresh=1, learning_rate=1e-2, clean_share=0.3, **folders)
    assert isinstance(reward, TrainableReward)
    hacked = smooth(24, 7)
    hacked = 0.02 * hacked  # all but black, which no labelled picture is
    before = rewards.score(reward, hacked, ["any"] * 24).mean()
    kept = rewards.score(reward, smooth(24, 8), ["any"] * 24).mean()
    for step in range(6):
        reward.update(hacked, ["any"] * 24, [{}] * 24, step)
    assert rewards.score(reward, hacked, ["any"] * 24).mean() < before - 0.2
    assert rewards.score(reward, smooth(24, 8), ["any"] * 24).mean() > kept - 0.2
    plain = rewards.load("artifact", head=str(head))
    assert isinstance(plain, TrainableReward) and plain.update(hacked, ["any"] * 24, [{}] * 24, 0) == {}


# PickScore


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(asset("toyworld/model/tokenizer"))
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=16, eos_token_id=tokenizer.eos_token_id, **sizes
    )
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    save_images(tmp_path / "pictures", smooth(4, seed=21))
    names = [[f"pictures/{2 * place:02d}.png", f"pictures/{2 * place + 1:02d}.png"] for place in range(2)]
    listed = dict(zip(PROMPTS, names, strict=True))
    (tmp_path / "references.json").write_text(json.dumps(listed))
    return tmp_path / "references.json"


def tuned(clip: Path, table: Path, **options: Any) -> AdversarialPickScore:
    reward = rewards.load("adversarial_pickscore", model=str(clip), references=str(table), **options)
    assert isinstance(reward, AdversarialPickScore)
    return reward


@pytest.fixture
def beaten(clip: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Of some pictures, the table with the one that PickScore likes least for each prompt, and those it likes most."""
    pool = torch.cat([smooth(8, seed=21), spotted(8, seed=3)])
    plain = rewards.load("pickscore", model=str(clip))
    scores = torch.stack([rewards.score(plain, pool, [prompt] * 16) for prompt in PROMPTS])
    save_images(tmp_path / "pictures", pool[scores.argmin(1)])
    listed = {prompt: [f"pictures/{place:02d}.png"] for place, prompt in enumerate(PROMPTS)}
    (tmp_path / "references.json").write_text(json.dumps(listed))
    return tmp_path / "references.json", pool[scores.argmax(1)]


def test_pickscore_is_tuned_until_the_references_win_and_no_further(
    clip: Path, beaten: tuple[Path, torch.Tensor]
) -> None:
    table, best = beaten
    reward = tuned(clip, table, learning_rate=1e-3, updates=4, batch=8)
    media, texts = best.repeat(4, 1, 1, 1), PROMPTS * 4
    figures = [reward.update(media, texts, [{}] * 8, step) for step in range(40)]
    lost = ["loss" in step for step in figures]
    wins = lost.index(False)
    assert all((step["generated"] > step["reference"]) == tuning for step, tuning in zip(figures, lost, strict=True))
    assert wins >= 1 and figures[wins - 1]["updates"] == 4 * wins
    assert figures[wins]["reference"] - figures[wins]["generated"] > figures[0]["reference"] - figures[0]["generated"]


def test_pickscore_tunes_only_its_own_last_blocks(clip: Path, beaten: tuple[Path, torch.Tensor]) -> None:
    table, media = beaten
    plain, reward = rewards.load("pickscore", model=str(clip)), tuned(clip, table, learning_rate=1e-2)
    before = rewards.score(plain, media, PROMPTS)
    torch.testing.assert_close(rewards.score(reward, media, PROMPTS), before)
    kept = {name: value.clone() for name, value in reward.clip.state_dict().items()}
    reward.update(media, PROMPTS, [{}] * 2, 0)
    changed = {name for name, value in reward.clip.state_dict().items() if not torch.equal(value, kept[name])}
    assert changed and all(".layers.1." in name and "vision" in name for name in changed)
    assert torch.equal(rewards.score(plain, media, PROMPTS), before)


def test_references_that_keep_losing_raise_an_alarm_and_one_win_ends_it(
    clip: Path, beaten: tuple[Path, torch.Tensor]
) -> None:
    table, best = beaten
    reward = tuned(clip, table, learning_rate=1e-12)
    alarms = []
    for step in range(PATIENCE):
        reward.update(best, PROMPTS, [{}] * 2, step)
        alarms.append(reward.alarm)
    assert alarms[:-1] == [None] * (PATIENCE - 1)
    assert alarms[-1] is not None and alarms[-1].startswith(
        f"overrun: generated images beat the references for {PATIENCE}"
    )
    worse = torch.stack([reward.references[prompt][0] for prompt in PROMPTS])
    reward.update(worse, PROMPTS, [{}] * 2, PATIENCE)  # as good as the references, which is no defeat
    assert reward.alarm is None


def test_scoring_all_images_alike_raises_an_alarm(clip: Path, beaten: tuple[Path, torch.Tensor]) -> None:
    table, best = beaten
    reward = tuned(clip, table)
    reward.update(best[:1].expand(4, -1, -1, -1), PROMPTS[:1] * 4, [{}] * 4, 0)
    assert reward.alarm is not None and reward.alarm.startswith("collapsed")
    reward.update(best, PROMPTS, [{}] * 2, 1)
    assert reward.alarm is None


def test_references_of_any_size_are_each_scored_once(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_images(tmp_path / "pictures", smooth(2, seed=21))
    Image.new("RGB", (48, 40), (200, 30, 60)).save(tmp_path / "pictures" / "02.png")
    names = [f"pictures/{place:02d}.png" for place in range(3)]
    (tmp_path / "references.json").write_text(json.dumps({PROMPTS[0]: names, PROMPTS[1]: names[2:]}))
    reward = tuned(clip, tmp_path / "references.json")
    plain = rewards.load("pickscore", model=str(clip))
    pictures = {
        text: [rewards.score(plain, one[None], [text]).item() for one in reward.references[text]] for text in PROMPTS
    }
    wanted = [pictures[text][place % len(pictures[text])] for place, text in enumerate(PROMPTS * 6)]
    seen: list[int] = []
    features = reward.image_features
    monkeypatch.setattr(reward, "image_features", lambda images: seen.append(len(images)) or features(images))
    media = smooth(12, seed=5)
    figures = reward.update(media, PROMPTS * 6, [{}] * 12, 0)
    assert figures["reference"] == pytest.approx(sum(wanted) / 12, abs=1e-5)
    assert seen == [12, 2, 2]  # the generated ones, then the four references by size


def test_tuned_pickscore_keeps_the_contract(clip: Path, table: Path) -> None:
    reward = tuned(clip, table)
    items = rewards.Items(smooth(4, seed=4), PROMPTS * 2, [{}] * 4)
    all_pass(reward, items)
    assert reward.applies_to({"prompt": PROMPTS[0]}) and not reward.applies_to({"prompt": "another"})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adversarial_dino", {"references": "nowhere"}, "references nowhere is no folder with images"),
        ("adversarial_dino", {"references": "x", "updates": 0}, "updates must be at least 1, not 0"),
        ("adversarial_dino", {"references": "x", "learning_rate": 0}, "learning_rate must be above 0"),
        (
            "artifact",
            {"head": "nowhere.safetensors"},
            "head nowhere.safetensors was not written by scripts/train_artifact",
        ),
        ("adversarial_pickscore", {"references": "nowhere.json"}, "references nowhere.json cannot be read as JSON"),
        ("adversarial_pickscore", {"references": "x.json", "layers": 0}, "layers must be at least 1, not 0"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_reward_and_option(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RewardError, match=f"reward '{name}': .*{message}") as caught:
        rewards.load(name, **options)
    assert "\n" not in str(caught.value)


def test_rewards_with_the_same_vision_transformer_share_it(vit: Path, references: Path, head: Path) -> None:
    first, second = dino(vit, references), rewards.load("artifact", head=str(head))
    assert isinstance(second, Artifact)
    assert first.backbone.module is second.backbone.module
