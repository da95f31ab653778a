"""How colourful an image is, by a formula."""

import math
from collections.abc import Sequence

import torch

from rewards.base import Golden, Rows
from rewards.frames import FrameReward


class Colorfulness(FrameReward):
    """Hasler and Suesstrunk's colourfulness M3 (2003) of pixels in [0, 1]: 0 for grey, about 0.4 for vivid images.

    With rg = R - G and yb = (R + G) / 2 - B over all pixels: sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2).
    """

    range = (0.0, math.inf)

    def golden(self) -> Golden:
        """A grey image, and a pure red one, where every pixel has rg = 1 and yb = 1/2."""
        grey, red = torch.full((3, 8, 8), 0.5), torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 8, 8)
        return Golden(torch.stack([grey, red]), ["grey", "red"], [{}, {}], [0.0, 0.3 * math.sqrt(1.25)], 1e-5)

    def of_images(self, images: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        red, green, blue = images.float().flatten(-2).unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue])  # (2, N, pixels)
        spread = opponents.var(-1, correction=0).sum(0).sqrt()
        shift = (opponents.mean(-1) ** 2).sum(0).sqrt()
        return spread + 0.3 * shift
