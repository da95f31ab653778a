"""The device that models are loaded to: `on_device` sets it for all loading inside its block."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_given: ContextVar[torch.device | None] = ContextVar("device", default=None)


def chosen_device(device: str | torch.device | None = None) -> torch.device:
    """`device` with its index (the CPU has none); None stands for that of `on_device`, else for the current card.

    That card is one of CUDA or ROCm; other accelerators are used where they are named. The index tells cards apart
    where a loaded model is kept under its device and used again.
    """
    found = _given.get() if device is None else torch.device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found = found or (accelerator if accelerator and accelerator.type == "cuda" else torch.device("cpu"))
    if found.type == "cpu":
        return torch.device("cpu")
    if found.index is None and accelerator is not None and found.type == accelerator.type:
        return torch.device(found.type, torch.accelerator.current_device_index())
    return found


def given_device() -> torch.device | None:
    """The device of the innermost `on_device` block; None outside of one."""
    return _given.get()


@contextmanager
def on_device(device: str | torch.device) -> Iterator[None]:
    """Within this block, `chosen_device` returns `device` where no other device is named."""
    token = _given.set(chosen_device(device))
    try:
        yield
    finally:
        _given.reset(token)


def make_current(device: torch.device) -> None:
    """Sets the calling thread's CUDA device; a new thread begins on card 0, whichever card the other threads use."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
