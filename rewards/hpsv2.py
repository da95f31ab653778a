"""HPSv2.1: an open_clip ViT-H/14 tuned on people's rankings of images for one prompt.

Source: Wu et al., 2023, and their package: the score is the cosine of image and prompt without the logit scale, about
0.2 to 0.35. An image that is not square is scaled to fit and padded with black, as in that package; it is not cropped.
"""

from rewards.backbones.clip import ClipReward
from rewards.backbones.weights import checkpoint


class HPSv2(ClipReward):
    """Cosine similarity in (-1, 1) of image and prompt.

    model: an open_clip architecture. weights: a file with its tensors under "state_dict", or ORGANISATION/REPO/FILE on
    the hub. The other options are those of `ClipReward`.
    """

    range = (-1.0, 1.0)
    prompt_sensitive = True

    def __init__(
        self,
        model: str = "ViT-H-14",
        weights: str = "xswu/HPSv2/HPS_v2.1_compressed.pt",
        batch_size: int = 64,
        frames: int = 4,
        device: str | None = None,
    ):
        file = str(checkpoint(weights, self.name))
        super().__init__(model, batch_size, frames, device, pretrained=file, resize_mode="longest")
