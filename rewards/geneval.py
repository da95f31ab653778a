"""GenEval: whether an image shows the objects that the prompt names, in the right number, colour and place.

Source: Ghosh et al., "GenEval: An object-focused framework for evaluating text-to-image alignment" (2023),
`evaluate_images.py`. `judge` is its verdict rule. `soft_score` is the graded score that Flow-GRPO trains on, with two
corrections: every term is clamped to [0, 1] (the reference implementation reaches -14), and a violated position scores
0 once (the reference implementation also appends a 1).

A detection is ``{"class": str, "box": [x0, y0, x1, y1], "score": float, "color": str}``, boxes in pixels.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from rewards.base import Reward, RewardError, Rows, import_object, nearest
from rewards.detectors.base import COLORS, SCORE_THRESHOLD, Detection, Detector

RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNTING_SCORE_THRESHOLD = 0.9
MAX_OBJECTS = 16
POSITION_THRESHOLD = 0.1


class Verdict(NamedTuple):
    """GenEval's verdict on one image; `reason` has one line per failed clause and is empty when `correct`."""

    correct: bool
    reason: str


def relations(box: Sequence[float], target: Sequence[float]) -> set[str]:
    """The RELATIONS that hold from `box` to `target`, both [x0, y0, x1, y1] in pixels.

    Along each axis, a tenth of the summed sizes is subtracted from the offset of the centres, down to 0. The rest is
    divided by the length of the full offset, and a direction holds above 0.5.
    """
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = box, target
    offset = np.array([ax0 + ax1 - bx0 - bx1, ay0 + ay1 - by0 - by1]) / 2
    sizes = np.array([abs(ax1 - ax0) + abs(bx1 - bx0), abs(ay1 - ay0) + abs(by1 - by0)])
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    holds = zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True)
    return {relation for relation, true in holds if true}


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union with GenEval's pixel-inclusive (+1) areas."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    shared = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b))
    return shared / (areas - shared)


def kept_detections(
    detections: Sequence[Detection], tag: str, nms_threshold: float = 1.0
) -> dict[str, list[Detection]]:
    """The detections that count, by class and best score first: above the threshold, at most 16 a class, greedy NMS."""
    threshold = COUNTING_SCORE_THRESHOLD if tag == "counting" else SCORE_THRESHOLD
    kept: dict[str, list[Detection]] = {}
    candidates: dict[str, int] = {}
    for detection in sorted(detections, key=lambda d: -d["score"]):
        name = detection["class"]
        if detection["score"] <= threshold or candidates.get(name, 0) == MAX_OBJECTS:
            continue
        candidates[name] = candidates.get(name, 0) + 1
        group = kept.setdefault(name, [])
        if all(_overlap(detection["box"], other["box"]) < nms_threshold or nms_threshold == 1.0 for other in group):
            group.append(detection)
    return kept


def judge(detections: Sequence[Detection], metadata: Mapping[str, Any], *, nms_threshold: float = 1.0) -> Verdict:
    """GenEval's rule for one image: the best detections meet every `include` clause, and no `exclude` clause is met.

    `nms_threshold`: overlap (IoU) from which the weaker of two boxes is dropped; 1.0 keeps all, the published default.
    """
    objects = kept_detections(detections, metadata["tag"], nms_threshold)
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for clause in metadata.get("include", ()):
        found = objects.get(clause["class"], [])[: clause["count"]]
        reason = _include_failure(clause, found, matched)
        matched.append(None if reason else found)
        if reason:
            reasons.append(reason)
    for clause in metadata.get("exclude", ()):
        count = len(objects.get(clause["class"], []))
        if count >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {count}")
    return Verdict(not reasons, "\n".join(reasons))


