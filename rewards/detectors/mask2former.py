"""GenEval's detector without mmdet: Mask2Former (Cheng et al., 2112.01527) from transformers, with colours by CLIP.

What differs from the published script: the weights are Facebook's, while mmdet trained its own; detections whose score
is near a threshold may therefore differ.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch.nn import functional as F
from transformers import AutoConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

from rewards.backbones.weights import bundled, whole
from rewards.base import RewardError, at_least_one, reason
from rewards.detectors.base import SCORE_THRESHOLD
from rewards.detectors.colors import OPENAI, ColorClassifier
from rewards.devices import chosen_device
from rewards.media import as_levels

PUBLISHED = "facebook/mask2former-swin-small-coco-instance"
NAME = "mask2former"
OBJECT_NAMES = "geneval/object_names.txt"
_GRID = (384, 384)  # transformers thresholds masks at this size, whatever the image's size
_ASPECT = 1333 / 800  # the limit of the longer side over the shorter side in these models' own evaluation
_WEIGHTS = (("*.json", "*.safetensors"), ("*.json", "*.bin"))


class Instances(NamedTuple):
    """The N instances found in one image, best first: class indices, scores in (0, 1], boxes and masks.

    boxes: N of [x0, y0, x1, y1] in pixels, the mask's extent as in mmdet, where x1 is the last column + 1 and y1 the
    last row + 1. masks: (N, H, W), bool.
    """

    labels: list[int]
    scores: list[float]
    boxes: list[list[int]]
    masks: torch.Tensor


def instances(class_logits: torch.Tensor, mask_logits: torch.Tensor, size: tuple[int, int]) -> Instances:
    """The instances that a model's queries find in one image of `size` (height, width) pixels.

    It equals `Mask2FormerImageProcessor.post_process_instance_segmentation` at threshold 0, but stays on the device.
    From all pairs of Q queries and C classes it takes the Q likeliest. A pair's score is the class's probability times
    the mean probability inside its mask. Instances with score 0 or without a pixel are left out.

    class_logits: (Q, C + 1), the last of them "no object". mask_logits: (Q, h, w).
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    likeliest, chosen = probabilities.flatten().topk(len(probabilities))
    labels = chosen % probabilities.shape[1]
    logits = F.interpolate(mask_logits.float()[None], _GRID, mode="bilinear", align_corners=False)[0]
    logits = logits[chosen // probabilities.shape[1]]
    inside = (logits > 0).float()
    certainty = (logits.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    scores = likeliest * certainty
    masks = F.interpolate(inside[None], size, mode="nearest")[0] > 0
    order = scores.argsort(descending=True, stable=True)
    order = order[(scores > 0)[order] & masks.flatten(1).any(1)[order]]
    masks = masks[order]
    rounded = [round(score, 6) for score in scores[order].tolist()]
    return Instances(labels[order].tolist(), rounded, extents(masks), masks)


def extents(masks: torch.Tensor) -> list[list[int]]:
    """Boxes [x0, y0, x1, y1] in pixels, x1 and y1 exclusive, of masks (N, H, W), none of which may be empty."""
    sides = []
    for axis in (1, 2):  # the columns, then the rows, in which the mask has a pixel
        filled = masks.any(axis).int()
        sides.append((filled.argmax(1), filled.shape[1] - filled.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], 1).tolist()


class Mask2Former:
    """A detector for `rewards.geneval`: objects of COCO's 80 classes under GenEval's names, with their colours.

    It returns every instance that the model finds, at most one per query. Those above GenEval's score of 0.3 get a
    colour; the others, which no verdict uses, get "".

    model: a hub id or a transformers folder. clip: the model that finds the colours, as in `ColorClassifier`.
    names: a file with one class a line, in the order of the model's classes (default: GenEval's names if the model has
        COCO's 80 classes, else the model's own).
    shortest_edge: pixels to which an image's shorter side is resized: 800 in GenEval's script and in the models' own
        evaluation. None takes the size of the model's image processor, 384 x 384 for the published model.
    batch_size: images that the model takes at once. device: where it runs (default: the accelerator, if there is one).
    """

    def __init__(
        self,
        model: str = PUBLISHED,
        clip: str = OPENAI,
        names: str | None = None,
        shortest_edge: int | None = 800,
        batch_size: int = 8,
        device: str | torch.device | None = None,
    ):
        at_least_one(NAME, shortest_edge=shortest_edge, batch_size=batch_size)
        self.device = chosen_device(device)
        self.folder = _folder(model)
        network, self.processor = _load(self.folder, model)
        labels = tuple(network.config.id2label[index] for index in range(network.config.num_labels))
        self.names = class_names(labels) if names is None else _read_names(names, len(labels))
        self.network = network.to(self.device)
        self.colors = ColorClassifier(clip, NAME, self.device)
        self.batch_size = batch_size
        self.size = shortest_edge and {"shortest_edge": shortest_edge, "longest_edge": int(shortest_edge * _ASPECT)}
        scale = f"{shortest_edge} pixels" if shortest_edge else "its processor's size"
        self.about = f"{model} at {scale}, colors by {clip}"

    def identity(self) -> dict[str, str]:
        """What its detections depend on: the names of model, size and CLIP, and the SHA-256 of the model's weights.

        Several weights files are hashed one after another, in the order of their names.
        """
        digest = hashlib.sha256()
        for file in _weights(self.folder):
            with file.open("rb") as opened:
                hashlib.file_digest(opened, lambda: digest)
        return {"detector": self.about, "checksum": digest.hexdigest()}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> list[list[dict[str, Any]]]:
        """The detections, best first, in each image of (B, 3, H, W) in [0, 1]; the other images do not change them."""
        return [found for part in images.split(self.batch_size) for found in self._detect(part.to(self.device))]

    def _detect(self, images: torch.Tensor) -> list[list[dict[str, Any]]]:
        options = {"size": self.size} if self.size else {}
        inputs = self.processor(images=as_levels(images), return_tensors="pt", device=self.device, **options)
        outputs = self.network(**inputs.to(self.device))
        size = (images.shape[-2], images.shape[-1])
        columns = zip(images, outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
        return [self._detections(image, instances(classes, masks, size)) for image, classes, masks in columns]

    def _detections(self, image: torch.Tensor, seen: Instances) -> list[dict[str, Any]]:
        names = [self.names[label] for label in seen.labels]
        count = sum(score > SCORE_THRESHOLD for score in seen.scores)
        colors = self.colors(image, seen.masks[:count], seen.boxes[:count], names[:count])
        colors += [""] * (len(names) - count)
        return [
            {"class": name, "box": [float(side) for side in box], "score": score, "color": color}
            for name, box, score, color in zip(names, seen.boxes, seen.scores, colors, strict=True)
        ]


def class_names(labels: Sequence[str]) -> tuple[str, ...]:
    """GenEval's names for COCO's classes, which differ in a few ("tv remote"); for other classes, `labels` themselves.

    Labels count as COCO's if there are 80, and they are nameless or most equal GenEval's at the same index.
    """
    wanted = tuple(bundled(OBJECT_NAMES).read_text(encoding="utf-8").splitlines())
    unnamed = [f"LABEL_{index}" for index in range(len(wanted))]
    if len(labels) != len(wanted):
        return tuple(labels)
    equal = sum(label == name for label, name in zip(labels, wanted, strict=True))
    return wanted if list(labels) == unnamed or 2 * equal > len(wanted) else tuple(labels)


def _read_names(file: str, count: int) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"detector {NAME!r}: names {file} cannot be read: {reason(error)}") from error
    if len(names) != count or not all(names):
        raise RewardError(
            f"detector {NAME!r}: {file} must have {count} lines, a name for each class; it has {len(names)}"
        )
    return names


def _folder(model: str) -> Path:
    """The folder of a model's files; they are fetched from the hub unless `model` is a folder."""
    if Path(model).is_dir():
        return Path(model)
    try:
        for patterns in _WEIGHTS:
            folder = Path(snapshot_download(model, allow_patterns=list(patterns)))
            if _weights(folder):
                break
    except Exception as error:
        raise RewardError(
            f"detector {NAME!r}: {model!r} is no local folder and cannot be fetched from the hub: {reason(error)}"
        ) from error
    return folder


def _weights(folder: Path) -> list[Path]:
    """The weights files that transformers loads from a folder."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _load(folder: Path, model: str) -> tuple[Any, Any]:
    """The model, in float32 for inference, and its image processor."""
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind != NAME:
            raise ValueError(f"it is a {kind}, not a {NAME}")
        network = whole(Mask2FormerForUniversalSegmentation.from_pretrained, folder, dtype=torch.float32)
        processor = Mask2FormerImageProcessor.from_pretrained(folder)
    except Exception as error:
        raise RewardError(f"detector {NAME!r}: {model!r} cannot be loaded: {reason(error)}") from error
    return network.eval().requires_grad_(False), processor
