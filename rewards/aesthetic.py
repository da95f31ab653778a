"""Aesthetic: how much people would like the look of an image, from 1 to 10, whatever its prompt.

Source: Schuhmann et al., 2022 (LAION's improved aesthetic predictor): linear layers, without activations between them,
on the CLIP ViT-L/14 image embedding of length 1; used as a reward since DDPO (Black et al., 2023).
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from rewards.backbones.clip import ClipReward
from rewards.backbones.weights import read_weights
from rewards.base import RewardError, Rows


def linear_layers(weights: Mapping[str, torch.Tensor], width: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weight and bias of each layer, found by the published names: layers.0.weight, layers.0.bias, layers.2.weight, ...

    Raises ValueError unless the layers lead from embeddings of `width` to one number.
    """
    numbers = sorted(int(key.split(".")[1]) for key in weights if re.fullmatch(r"layers\.\d+\.weight", key))
    if not numbers:
        raise ValueError("it has no layers.0.weight")
    layers = [(weights[f"layers.{number}.weight"], weights[f"layers.{number}.bias"]) for number in numbers]
    inputs = [width, *(len(bias) for _, bias in layers)]
    for number, (weight, _), wanted in zip(numbers, layers, zip(inputs[1:], inputs, strict=False), strict=True):
        if tuple(weight.shape) != wanted:
            raise ValueError(f"layers.{number}.weight is {tuple(weight.shape)} and must be {wanted}")
    if inputs[-1] != 1:
        raise ValueError(f"its last layer gives {inputs[-1]} numbers and must give one")
    return layers


def linear_score(layers: Sequence[Sequence[torch.Tensor]], features: torch.Tensor) -> torch.Tensor:
    """The number (B,) to which `linear_layers` lead from features (B, width)."""
    for weight, bias in layers:
        features = F.linear(features, weight, bias)
    return features.squeeze(-1)


class Aesthetic(ClipReward):
    """The predicted rating; it has no bounds, but the published head gives about 1 to 10.

    model: the CLIP model. head: the head's weights, a file or ORGANISATION/REPO/FILE on the hub;
        "toyworld/judges/aesthetic.safetensors" is the head of the embedded world's CLIP.
    The other options are those of `ClipReward`.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
        pretrained: str | None = None,
        batch_size: int = 64,
        frames: int = 4,
        device: str | None = None,
    ):
        weights = read_weights(head, self.name)
        super().__init__(model, batch_size, frames, device, pretrained=pretrained)
        width = self.image_features(torch.zeros(1, 3, 8, 8)).shape[1]
        try:
            layers = linear_layers(weights, width)
        except (ValueError, KeyError) as error:
            raise RewardError(f"reward 'aesthetic': head {head} does not fit CLIP model {model}: {error}") from error
        self.layers = [[part.to(self.device) for part in layer] for layer in layers]

    def of_images(self, images: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        return linear_score(self.layers, self.image_features(images))
