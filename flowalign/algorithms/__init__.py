"""The algorithms: one file per paper. Each name below is imported at its first use."""

from typing import TYPE_CHECKING

from rewards.lazy import exports

if TYPE_CHECKING:
    from flowalign.algorithms.base import Algorithm
    from flowalign.algorithms.batches import Batch, NoisedBatch, TransitionBatch
    from flowalign.algorithms.crd import CRD
    from flowalign.algorithms.flow_grpo import FlowGRPO
    from flowalign.algorithms.gdro import GDRO
    from flowalign.algorithms.marble import Marble
    from flowalign.algorithms.nft import NFT
    from flowalign.algorithms.prdp import PRDP

_FROM = {
    "base": ("Algorithm",),
    "batches": ("Batch", "NoisedBatch", "TransitionBatch"),
    "crd": ("CRD",),
    "flow_grpo": ("FlowGRPO",),
    "gdro": ("GDRO",),
    "marble": ("Marble",),
    "nft": ("NFT",),
    "prdp": ("PRDP",),
}

__all__ = [
    "CRD",
    "GDRO",
    "NFT",
    "PRDP",
    "Algorithm",
    "Batch",
    "FlowGRPO",
    "Marble",
    "NoisedBatch",
    "TransitionBatch",
]

__getattr__ = exports(__name__, _FROM)
