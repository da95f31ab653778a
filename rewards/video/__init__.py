"""Formulas of video rewards: pure functions on frames, features, flows and hidden states, and heads of video judges.

A module is imported at the first use of one of its names.
"""

from typing import TYPE_CHECKING

from rewards.lazy import exports

if TYPE_CHECKING:
    from rewards.video.flow import flows
    from rewards.video.formulas import consistency, flickering, is_dynamic, is_static, smoothness
    from rewards.video.heads import HPQAHead, HPSv3Head
    from rewards.video.losses import bradley_terry_with_ties, uncertainty_loss, win_tie_loss
    from rewards.video.motion import MotionBinding, motion_binding
    from rewards.video.totals import VBenchTotal, vbench_total
    from rewards.video.transport import partial_transport, relaxed_transport

_FROM = {
    "flow": ("flows",),
    "formulas": ("consistency", "flickering", "is_dynamic", "is_static", "smoothness"),
    "heads": ("HPQAHead", "HPSv3Head"),
    "losses": ("bradley_terry_with_ties", "uncertainty_loss", "win_tie_loss"),
    "motion": ("MotionBinding", "motion_binding"),
    "totals": ("VBenchTotal", "vbench_total"),
    "transport": ("partial_transport", "relaxed_transport"),
}

__all__ = [
    "HPQAHead",
    "HPSv3Head",
    "MotionBinding",
    "VBenchTotal",
    "bradley_terry_with_ties",
    "consistency",
    "flickering",
    "flows",
    "is_dynamic",
    "is_static",
    "motion_binding",
    "partial_transport",
    "relaxed_transport",
    "smoothness",
    "uncertainty_loss",
    "vbench_total",
    "win_tie_loss",
]

__getattr__ = exports(__name__, _FROM)
