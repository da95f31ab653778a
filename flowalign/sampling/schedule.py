"""Sigma schedules: even values, shifted towards noise as the model was trained (Esser et al. 2024, section 5.3.2)."""

from __future__ import annotations

from flowalign.lazy import torch


def shifted(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """s sigma / (1 + (s - 1) sigma): with s above 1 more of the steps are at high noise; 1 stays 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_schedule(
    steps: int, shift: float = 1.0, *, lowest: float | None = None, terminal: float | None = None
) -> torch.Tensor:
    """The noise levels (steps + 1,), float32, from exactly 1 down to 0.

    Before the shift they are even from 1 to `lowest`, by default 1 / steps, and 0 comes after it. With `terminal` they
    are then stretched so that the last one above 0 is that value (LTX-Video).
    """
    even = torch.linspace(1, 1 / steps if lowest is None else lowest, steps, dtype=torch.float64)
    sigmas = shifted(even, shift)
    if terminal is not None and steps > 1:
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()
