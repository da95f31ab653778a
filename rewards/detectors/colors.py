"""The colour of detected objects, found by CLIP on each object's masked crop, as in GenEval.

Source: Ghosh et al., "GenEval" (2023), `evaluate_images.py`: the object is laid on a grey ground and cropped to its
box, and CLIP compares the crop with ten colours, each in three templates.
"""

from collections.abc import Sequence

import open_clip
import torch
from torch.nn import functional as F

from rewards.backbones.clip import ClipFeatures
from rewards.detectors.base import COLORS

OPENAI = "ViT-L-14-quickgelu/openai"
"""OpenAI's ViT-L-14, as in GenEval; open_clip 3 uses the right activation under this name only."""
BACKGROUND = 0x99 / 255
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class ColorClassifier:
    """Which of GenEval's ten colours an object has.

    clip: an open_clip ARCHITECTURE/TAG, or a CLIP model's folder, hub id or "hf-hub:..." id.
    owner: the name in error sentences. device: where the model runs (default: the accelerator, if there is one).
    """

    def __init__(self, clip: str, owner: str, device: str | torch.device | None = None):
        architecture, _, tag = clip.partition("/")
        known = architecture in open_clip.list_models()
        model, pretrained = (architecture, tag) if known else (clip, None)
        self.clip = ClipFeatures(model, owner, len(COLORS) * len(TEMPLATES), device, pretrained=pretrained)
        self.texts: dict[str, torch.Tensor] = {}

    def directions(self, name: str) -> torch.Tensor:
        """Embeddings (10, D) of length 1, one per colour of an object of class `name`: the mean over its templates."""
        if name not in self.texts:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            means = self.clip.text_features(texts).unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1)
            self.texts[name] = F.normalize(means, dim=-1)
        return self.texts[name]

    def __call__(
        self, image: torch.Tensor, masks: torch.Tensor, boxes: Sequence[Sequence[int]], names: Sequence[str]
    ) -> list[str]:
        """The colours of N objects of an image (3, H, W) in [0, 1].

        masks: (N, H, W), bool. boxes: [x0, y0, x1, y1] in pixels, x1 and y1 exclusive. names: the objects' classes.
        """
        found = []
        for mask, (x0, y0, x1, y1), name in zip(masks, boxes, names, strict=True):
            crop = torch.where(mask, image, BACKGROUND)[:, y0:y1, x0:x1]
            similarity = self.clip.image_features(crop[None])[0] @ self.directions(name).T  # crops differ in size
            found.append(COLORS[int(similarity.argmax())])
        return found
