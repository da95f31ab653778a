"""GenEval: draw its prompts, find the objects, judge, and sum up as the published scripts do.

Source: Ghosh et al. 2023, `generation/diffusers_generate.py`, `evaluation/evaluate_images.py`, `summary_scores.py`. The
rule itself lives in the reward zoo. The published script's detector is mmdet's; what judged is in results.jsonl.
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
from flowalign.evaluate.drawing import Picture, batches_of_a_size
from flowalign.evaluate.intervals import combined_interval, mean_interval, mean_of
from flowalign.evaluate.results import RESULTS, Line, by_prompt, write_summary
from flowalign.toyworld.render import SHAPES, Item, Scene, render
from rewards.base import RewardError, import_object
from rewards.detectors.base import COLORS, Detector
from rewards.geneval import RELATIONS, TASKS, Verdict, judge, kept_detections, refuse_unknown_classes, soft_score
from rewards.media import read_picture

__all__ = ["Verdict", "judge", "soft_score"]


def _one_of(known: Sequence[str]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"{value!r} is none of {', '.join(known)}")
        return value

    return AfterValidator(check)


class Clause(BaseModel):
    """One of a prompt's `include` or `exclude`."""

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
                raise ValueError(f"include.{index}.position names clause {clause.position[1]}, which is no earlier one")
        return self


def fault(metadata: Mapping[str, Any]) -> str | None:
    """What keeps a row from being GenEval's, or None."""
    try:
        Task.model_validate(metadata)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        return f"{where}: {what}" if where else what
    return None


class Judge(NamedTuple):
    """A detector, the class names that it knows, and what results.jsonl says of it."""

    detector: Detector
    names: tuple[str, ...]
    identity: dict[str, str]


def load_judge(spec: str, options: Mapping[str, Any] | None = None) -> Judge:
    """The detector that `spec` names: "package.module:Name", "file.py:Name", or a Mask2Former's hub id or folder.

    `options` are passed to its class.

    A detector is a function of images (B, 3, H, W) in [0, 1], or a class of one, with `names`, the classes it knows,
    and, where it has them, `identity()`: {"detector": its id, "checksum": of its weights}.
    """
    if ":" in spec:
        made, values = import_object(spec), dict(options or {})
    else:
        made, values = import_object("rewards.detectors.mask2former:Mask2Former"), {"model": spec, **(options or {})}
    if values and not isinstance(made, type):
        raise UserError(f"--detector {spec} is no class, so it takes no --detector-option")
    try:
        detector = made(**values) if isinstance(made, type) else made
    except TypeError as error:
        raise UserError(f"--detector {spec} cannot be made with these options: {error}") from error
    names = getattr(detector, "names", None)
    if not names:
        raise UserError(f"--detector {spec}: it has no `names`, the tuple of the class names that it knows")
    identity = detector.identity() if hasattr(detector, "identity") else {"detector": spec, "checksum": "unknown"}
    return Judge(detector, tuple(names), dict(identity))


def check_sight(judging: Judge) -> str | None:
    """Show the detector a bundled picture: a person for COCO's classes, two shapes for the embedded world's.

    Returns what it was to find, or None for a detector of other classes. Raises UserError where it finds it not.
    """
    if "person" in judging.names:
        # The portrait of Grace Hopper (US Navy, public domain) that comes with matplotlib.
        wanted, media = {"person"}, read_picture(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
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
            f"the detector {name} finds {found} in a picture of {' and '.join(sorted(wanted))}; its weights or their "
            "loading are broken (--no-check-detector judges nevertheless)"
        )
    return " and ".join(sorted(wanted))


def verdicts(judging: Judge, pictures: Sequence[Picture]) -> list[Line]:
    """GenEval's line of each picture, with the detector's id and checksum."""
    lines: list[Line] = [{}] * len(pictures)
    for places, media in batches_of_a_size(pictures):
        for place, detections in zip(places, judging.detector(media), strict=True):
            picture = pictures[place]
            verdict = judge(detections, picture.row.metadata)
            kept = kept_detections(detections, picture.row.metadata["tag"])
            boxes = {name: [[*map(float, one["box"]), float(one["score"])] for one in kept[name]] for name in kept}
            lines[place] = {
                "filename": picture.name,
                "tag": picture.row.metadata["tag"],
                "prompt": picture.row.prompt,
                "correct": verdict.correct,
                "reason": verdict.reason,
                "metadata": json.dumps(picture.row.about),
                "details": json.dumps(boxes),
                **judging.identity,
            }
    return lines


def summarise(lines: Sequence[Line], images: int) -> dict[str, Any]:
    """Scores with 95 % intervals of lines, a picture each, of a list with `images` pictures for every row.

    Rows that are alike are one prompt, as the published scripts group them. `overall` is GenEval's, the unweighted mean
    of the tasks; `image_mean` is over all pictures; `any_success` is the share of prompts
    of which at least one picture is correct.
    """
    prompts = by_prompt(lines, _asked)
    by_task: dict[str, list[list[float]]] = {}
    for group in prompts:
        by_task.setdefault(group[0]["tag"], []).append([float(line["correct"]) for line in group])
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
    """What a line's prompt asks for, in whatever order its row says it."""
    row = json.loads(line["metadata"])
    return json.dumps([row.get(key) for key in ("prompt", "tag", "include", "exclude")], sort_keys=True)


def evaluate_geneval(
    benchmark: Benchmark, judging: Judge, *, check_detector: bool = True
) -> tuple[dict[str, Any], Path]:
    """Draw what is missing, judge what is not judged yet, and write the summary, which is returned with its folder.

    `check_detector` shows it a bundled picture first, see `check_sight`.

    Raises UserError for prompts, pictures, a detector or a folder that do not fit, and where no picture is correct.
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
    lines = benchmark.judged(rows, about, partial(verdicts, judging))
    if not any(line["correct"] for line in lines):
        raise CheckFailed(
            f"every score is 0: none of the {len(lines)} pictures is correct; look at them and at the reasons in "
            f"{benchmark.folder / RESULTS}, of which the first is: {lines[0]['reason'].splitlines()[0]}"
        )
    summary = {**about, **benchmark.about(rows), "detector_found": seen, **summarise(lines, benchmark.images)}
    write_summary(benchmark.folder, summary)
    return summary, benchmark.folder