def _include_failure(
    clause: Mapping[str, Any], found: Sequence[Detection], matched: Sequence[list[Detection] | None]
) -> str:
    """Why `found` does not meet the clause, in GenEval's words; empty when it does."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        colors = [detection["color"] for detection in found]
        right = colors.count(clause["color"])
        if right < count:
            others = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
            return f"expected {clause['color']} {name}>={count}, found {right} {clause['color']}; and {others}"
    if "position" in clause:
        relation, index = clause["position"]
        targets = matched[index]
        if targets is None:
            return f"no target for {name} to be {relation}"
        for detection in found:
            for target in targets:
                true = relations(detection["box"], target["box"])
                if relation not in true:
                    seen = " and ".join(r for r in RELATIONS if r in true)
                    return f"expected {name} {relation} target, found {seen} target"
    return ""


def soft_score(detections: Sequence[Detection], metadata: Mapping[str, Any], *, nms_threshold: float = 1.0) -> float:
    """The graded score in [0, 1]: the mean of the terms of all `include` clauses.

    A clause gives the term 1 - |wanted - found| / wanted for its count, and one more term for a colour or a position;
    that term is 0 while the count is wrong.
    """
    objects = kept_detections(detections, metadata["tag"], nms_threshold)
    terms: list[float] = []
    matched: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        count, found = clause["count"], objects.get(clause["class"], [])
        terms.append(max(0.0, 1 - abs(count - len(found)) / count))
        met = len(found) == count
        if "color" in clause:
            right = sum(detection["color"] == clause["color"] for detection in found)
            terms.append(max(0.0, 1 - abs(count - right) / count) if met else 0.0)
            met = met and right == count
        if "position" in clause:
            relation, index = clause["position"]
            targets = matched[index]
            met = met and targets is not None
            met = met and all(relation in relations(a["box"], b["box"]) for a in found for b in targets or ())
            terms.append(float(met))
        matched.append(found if met else None)
    return sum(terms) / len(terms)


def refuse_unknown_classes(detector: Any, metadata: Iterable[Mapping[str, Any]]) -> None:
    """Raises RewardError for the first class in GenEval's metadata rows that is not among the detector's `names`.

    Such a class would never be found, and each of its prompts would be judged wrong. A detector without `names` passes.
    """
    names: Collection[str] | None = getattr(detector, "names", None)
    if names is None:
        return
    asked = (clause["class"] for row in metadata for clause in (*row.get("include", ()), *row.get("exclude", ())))
    unknown = next((name for name in asked if name not in names), None)
    if unknown is not None:
        raise RewardError(
            f"geneval: the prompts ask for the class {unknown!r}, which the detector does not have; the nearest of its "
            f"{len(names)} is {nearest(unknown, names)!r}"
        )


class GenEval(Reward):
    """GenEval's score of each image, with any detector.

    detector: maps images (B, 3, H, W) in [0, 1] to one list of detections per image. It is an object, or the name
        ``"package.module:Name"`` of one; a class is built with `detector_options`. The benchmark's detector is
        ``"rewards.detectors.mask2former:Mask2Former"``.
    strict_weight: the weight of the official verdict in the score, beside the graded score: 0 is soft, 1 is strict.
    nms_threshold: as in `judge`.
    Metadata rows are GenEval's: ``{"tag": ..., "include": [...], "exclude": [...]}``.
    """

    range = (0.0, 1.0)
    prompt_sensitive = True

    def __init__(
        self,
        detector: str | Detector,
        strict_weight: float = 0.0,
        nms_threshold: float = 1.0,
        detector_options: Mapping[str, Any] | None = None,
    ):
        if not 0 <= strict_weight <= 1:
            raise RewardError(f"geneval: strict_weight must lie in [0, 1], not {strict_weight}")
        found = import_object(detector) if isinstance(detector, str) else detector
        if detector_options and not isinstance(found, type):
            raise RewardError(f"geneval: detector {detector!r} is not a class and takes no detector_options")
        self.detector: Detector = found(**(detector_options or {})) if isinstance(found, type) else found
        self.strict_weight = strict_weight
        self.nms_threshold = nms_threshold

    def applies_to(self, row: Mapping[str, Any]) -> bool:
        """True for rows that carry GenEval's clauses."""
        return "include" in row

    def __call__(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        """Scores (B,) in [0, 1] of images (B, 3, H, W)."""
        for index, row in enumerate(metadata):
            if "include" not in row or "tag" not in row:
                raise RewardError(
                    f"geneval: item {index} ({prompts[index]!r}) has no GenEval metadata (keys tag and include); "
                    "use a .jsonl prompt file"
                )
        refuse_unknown_classes(self.detector, metadata)
        scores = []
        for detections, row in zip(self.detector(media), metadata, strict=True):
            soft = soft_score(detections, row, nms_threshold=self.nms_threshold)
            strict = float(judge(detections, row, nms_threshold=self.nms_threshold).correct)
            scores.append(self.strict_weight * strict + (1 - self.strict_weight) * soft)
        return torch.tensor(scores, dtype=torch.float32)
