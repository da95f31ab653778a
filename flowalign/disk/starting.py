"""Whether a run may begin or resume in its folder: what it holds, which process trains in it, what has changed.

The module imports nothing heavy, so that a user learns of an occupied folder before anything loads.
"""

import errno
import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from weakref import finalize

from flowalign.config import Recipe, load_recipe
from flowalign.config.base import UserError
from flowalign.disk.about import command_line, now
from flowalign.disk.files import PARTIAL, remove

# Settings that a resumed run may change: when it ends, and how a step is computed, but not its result. Of the section
# `run` all settings but the seed may change.
_MAY_CHANGE = {
    *(("train", "steps"), ("train", "idle_steps"), ("train", "micro_batch"), ("rollout", "batch")),
    *(("evaluation", "batch"), ("model", "gradient_checkpointing"), ("model", "cache_conditions")),
}
_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # disks without locks; there the user must take care
_OURS = (  # all that a run writes
    *("recipe.yaml", "run.json", "inputs.json", "metrics.jsonl", "report.html"),
    *("checkpoints", "evaluations", "samples", "lora", "best", "best_unhacked", "profile"),
)


def check_start(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> list[str]:
    """Raises UserError unless the recipe's run may begin in its folder or, with `resume`, go on there.

    A run that has trained is replaced only with `overwrite`. A folder that holds something other than a run is never
    replaced. Returns the settings that a resumed run changes, each as "key (before -> after)".
    """
    folder = recipe.folder
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite begins it anew; give only one of them")
    FolderLock.check(folder)
    _check_disk(folder)
    if resume:
        return _check_resume(folder, recipe)
    if _is_free(folder):
        return []
    if not _is_run(folder):
        raise UserError(f"{folder} exists and is not a run folder; set run.folder to another place")
    if _has_trained(folder) and not overwrite:
        raise UserError(
            f"{folder} already holds a run; go on with --resume, begin it anew with --overwrite, or set run.folder to "
            "another place"
        )
    return []


def _check_disk(folder: Path) -> None:
    """Raises UserError when the folder cannot be written to. It tries, since permissions alone do not tell."""
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=PARTIAL, dir=place))
    except OSError as error:
        raise UserError(f"cannot write to run folder {folder}: {place}: {error.strerror or error}") from error


def _check_resume(folder: Path, recipe: Recipe) -> list[str]:
    saved = folder / "recipe.yaml"
    if not saved.is_file():
        if _is_run(folder):
            raise UserError(f"{folder} has lost its recipe.yaml; put the run's recipe back there to go on")
        raise UserError(f"{folder} holds no run to resume; leave --resume out to begin one")
    changes = refuse_changes(load_recipe(saved), recipe)
    info = read_info(folder)
    for file in sorted(folder.glob("evaluations/step_*.json")):
        read_json(file, "to go on without that evaluation")
    if ("checkpoint" in info or "finished" in info) and not _has_checkpoints(folder):
        raise UserError(
            f"the run in {folder} has lost its checkpoints/ and cannot go on; begin it anew with --overwrite"
        )
    return changes


def _is_free(folder: Path) -> bool:
    """Whether the folder is missing, empty, or holds only what a killed run left half-written."""
    if not folder.is_dir():
        return not folder.exists()
    return all(path.name == _LOCK or path.name.startswith(PARTIAL) for path in folder.iterdir())


def _is_run(folder: Path) -> bool:
    """Whether a run wrote the folder; a recipe.yaml alone may be the user's own."""
    try:
        return "versions" in json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return _has_checkpoints(folder)


def _has_trained(folder: Path) -> bool:
    """Whether the run in the folder has finished a training step."""
    metrics = folder / "metrics.jsonl"
    return _has_checkpoints(folder) or (metrics.is_file() and metrics.stat().st_size > 0)


def _has_checkpoints(folder: Path) -> bool:
    return any(path.is_file() for path in folder.glob("checkpoints/step_*/state.json"))


def read_info(folder: Path) -> dict[str, Any]:
    """The contents of run.json, empty without the file. Raises UserError when it is damaged."""
    return read_json(folder / "run.json", "and the run writes it anew")


def read_json(path: Path, purpose: str) -> dict[str, Any]:
    """The JSON object in a file, empty without the file. Raises UserError when the file is damaged.

    purpose: the end of the error's sentence, after "remove it".
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it {purpose}") from error
    return found


def clear(folder: Path) -> None:
    """Remove what runs write into a folder, and nothing else."""
    for path in [folder / name for name in _OURS] + list(folder.glob(f"{PARTIAL}*")):
        remove(path)


class FolderLock:
    """This process's lock on a folder that it trains in; the lock ends with the process at the latest.

    It is a POSIX lock: a forked child does not inherit it, and it works between machines that share a disk.
    """

    _held: ClassVar[dict[Path, tuple[int, int, int]]] = {}  # file: (process, descriptor, id of the last FolderLock)

    def __init__(self, folder: Path):
        """Raises UserError when another process has the lock, OSError when the folder cannot be written to."""
        self._file = (folder / _LOCK).resolve()
        process, descriptor, _ = self._held.get(self._file, (0, -1, 0))
        if process != os.getpid():  # otherwise an earlier run of this process hands it over
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            _take(descriptor, fcntl.LOCK_EX, folder)
            os.ftruncate(descriptor, 0)
            os.write(
                descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now()}: {command_line()}".encode()
            )
        self._held[self._file] = (os.getpid(), descriptor, id(self))
        self.release = finalize(self, _release, self._held, self._file, id(self))

    @classmethod
    def check(cls, folder: Path) -> None:
        """Raises UserError when another process trains in the folder."""
        file = (folder / _LOCK).resolve()
        if not file.is_file() or cls._held.get(file, (0,))[0] == os.getpid():
            return
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            return  # writing to the folder reports the fault
        try:
            _take(descriptor, fcntl.LOCK_SH, folder)
        finally:
            os.close(descriptor)


def _take(descriptor: int, kind: int, folder: Path) -> None:
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
        raise UserError(
            f"{folder} is in use by {holder}; wait until that ends, or set run.folder to another place"
        ) from None


def _release(held: dict[Path, tuple[int, int, int]], file: Path, owner: int) -> None:
    process, descriptor, last = held.get(file, (0, -1, 0))
    if process == os.getpid() and last == owner:
        del held[file]
        os.close(descriptor)


def refuse_changes(saved: Recipe, wanted: Recipe) -> list[str]:
    """Raises UserError unless a run of the recipe `saved` may go on with the recipe `wanted`; returns the changes."""
    before, after = _flat(saved.model_dump(mode="json")), _flat(wanted.model_dump(mode="json"))
    differing = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    changes = {key: f"{'.'.join(key)} ({before.get(key)} -> {after.get(key)})" for key in differing}
    refused = [key for key in differing if key not in _MAY_CHANGE and (key[0] != "run" or key == ("run", "seed"))]
    if refused:
        raise UserError(
            f"the run in {wanted.folder} was begun with another recipe; differing: "
            f"{', '.join(changes[key] for key in refused)}; `flowalign train {wanted.folder} --resume` keeps its recipe"
        )
    return [text for key, text in changes.items() if key != ("run", "folder")]


def _flat(values: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in values.items():
        flat |= _flat(value, (*prefix, key)) if isinstance(value, dict) and value else {(*prefix, key): value}
    return flat
