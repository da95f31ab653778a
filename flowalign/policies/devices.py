"""The device of this process: chosen once, before anything loads, and handed on."""

import torch

from rewards.devices import chosen_device


def own_device() -> torch.device:
    """The graphics card that is current, with its index, or the processor."""
    return chosen_device("cuda" if torch.cuda.is_available() else "cpu")
