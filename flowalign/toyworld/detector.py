"""The exact judge of the embedded world: it finds the boxes, classes and colours of the shapes in any image.

Pixels that differ from the border's median colour are ink. A connected part of ink is an object if its silhouette
agrees with the template of a class and its inner colour is near one of the palette.
"""

import functools
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from flowalign.toyworld.render import PALETTE, SHAPES, coverage
from rewards.media import as_levels

INK_DIFFERENCE = 45.0  # 8-bit levels of the largest channel's difference
MIN_AREA = 28  # pixels
MIN_IOU = 0.72
MAX_COLOR_DISTANCE = 80.0  # 8-bit levels, Euclidean over the channels
MAX_STRETCH = 1.3  # a silhouette's proportions relative to its template's
_TEMPLATE = 24  # pixels of a template's side


def _silhouette(mask: np.ndarray) -> tuple[np.ndarray, float]:
    """A soft mask (h, w) in [0, 1], cropped to its ink and resized to the template's side, and its width / height."""
    ys, xs = np.nonzero(mask > 0.5)  # the half-covered rim is left out
    mask = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    image = Image.fromarray(mask.astype(np.float32)).resize((_TEMPLATE, _TEMPLATE), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32), mask.shape[1] / mask.shape[0]


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """The classes' silhouettes (7, 24, 24) and their width / height (7,)."""
    silhouettes, aspects = zip(*(_silhouette(coverage(shape, 96)) for shape in SHAPES), strict=True)
    return np.stack(silhouettes), np.array(aspects)


def detect(image: np.ndarray) -> list[dict[str, Any]]:
    """Detections in one image (H, W, 3) of 8-bit levels: class, box in pixels, score 1.0, colour, center and area.

    The last two, in pixels, weigh a pixel by how far the object covers it, so they are finer than the box.
    """
    levels = image.astype(np.float32)
    border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    difference = np.abs(levels - np.median(border, axis=0)).max(axis=-1)
    labels, _ = ndimage.label(difference > INK_DIFFERENCE)
    found = []
    for index, region in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[region] == index
        if mask.sum() < MIN_AREA:
            continue
        soft = _covered(difference[region] * mask)
        name = _shape_of(soft)
        color = _color_of(levels[region], mask)
        if name and color:
            rows, columns = region
            box = [float(columns.start), float(rows.start), float(columns.stop), float(rows.stop)]
            seen = {"class": name, "box": box, "score": 1.0, "color": color}
            found.append(seen | {"center": _center(soft, box), "area": float(soft.sum())})
    return found


def _covered(difference: np.ndarray) -> np.ndarray:
    """How far an object covers each pixel, in [0, 1], from the object's difference to the background."""
    soft: np.ndarray = np.clip(difference / max(float(np.percentile(difference[difference > 0], 80)), 1.0), 0, 1)
    return soft


def _center(soft: np.ndarray, box: list[float]) -> list[float]:
    height, width = soft.shape
    x, y = soft.sum(axis=0) @ np.arange(width), soft.sum(axis=1) @ np.arange(height)
    return [box[0] + 0.5 + float(x / soft.sum()), box[1] + 0.5 + float(y / soft.sum())]


def _shape_of(soft: np.ndarray) -> str | None:
    silhouettes, aspects = _templates()
    own, aspect = _silhouette(soft)
    shared = np.minimum(silhouettes, own).sum(axis=(1, 2))
    iou = shared / np.maximum(silhouettes, own).sum(axis=(1, 2))
    stretch = aspect / aspects
    iou[np.maximum(stretch, 1 / stretch) > MAX_STRETCH] = 0
    best = int(iou.argmax())
    return SHAPES[best] if iou[best] >= MIN_IOU else None


def _color_of(levels: np.ndarray, mask: np.ndarray) -> str | None:
    inner = ndimage.binary_erosion(mask, structure=np.ones((3, 3)))
    color = np.median(levels[inner if inner.sum() >= 6 else mask], axis=0)
    distances = {name: float(np.linalg.norm(color - np.asarray(rgb))) for name, rgb in PALETTE.items()}
    name = min(distances, key=lambda n: distances[n])
    return name if distances[name] < MAX_COLOR_DISTANCE else None


class ExactDetector:
    """`detect` for a batch of images (B, 3, H, W) in [0, 1]: the embedded world's detector for GenEval."""

    names = SHAPES

    def identity(self) -> dict[str, str]:
        """The detector's name in results; there are no weights to check."""
        return {"detector": f"{type(self).__module__}:{type(self).__name__}", "checksum": "exact"}

    def __call__(self, images: torch.Tensor) -> list[list[dict[str, Any]]]:
        """One list of detections per image."""
        levels = as_levels(images).permute(0, 2, 3, 1).float().cpu().numpy()
        return [detect(image) for image in levels]
