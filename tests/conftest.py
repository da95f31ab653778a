"""What every test may lean on."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import settings

from flowalign.sampling import counted_generator
from flowalign.toyworld import pretraining

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


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    """Tiny models are slower, and their last digits depend on the machine, with many threads."""
    torch.set_num_threads(2)
