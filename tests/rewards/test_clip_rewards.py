"""Rewards on CLIP, vision transformers and BLIP against the libraries' own pipelines; the embedded world's judges."""

import gc
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from timm.data.config import resolve_model_data_config
from timm.models import save_for_hf
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
)

import rewards
from flowalign.toyworld.making import examples
from flowalign.toyworld.making.pretraining import make_tokenizer
from flowalign.toyworld.making.spoiling import quality_examples
from rewards.aesthetic import linear_layers
from rewards.backbones import weights
from rewards.backbones.vit import VisionBackbone
from rewards.backbones.weights import read_weights

PROMPTS = ["a photo of a red star", 'a sign that says "OWL"', "a photo of two rings"]
SIZES = [(32, 32), (48, 80), (70, 40), (20, 25)]
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
JUDGE = "toyworld/judges/clip"


def levels(height: int, width: int, count: int = 3) -> np.ndarray:
    """Smooth pictures with some noise, 8-bit, (count, height, width, 3)."""
    rng = np.random.default_rng(height * 1000 + width)
    coarse = rng.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    smooth = [Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC) for image in coarse]
    noise = rng.integers(-9, 10, (count, height, width, 3))
    return (np.stack([np.asarray(image) for image in smooth]) + noise).clip(0, 255).astype(np.uint8)


