"""A run folder: recipe, versions, metrics, evaluations, pictures, checkpoints, weights, report."""

import errno
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image

from flowalign.config import Recipe, dump_recipe, load_recipe
from flowalign.config.base import UserError
from flowalign.data import Row
from flowalign.evaluate.evaluation import Evaluated
from flowalign.manifest import FILE_NAME, MANIFEST
from flowalign.starting import FolderLock, check_start, clear, read_info

_PACKAGES = ("flowalign", "torch", "diffusers", "transformers", "accelerate", "peft", "rapidocr", "onnxruntime")
MAP = "map_"  # what folders of marked pictures begin with, before the reward's name
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class RunFolder:
    """The files of one run. Every file is replaced whole, metrics grow by a line a step."""

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
        """The folder of a run that begins, or with `resume` goes on; no other process can have it until `held` is left.

        Raises UserError as `check_start` does, and when it cannot be written to.
        """
        run = cls(recipe.folder)
        check_start(recipe, resume=resume, overwrite=overwrite)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run.lock = FolderLock(run.path)
            check_start(recipe, resume=resume, overwrite=overwrite)  # others may have begun meanwhile
            if not resume:
                clear(run.path)
            run.update_info(versions=versions())  # first: it tells a run's folder from others
            replace_text(run.path / "inputs.json", json.dumps(inputs, indent=2) + "\n")
            replace_text(run.path / "recipe.yaml", dump_recipe(recipe))
        except OSError as error:
            raise UserError(f"cannot write to run folder {run.path}: {error.strerror or error}") from error
        return run

    @contextmanager
    def held(self) -> Iterator[None]:
        """While a run is under way: no other process trains here, and a disk that takes nothing is a UserError."""
        if self.lock is not None:
            self.lock = FolderLock(self.path)  # once more, for a run that goes on after it was stopped
        try:
            with disk_explained(self.path):
                yield
        finally:
            if self.lock is not None:
                self.lock.release()

    @classmethod
    def open(cls, path: Path) -> tuple["RunFolder", Recipe]:
        """An existing run and its recipe; UserError for a folder that is none."""
        if not (path / "recipe.yaml").is_file():
            raise UserError(f"{path} is no run folder: it has no recipe.yaml")
        return cls(path), load_recipe(path / "recipe.yaml")

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return "finished" in read_info(self.path)

    def update_info(self, **values: Any) -> None:
        """Merge values into run.json; None removes one."""
        kept = {key: value for key, value in (read_info(self.path) | values).items() if value is not None}
        replace_text(self.path / "run.json", json.dumps(kept, indent=2) + "\n")

    def log_step(self, values: Mapping[str, Any]) -> None:
        """Append a line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop metrics, evaluations and pictures from after `step`: a resumed run makes them again."""
        for place in (*self.path.glob("evaluations/step_*.json"), *self.path.glob("samples/step_*")):
            number = place.stem.removeprefix("step_")
            if number.isdecimal() and int(number) > step:
                shutil.rmtree(place) if place.is_dir() else place.unlink()
        if self.metrics.exists():
            lines = [
                line
                for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
                if _step_of(line) in range(step + 1)
            ]
            replace_text(self.metrics, "".join(line + "\n" for line in lines))

    def evaluation(self, name: str) -> Path:
        """Where the evaluation of that name is, or would be."""
        return self.path / "evaluations" / f"{name}.json"

    def write_evaluation(self, name: str, evaluated: Evaluated, about: Mapping[str, Any]) -> dict[str, Any]:
        """Write the pictures samples/NAME/ and last evaluations/NAME.json, which says that all is there.

        Returns the summary.
        """
        rows = [
            {"prompt": row.prompt, **({"tag": tag} if (tag := row.metadata.get("tag")) else {}), "scores": scores}
            for row, scores in zip(evaluated.rows, evaluated.scores, strict=True)
        ]
        summary = evaluated.summary()
        if len(evaluated.pictures):
            folder = self.path / "samples" / name
            shown = list({row.index: row for row in evaluated.rows}.values())[: len(evaluated.pictures)]
            save_pictures(folder, evaluated.pictures, shown)
            for reward, found in evaluated.maps.items():
                save_pictures(folder / f"{MAP}{quote(reward, safe='')}", marked(evaluated.pictures, found))
            replace_text(folder / "prompts.json", json.dumps([row.prompt for row in shown]) + "\n")
        (self.path / "evaluations").mkdir(exist_ok=True)
        contents = {**about, "rows": rows, "summary": summary}
        replace_text(self.evaluation(name), json.dumps(contents) + "\n")
        return summary

    def keep_weights(self, name: str, export: Callable[[Path], None], about: Mapping[str, Any]) -> None:
        """Write weights under a name of their own, such as best, with the step and audit of their evaluation."""
        with replaced_folder(self.path / name) as folder:
            export(folder)
            kept = {key: about[key] for key in ("step", "audit")}
            (folder / "evaluation.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


@contextmanager
def disk_explained(folder: Path) -> Iterator[None]:
    """A full or read-only disk under a run folder as a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        what = f"cannot write to {error.filename or folder}: {error.strerror}"
        raise UserError(f"{what}; make room, then go on from the last checkpoint with --resume") from error


def _step_of(line: str) -> int:
    """The step of a metrics line; -1 for one that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def replace_text(path: Path, text: str) -> None:
    """Write a file whole, in UTF-8: under another name first, then renamed.

    What is no character, as in names of files of another encoding, is written as an escape.
    """
    partial = path.with_name(f".partial_{path.name}")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def marked(images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) greyed, with maps (B, H, W) in [0, 1] laid over them in red."""
    grey = images.mean(1, keepdim=True).expand_as(images)
    red = torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1)
    return grey + 0.8 * maps[:, None] * (red - grey)


def save_pictures(folder: Path, images: torch.Tensor, rows: Sequence[Row] = ()) -> list[Path]:
    """The PNG files `picture_names` of images (B, 3, H, W) in [0, 1], in a folder that is replaced whole.

    With the images' B rows the folder's MANIFEST says whose each is.
    """
    names = picture_names(len(images))
    with replaced_folder(folder) as partial:
        for name, picture in zip(names, to_uint8(images), strict=True):
            Image.fromarray(picture).save(partial / name)
        if rows:
            about = [{FILE_NAME: name, "prompt": row.prompt} for name, row in zip(names, rows, strict=True)]
            lines = [json.dumps(own | row.metadata | own) + "\n" for own, row in zip(about, rows, strict=True)]
            replace_text(partial / MANIFEST, "".join(lines))
    return [folder / name for name in names]


def picture_names(count: int) -> list[str]:
    """00.png, 01.png, ..., all as wide as the last needs, so that any order of names is that of the pictures."""
    width = max(2, len(str(count - 1)))
    return [f"{index:0{width}d}.png" for index in range(count)]


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which then takes the place of `folder`; of one that was not filled nothing is left."""
    partial = folder.with_name(f".partial_{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8."""
    pixels: np.ndarray = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line() -> str:
    """What started this process."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
