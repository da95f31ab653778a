"""What a detector is to GenEval: what it finds, and how sure it must be."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SCORE_THRESHOLD = 0.3  # a detection must be surer than this

Detection = Mapping[str, Any]
Detector = Callable[[torch.Tensor], list[list[Detection]]]
