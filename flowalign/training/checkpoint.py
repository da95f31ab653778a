"""Checkpoints that appear whole or not at all, and from which a run goes on exactly.

A checkpoint is a folder: weights, snapshots and optimizer state as safetensors, counters as JSON, and a checksum of
each file, since safetensors notices a torn file but not a flipped bit. Randomness is counted, so there is no generator
state to keep.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flowalign.config.base import UserError
from flowalign.disk.files import (
    checksum,
    remove_folder,
    remove_partial_folders,
    replace_json,
    replace_text,
    replaced_folder,
    sync,
)
from flowalign.disk.tensors import save_tensors
from flowalign.policies.base import Policy

SUMS = "SHA256SUMS"  # in the format that `sha256sum --check` reads

_SEPARATOR = "/"
_NUMBER = "#"  # ends the name of a tensor that stores a plain number
Restore = Callable[[Mapping[str, torch.Tensor]], None]


def checkpoint_path(folder: Path, step: int) -> Path:
    """The path of the checkpoint after `step` finished training steps."""
    return folder / f"step_{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    numbers = {path: path.name.removeprefix("step_") for path in folder.glob("step_*") if path.is_dir()}
    return sorted((path for path, number in numbers.items() if number.isdecimal()), key=lambda path: int(numbers[path]))


def save_checkpoint(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    memory: Mapping[str, Mapping[str, torch.Tensor]],
    counters: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `counters["step"]`, then remove all but the last `keep`; returns its path.

    memory: the state of the algorithm and the rewards, one file of tensors for each name. An existing checkpoint of
    the step is left alone: it holds the same state, and replacing it would leave a moment without one.

    Raises UserError when the disk refuses it; older checkpoints are then untouched.
    """
    target = checkpoint_path(folder, counters["step"])
    if target.is_dir():
        return target
    snapshots = {
        f"{name}{_SEPARATOR}{key}": tensor for name, kept in policy.snapshots.items() for key, tensor in kept.items()
    }
    state, groups = _optimizer_tensors(optimizer)
    try:
        remove_partial_folders(folder)
        files = {"weights": policy.trainable_state(), "snapshots": snapshots, "optimizer": state, **memory}
        with replaced_folder(target) as partial:
            for name, tensors in files.items():
                save_tensors(partial / f"{name}.safetensors", tensors)
            replace_json(partial / "state.json", {"counters": dict(counters), "optimizer": groups}, indent=None)
            sums = [f"{checksum(path)}  {path.name}\n" for path in sorted(partial.iterdir())]
            replace_text(partial / SUMS, "".join(sums))
            sync(*partial.iterdir(), partial)
        sync(folder)
    except (OSError, SafetensorError) as error:
        last = checkpoints(folder)
        kept = f"the last good one is {last[-1].name}" if last else "there is none yet"
        raise UserError(f"cannot write a checkpoint to {folder}: {error}; {kept}") from error
    for old in checkpoints(folder)[:-keep]:
        remove_folder(old)
    return target


def load_checkpoint(
    path: Path, policy: Policy, optimizer: torch.optim.Optimizer, memory: Mapping[str, Restore]
) -> dict[str, Any]:
    """Restore weights, snapshots and optimizer, call each of `memory` with its tensors, and return the counters.

    Raises UserError for a checkpoint that is damaged or of another model.
    """
    with _explained(path):
        _verify(path, "weights", "snapshots", "optimizer", *memory)
        contents = json.loads((path / "state.json").read_text(encoding="utf-8"))
        _load_policy_state(path, policy)
        _restore_optimizer(optimizer, load_file(path / "optimizer.safetensors"), contents["optimizer"])
        for name, restore in memory.items():
            restore(load_file(path / f"{name}.safetensors"))
    counters: dict[str, Any] = contents["counters"]
    return counters


def load_last_weights(folder: Path, policy: Policy, rewards: Restore) -> str:
    """Load the weights of a run's last checkpoint into the policy, the average (EMA) if it has one; returns its name.

    rewards: called with the state of the run's rewards. Raises UserError without a checkpoint in the folder, and as
    `load_checkpoint` does.
    """
    found = checkpoints(folder)
    if not found:
        raise UserError(f"{folder.parent} has no checkpoint yet")
    path = found[-1]
    with _explained(path):
        _verify(path, "weights", "snapshots", "rewards")
        _load_policy_state(path, policy)
        rewards(load_file(path / "rewards.safetensors"))
    if "ema" in policy.snapshots:
        policy.load_trainable_state(policy.snapshots["ema"])
    return path.name


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"checkpoint {path} cannot be used ({error}); remove that folder to go on from an older one"
        ) from error


def _verify(path: Path, *names: str) -> None:
    """Raises ValueError unless the counters and the named files of tensors match their checksums."""
    lines = (path / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    sums = {file: written for written, _, file in (line.partition("  ") for line in lines)}
    for file in ("state.json", *(f"{name}.safetensors" for name in names)):
        if checksum(path / file) != sums.get(file):
            raise ValueError(f"{file} does not match {SUMS}")


def _load_policy_state(path: Path, policy: Policy) -> None:
    policy.load_trainable_state(load_file(path / "weights.safetensors"), begins=False)
    policy.snapshots = {}
    for name, tensor in load_file(path / "snapshots.safetensors").items():
        snapshot, key = name.split(_SEPARATOR, 1)
        policy.snapshots.setdefault(snapshot, {})[key] = tensor.to(policy.device)
    policy.find_current()


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The optimizer's state as a flat mapping, and its parameter groups.

    bitsandbytes nests its state, holds plain numbers in it, and shares tables between parameters.
    """
    contents = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for index, state in contents["state"].items():
        inner = {k: v for value in state.values() if isinstance(value, dict) for k, v in value.items()}
        for name, value in (state | inner).items():
            if isinstance(value, torch.Tensor):
                place = value.untyped_storage().data_ptr()
                tensors[f"{index}{_SEPARATOR}{name}"] = value.clone() if place in seen else value
                seen.add(place)
            elif not isinstance(value, dict):
                tensors[f"{index}{_SEPARATOR}{name}{_NUMBER}"] = torch.tensor(value)
    return tensors, contents["param_groups"]


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], groups: list[dict[str, Any]]
) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, key = name.split(_SEPARATOR, 1)
        kept = value.item() if key.endswith(_NUMBER) else value
        state.setdefault(int(index), {})[key.removesuffix(_NUMBER)] = kept
    optimizer.load_state_dict({"state": state, "param_groups": groups})
