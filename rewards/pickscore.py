"""PickScore: a CLIP model tuned on people's choices between images for one prompt.

Source: Kirstain et al., 2023, eq. 1: s(image, prompt) = exp(logit scale) cos, about 18 to 25 for the published model.
The default divides by 26, as Flow-GRPO, DiffusionNFT and AWM do, so that good images lie near 1; `divisor: 1` gives the
paper's score. DanceGRPO and Pref-GRPO use the bare cosine, which `clipscore` with this model gives.
"""

from rewards.backbones.clip import ClipReward
from rewards.base import RewardError

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the base model, whose processor the authors use


class PickScore(ClipReward):
    """exp(logit scale) cos / divisor.

    model: as in `ClipReward`; "toyworld/judges/preference" is the embedded world's. processor: the model whose
    tokenizer and image processor are used (default: the base model for the published model, else `model`). divisor:
    what the score is divided by. The other options are those of `ClipReward`.
    """

    prompt_sensitive = True

    def __init__(
        self,
        model: str = MODEL,
        processor: str | None = None,
        divisor: float = 26.0,
        batch_size: int = 64,
        frames: int = 4,
        device: str | None = None,
    ):
        if not divisor > 0:
            raise RewardError(f"reward 'pickscore': divisor must be above 0, not {divisor}")
        processor = processor or (PROCESSOR if model == MODEL else None)
        super().__init__(model, batch_size, frames, device, processor=processor)
        self.factor = self.clip.model.logit_scale.exp().item() / divisor
        self.range = (-self.factor, self.factor)
