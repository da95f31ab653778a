"""Classifier-free guidance between two velocities (Ho and Salimans 2022), as diffusers' pipelines compute it."""

from __future__ import annotations

from typing import Literal

from flowalign.lazy import torch

GuidanceForm = Literal["plain", "rescaled"]


def guided(
    positive: torch.Tensor, negative: torch.Tensor, guidance: float, form: GuidanceForm = "plain"
) -> torch.Tensor:
    """The guided velocity v_negative + guidance (v_positive - v_negative), (B, ...), from velocities (B, ...).

    The form "rescaled" gives it the norm of v_positive along the last dimension, the channels of a token, as
    Qwen-Image's pipeline does; a guided velocity of 0 stays 0.
    """
    velocity = negative + guidance * (positive - negative)
    if form == "plain":
        return velocity
    length = velocity.norm(dim=-1, keepdim=True)
    scale = positive.norm(dim=-1, keepdim=True) / length.where(length > 0, torch.ones_like(length))
    return velocity * scale
