"""A pipeline's scheduler as the Euler steps that policies take: it gives its shift, never its own values or steps."""

import logging
from functools import cache
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flowalign.config.base import UserError

_log = logging.getLogger(__name__)
_SHIFT = (
    *("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal"),
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
)


class EvenEuler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Euler steps on shifted even sigmas, from 1: what other solvers of flows have as their schedule, but for its ends.

    UniPC's first sigma is .999999, where a stochastic step would add noise of standard deviation 91.
    """

    def set_timesteps(self, num_inference_steps: int | None = None, *args: Any, **kwargs: Any) -> None:
        """As the parent's, with even sigmas where none are given."""
        if num_inference_steps is not None and kwargs.get("sigmas") is None and kwargs.get("timesteps") is None:
            kwargs["sigmas"] = torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        super().set_timesteps(num_inference_steps, *args, **kwargs)


def euler_scheduler(scheduler: Any) -> Any:
    """The scheduler itself if it takes Euler steps of a flow, else one that does, with its shift, and says so once.

    Raises UserError for one of a model that predicts noise, or that counts its time the other way.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        if config.invert_sigmas:
            raise UserError(
                "model.path: its scheduler has invert_sigmas, so 1 is no noise there; that is not supported"
            )
        for spacing in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            if config.get(spacing):
                raise UserError(
                    f"model.path: its scheduler has {spacing}, and no flow is drawn so here; set it to false"
                )
        if config.stochastic_sampling:
            _say("model.path: its scheduler has stochastic_sampling; images are drawn by Euler steps without it")
        return scheduler
    is_flow = name.startswith("FlowMatch") or config.get("use_flow_sigmas", False)
    if not is_flow or config.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise UserError(
            f"model.path: its scheduler is a {name}, by its configuration for a model that predicts no velocity; "
            "give a rectified flow, whose scheduler is a FlowMatchEulerDiscreteScheduler"
        )
    shift = float(config.get("shift", config.get("flow_shift", 1.0)))
    kept = {key: config[key] for key in _SHIFT if key in config}
    how = "a shift by resolution" if kept.get("use_dynamic_shifting") else f"its shift of {shift:g}"
    _say(f"model.path: its scheduler is a {name}; images are drawn by Euler steps with {how}")
    return EvenEuler(shift=shift, **kept)


@cache
def _say(text: str) -> None:
    _log.warning(text)
