"""The CLIP on the vision transformer, and the aesthetic head on its embeddings."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from flowalign.toyworld.making.examples import Example, alike_examples, drawn, examples
from flowalign.toyworld.making.pretraining import MAX_TOKENS, make_tokenizer
from flowalign.toyworld.making.spoiling import quality_examples, rated
from flowalign.toyworld.making.training import (
    DEPTH,
    EPSILON,
    HEADS,
    MEAN,
    MLP_RATIO,
    PATCH,
    STD,
    WIDTH,
    Log,
    seen,
    train,
)
from flowalign.toyworld.render import SIZE

SHARE_OF_SHAPES = 0.75  # more than signs, since prompts of shapes take longer to tell apart


def clip_tower_state(vit: nn.Module) -> dict[str, torch.Tensor]:
    """A pre-norm timm vision transformer's weights under the names of transformers' CLIP."""
    names = {
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm_pre": "pre_layrnorm",
        "norm": "post_layernorm",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    state = {}
    for key, value in vit.state_dict().items():
        if key == "cls_token":
            state["embeddings.class_embedding"] = value.flatten()
        elif key == "pos_embed":
            state["embeddings.position_embedding.weight"] = value[0]
        else:
            found = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", key)
            assert found is not None
            block, part, kind = found.groups()
            place = f"encoder.layers.{block}." if block else ""
            if part == "attn.qkv":
                for name, third in zip("qkv", value.chunk(3), strict=True):
                    state[f"{place}self_attn.{name}_proj.{kind}"] = third
            else:
                state[f"{place}{names[part]}.{kind}"] = value
    return state


def new_clip(vit: nn.Module) -> CLIPModel:
    """A CLIPModel whose image tower is `vit`, with an untrained text tower of two layers."""
    tokenizer = make_tokenizer()
    size: dict[str, object] = {
        "hidden_size": WIDTH,
        "intermediate_size": MLP_RATIO * WIDTH,
        "num_attention_heads": HEADS,
    }
    size |= {"projection_dim": WIDTH, "hidden_act": "gelu"}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, "num_hidden_layers": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": SIZE, "patch_size": PATCH, "num_hidden_layers": DEPTH, "layer_norm_eps": EPSILON}
    config = CLIPConfig(
        text_config={**size, **text, **ends, "pad_token_id": tokenizer.pad_token_id},
        vision_config={**size, **vision},
        projection_dim=WIDTH,
        **ends,
    )
    clip = CLIPModel(config)
    clip.vision_model.load_state_dict(clip_tower_state(vit))
    return clip


def train_clip(vit: nn.Module, seed: int, steps: int, batch: int, log: Log) -> CLIPModel:
    """A CLIPModel whose image tower starts as `vit`; the tower's first half stays frozen."""
    torch.manual_seed(seed + 1)
    clip = new_clip(vit)
    for part in (clip.vision_model.embeddings, clip.vision_model.encoder.layers[: DEPTH // 2]):
        part.requires_grad_(False)  # it knows what covers a patch; the rest learns what the patches mean together
    _contrast("clip", clip, lambda step: examples(seed, 1, step, batch), (seed, 1), steps, 1.5e-3, log)
    return clip


def sharpen_clip(clip: CLIPModel, seed: int, steps: int, batch: int, log: Log) -> CLIPModel:
    """`train_clip`'s model, trained further on batches in which every second prompt differs in a word or two from
    another.

    In a random batch the shapes alone tell most prompts apart; in these batches colours, numbers and places count too.
    """
    torch.manual_seed(seed + 3)
    clip.requires_grad_(True)
    clip.vision_model.embeddings.requires_grad_(False)
    _contrast(
        "clip on similar prompts",
        clip,
        lambda step: alike_examples(seed, 6, step, batch, SHARE_OF_SHAPES),
        (seed, 6),
        steps,
        6e-4,
        log,
    )
    return clip


def _contrast(
    name: str,
    clip: CLIPModel,
    draw: Callable[[int], list[Example]],
    key: tuple[int, int],
    steps: int,
    rate: float,
    log: Log,
) -> None:
    """Trains on `draw(step)` with CLIP's loss; the noise depends on `key`, which is (seed, stage).

    A quarter of the images are spoilt, and a linear layer must predict how much, so that the embeddings show it.
    """
    tokenizer, taste = make_tokenizer(), nn.Linear(WIDTH, 1)

    def loss_of(step: int) -> torch.Tensor:
        prompts, scenes = zip(*draw(step), strict=True)
        ids = tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids
        images, rating = rated(drawn(scenes), *key, step, spoilt=len(scenes) // 4)
        found = clip(input_ids=ids, pixel_values=seen(images, *key, step), return_loss=True)
        guess = 10 * taste(found.image_embeds).squeeze(-1)
        return found.loss + F.mse_loss(guess, (rating - 8) / 3)

    train(name, nn.ModuleList([clip, taste]), loss_of, steps, rate, log)
    with torch.no_grad():
        clip.logit_scale.clamp_(max=np.log(100))


@torch.no_grad()
def image_features(clip: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, D), of length 1, of images (B, 3, 64, 64) in [0, 1]."""
    pixels = (images - MEAN[0]) / STD[0]
    return F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


def fit_aesthetic(clip: CLIPModel, seed: int, batches: int, log: Log) -> dict[str, torch.Tensor]:
    """A ridge regression of the rating on the embedding, as a head of one layer in the published layout."""
    found = [
        (image_features(clip, images), rating)
        for images, rating in (quality_examples(seed, i, 256) for i in range(batches))
    ]
    features, ratings = torch.cat([x for x, _ in found]).double(), torch.cat([y for _, y in found]).double()
    inputs = F.pad(features, (0, 1), value=1.0)
    solution = torch.linalg.solve(inputs.T @ inputs + 1e-3 * torch.eye(WIDTH + 1).double(), inputs.T @ ratings)
    error = (inputs @ solution - ratings).square().mean().sqrt().item()
    log(f"aesthetic: {len(ratings)} images, error {error:.2f} of a spread of {ratings.std().item():.2f}")
    return {"layers.0.weight": solution[None, :-1].float().contiguous(), "layers.0.bias": solution[-1:].float()}


def save_clip(clip: CLIPModel, folder: Path) -> None:
    """Writes the CLIP in half precision, with its tokenizer and image processor, as a transformers folder."""
    copy.deepcopy(clip).half().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    size = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    CLIPImageProcessor(**size, image_mean=list(MEAN), image_std=list(STD)).save_pretrained(folder)
