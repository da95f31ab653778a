"""Where a reward's weights come from: a folder or file of one's own, the hub, or the package itself."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from rewards.base import RewardError, reason

# In a checkout beside the package, in an installation inside its sister package.
_PLACES = tuple(Path(__file__).parents[2] / place for place in ("assets", "flowalign/assets"))
BUNDLED = "toyworld/"


def bundled(name: str) -> Path:
    """The path of a file or folder that comes with the package; RewardError when the installation lacks it."""
    for place in _PLACES:
        if (place / name).exists():
            return place / name
    raise RewardError(f"the installation lacks assets/{name}; reinstall flowalign")


def located(model: str) -> str:
    """A bundled name ("toyworld/judges/clip") as its path; any other path or hub id as it is."""
    return str(bundled(model)) if model.startswith(BUNDLED) and not Path(model).exists() else model


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


def checkpoint(file: str, reward: str) -> Path:
    """The path of a weights file: a path, a bundled name, or "organisation/repository/file" on the hub.

    Raises RewardError, in the name of `reward`, when there is no such file.
    """
    path = Path(located(file)).expanduser()
    if path.is_file():
        return path
    parts = file.split("/")
    if len(parts) < 3 or not all(parts):
        raise RewardError(
            f"reward {reward!r}: there is no file {file}, and a file on the hub is ORGANISATION/REPO/FILE"
        )
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except Exception as error:
        raise RewardError(
            f"reward {reward!r}: {file} is neither a file nor to be had from the hub: {reason(error)}"
        ) from error


def read_weights(file: str, reward: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors or torch file that `checkpoint` finds, in float32; also those under "state_dict"."""
    path = checkpoint(file, reward)
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise RewardError(f"reward {reward!r}: {path} cannot be read as weights: {reason(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise RewardError(f"reward {reward!r}: {path} holds no tensors by name")
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