def tensor(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def score(reward, media, prompts=PROMPTS, metadata=None):
    return rewards.score(reward, media, prompts, metadata)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A transformers CLIP folder with random weights: 32 x 32 pictures."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 3}
    vision = {**TINY, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, bos_token_id=1, eos_token_id=3)
    model = CLIPModel(config)
    for weight in model.parameters():  # so that pictures and texts differ as they do in a trained model
        nn.init.normal_(weight, std=0.2) if weight.ndim > 1 else None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory) -> Path:
    """An open_clip folder with random weights: 32 x 32 pictures, the library's own tokenizer."""
    folder = tmp_path_factory.mktemp("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    model = open_clip.CLIP(**{**config, "vision_cfg": {**vision}, "text_cfg": {**text}})
    looks = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": looks}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory) -> Path:
    """A timm folder with random weights: 32 x 32 pictures, resized to more and cropped."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    looks = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "crop_pct": 0.9, "input_size": (3, 32, 32)}
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay=looks, **shape)
    save_for_hf(model, folder, safe_serialization=True)
    return folder


@torch.no_grad()
def library_cosines(folder: Path, pictures: np.ndarray, prompts) -> torch.Tensor:
    """What transformers' own processor and model give for picture files."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    files = [Image.fromarray(picture) for picture in pictures]
    pixels = AutoImageProcessor.from_pretrained(folder)(images=files, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    return (model(**pixels, **tokens).logits_per_image / model.logit_scale.exp()).diagonal()


@pytest.mark.parametrize("size", SIZES)
def test_clip_scores_are_those_of_transformers_own_pipeline(clip_folder, size):
    pictures = levels(*size)
    expected = library_cosines(clip_folder, pictures, PROMPTS)
    assert expected.std() > 0.01
    found = score(rewards.load("clipscore", model=str(clip_folder)), tensor(pictures))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_clip_scores_are_those_of_open_clips_own_pipeline(open_clip_folder, size):
    pictures, name = levels(*size), f"local-dir:{open_clip_folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    files = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
    with torch.no_grad():
        images, texts, _ = model.eval()(files, open_clip.get_tokenizer(name)(PROMPTS))
    found = score(rewards.load("clipscore", model=str(open_clip_folder)), tensor(pictures))
    torch.testing.assert_close(found, (images * texts).sum(-1), atol=1e-4, rtol=0)


def test_hessels_form_is_two_and_a_half_times_the_positive_cosine(clip_folder):
    media = tensor(levels(32, 32))
    cosines = score(rewards.load("clipscore", model=str(clip_folder)), media)
    found = score(rewards.load("clipscore", model=str(clip_folder), scale="hessel"), media)
    torch.testing.assert_close(found, 2.5 * cosines.clamp(min=0))


def test_pickscore_is_the_scaled_cosine_over_its_divisor(clip_folder):
    media = tensor(levels(32, 32))
    cosines = score(rewards.load("clipscore", model=str(clip_folder)), media)
    reward = rewards.load("pickscore", model=str(clip_folder))
    scale = reward.clip.model.logit_scale.exp()
    torch.testing.assert_close(score(reward, media), scale * cosines / 26)
    torch.testing.assert_close(
        score(rewards.load("pickscore", model=str(clip_folder), divisor=1.0), media), scale * cosines
    )
    assert reward.range[1] == pytest.approx(scale.item() / 26)


@pytest.mark.parametrize("size", SIZES)
def test_hpsv2_pads_and_reads_the_published_layout(open_clip_folder, tmp_path, size):
    config = json.loads((open_clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-hps.json")
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("tiny-hps", image_resize_mode="longest")
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "HPS.pt")
    pictures = levels(*size)
    files = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
    with torch.no_grad():
        images, texts, _ = model.eval()(files, open_clip.get_tokenizer("tiny-hps")(PROMPTS))
    reward = rewards.load("hpsv2", model="tiny-hps", weights=str(tmp_path / "HPS.pt"))
    torch.testing.assert_close(score(reward, tensor(pictures)), (images * texts).sum(-1), atol=1e-4, rtol=0)


def test_rewards_on_one_model_load_it_once_and_free_it_with_the_last(clip_folder):
    first = rewards.load("clipscore", model=str(clip_folder))
    second = rewards.load("pickscore", model=str(clip_folder))
    assert first.clip is second.clip
    key = next(key for key in weights._loaded if str(clip_folder) in key)
    del first, second
    gc.collect()
    assert key not in weights._loaded


def test_a_score_does_not_depend_on_its_batch_or_on_the_batch_size(clip_folder):
    media = tensor(levels(40, 32))
    together = score(rewards.load("clipscore", model=str(clip_folder)), media)
    for batch_size in (1, 2):
        parts = score(rewards.load("clipscore", model=str(clip_folder), batch_size=batch_size), media)
        torch.testing.assert_close(parts, together, atol=1e-6, rtol=0)
    reward = rewards.load("clipscore", model=str(clip_folder))
    alone = torch.cat([score(reward, media[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)


def test_a_video_scores_as_the_mean_of_its_frames(clip_folder):
    frames, reward = tensor(levels(32, 32)), rewards.load("clipscore", model=str(clip_folder))
    expected = score(reward, frames, PROMPTS[:1] * 3).mean()
    torch.testing.assert_close(score(reward, frames[None], PROMPTS[:1])[0], expected)


@pytest.mark.parametrize("name", ["clipscore", "pickscore", "hpsv2", "aesthetic", "imagereward"])
def test_a_missing_model_is_an_error_of_one_sentence(name, tmp_path):
    missing = str(tmp_path / "none.pt")
    option = {"hpsv2": "weights", "aesthetic": "head"}.get(name, "model")
    with pytest.raises(rewards.RewardError, match=f"reward '{name}'.*none.pt") as caught:
        rewards.load(name, **{option: missing})
    assert "\n" not in str(caught.value)


def test_weights_that_lack_a_part_are_refused_and_not_drawn_at_random(clip_folder, tmp_path):
    model = CLIPModel.from_pretrained(clip_folder)
    state = {key: value for key, value in model.state_dict().items() if key != "visual_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(rewards.RewardError, match=r"the weights lack visual_projection\.weight"):
        rewards.load("clipscore", model=str(tmp_path))


def test_an_aesthetic_head_is_a_chain_of_linear_layers_on_the_embedding(clip_folder, tmp_path):
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.2), nn.Linear(8, 1)).eval()
    torch.save({f"layers.{key}": value for key, value in chain.state_dict().items()}, tmp_path / "head.pth")
    media = tensor(levels(32, 32))
    reward = rewards.load("aesthetic", model=str(clip_folder), head=str(tmp_path / "head.pth"))
    expected = chain(reward.image_features(media)).squeeze(-1).detach()
    torch.testing.assert_close(score(reward, media), expected)


def test_an_aesthetic_head_of_another_model_is_an_error_of_one_sentence(clip_folder, tmp_path):
    save_file({"layers.0.weight": torch.zeros(1, 768), "layers.0.bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    wanted = r"does not fit CLIP model .*: layers\.0\.weight is \(1, 768\) and must be \(1, 16\)"
    with pytest.raises(rewards.RewardError, match=wanted):
        rewards.load("aesthetic", model=str(clip_folder), head=str(tmp_path / "head.safetensors"))


def test_the_published_aesthetic_head_can_be_read(shared):
    file = shared / "data" / "aesthetic_sac_logos_ava1_l14_linearMSE.pth"
    layers = linear_layers(read_weights(str(file), "aesthetic"), 768)
    assert [len(bias) for _, bias in layers] == [1024, 128, 64, 16, 1]


@pytest.mark.parametrize("size", SIZES)
def test_vision_features_are_those_of_timms_own_pipeline(vit_folder, size):
    pictures, backbone = levels(*size), VisionBackbone(str(vit_folder))
    model = timm.create_model(f"local-dir:{vit_folder}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        expected = model.forward_features(torch.stack([transform(Image.fromarray(picture)) for picture in pictures]))
    own, patches = backbone.features(tensor(pictures))
    assert (backbone.size, backbone.dim, patches.shape) == ((32, 32), 32, (3, 16, 32))
    torch.testing.assert_close(own, expected[:, 0], atol=2e-3, rtol=0)
    assert F.cosine_similarity(patches, expected[:, 1:], dim=-1).min() > 0.9999


def test_a_network_without_a_class_token_is_refused_as_a_backbone(tmp_path):
    save_for_hf(timm.create_model("test_resnet", pretrained=False), tmp_path, safe_serialization=True)
    with pytest.raises(rewards.RewardError, match="is not a vision transformer with a class token"):
        VisionBackbone(str(tmp_path))


@pytest.mark.parametrize("backbone", ["timm", "clip"])
def test_similarity_is_the_mean_over_a_prompts_references(backbone, vit_folder, clip_folder, tmp_path):
    pictures = levels(32, 32)
    for name, picture in zip("abc", pictures, strict=True):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    model = str(vit_folder if backbone == "timm" else clip_folder)
    reward = rewards.load("similarity", references=str(tmp_path), model=model, backbone=backbone)
    features = reward.features(tensor(pictures))
    rows = [{"reference": "a.png"}, {"reference": ["a.png", "c.png"]}, {"reference": "b.png"}]
    found = score(reward, tensor(pictures), PROMPTS, rows)
    cosines = features @ features.T
    expected = [1.0, (cosines[1, 0] + cosines[1, 2]).item() / 2, cosines[2, 1].item()]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


def test_references_by_prompt_come_from_a_jsonl_file(vit_folder, tmp_path):
    pictures = levels(32, 32)
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": PROMPTS[0], "reference": "a.png"}) + "\n")
    reward = rewards.load("similarity", references=str(tmp_path / "rows.jsonl"), model=str(vit_folder))
    assert reward.applies_to({"prompt": PROMPTS[0]}) and not reward.applies_to({"prompt": PROMPTS[1]})
    torch.testing.assert_close(score(reward, tensor(pictures[:1]), PROMPTS[:1]), torch.ones(1))
    with pytest.raises(rewards.RewardError, match=r"item 0 \(.*OWL.*\) has no reference"):
        score(reward, tensor(pictures[:1]), PROMPTS[1:2])


def test_a_missing_reference_is_an_error_of_one_sentence(vit_folder, tmp_path):
    reward = rewards.load("similarity", references=str(tmp_path), model=str(vit_folder))
    with pytest.raises(rewards.RewardError, match=r"none\.png"):
        score(reward, tensor(levels(32, 32))[:1], PROMPTS[:1], [{"reference": "none.png"}])
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "reference": "none.png"}\n{"prompt": "a"}\n')
    with pytest.raises(rewards.RewardError, match=r"rows\.jsonl line 2 is not"):
        rewards.load("similarity", references=str(tmp_path / "rows.jsonl"), model=str(vit_folder))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, nn.Module, BertModel, nn.Sequential]:
    """A small ImageReward in the published layout, and its parts: timm's transformer, BERT, the head."""
    folder = tmp_path_factory.mktemp("imagereward")
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "red", "star", "two", "rings"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "tokenizer")
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 0}
    vision = timm.create_model("vit_tiny_patch16_224", **shape).eval()
    config = BertConfig(
        vocab_size=len(words) + 2,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=40,
        is_decoder=True,
        add_cross_attention=True,
    )
    text = BertModel(config, add_pooling_layer=False).eval()
    cross = [
        part
        for layer in text.encoder.layer
        for part in (layer.crossattention.self.key, layer.crossattention.self.value)
    ]
    for linear in cross:  # the image is wider than the text
        linear.weight = nn.Parameter(0.1 * torch.randn(64, 128))
    nn.init.zeros_(text.embeddings.token_type_embeddings.weight)  # BLIP has none
    head = nn.Sequential(nn.Linear(64, 8), nn.Dropout(0.2), nn.Linear(8, 1)).eval()
    state = {f"blip.visual_encoder.{key}": value for key, value in vision.state_dict().items()}
    for key, value in text.state_dict().items():
        if "token_type" not in key:
            state[f"blip.text_encoder.{key}"] = value
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    state["blip.vision_proj.weight"] = torch.zeros(4, 128)
    torch.save(state | {f"mlp.layers.{key}": value for key, value in head.state_dict().items()}, folder / "IR.pt")
    return folder, vision, text, head


def test_imagereward_is_blip_with_the_published_weights(published):
    folder, vision, text, head = published
    reward = rewards.load("imagereward", model=str(folder / "IR.pt"), tokenizer=str(folder / "tokenizer"))
    media, prompts = tensor(levels(32, 32)), ["a photo of a red star", "two rings", "a sign"]
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = (media - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)
    text.config.is_decoder = False  # an encoder that reads both ways, as in BLIP
    for module in text.modules():
        module.is_causal = False
    expected = []
    for index, prompt in enumerate(prompts):  # one by one and without padding
        tokens = reward.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            seen = vision.forward_features(pixels[index : index + 1])
            expected.append(head(text(tokens.input_ids, encoder_hidden_states=seen).last_hidden_state[0, 0]).item())
    expected = (torch.tensor(expected) - 0.16717362830052426) / 1.0333394966054072
    assert expected.std() > 1e-3
    torch.testing.assert_close(score(reward, media, prompts), expected, atol=1e-4, rtol=0)


def test_weights_that_are_not_imagerewards_are_an_error_of_one_sentence(published, tmp_path):
    torch.save({"layers.0.weight": torch.zeros(1, 2)}, tmp_path / "other.pt")
    with pytest.raises(rewards.RewardError, match=r"other\.pt with tokenizer .* cannot be loaded"):
        rewards.load("imagereward", model=str(tmp_path / "other.pt"), tokenizer=str(published[0] / "tokenizer"))


def test_the_worlds_clip_finds_the_true_prompt_among_64():
    reward, hits = rewards.load("clipscore", model=JUDGE), []
    for seed in range(4):
        prompts, scenes = examples.held_out_examples(seed, count=64)
        likeness = reward.image_features(examples.drawn(scenes)) @ reward.text_features(prompts).T
        others = examples.also_true(prompts, scenes) & ~torch.eye(64, dtype=torch.bool)
        hits.append(likeness.masked_fill(others, -2).argmax(1) == torch.arange(64))
    assert torch.stack(hits).float().mean() >= 0.9  # 0.927 over 1,024 pictures


def test_the_worlds_aesthetic_head_prefers_clean_images():
    images, rating = quality_examples(seed=7, step=0, count=64)
    reward = rewards.load("aesthetic", model=JUDGE, head="toyworld/judges/aesthetic.safetensors")
    found = score(reward, images, [""] * 64)
    worse = rating < 6
    assert (found[rating == 10][:, None] > found[worse][None]).float().mean() > 0.9


def test_the_worlds_vision_transformer_can_be_loaded():
    backbone = VisionBackbone("toyworld/judges/vit")
    own, patches = backbone.features(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert own.shape == (2, 128) and patches.shape == (2, 64, 128)
