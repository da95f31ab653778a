"""How small an image is as a JPEG file: a reward without a model, and a classic example of one that gets hacked."""

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from rewards.base import RewardError, Rows
from rewards.frames import FrameReward
from rewards.media import as_levels


class Compressibility(FrameReward):
    """Minus the size of the image's JPEG file, in bytes per pixel; with `reverse` plus the size (incompressibility).

    quality: JPEG quality, 1 to 100.
    Source: DDPO (Black et al. 2023, section 5), which takes the kilobytes of a 512-pixel image; bytes per pixel differ
    from that by a factor and do not depend on the resolution.
    """

    def __init__(self, quality: int = 95, reverse: bool = False):
        if not 1 <= quality <= 100:
            raise RewardError(f"reward 'compressibility': quality must lie in 1 to 100, not {quality}")
        self.quality = quality
        self.sign = 1.0 if reverse else -1.0
        self.range = (0.0, math.inf) if reverse else (-math.inf, 0.0)

    def of_images(self, images: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        levels: np.ndarray = as_levels(images).permute(0, 2, 3, 1).cpu().numpy()
        sizes = [self._bytes(image) / image[..., 0].size for image in levels]
        return self.sign * torch.tensor(sizes)

    def _bytes(self, image: np.ndarray) -> int:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell()
