"""Where a reward's weights come from: a folder or file of one's own, the hub, or the package itself."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from rewards.base import RewardError

# In a checkout beside the package, in an installation inside its sister package.
_PLACES = tuple(Path(__file__).parent.parent / place for place in ("assets", "flowalign/assets"))
BUNDLED = "toyworld/"
_given: ContextVar[torch.device | None] = ContextVar("device", default=None)


def bundled(name: str) -> Path:
    """The path of a file or folder that comes with the package; RewardError when the installation lacks it."""
    for place in _PLACES:
        if (place / name).exists():
            return place / name
    raise RewardError(f"the installation lacks assets/{name}; reinstall flowalign")


def located(model: str) -> str:
    """A bundled name ("toyworld/judges/clip") as its path; any other path or hub id as it is."""
    return str(bundled(model)) if model.startswith(BUNDLED) and not Path(model).exists() else model


def chosen_device(device: str | torch.device | None = None) -> torch.device:
    """`device` with its index, but a processor without; None: that of `on_device`, else the accelerator's current one.

    An index tells the devices of several processes apart, in what is loaded for one and kept for others too.
    """
    found = _given.get() if device is None else torch.device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found = found or accelerator or torch.device("cpu")
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


def whole(load: Callable[..., Any], *place: Any, **options: Any) -> Any:
    """The network that `load`, a `from_pretrained`, makes of a folder or hub id; ValueError if it made up a weight.

    A weight that the files lack, or have in another shape, is drawn at random, and a layer beyond those that the
    configuration counts is left out: each with no more than a warning. Tied weights and buffers that are computed are
    rightly absent.
    """
    # A shape that differs is reported below, where the libraries would raise without its name.
    network, found = load(*place, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    own = {name for name, _ in network.named_parameters()}
    own |= {name for name, _ in network.named_buffers() if name.endswith(("running_mean", "running_var"))}
    layers = {re.sub(r"\d+", "#", name) for name in own}
    mismatched = {one if isinstance(one, str) else one[0] for one in found.get("mismatched_keys", ())}
    beyond = {name for name in found["unexpected_keys"] if re.sub(r"\d+", "#", name) in layers}
    for names, fault in (
        (set(found["missing_keys"]) & own, "the weights lack"),
        (mismatched, "the weights have another shape than the configuration says for"),
        (beyond, "the weights hold more layers than the configuration says, such as"),
    ):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise ValueError(f"{fault} {first}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
    return network
