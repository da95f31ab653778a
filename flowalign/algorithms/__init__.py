"""The algorithms, by the name a recipe gives them: one file per paper."""

from flowalign.algorithms.base import Algorithm, Batch, Transition
from flowalign.algorithms.flow_grpo import FlowGRPO

ALGORITHMS: dict[str, type[Algorithm]] = {"flow_grpo": FlowGRPO}

__all__ = ["ALGORITHMS", "Algorithm", "Batch", "FlowGRPO", "Transition"]
