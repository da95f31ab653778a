"""The device that what is loaded goes to: said once around it, with its index."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_given: ContextVar[torch.device | None] = ContextVar("device", default=None)


def chosen_device(device: str | torch.device | None = None) -> torch.device:
    """`device` with its index, but a processor without; None: that of `on_device`, else the current card, if any.

    Cards of CUDA and ROCm are chosen, as a policy needs; others are used where they are named. An index tells the
    devices of several processes apart, in what is loaded for one and kept for others too.
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
    """That of the innermost `on_device`."""
    return _given.get()


@contextmanager
def on_device(device: str | torch.device) -> Iterator[None]:
    """What is loaded within chooses this device, unless it is told another."""
    token = _given.set(chosen_device(device))
    try:
        yield
    finally:
        _given.reset(token)


def make_current(device: torch.device) -> None:
    """For the thread that calls it: a new one begins on card 0, whatever the others work on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
