"""Image features from a vision transformer or a CLIP model, for comparing images."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from rewards.backbones.clip import ClipFeatures
from rewards.backbones.vit import VisionBackbone
from rewards.base import RewardError


def unit_features(
    model: str, backbone: str, batch_size: int, device: str | torch.device | None, reward: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function from images (B, 3, H, W) in [0, 1] to their features (B, D) of length 1.

    backbone: "timm" gives the class token of a timm vision transformer, "clip" the embedding of a CLIP model as the
    reward `clipscore` takes it. Of an image that is not square, both see what the model's own preprocessing shows,
    often the middle. Raises RewardError that names `reward` for any other backbone and for a model that does not load.
    """
    if backbone == "clip":
        return ClipFeatures(model, reward, batch_size, device).image_features
    if backbone == "timm":
        vit = VisionBackbone(model, device, batch_size, reward)
        return lambda images: F.normalize(vit.features(images)[0], dim=-1)
    raise RewardError(f"reward {reward!r}: backbone must be 'timm' or 'clip', not {backbone!r}")
