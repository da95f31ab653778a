"""How small a picture is as a JPEG file: a reward without a model, and a classic to be hacked with."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from rewards.base import RewardError
from rewards.frames import FrameReward
from rewards.media import as_levels


class Compressibility(FrameReward):
    """Minus the size of the picture's JPEG file, in bytes per pixel; with `reverse` plus it (incompressibility).

    Source: DDPO (Black et al. 2023, section 5), which takes kilobytes of a 512-pixel picture; per pixel it is the same
    up to a factor and does not depend on the resolution.
    """

    name = "compressibility"

    def __init__(self, quality: int = 95, reverse: bool = False):
        if not 1 <= quality <= 100:
            raise RewardError(f"reward 'compressibility': quality must lie in 1 to 100, not {quality}")
        self.quality = quality
        self.sign = 1.0 if reverse else -1.0
        self.range = (0.0, math.inf) if reverse else (-math.inf, 0.0)

    def of_pictures(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        pictures: np.ndarray = as_levels(images).permute(0, 2, 3, 1).cpu().numpy()
        sizes = [self._bytes(picture) / picture[..., 0].size for picture in pictures]
        return self.sign * torch.tensor(sizes)

    def _bytes(self, picture: np.ndarray) -> int:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell()
