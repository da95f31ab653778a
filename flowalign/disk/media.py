"""Images as files: 8-bit PNGs in a folder that is replaced whole. The folder's MANIFEST describes each image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from flowalign.disk.files import replace_json_lines, replaced_file, replaced_folder
from rewards.media import as_levels

MANIFEST, FILE_NAME = "metadata.jsonl", "file_name"  # the file, and the key in each line that names an image
MAP = "map_"  # a folder of marked images is named map_REWARD


def marked(images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) greyed, with maps (B, H, W) in [0, 1] laid over them in red."""
    grey = images.mean(1, keepdim=True).expand_as(images)
    red = torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1)
    return grey + 0.8 * maps[:, None] * (red - grey)


def save_images(folder: Path, images: torch.Tensor, about: Sequence[Mapping[str, Any]] = ()) -> list[Path]:
    """Write images (B, 3, H, W) in [0, 1] as the PNG files `image_names`; the folder is replaced whole.

    `about` holds one line of the folder's MANIFEST for each image, such as its prompt. Returns the files' paths.
    """
    names = image_names(len(images))
    with replaced_folder(folder) as partial:
        for name, pixels in zip(names, to_uint8(images), strict=True):
            save_image(partial / name, pixels)
        if about:
            lines = [{FILE_NAME: name} | dict(one) | {FILE_NAME: name} for name, one in zip(names, about, strict=True)]
            replace_json_lines(partial / MANIFEST, lines)
    return [folder / name for name in names]


def save_image(path: Path, pixels: np.ndarray) -> None:
    """Write pixels (H, W, 3) uint8 as a PNG, whole."""
    with replaced_file(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")


def image_names(count: int) -> list[str]:
    """00.png, 01.png, ..., padded to one width, so that sorting the names keeps the order of the images."""
    width = max(2, len(str(count - 1)))
    return [f"{index:0{width}d}.png" for index in range(count)]


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8."""
    pixels: np.ndarray = as_levels(images).permute(0, 2, 3, 1).cpu().numpy()
    return pixels
