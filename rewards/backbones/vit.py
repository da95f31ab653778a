"""A frozen timm vision transformer that extracts features: the backbone of the DINO and artifact rewards.

The model's own config defines its input (size, crop, interpolation, mean and standard deviation).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch.nn import functional as F

from rewards.backbones.preprocessing import Mode, Preprocessing
from rewards.backbones.weights import located, shared
from rewards.base import RewardError, at_least_one, reason
from rewards.devices import chosen_device
from rewards.media import read_image

_MODES: dict[str, Mode] = {"center": "shortest", "squash": "squash", "border": "longest"}


def load_vit(model: str, reward: str = "vit") -> Any:
    """A timm vision transformer without its classifier, in float32 for inference.

    model: a timm name ("vit_base_patch14_dinov2.lvd142m"), a hub id ("hf-hub:timm/..."), a bundled model
        ("toyworld/judges/vit"), or a folder as `timm.models.save_for_hf` writes it (config.json, model.safetensors).
    reward: the name in the error if the loading fails.
    """
    found = located(model)
    try:
        name = f"local-dir:{found}" if Path(found).is_dir() else found
        module = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:
        raise RewardError(f"reward {reward!r}: model {model!r} cannot be loaded with timm: {reason(error)}") from error
    if getattr(module, "cls_token", None) is None or not hasattr(module, "patch_embed"):
        raise RewardError(f"reward {reward!r}: model {model!r} is not a vision transformer with a class token")
    return module.eval().requires_grad_(False)


def _preprocessing(module: Any) -> Preprocessing:
    config = resolve_model_data_config(module)
    crop = config["input_size"][1:]
    resize = tuple(math.floor(side / config["crop_pct"]) for side in crop)
    mode = _MODES[config["crop_mode"]]
    mean, std, interpolation = config["mean"], config["std"], config["interpolation"]
    fill = [round(255 * value) for value in mean]
    return Preprocessing(resize, crop, mean, std, interpolation, mode, fill)


class VisionBackbone:
    """Features of images (B, 3, H, W) in [0, 1] of any size.

    Rewards with the same model on the same device share it for as long as one of them lives.

    model: as in `load_vit`. device: where the model runs (default: the accelerator, if there is one).
    `dim` is the width D of the features, `size` the input's (height, width) in pixels, `grid` the patches' (rows,
    columns).
    """

    def __init__(self, model: str, device: str | torch.device | None = None, batch_size: int = 64, reward: str = "vit"):
        at_least_one(reward, batch_size=batch_size)
        self.device = chosen_device(device)
        key = ("timm", located(model), str(self.device))
        self.module = shared(lambda: load_vit(model, reward).to(self.device), *key)
        self.preprocessing = _preprocessing(self.module)
        self.batch_size = batch_size
        self.size = self.preprocessing.crop
        self.dim: int = self.module.num_features
        self.grid: tuple[int, int] = self.module.patch_embed.grid_size

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The class token (B, D) and the patches (B, P, D), row by row, after the final norm; float32, not scaled.

        The model's own preprocessing may show only the middle of an image that is not square; `tiles` shows all of it.
        """
        batches = [
            self.module.forward_features(self.preprocessing(b.to(self.device))) for b in images.split(self.batch_size)
        ]
        tokens = torch.cat(batches)
        return tokens[:, 0], tokens[:, self.module.num_prefix_tokens :]

    @torch.no_grad()
    def tiles(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`features` of the T tiles that cover an image: class tokens (B, T, D) and patches (B, T, P, D).

        A square image is one tile and has its `features`. Tiles keep the image's proportions and scale, so that a head
        trained on square images still fits; an image squeezed to a square would show a discriminator its shape instead.
        """
        count = len(self.preprocessing.corners(*images.shape[-2:]))
        batches = []
        for part in images.split(max(1, self.batch_size // count)):
            inputs = self.preprocessing.tiles(part.to(self.device))
            batches.append(self.module.forward_features(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2]))
        tokens = torch.cat(batches)
        return tokens[:, :, 0], tokens[:, :, self.module.num_prefix_tokens :]

    def tiles_of_files(self, files: Sequence[Path]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`tiles` of image files of any sizes, (T, D) and (T, P, D) for each file."""
        parts = [self.tiles(read_image(file)[None]) for file in files]
        return [(own[0], patches[0]) for own, patches in parts]

    def maps(self, values: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Values (B, T, P) >= 0 of the tiles' patches as maps (B, height, width) over the images.

        Where tiles overlap, the highest value counts. The map is 0 where the model sees nothing: at the rim of a square
        image, if its preprocessing crops the middle.
        """
        crop, resized = self.size, self.preprocessing.resized(height, width)
        scales = height / resized[0], width / resized[1]
        maps = values.new_zeros(len(values), height, width)
        for number, corner in enumerate(self.preprocessing.corners(height, width)):
            (top, left), (bottom, right) = (
                [round((start + added) * scale) for start, added, scale in zip(corner, extent, scales, strict=True)]
                for extent in ((0, 0), crop)
            )
            tile = values[:, number].view(-1, 1, *self.grid)
            tile = F.interpolate(tile, size=(bottom - top, right - left), mode="bilinear", align_corners=False)[:, 0]
            tile = tile[:, max(-top, 0) :, max(-left, 0) :]  # without the part over padding
            place = maps[:, max(top, 0) : bottom, max(left, 0) : right]
            place.copy_(torch.maximum(place, tile[:, : place.shape[1], : place.shape[2]]))
        return maps
