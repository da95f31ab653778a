"""ImageReward: a BLIP that reads the prompt with attention to the image, tuned on people's rankings.

Source: Xu et al., 2023 (eq. 1 trains it) and their package. Scores lie around -2.3 to 2.3; they are normalised by the
mean and the standard deviation over the authors' data. The weights are loaded into transformers' BLIP classes, which
name them otherwise.
"""

import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rewards.aesthetic import linear_layers, linear_score
from rewards.backbones.preprocessing import Preprocessing
from rewards.backbones.weights import located, read_weights
from rewards.base import RewardError, Rows, at_least_one, reason
from rewards.devices import chosen_device
from rewards.frames import FrameReward

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # raw scores on the authors' data
PIXEL_MEAN, PIXEL_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_TOKENS = 35
HEAD_WIDTH = 64  # every attention head of both towers
Tensors = dict[str, torch.Tensor]

VISION_NAMES = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
}


def _part(weights: Tensors, prefix: str) -> Tensors:
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}


def _depth(weights: Tensors, prefix: str) -> int:
    return 1 + max(int(key[len(prefix) :].split(".")[0]) for key in weights if key.startswith(prefix))


def vision_tower(weights: Tensors) -> BlipVisionModel:
    """The image encoder; its shape is read from the published weights."""
    state = {}
    for key, value in weights.items():
        for pattern, name in VISION_NAMES.items():
            key = re.sub(pattern, name, key)
        state[key] = value
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=_depth(weights, "blocks."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * round((weights["pos_embed"].shape[1] - 1) ** 0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    tower = BlipVisionModel(config)
    tower.load_state_dict(state)
    return tower


def text_tower(weights: Tensors) -> BlipTextModel:
    """The text encoder with cross attention to the image; its shape is read from the published weights."""
    words, width = weights["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(weights["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_depth(weights, "encoder.layer."),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
    )
    tower = BlipTextModel(config, add_pooling_layer=False)
    tower.load_state_dict({key: value for key, value in weights.items() if key != "embeddings.position_ids"})
    return tower


class ImageReward(FrameReward):
    """The authors' normalised score, without bounds.

    model: the published weights, a file or ORGANISATION/REPO/FILE on the hub. tokenizer: BERT's, a folder or hub id.
    batch_size: images that the model takes at once. frames: frames of a video that are judged, the middles of equal
        spans; the score is their mean. device: where the model runs (default: the accelerator, if there is one).
    """

    prompt_sensitive = True

    def __init__(
        self,
        model: str = "THUDM/ImageReward/ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        batch_size: int = 32,
        frames: int = 4,
        device: str | None = None,
    ):
        at_least_one(self.name, batch_size=batch_size, frames=frames)
        weights = read_weights(model, self.name)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(located(tokenizer))
            vision = vision_tower(_part(weights, "blip.visual_encoder."))
            text = text_tower(_part(weights, "blip.text_encoder."))
            layers = linear_layers(_part(weights, "mlp."), text.config.hidden_size)
        except Exception as error:
            raise RewardError(
                f"reward 'imagereward': {model} with tokenizer {tokenizer} cannot be loaded: {reason(error)}"
            ) from error
        self.device = chosen_device(device)
        self.towers = nn.ModuleDict({"vision": vision, "text": text}).to(self.device).eval().requires_grad_(False)
        self.layers = [[part.to(self.device) for part in layer] for layer in layers]
        size = (vision.config.image_size,) * 2
        self.preprocessing = Preprocessing(size, size, PIXEL_MEAN, PIXEL_DEVIATION)
        self.batch_size = batch_size
        self.frames = frames

    @torch.no_grad()
    def raw_scores(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,), not normalised, of images (B, 3, H, W) in [0, 1]; prompts are cut to 35 tokens."""
        limits = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS}
        tokens = self.tokenizer(list(prompts), **limits, return_tensors="pt").to(self.device)
        seen = self.towers["vision"](self.preprocessing(images.to(self.device))).last_hidden_state
        read = self.towers["text"](tokens.input_ids, tokens.attention_mask, encoder_hidden_states=seen)
        return linear_score(self.layers, read.last_hidden_state[:, 0])

    def of_images(self, images: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        starts = range(0, len(prompts), self.batch_size)
        parts = [(images[i : i + self.batch_size], prompts[i : i + self.batch_size]) for i in starts]
        scores = torch.cat([self.raw_scores(some, texts) for some, texts in parts])
        return (scores - MEAN) / DEVIATION
