"""Imperfect judges of the embedded world, for a policy to hack: each measures a part of the quality only.

`Learned` stands for a reward model: it is fitted to the gold scores of a few images of the base model. It has never
seen the images that a trained policy may draw, and it does not read prompts. `Legible` rates signs as an OCR reward
does, and takes strong contrast for legibility.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from rewards.artifact import load_head
from rewards.backbones.vit import VisionBackbone
from rewards.base import Reward, Rows
from rewards.frames import FrameReward, chosen_frames, mean_of_frames
from rewards.learning import Head, counted, descend
from rewards.ocr import OCR

BACKBONE = "toyworld/judges/vit"
_HIDDEN = 64
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


def fit_learned(images: torch.Tensor, scores: torch.Tensor, *, seed: int, steps: int = 150) -> Head:
    """A head for `Learned`, fitted by cross entropy to the scores (N,) in [0, 1] of images (N, 3, H, W)."""
    features = _described(VisionBackbone(BACKBONE), images)
    head = Head(features.shape[1], _HIDDEN, seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.1)
    for step in range(steps):
        rows = torch.randperm(len(features), generator=counted(seed, step))[:64]
        loss = F.binary_cross_entropy_with_logits(head(features[rows]), scores[rows])
        descend(optimizer, loss)
    return head


def _described(backbone: VisionBackbone, images: torch.Tensor) -> torch.Tensor:
    """Features (B, 2 D): the class token and the mean of the patches."""
    own, patches = backbone.features(images)
    return torch.cat([own, patches.mean(1)], dim=1)


class Learned(FrameReward):
    """The logit, without bounds, of a head that `fit_learned` fitted and `rewards.artifact.save_head` wrote.

    head: the head's file. device: where the model runs (default: the accelerator, if there is one).
    """

    def __init__(self, head: str, device: str | None = None):
        fitted, model = load_head(head, self.name)
        self.backbone = VisionBackbone(model, device, reward=self.name)
        self.head = fitted.to(self.backbone.device)

    @torch.no_grad()
    def of_images(self, images: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        return self.head(_described(self.backbone, images))


class Legible(Reward):
    """The share of the quoted text that can be read, whatever surrounds it, plus `contrast` times the image's contrast.

    An image's contrast is the standard deviation of its grey levels in [0, 1].
    """

    range = (0.0, math.inf)
    prompt_sensitive = True

    def __init__(self, contrast: float = 12.0, threads: int | None = None):
        self.ocr = OCR(mode="lines", threads=threads)
        self.contrast = contrast

    def applies_to(self, row: Mapping[str, Any]) -> bool:
        """True for prompts that quote a text."""
        return self.ocr.applies_to(row)

    def __call__(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        """Scores (B,) of images or videos; RewardError for a prompt that quotes no text."""
        frames, count = chosen_frames(media)
        grey = (frames.float() * frames.new_tensor(_GREY).view(3, 1, 1)).sum(1)
        contrast = mean_of_frames(grey.flatten(1).std(1), count)
        return self.ocr(media, prompts, metadata) + self.contrast * contrast.cpu()
