"""GenEval: draw its prompts, detect objects, judge the images, and summarise as the published scripts do.

Source: Ghosh et al. 2023, `generation/diffusers_generate.py`, `evaluation/evaluate_images.py`, `summary_scores.py`. The
judging rule is `rewards.geneval`. The published script uses mmdet's detector; results.jsonl names the detector in use.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib
import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from flowalign.config.base import CheckFailed, UserError
from flowalign.evaluate.benchmark import Benchmark
from flowalign.evaluate.drawing import Sample
from flowalign.evaluate.intervals import combined_interval, mean_interval, mean_of
from flowalign.evaluate.results import RESULTS, Line, by_prompt, write_summary
from flowalign.toyworld.render import SHAPES, Item, Scene, render
from rewards.base import RewardError, grouped, import_object
from rewards.detectors.base import COLORS, Detector
from rewards.geneval import RELATIONS, TASKS, Verdict, judge, kept_detections, refuse_unknown_classes, soft_score
from rewards.media import read_image

__all__ = ["Verdict", "judge", "soft_score"]


def _one_of(known: Sequence[str]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"{value!r} is none of {', '.join(known)}")
        return value

    return AfterValidator(check)


class Clause(BaseModel):
    """One entry of a prompt's `include` or `exclude`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(alias="class", min_length=1)
    count: PositiveInt
    color: Annotated[str, _one_of(COLORS)] | None = None
    position: tuple[Annotated[str, _one_of(RELATIONS)], int] | None = Field(default=None, strict=False)


class Task(BaseModel):
    """A prompt's metadata in GenEval's format."""

    tag: str = Field(min_length=1, strict=True)
    include: list[Clause] = Field(min_length=1)
    exclude: list[Clause] = []

    @model_validator(mode="after")
    def _positions_are_of_earlier_clauses(self) -> "Task":
        for index, clause in enumerate(self.include):
            if clause.position and not 0 <= clause.position[1] < index:
                raise ValueError(
                    f"include.{index}.position names clause {clause.position[1]}, which is not an earlier one"
                )
        return self


def fault(metadata: Mapping[str, Any]) -> str | None:
    """What is wrong with a row's GenEval metadata, or None."""
    try:
        Task.model_validate(metadata)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        return f"{where}: {what}" if where else what
    return None


class Judge(NamedTuple):
    """A detector, the class names that it knows, and how results.jsonl identifies it."""

    detector: Detector
    names: tuple[str, ...]
    identity: dict[str, str]


def load_judge(spec: str, options: Mapping[str, Any] | None = None) -> Judge:
    """Load the detector `spec`: "package.module:Name", "file.py:Name", or the hub id or folder of a Mask2Former.

    A detector is a function of images (B, 3, H, W) in [0, 1], or a class whose objects are such functions. `options`
    are passed to the class. A detector has `names`, the classes that it knows, and may have `identity()`, which
    returns {"detector": its id, "checksum": the checksum of its weights}. Raises UserError for any other object.
    """
    if ":" in spec:
        made, values = import_object(spec), dict(options or {})
    else:
        made, values = import_object("rewards.detectors.mask2former:Mask2Former"), {"model": spec, **(options or {})}
    if values and not isinstance(made, type):
        raise UserError(f"--detector {spec} is not a class, so it takes no --detector-option")
    try:
        detector = made(**values) if isinstance(made, type) else made
    except TypeError as error:
        raise UserError(f"--detector {spec} does not take these options: {error}") from error
    names = getattr(detector, "names", None)
    if not names:
        raise UserError(f"--detector {spec} has no `names`, the tuple of the class names that it knows")
    identity = detector.identity() if hasattr(detector, "identity") else {"detector": spec, "checksum": "unknown"}
    return Judge(detector, tuple(names), dict(identity))


