"""The types of a detector for GenEval, its colours, and the score from which a detection counts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SCORE_THRESHOLD = 0.3  # a detection counts if its score is above this

Detection = Mapping[str, Any]
Detector = Callable[[torch.Tensor], list[list[Detection]]]
