"""The evaluation of a policy: fixed prompts and counted noise in, scores with standard errors out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from accelerate.utils import gather_object

import rewards as zoo
from flowalign.config import Evaluation
from flowalign.disk.files import make_folder, replace_json
from flowalign.disk.media import MAP, marked, save_images
from flowalign.disk.run_folder import RunFolder
from flowalign.evaluate.intervals import clustered_error, combined_interval, mean_interval
from flowalign.policies.base import Policy
from flowalign.policies.request import MediaRequest
from flowalign.rollout.generate import Progress, rollout
from flowalign.rollout.prompts import Row
from flowalign.rollout.stages import RolloutRequest
from flowalign.sampling.noise import EVALUATION
from rewards.base import grouped
from rewards.combine import score_all


class Seen(NamedTuple):
    """What an audit measures in one image: its image statistics and its features."""

    statistics: dict[str, float]
    features: np.ndarray  # (D,), float32


Observe = Callable[[torch.Tensor], list[Seen]]


@dataclass
class Evaluated:
    """The scores of all images, in the order of the prompts.

    `images` are the first images of the first prompts, (K, 3, H, W). `maps` are a reward's maps of these images,
    (K, H, W) in [0, 1], from the rewards that can show where they see what they punish.
    """

    rows: list[Row]
    scores: list[dict[str, float]]  # a reward that does not apply to a row is absent
    images: torch.Tensor
    maps: dict[str, torch.Tensor] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)  # one per image, if `evaluate` was given `observe`

    def summary(self, *, intervals: bool = False) -> dict[str, dict[str, Any]]:
        """Mean, standard error and count of each reward; also per GenEval task and the tasks' mean if rows have tasks.

        `intervals` adds 95 % intervals and the number of prompts; they take a while to compute.
        """
        names = dict.fromkeys(name for scores in self.scores for name in scores)
        return {name: self._summarise(name, intervals) for name in names}

    def _summarise(self, name: str, intervals: bool) -> dict[str, Any]:
        judged = [(row, scores[name]) for row, scores in zip(self.rows, self.scores, strict=True) if name in scores]
        result = _mean(judged, intervals)
        tags = dict.fromkeys(row.metadata["tag"] for row, _ in judged if "tag" in row.metadata)
        if tags:
            by_tag = {tag: [one for one in judged if one[0].metadata.get("tag") == tag] for tag in tags}
            tasks = result["tasks"] = {tag: _mean(own, intervals) for tag, own in by_tag.items()}
            means = [task["mean"] for task in tasks.values()]
            result["overall"] = float(np.mean(means))
            if intervals:
                found = [task["interval"] for task in tasks.values()]
                result["overall_interval"] = combined_interval(means, found)
        return result


def _mean(judged: Sequence[tuple[Row, float]], intervals: bool) -> dict[str, Any]:
    """Mean and standard error of scores with their rows.

    The standard error is over prompts, because the images of one prompt succeed and fail together.
    """
    own = list(grouped((row.prompt, value) for row, value in judged).values())
    mean = float(np.mean([value for _, value in judged]))
    result = {"mean": mean, "standard_error": clustered_error(own), "count": len(judged)}
    return {**result, "prompts": len(own), "interval": mean_interval(own)} if intervals else result


def evaluate(
    policy: Policy,
    rows: Sequence[Row],
    rewards: Mapping[str, zoo.Reward],
    settings: Evaluation,
    request: MediaRequest,
    progress: Progress | None = None,
    observe: Observe | None = None,
    unscored: Sequence[Row] = (),
) -> Evaluated:
    """Draw and score `images_per_prompt` images of every row.

    `observe` is called with the images of each batch. The rows `unscored` are drawn but not scored: with sharded
    weights all processes must make the same number of forward passes.

    The noise depends only on (settings.seed, row, member), so two models can be compared image by image.
    """
    scored: list[dict[str, float]] = []
    expanded: list[Row] = []
    images: list[torch.Tensor] = []
    seen: list[Seen] = []
    chunk = max(1, settings.batch // settings.images_per_prompt)
    drawn = [*rows, *unscored]
    for start in range(0, len(drawn), chunk):
        samples = rollout(
            policy,
            RolloutRequest(
                drawn[start : start + chunk],
                settings.images_per_prompt,
                settings,
                request,
                (EVALUATION, settings.seed, 0),
                batch=settings.batch,
            ),
            progress=progress,
        )
        count = max(0, len(rows) - start) * settings.images_per_prompt
        if count == 0:
            continue
        own, media = samples.rows[:count], samples.media[:count]
        scored += score_rows(rewards, media, own)
        expanded += own
        seen += observe(media) if observe else []
        if sum(len(part) for part in images) < settings.keep_media:
            images.append(media[:: settings.images_per_prompt].cpu())
    if not images:
        return Evaluated(expanded, scored, torch.empty(0), seen=seen)
    shown = torch.cat(images)[: settings.keep_media]
    maps = {name: found.cpu() for name, reward in rewards.items() if (found := reward.maps(shown.clone())) is not None}
    return Evaluated(expanded, scored, shown, maps, seen)


def score_rows(rewards: Mapping[str, zoo.Reward], media: torch.Tensor, rows: Sequence[Row]) -> list[dict[str, float]]:
    """The scores of media (B, ...) drawn for B rows: for each row those of the rewards that apply to it, by name."""
    scores = score_all(rewards, media, [row.prompt for row in rows], [row.metadata for row in rows])
    return [
        {name: float(one.values[index]) for name, one in scores.items() if one.applies[index]}
        for index in range(len(rows))
    ]


def evaluated_by_all(own: Evaluated, keep_media: int) -> Evaluated:
    """Join the evaluations of all processes, in the order of the prompts, with the media of the first `keep_media`."""
    looked = own.seen or len(own.rows) * (None,)
    judged = gather_object(list(zip(own.rows, own.scores, looked, strict=True)))
    judged.sort(key=lambda one: one[0].index)
    shown = list(dict.fromkeys(row.index for row in own.rows))[: len(own.images)]
    own_maps = [{name: found[place] for name, found in own.maps.items()} for place in range(len(shown))]
    kept = gather_object(list(zip(shown, own.images, own_maps, strict=True)))
    kept.sort(key=lambda triple: triple[0])
    kept = kept[:keep_media]
    images = [image for _, image, _ in kept]
    stacked = torch.stack(images) if images else torch.empty(0)
    maps = {name: torch.stack([found[name] for _, _, found in kept]) for name in own.maps}
    rows, scores, seen = ([one[place] for one in judged] for place in range(3))
    return Evaluated(rows, scores, stacked, maps, [one for one in seen if one is not None])


def write_evaluation(run: RunFolder, name: str, evaluated: Evaluated, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write an evaluation's images to samples/NAME/ of a run, then its scores to evaluations/NAME.json.

    The JSON file comes last, so its presence shows that the evaluation is complete. Returns the summary.
    """
    rows = [
        {"prompt": row.prompt, **({"tag": tag} if (tag := row.metadata.get("tag")) else {}), "scores": scores}
        for row, scores in zip(evaluated.rows, evaluated.scores, strict=True)
    ]
    summary = evaluated.summary()
    if len(evaluated.images):
        folder = run.path / "samples" / name
        shown = list({row.index: row for row in evaluated.rows}.values())[: len(evaluated.images)]
        save_images(folder, evaluated.images, [row.about for row in shown])
        for reward, found in evaluated.maps.items():
            save_images(folder / f"{MAP}{quote(reward, safe='')}", marked(evaluated.images, found))
        replace_json(folder / "prompts.json", [row.prompt for row in shown], indent=None)
    make_folder(run.path / "evaluations")
    replace_json(run.evaluation(name), {**about, "rows": rows, "summary": summary}, indent=None)
    return summary
