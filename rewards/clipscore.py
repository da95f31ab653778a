"""CLIPScore: how well an image fits its prompt, as the cosine of their CLIP embeddings.

Source: Hessel et al., 2021, eq. 1: CLIP-S = w max(cos, 0), w = 2.5, which `scale: hessel` gives. By default the score
is the plain cosine, as DiffusionNFT and Flow-Factory use it (other papers report the cosine times 100 or 100 / 30).
What differs from the paper: ViT-L/14 by default, not ViT-B/32, and no "A photo depicts" before the prompt.
"""

from rewards.backbones.clip import ClipReward
from rewards.base import RewardError

HESSEL_WEIGHT = 2.5


class CLIPScore(ClipReward):
    """The similarity of image and prompt.

    scale: "cosine" for the cosine, in (-1, 1); "hessel" for 2.5 max(cosine, 0), in (0, 2.5).
    The other options are those of `ClipReward`.
    """

    range = (-1.0, 1.0)
    prompt_sensitive = True

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        pretrained: str | None = None,
        scale: str = "cosine",
        batch_size: int = 64,
        frames: int = 4,
        device: str | None = None,
    ):
        if scale not in ("cosine", "hessel"):
            raise RewardError(f"reward 'clipscore': scale must be 'cosine' or 'hessel', not {scale!r}")
        super().__init__(model, batch_size, frames, device, pretrained=pretrained)
        if scale == "hessel":
            self.factor, self.range = HESSEL_WEIGHT, (0.0, HESSEL_WEIGHT)