def check_sight(judging: Judge) -> str | None:
    """Test the detector on a bundled image: a person for COCO's classes, two shapes for the toyworld's.

    Returns the names of what the image shows, or None if the detector has other classes. Raises CheckFailed if the
    detector misses one of them.
    """
    if "person" in judging.names:
        # The portrait of Grace Hopper (US Navy, public domain) that comes with matplotlib.
        wanted, media = {"person"}, read_image(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    elif set(SHAPES) <= set(judging.names):
        wanted = {"star", "ring"}
        scene = render(Scene(items=(Item("star", "red", 4, 6, 26), Item("ring", "blue", 34, 30, 26))))
        media = torch.from_numpy(scene.astype(np.float32) / 255).permute(2, 0, 1)
    else:
        return None
    seen = set(kept_detections(judging.detector(media[None])[0], "single_object"))
    if not wanted <= seen:
        found, name = ", ".join(sorted(seen)) or "nothing", judging.identity["detector"]
        raise CheckFailed(
            f"the detector {name} finds {found} in an image of {' and '.join(sorted(wanted))}; its weights or their "
            "loading are broken (--no-check-detector skips this check)"
        )
    return " and ".join(sorted(wanted))


def line_of(judging: Judge, sample: Sample, detections: Sequence[Mapping[str, Any]]) -> Line:
    """GenEval's line for an image, with the detector's id and checksum."""
    verdict = judge(detections, sample.row.metadata)
    kept = kept_detections(detections, sample.row.metadata["tag"])
    boxes = {name: [[*map(float, one["box"]), float(one["score"])] for one in kept[name]] for name in kept}
    return {
        "filename": sample.name,
        "tag": sample.row.metadata["tag"],
        "prompt": sample.row.prompt,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "metadata": json.dumps(sample.row.about),
        "details": json.dumps(boxes),
        **judging.identity,
    }


def summarise(lines: Sequence[Line], images: int) -> dict[str, Any]:
    """Scores with 95 % intervals over lines, one per image; `images` is the number of images per row.

    Equal rows count as one prompt, as in the published scripts. `overall` is GenEval's score, the unweighted mean of
    the tasks; `image_mean` is the mean over all images; `any_success` is the share of prompts with at least one
    correct image.
    """
    prompts = by_prompt(lines, _asked)
    by_task = grouped((group[0]["tag"], [float(line["correct"]) for line in group]) for group in prompts)
    order = sorted(by_task, key=lambda tag: (TASKS.index(tag) if tag in TASKS else len(TASKS), tag))
    groups = [by_task[tag] for tag in order]
    sizes = [float(sum(map(len, own))) for own in groups]
    scores, intervals = [mean_of(own) for own in groups], [mean_interval(own) for own in groups]
    tasks = zip(order, scores, intervals, groups, strict=True)
    any_success = [[max(group)] for own in groups for group in own]
    return {
        "tasks": {tag: {"score": s, "interval": interval, "prompts": len(own)} for tag, s, interval, own in tasks},
        "overall": {"score": float(np.mean(scores)), "interval": combined_interval(scores, intervals)},
        "image_mean": {
            "score": float(np.average(scores, weights=sizes)),
            "interval": combined_interval(scores, intervals, sizes),
        },
        "any_success": {"score": float(np.mean(any_success)), "interval": mean_interval(any_success)},
        "prompts": len(prompts),
        "images": len(lines),
        "images_per_prompt": images,
    }


def _asked(line: Line) -> str:
    """What a line's prompt asks for, as a text that does not depend on the order of the row's keys."""
    row = json.loads(line["metadata"])
    return json.dumps([row.get(key) for key in ("prompt", "tag", "include", "exclude")], sort_keys=True)


def evaluate_geneval(
    benchmark: Benchmark, judging: Judge, *, check_detector: bool = True
) -> tuple[dict[str, Any], Path]:
    """Draw the missing images, judge those not judged yet, and write the summary; returns the summary and its folder.

    `check_detector` first tests the detector with `check_sight`.

    Raises UserError for an unsuitable prompt, image, detector or folder, and CheckFailed if no image is correct.
    """
    rows = benchmark.rows()
    for row in rows:
        if what := fault(row.metadata):
            raise UserError(f"{benchmark.where(row)}: no GenEval metadata: {what}")
        try:
            refuse_unknown_classes(judging.detector, [row.metadata])
        except RewardError as error:
            raise UserError(f"{benchmark.where(row)}: {error}") from error
    seen = check_sight(judging) if check_detector else None
    about = {"benchmark": "geneval", **judging.identity}
    benchmark = benchmark.placed("geneval", about)
    lines = benchmark.judged(rows, about, judging.detector, partial(line_of, judging))
    if not any(line["correct"] for line in lines):
        raise CheckFailed(
            f"every score is 0: none of the {len(lines)} images is correct; look at them and at the reasons in "
            f"{benchmark.folder / RESULTS}; the first is: {lines[0]['reason'].splitlines()[0]}"
        )
    summary = {**about, **benchmark.about(rows), "detector_found": seen, **summarise(lines, benchmark.images)}
    write_summary(benchmark.folder, summary)
    return summary, benchmark.folder
