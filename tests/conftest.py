"""What every test may lean on."""

import json
import os
from collections.abc import Callable
from pathlib import Path
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
from hypothesis import settings
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flowalign.sampling import counted_generator
from flowalign.toyworld.making import pretraining

REWARDS = """
import torch
def brightness(media, prompts, metadata):
    return media.flatten(1).mean(1)
def constant(media, prompts, metadata):
    return torch.ones(len(media))
def raises(media, prompts, metadata):
    raise RuntimeError("the judge is asleep")
def nan(media, prompts, metadata):
    return torch.full((len(media),), float("nan"))
def short(media, prompts, metadata):
    return torch.zeros(len(media) - 1)
def words(media, prompts, metadata):
    return ["good"] * len(media)
"""

# How long an example takes is the machine's business, not a property of the code.
settings.register_profile("flowalign", deadline=None)
settings.load_profile("flowalign")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden numbers and test data, beside the repository or at $FLOWALIGN_SHARED."""
    folder = Path(os.environ.get("FLOWALIGN_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"{folder} with the golden numbers is absent")
    return folder


@pytest.fixture(scope="session")
def video_golden(shared: Path) -> Callable[[str], list[dict[str, Any]]]:
    """The golden cases of a name in golden/video: the fields of each case and its tensors, in one table."""

    def cases(name: str) -> list[dict[str, Any]]:
        place = shared / "golden" / "video"
        tensors = load_file(place / f"{name}.safetensors") if (place / f"{name}.safetensors").is_file() else {}
        fields = json.loads((place / f"{name}.json").read_text())["cases"]
        for key, tensor in tensors.items():
            case, _, field = key.partition(".")
            fields[case][field] = tensor
        return [{"case": case, **known} for case, known in fields.items()]

    return cases


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusion3Pipeline folder of the real classes with random weights: 16 x 16 pictures, no T5."""
    folder: Path = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    tokenizer = pretraining.make_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * pretraining.TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * pretraining.TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    text = pretraining.TextTower(tokenizer)
    with torch.no_grad():  # releases of transformers differ in how they draw first weights
        for name, weight in text.named_parameters():
            if weight.ndim > 1:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=counted_generator(*name.encode())))
    pretraining.assemble(folder, _autoencoder(), transformer, text, tokenizer)
    return folder


def _t5(width: int, words: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=words, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


def _autoencoder() -> AutoencoderKL:
    vae = pretraining.make_autoencoder()
    vae.register_to_config(scaling_factor=0.7, shift_factor=0.1)
    return vae


@pytest.fixture(scope="session")
def tiny_sd35(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusion3Pipeline folder like 3.5 medium: a T5, normed queries, two blocks with a second attention."""
    folder: Path = tmp_path_factory.mktemp("model") / "tiny_sd35"
    torch.manual_seed(1)
    tokenizer = pretraining.make_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * pretraining.TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * pretraining.TEXT_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0, 1),
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(),
        text_encoder=pretraining.make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=pretraining.make_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=_t5(2 * pretraining.TEXT_WIDTH, len(tokenizer)),
        tokenizer_3=tokenizer,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A FluxPipeline folder: like dev, with embedded guidance and a shift by resolution, or like schnell, without."""
    made: dict[bool, Path] = {}

    def make(distilled: bool) -> Path:
        if distilled not in made:
            made[distilled] = tmp_path_factory.mktemp("model") / f"tiny_flux_{distilled}"
            _save_flux(made[distilled], distilled)
        return made[distilled]

    return make


def _save_flux(folder: Path, distilled: bool) -> None:
    torch.manual_seed(2)
    tokenizer = pretraining.make_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=pretraining.MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=distilled,
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if distilled else 1.0, use_dynamic_shifting=distilled),
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        text_encoder_2=_t5(32, len(tokenizer)),
        tokenizer_2=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_values(tiny_model: Path) -> Callable[[Path], dict[str, Any]]:
    """Makes the values of a recipe of a few seconds, with its files in a folder."""
    return lambda folder: _values(tiny_model, folder)


@pytest.fixture
def values(tiny_values: Callable[[Path], dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """A recipe of a few seconds."""
    return tiny_values(tmp_path)


def _values(tiny_model: Path, folder: Path) -> dict[str, Any]:
    (folder / "judge.py").write_text(REWARDS)
    (folder / "prompts.txt").write_text("".join(f"a photo of {n} stars\n" for n in ("two", "three", "four", "a")))
    return {
        "name": "tiny",
        "model": {
            "path": str(tiny_model),
            "height": 64,
            "width": 64,
            "dtype": "fp32",
            "max_sequence_length": 0,
            "lora": {"rank": 4, "targets": ["attention", "feed_forward"]},
        },
        "prompts": str(folder / "prompts.txt"),
        "rewards": {"brightness": {"load": f"{folder / 'judge.py'}:brightness"}},
        "algorithm": {"name": "flow_grpo", "clip_range": 1e-2},
        "rollout": {"steps": 3, "window": [0, 2], "batch": 8},
        "train": {
            "steps": 4,
            "prompts_per_step": 2,
            "group_size": 4,
            "updates_per_step": 2,
            "micro_batch": 3,
            "learning_rate": 3e-3,
        },
        "evaluation": {"prompts": str(folder / "prompts.txt"), "steps": 3, "every": 2, "keep_media": 2},
        "guard": None,
        "run": {"folder": str(folder / "run"), "checkpoint_every": 1},
    }


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    """Tiny models are slower, and their last digits depend on the machine, with many threads."""
    torch.set_num_threads(1)
