"""Images as open_clip and timm models want them: 8-bit levels, antialiased resize, centre crop, normalisation.

The same as the libraries' own transforms of PIL images, for batches of tensors on any device.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

Mode = Literal["shortest", "longest", "squash"]


def as_levels(images: torch.Tensor) -> torch.Tensor:
    """Images (..., 3, H, W) in [0, 1] as the 8-bit levels of a picture file, on which models are trained."""
    return (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)


class Preprocessing(NamedTuple):
    """From images (B, 3, H, W) in [0, 1] to a model's input (B, 3, *crop).

    resize: height and width to which `mode` refers: "shortest" makes the image cover them, "longest" makes it fit in,
        both keeping its proportions; "squash" takes them as they are.
    fill: level of what is added where the resized image is smaller than the crop.
    """

    resize: tuple[int, int]
    crop: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str = "bicubic"
    mode: Mode = "shortest"
    fill: Sequence[float] = (0.0, 0.0, 0.0)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Model input (B, 3, *crop), float32, on the images' device."""
        levels = as_levels(images).float()
        height, width = self._resized(*levels.shape[-2:])
        for size in ((levels.shape[-2], width), (height, width)):  # PIL rounds after each of the two directions
            if size != tuple(levels.shape[-2:]):
                levels = F.interpolate(levels, size, mode=self.interpolation, antialias=True).round().clamp(0, 255)
        width, height = (max(self.crop[axis] - levels.shape[axis - 2], 0) for axis in (1, 0))
        padding = [width // 2, height // 2, (width + 1) // 2, (height + 1) // 2]
        levels = transforms.pad(levels, padding, fill=list(self.fill))
        levels = transforms.center_crop(levels, list(self.crop))
        return transforms.normalize(levels / 255, list(self.mean), list(self.std))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.mode == "squash":
            return self.resize
        if self.mode == "shortest" and self.resize[0] == self.resize[1]:  # rounded down, as torchvision does
            side = self.resize[0]
            return (side, side * width // height) if height <= width else (side * height // width, side)
        ratios = height / self.resize[0], width / self.resize[1]
        ratio = min(ratios) if self.mode == "shortest" else max(ratios)
        return round(height / ratio), round(width / ratio)
