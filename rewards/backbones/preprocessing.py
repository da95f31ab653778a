"""The preprocessing of open_clip and timm models: 8-bit levels, antialiased resize, centre crop, normalisation.

It gives the same pixels as the libraries' own transforms of PIL images, for batches of tensors on any device.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from rewards.media import as_levels

Mode = Literal["shortest", "longest", "squash"]


class Preprocessing(NamedTuple):
    """From images (B, 3, H, W) in [0, 1] to a model's input (B, 3, *crop).

    resize: a height and a width. mode: "shortest" scales the image to cover them, "longest" scales it to fit into them,
        and both keep its proportions; "squash" resizes it to exactly them.
    fill: the levels, 0 to 255, of the padding where the resized image is smaller than the crop.
    """

    resize: tuple[int, int]
    crop: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str = "bicubic"
    mode: Mode = "shortest"
    fill: Sequence[float] = (0.0, 0.0, 0.0)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Model input (B, 3, *crop), float32, on the images' device; of an image of another shape, the middle."""
        return self._normalised(transforms.center_crop(self._padded(images), list(self.crop)))

    def tiles(self, images: torch.Tensor) -> torch.Tensor:
        """Model inputs (B, T, 3, *crop) that show images of any shape whole, in T tiles at the places of `corners`."""
        corners = self.corners(*images.shape[-2:])
        if len(corners) == 1:
            return self(images)[:, None]
        levels, (height, width) = self._padded(images), self.crop
        starts = [(max(top, 0), max(left, 0)) for top, left in corners]
        crops = [levels[..., top : top + height, left : left + width] for top, left in starts]
        return self._normalised(torch.stack(crops, 1))

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """The upper left corners of an image's tiles, in pixels of the resized image; below 0 where it is padded.

        An image of the crop's shape has one tile, the middle, as in the model's own preprocessing. Any other image is
        covered by the fewest possible tiles, evenly spaced.
        """
        sizes = self.resized(height, width)
        if height * self.crop[1] == width * self.crop[0]:
            return [(round((sizes[0] - self.crop[0]) / 2), round((sizes[1] - self.crop[1]) / 2))]
        rows, columns = (_starts(size, crop) for size, crop in zip(sizes, self.crop, strict=True))
        return [(row, column) for row in rows for column in columns]

    def _padded(self, images: torch.Tensor) -> torch.Tensor:
        """8-bit levels of the resized images, float32, at least as large as the crop."""
        levels = as_levels(images).float()
        height, width = self.resized(*levels.shape[-2:])
        for size in ((levels.shape[-2], width), (height, width)):  # PIL resizes one axis, rounds, then the other
            if size != tuple(levels.shape[-2:]):
                levels = F.interpolate(levels, size, mode=self.interpolation, antialias=True).round().clamp(0, 255)
        width, height = (max(self.crop[axis] - levels.shape[axis - 2], 0) for axis in (1, 0))
        padding = [width // 2, height // 2, (width + 1) // 2, (height + 1) // 2]
        return transforms.pad(levels, padding, fill=list(self.fill))

    def _normalised(self, levels: torch.Tensor) -> torch.Tensor:
        return transforms.normalize(levels / 255, list(self.mean), list(self.std))

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The height and width to which an image of this size is resized."""
        if self.mode == "squash":
            return self.resize
        if self.mode == "shortest" and self.resize[0] == self.resize[1]:  # rounded down, as torchvision does
            side = self.resize[0]
            return (side, side * width // height) if height <= width else (side * height // width, side)
        ratios = height / self.resize[0], width / self.resize[1]
        ratio = min(ratios) if self.mode == "shortest" else max(ratios)
        return round(height / ratio), round(width / ratio)


def _starts(size: int, crop: int) -> list[int]:
    """Where the fewest crops that cover a length begin."""
    if size <= crop:
        return [-((crop - size) // 2)]
    count = -(-size // crop)
    return [round(index * (size - crop) / (count - 1)) for index in range(count)]
