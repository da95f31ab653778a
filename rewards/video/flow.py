"""Optical flow without a network: OpenCV's DIS (Kroeger et al., "Dense Inverse Search", 2016, arXiv 1603.03590)."""

from itertools import pairwise
from typing import Literal

import cv2
import numpy as np
import torch

Preset = Literal["ultrafast", "fast", "medium"]
_PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}


def flows(frames: torch.Tensor, preset: Preset = "fast") -> torch.Tensor:
    """The motion from each frame to the next, (T - 1, 2, H, W) float32 in pixels: to the right, and down.

    frames: (T, H, W, 3) uint8 RGB. The preset "fast" follows small objects best (medium smooths over them). Raises
    ValueError for fewer than 2 frames, for floats, and for frames of less than 12 pixels.
    """
    if len(frames) < 2:
        raise ValueError(f"optical flow needs 2 frames or more, and the video has {len(frames)}")
    if frames.dtype != torch.uint8 or max(frames.shape[1:3]) < 12:
        raise ValueError(f"optical flow needs uint8 frames of 12 pixels or more, not {frames.dtype} {(*frames.shape,)}")
    search = cv2.DISOpticalFlow.create(_PRESETS[preset])
    shades = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames.cpu().numpy()]
    found = [search.calc(one, other, None) for one, other in pairwise(shades)]  # type: ignore[call-overload]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)
