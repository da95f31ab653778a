"""A run folder: recipe, versions, metrics, evaluations, media, checkpoints, weights, report."""

import errno
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowalign.config import Recipe, dump_recipe, load_recipe
from flowalign.config.base import UserError
from flowalign.disk.about import versions
from flowalign.disk.files import append_json_line, make_folder, remove, replace_json, replace_text, replaced_folder
from flowalign.disk.starting import FolderLock, check_start, clear, read_info

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # faults of the disk, not of the code


class RunFolder:
    """The files of one run. Each file is replaced whole, except the metrics, which grow by one line a step."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "lora"
        self.metrics = path / "metrics.jsonl"
        self.lock: FolderLock | None = None

    @classmethod
    def create(
        cls, recipe: Recipe, inputs: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> "RunFolder":
        """The folder of a new run or, with `resume`, of an earlier one. It is locked until `held` is left.

        Raises UserError as `check_start` does, and when the folder cannot be written to.
        """
        run = cls(recipe.folder)
        check_start(recipe, resume=resume, overwrite=overwrite)
        try:
            make_folder(run.path)
            run.lock = FolderLock(run.path)
            check_start(recipe, resume=resume, overwrite=overwrite)  # another run may have begun meanwhile
            if not resume:
                clear(run.path)
            run.update_info(versions=versions())  # first: run.json marks the folder as a run's
            replace_json(run.path / "inputs.json", inputs)
            replace_text(run.path / "recipe.yaml", dump_recipe(recipe))
        except OSError as error:
            raise UserError(f"cannot write to run folder {run.path}: {error.strerror or error}") from error
        return run

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out while a run is under way, and turn a full or broken disk into a UserError."""
        if self.lock is not None:
            self.lock = FolderLock(self.path)  # again: a Trainer that was stopped has released it
        try:
            with disk_explained(self.path):
                yield
        finally:
            if self.lock is not None:
                self.lock.release()

    @classmethod
    def open(cls, path: Path) -> tuple["RunFolder", Recipe]:
        """An existing run and its recipe. Raises UserError for a folder without a recipe."""
        if not (path / "recipe.yaml").is_file():
            raise UserError(f"{path} is not a run folder: it has no recipe.yaml")
        return cls(path), load_recipe(path / "recipe.yaml")

    @property
    def finished(self) -> bool:
        """Whether the run has ended."""
        return "finished" in read_info(self.path)

    def update_info(self, **values: Any) -> None:
        """Merge values into run.json; None removes a key."""
        kept = {key: value for key, value in (read_info(self.path) | values).items() if value is not None}
        replace_json(self.path / "run.json", kept)

    def log_step(self, values: Mapping[str, Any]) -> None:
        """Append one step's line to the metrics."""
        append_json_line(self.metrics, values)

    def forget_after(self, step: int) -> None:
        """Remove metrics, evaluations and media from after `step`: a resumed run writes them again."""
        for place in (*self.path.glob("evaluations/step_*.json"), *self.path.glob("samples/step_*")):
            number = place.stem.removeprefix("step_")
            if number.isdecimal() and int(number) > step:
                remove(place)
        if self.metrics.exists():
            lines = [
                line
                for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
                if _step_of(line) in range(step + 1)
            ]
            replace_text(self.metrics, "".join(line + "\n" for line in lines))

    def evaluation(self, name: str) -> Path:
        """The path of the evaluation `name`, which need not exist."""
        return self.path / "evaluations" / f"{name}.json"

    def keep_weights(self, name: str, export: Callable[[Path], None], about: Mapping[str, Any]) -> None:
        """Write weights into the folder `name`, such as best, with the step and audit of their evaluation."""
        with replaced_folder(self.path / name) as folder:
            export(folder)
            replace_json(folder / "evaluation.json", {key: about[key] for key in ("step", "audit")})


@contextmanager
def disk_explained(folder: Path) -> Iterator[None]:
    """Turn the OSError of a full, read-only or failing disk under a run folder into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        what = f"cannot write to {error.filename or folder}: {error.strerror}"
        raise UserError(f"{what}; make room, then go on from the last checkpoint with --resume") from error


def _step_of(line: str) -> int:
    """The step of a metrics line; -1 for a line that a killed process left incomplete."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
