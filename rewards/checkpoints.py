"""Weights of one file, from a path, the hub or the package: read without running anything that is in them."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from rewards.base import RewardError, reason
from rewards.weights import located


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
