"""The weights of rewards: from a local folder or file, from the hub, or from the package itself."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn

from rewards.base import RewardError, reason

# A checkout has the assets beside the package, an installation inside the package flowalign.
_PLACES = tuple(Path(__file__).parents[2] / place for place in ("assets", "flowalign/assets"))
BUNDLED = "toyworld/"
_loaded: WeakValueDictionary[tuple[object, ...], nn.Module] = WeakValueDictionary()


def bundled(name: str) -> Path:
    """The path of a file or folder that is shipped with the package; RewardError when the installation lacks it."""
    for place in _PLACES:
        if (place / name).exists():
            return place / name
    raise RewardError(f"the installation lacks assets/{name}; reinstall flowalign")


def located(model: str) -> str:
    """The path of a bundled name ("toyworld/judges/clip"); any other path or hub id unchanged."""
    return str(bundled(model)) if model.startswith(BUNDLED) and not Path(model).exists() else model


def whole(load: Callable[..., Any], *place: Any, **options: Any) -> Any:
    """The network that `load`, a `from_pretrained`, loads from a folder or hub id; ValueError unless it is complete.

    `from_pretrained` only warns when it draws a weight at random that the files lack or have in another shape, and when
    it leaves out layers beyond those that the configuration counts. Tied weights and computed buffers may be absent.
    """
    # With `ignore_mismatched_sizes` the error below can name the weight; the libraries' own error does not.
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


def shared(load: Callable[[], Any], *key: object) -> Any:
    """The network that `load` loads; users that give the same key share it for as long as one of them lives."""
    network = _loaded.get(key)
    if network is None:
        network = _loaded[key] = load()
    return network


def checkpoint(file: str, reward: str) -> Path:
    """The path of a weights file, given as a path, a bundled name or "organisation/repository/file" on the hub.

    Raises RewardError that names `reward` when there is no such file.
    """
    path = Path(located(file)).expanduser()
    if path.is_file():
        return path
    parts = file.split("/")
    if len(parts) < 3 or not all(parts):
        raise RewardError(
            f"reward {reward!r}: there is no file {file}; a file on the hub is written ORGANISATION/REPO/FILE"
        )
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except Exception as error:
        raise RewardError(
            f"reward {reward!r}: {file} is no local file and cannot be fetched from the hub: {reason(error)}"
        ) from error


def read_weights(file: str, reward: str) -> dict[str, torch.Tensor]:
    """The tensors, in float32, of the safetensors or torch file that `checkpoint` finds; "state_dict" is unwrapped."""
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
        raise RewardError(f"reward {reward!r}: {path} holds no named tensors")
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
