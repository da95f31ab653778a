"""Errors about samples that are not finite: since which step, and which settings to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

from flowalign.config import Recipe
from flowalign.config.base import UserError
from flowalign.rollout.finite import NotFinite


@contextmanager
def not_finite_explained(recipe: Recipe, step: int, trained: bool) -> Iterator[None]:
    """Turn NotFinite into a UserError that names the step of the run and the settings to lower.

    trained: whether the run has trained the policy; the settings to change differ before that.
    """
    try:
        yield
    except NotFinite as error:
        if not trained:
            noise, guidance = recipe.rollout.noise_level, recipe.rollout.guidance
            ways = [f"lower rollout.noise_level ({noise:g})"] if noise else []
            ways += [f"lower rollout.guidance ({guidance:g})"] if guidance > 1 else []
            ways += ["set model.dtype=fp32"] if recipe.model.dtype != "fp32" else []
            ways.append("check that the model's files are complete")
            raise UserError(f"the model's {error.what} before any training; {' or '.join(ways)}") from error
        raise UserError(
            f"the policy has diverged: its {error.what} from step {step} on, and no reward is at fault; "
            f"{what_to_lower(recipe)}, then begin anew or go on from an older checkpoint"
        ) from error


def what_to_lower(recipe: Recipe) -> str:
    """The settings that make updates smaller, with their values; in half precision, bf16 too."""
    train, algorithm = recipe.train, recipe.algorithm
    settings = {"train.learning_rate": train.learning_rate, "train.max_grad_norm": train.max_grad_norm}
    for name in algorithm.strength:
        if value := getattr(algorithm, name):
            settings[f"algorithm.{name}"] = value
    if recipe.rollout.guidance > 1:
        settings["rollout.guidance"] = recipe.rollout.guidance
    lower = " or ".join(f"{name} ({value:g})" for name, value in settings.items())
    return f"lower {lower}" + (", or set model.dtype=bf16" if recipe.model.dtype == "fp16" else "")
