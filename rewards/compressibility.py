"""How small a picture is as a JPEG file: a reward without a model, and a classic to be hacked with."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from rewards.base import Reward, RewardError
from rewards.media import as_levels, chosen_frames, mean_of_frames


class Compressibility(Reward):
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

    def __call__(
        self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        """Scores (B,) of images (B, 3, H, W), or of videos as the mean of their frames."""
        frames, count = chosen_frames(media)
        pictures: np.ndarray = as_levels(frames).permute(0, 2, 3, 1).cpu().numpy()
        sizes = [self._bytes(picture) / picture[..., 0].size for picture in pictures]
        return self.sign * mean_of_frames(torch.tensor(sizes), count)

    def _bytes(self, picture: np.ndarray) -> int:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell()
