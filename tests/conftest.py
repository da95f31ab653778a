"""What every test may lean on."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import settings

from flowalign.sampling import counted_generator
from flowalign.toyworld import pretraining

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
    vae = pretraining.make_autoencoder()
    vae.register_to_config(scaling_factor=0.7, shift_factor=0.1)
    pretraining.assemble(folder, vae, transformer, text, tokenizer)
    return folder


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
        "evaluation": {"prompts": str(folder / "prompts.txt"), "steps": 3, "every": 2, "pictures": 2},
        "guard": None,
        "run": {"folder": str(folder / "run"), "checkpoint_every": 1},
    }


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    """Tiny models are slower, and their last digits depend on the machine, with many threads."""
    torch.set_num_threads(2)
