"""The algorithms, by the name a recipe gives them: one file per paper."""

from flowalign.algorithms.base import Algorithm, Batch, Noised, Transition
from flowalign.algorithms.crd import CRD
from flowalign.algorithms.flow_grpo import FlowGRPO
from flowalign.algorithms.gdro import GDRO
from flowalign.algorithms.marble import Marble
from flowalign.algorithms.nft import NFT
from flowalign.algorithms.prdp import PRDP

ALGORITHMS: dict[str, type[Algorithm]] = {
    kind.model_fields["name"].default: kind for kind in (FlowGRPO, NFT, GDRO, CRD, Marble, PRDP)
}

__all__ = [
    "ALGORITHMS",
    "CRD",
    "GDRO",
    "NFT",
    "PRDP",
    "Algorithm",
    "Batch",
    "FlowGRPO",
    "Marble",
    "Noised",
    "Transition",
]
