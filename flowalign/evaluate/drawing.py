"""Images of a prompt list on disk, in GenEval's layout: drawn here, or given by a user.

    drawing.json                the settings that decide the images; a folder with other settings is refused
    00000/metadata.jsonl        the first prompt's row, a line of JSON
    00000/samples/0000.png      its first image

A killed drawing loses one batch at most. A resumed drawing keeps the batches of the whole plan, whatever is missing,
because the last digits of a forward pass may depend on its batch. It therefore writes the same bytes as a drawing that
was never stopped, on the same machine with the same number of threads.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flowalign.config import Model, Sampler
from flowalign.config.base import UserError, counted
from flowalign.disk.files import checksum_of, make_folder, replace_json
from flowalign.disk.media import MANIFEST, save_image, to_uint8
from flowalign.evaluate.results import DRAWING, Stopwatch, check_folder, keep_settings
from flowalign.policies.adapters import adapter_files, further_adapters
from flowalign.policies.base import Policy, forward_dtype
from flowalign.policies.cutting import cut_prompts
from flowalign.policies.loading import EMBEDDED, load_policy, model_settings, sizes_of, usual_sampling
from flowalign.policies.request import MediaRequest
from flowalign.rollout.generate import Progress, rollout
from flowalign.rollout.manifest import manifest_of, rows_of_files
from flowalign.rollout.prompts import Row, load_prompts
from flowalign.rollout.stages import RolloutRequest
from flowalign.sampling.noise import EVALUATION
from flowalign.terminal import Terminal
from rewards.base import grouped
from rewards.media import FORMATS, images_in, natural, read_image

# Settings of a model that do not decide its images, or that `Drawing.settings` records in another form.
_NOT_DECISIVE = {"path", "adapter", "dtype", "attention", "compile", "lora", "gradient_checkpointing"}


@dataclass(frozen=True)
class Sample:
    """One image of a prompt; `name` is its path inside the folder of images, as results name it."""

    path: Path
    name: str
    row: Row


@dataclass(frozen=True)
class Drawing:
    """How the images of a prompt list are drawn; the noise is counted by (seed, row, member), as in `evaluate`."""

    model: Model
    sampler: Sampler
    seed: int
    images: int
    """Images per prompt."""
    batch: int
    """Images drawn at once."""
    device: str
    origin: str = "as given"
    """Where the sampler's settings come from, in words."""

    @property
    def words(self) -> str:
        """How the images are drawn, in words."""
        return f"drawn with {sampling_words(self.sampler, sizes_of(self.model).request, self.seed)} ({self.origin})"

    def name(self, rows: Sequence[Row], about: Mapping[str, Any]) -> str:
        """A folder name for images of these rows: the model, its adapter, and a checksum of all that decides them.

        `about` holds the deciding settings that the drawing does not know. The same drawing has the same name.
        """
        adapter = self.model.adapter
        tuned = [_place_name(str(place)) for place in (Path(adapter).resolve().parent, adapter)] if adapter else []
        how = [f"{self.sampler.steps}steps", f"g{self.sampler.guidance:g}"]
        return folder_name([_place_name(self.model.path), *tuned, *how], {**about, **self.settings(rows)})

    @property
    def embedded(self) -> bool:
        """Whether the model is the one embedded in the package."""
        return self.model.path == EMBEDDED

    def settings(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The settings that decide the images, as drawing.json keeps them."""
        model, (request, length) = self.model, sizes_of(self.model)
        place = Path(model.path)
        local = not self.embedded and place.exists()
        dtype = forward_dtype(model.dtype, torch.device(self.device))
        return {
            "model": str(place.resolve()) if local else model.path,
            "adapter": _checksum(model.adapter) if model.adapter else None,
            **self.sampler.model_dump(include=set(Sampler.model_fields)),
            **model.model_dump(mode="json", exclude=_NOT_DECISIVE),
            "height": request.height,
            "width": request.width,
            "max_sequence_length": length,
            "seed": self.seed,
            "images_per_prompt": self.images,
            "batch": self.batch,
            "precision": f"{str(dtype).removeprefix('torch.')} on {self.device}",
            "prompts": checksum_of([row.about for row in rows]),
        }

    def chunks(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """The rows that are drawn together: at most `batch` images, but at least one prompt's."""
        size = max(1, self.batch // self.images)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def request(self, rows: Sequence[Row], media: MediaRequest) -> RolloutRequest:
        """What a rollout of some rows is asked for."""
        key = (EVALUATION, self.seed, 0)
        return RolloutRequest(rows, self.images, self.sampler, media, key, batch=self.batch)


def drawing_of(
    model: str,
    adapter: str | Path | None = None,
    *,
    device: str,
    images: int = 1,
    batch: int | None = None,
    size: int | None = None,
    max_sequence_length: int | None = None,
    seed: int | None = None,
    **sampling: Any,
) -> Drawing:
    """The drawing of a model by the name that a user gives; see `model_settings` and `usual_sampling`.

    An argument that is not None replaces the usual setting; `sampling` are fields of `Sampler`. Raises UserError as
    these two functions do.
    """
    settings = model_settings(model, adapter, size, max_sequence_length)
    usual, usual_seed, origin = usual_sampling(model)
    own = {name: value for name, value in sampling.items() if value is not None}
    given = [name for name, value in {**own, "seed": seed, "size": size}.items() if value is not None]
    origin = f"{origin} settings" + (f" except the given {', '.join(given)}" if given else "")
    sampler = Sampler(**{**usual.model_dump(), **own})
    return Drawing(settings, sampler, usual_seed if seed is None else seed, images, batch or 16, device, origin)


def sampling_words(sampler: Sampler, request: MediaRequest, seed: int) -> str:
    """The settings that decide a model's images, in words."""
    steps, pixels = counted(sampler.steps, "step"), f"{request.width} x {request.height} pixels"
    how = f"guidance {sampler.guidance:g}, {sampler.schedule} schedule, {sampler.solver}"
    return f"{steps}, {how}, {pixels}, seed {seed}"


def folder_name(parts: Sequence[str], about: Mapping[str, Any]) -> str:
    """The parts, and eight letters of a checksum that differ when the settings `about` differ."""
    return "-".join([*parts, checksum_of(about, sort_keys=True, default=str)[:8]])


def _place_name(place: str) -> str:
    """The last part of a path or hub id, in characters that every file system takes."""
    name = Path(place).name if Path(place).name not in ("", "..") else Path(place).resolve().name
    return re.sub(r"[^\w.-]+", "_", name) or "model"


def draw(
    folder: Path,
    drawing: Drawing,
    rows: Sequence[Row],
    stopwatch: Stopwatch,
    progress: Progress | None = None,
    load: Callable[[Model, str], Policy] = load_policy,
) -> None:
    """Draw the rows' images that `folder` lacks; the model is loaded only if an image is missing.

    Raises UserError for a folder of another drawing, with the setting that differs, and as `load_policy` does.
    """
    settings = drawing.settings(rows)
    check_folder(folder, DRAWING, settings, made="*/samples/*.png")
    policy: Policy | None = None
    stopwatch.start()
    for chunk in drawing.chunks(rows):
        images = itertools.product(chunk, range(drawing.images))
        paths = [folder / f"{row.index:05d}/samples/{member:04d}.png" for row, member in images]
        missing = [place for place, path in enumerate(paths) if not _is_whole(path)]
        if missing:
            if policy is None:
                policy = load(drawing.model, drawing.device)
                Terminal().say(*cut_prompts(policy, (row.prompt for row in rows)))
                keep_settings(folder, DRAWING, settings)
            drawn = rollout(policy, drawing.request(chunk, policy.request), progress=progress)
            for row in chunk:
                own = folder / f"{row.index:05d}"
                make_folder(own / "samples")
                replace_json(own / "metadata.jsonl", row.about, indent=None)
            pixels = to_uint8(drawn.media)
            for place in missing:
                save_image(paths[place], pixels[place])
            stopwatch.lap("draw")
        elif progress:
            progress(len(paths))


def listed(folder: Path, images: int, rows: Sequence[Row] | None = None) -> list[Sample]:
    """The images of a folder in GenEval's layout, ordered by prompt and member; every image is checked to be readable.

    With `rows` the folders 00000, 00001, ... must match the rows; without, the rows come from the folders. A folder
    with a MANIFEST, such as `flowalign sample` writes, holds the images itself, and the MANIFEST gives their rows.
    Raises UserError with the path of anything that is missing, unreadable or superfluous.
    """
    if manifest := manifest_of(folder):
        return _manifested(manifest, images, rows)
    numbered = (place for place in folder.glob("*") if place.is_dir() and place.name.isdecimal())
    folders = sorted(numbered, key=lambda place: natural(place.name))
    if not folders:
        layout = "00000/metadata.jsonl, 00000/samples/0000.png"
        raise UserError(f"{folder} holds no images in GenEval's layout ({layout}), and no {MANIFEST} that names some")
    if rows is not None:
        wanted = {f"{row.index:05d}" for row in rows}
        there = {place.name for place in folders}
        for row in rows:
            if f"{row.index:05d}" not in there:
                raise UserError(f"{folder} has no folder {row.index:05d} for prompt {row.index + 1} ({row.prompt!r})")
        if extra := sorted(there - wanted):
            raise UserError(
                f"{folder}/{extra[0]} belongs to none of the {len(rows)} prompts; remove it or add its prompt"
            )
    found = [_metadata_row(place) for place in folders]
    for place, row, own in zip(folders, rows or (), found, strict=rows is not None):
        if own.about != row.about:
            raise UserError(
                f"{place}/metadata.jsonl does not hold prompt {row.index + 1} of the list: "
                f"it holds {json.dumps(own.about)}, not {json.dumps(row.about)}"
            )
    return [sample for place, row in zip(folders, found, strict=True) for sample in _samples(place, row, images)]


def _manifested(manifest: Path, images: int, rows: Sequence[Row] | None) -> list[Sample]:
    folder = manifest.parent
    there = zip(*rows_of_files(folder, str(manifest), images_in(folder)), strict=True)
    groups = grouped((json.dumps(row.about, sort_keys=True), (row, path)) for row, path in there).values()
    found = [replace(own[0][0], index=index) for index, own in enumerate(groups)]
    for row, own in zip(found, groups, strict=True):
        if (count := len(own)) != images:
            raise UserError(f"{folder} holds {count} images of {row.prompt!r}, not {images}; see --images-per-prompt")
    if rows and [row.prompt for row in rows] != [row.prompt for row in found]:
        raise UserError(f"{manifest} does not hold the prompts of the list in their order; leave --prompts out")
    pairs = zip(rows or found, groups, strict=True)
    return [_seen(path, folder, row) for row, own in pairs for _, path in own]


def _seen(path: Path, folder: Path, row: Row) -> Sample:
    if not _is_whole(path, FORMATS):
        raise UserError(f"{path} is not a readable image; draw it again")
    return Sample(path, path.relative_to(folder).as_posix(), row)


def _metadata_row(folder: Path) -> Row:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing; it holds the prompt of the images in {folder.name}/samples")
    rows = load_prompts(str(path))
    if len(rows) != 1:
        raise UserError(f"{path} holds {len(rows)} rows; it must hold one, since a folder's images have one prompt")
    return Row(int(folder.name), rows[0].prompt, rows[0].metadata)


def _samples(folder: Path, row: Row, images: int) -> list[Sample]:
    samples = folder / "samples"
    paths = [path for path in images_in(samples) if path.stem.isdecimal()] if samples.is_dir() else []
    if len(paths) != images:
        raise UserError(f"{folder}/samples holds {len(paths)} images NNNN.png, not {images}; see --images-per-prompt")
    return [_seen(path, folder.parent, row) for path in paths]


def seen_by_size(samples: Sequence[Sample], see: Callable[[torch.Tensor], Sequence[Any]]) -> list[Any]:
    """What `see` finds in each image; it is given the images of one size together, (B, 3, H, W) in [0, 1]."""
    media = [read_image(sample.path) for sample in samples]
    found: dict[int, Any] = {}
    for places in grouped((one.shape, place) for place, one in enumerate(media)).values():
        found.update(zip(places, see(torch.stack([media[place] for place in places])), strict=True))
    return [found[place] for place in range(len(samples))]


def _is_whole(path: Path, formats: tuple[str, ...] = ("PNG",)) -> bool:
    """Whether a complete image file exists: readable to its end, with the right checksums if it is a PNG."""
    try:
        with Image.open(path, formats=formats) as image:
            image.verify()
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def _checksum(adapter: str) -> str:
    """The checksum of an adapter's files: its weights and their scale."""
    digest = hashlib.sha256()
    for one in (adapter, *further_adapters(adapter).values()):
        for file in adapter_files(one):
            digest.update(file.read_bytes())
    return digest.hexdigest()
