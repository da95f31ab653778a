"""Out of memory: an error that names the phase of the run and the setting to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flowalign.config import Recipe
from flowalign.config.base import UserError


@contextmanager
def out_of_memory_explained(phase: str, recipe: Recipe) -> Iterator[None]:
    """Turn a device's torch.OutOfMemoryError in a `phase` (rollout, reward, train, evaluation) into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory in the {phase} phase with {_what_to_lower(phase, recipe)}; `flowalign plan` says what fits"
        ) from error


def _what_to_lower(phase: str, recipe: Recipe) -> str:
    """The setting with its value, and what to change."""
    if phase == "train":
        if recipe.train.micro_batch > 1:
            return f"train.micro_batch {recipe.train.micro_batch}; lower it"
        if not recipe.model.gradient_checkpointing:
            return f"train.micro_batch {recipe.train.micro_batch}, the least; set model.gradient_checkpointing=true"
        return f"train.micro_batch {recipe.train.micro_batch}, the least; lower model.lora.rank or the image size"
    if phase == "evaluation":
        return f"evaluation.batch {recipe.evaluation.batch}; lower it"
    if phase == "reward":
        return f"rollout.batch {recipe.rollout.batch}; lower it, or serve the rewards elsewhere with `flowalign serve`"
    return f"rollout.batch {recipe.rollout.batch}; lower it"
