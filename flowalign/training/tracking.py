"""The values that a run logs to Accelerate's trackers, such as TensorBoard."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from flowalign.config.base import UserError

_STEP = (
    "loss",
    "grad_norm",
    "learning_rate",
    "zero_spread",
    "trust",
    "skipped_updates",
    "gradient_scale",
    "forwards",
    "minutes",
)


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is not installed; Accelerate would skip it silently."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"run.trackers: {name} is not installed; install it with pip install 'flowalign[{name}]'")


def step_values(line: Mapping[str, Any]) -> dict[str, float]:
    """A training step's metrics as a flat mapping: reward/NAME, unparsable/NAME, seconds/PHASE, loss, grad_norm, ..."""
    values = {name: float(line[name]) for name in _STEP if name in line}
    for name, counts in line.get("answers", {}).items():
        values |= {f"{key}/{name}": float(count) for key, count in counts.items()}
    for section in ("reward", "reward_std", "metrics", "seconds"):
        values |= {f"{section}/{name}": float(value) for name, value in line[section].items()}
    return values


def evaluation_values(summary: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, float]:
    """An evaluation's means as evaluation/NAME, the number of its training prompts, and the number of its alarms."""
    values = {f"evaluation/{name}": float(result["mean"]) for name, result in summary.items()}
    values["evaluation/trained_prompts"] = float(about["trained_prompts"])
    return values | ({"evaluation/alarms": float(len(about["audit"]["alarms"]))} if "audit" in about else {})
