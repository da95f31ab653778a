"""The one evaluation: fixed prompts and counted noise in, scores with standard errors out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object

import rewards as zoo
from flowalign.config import Evaluation, RewardSettings
from flowalign.config.base import UserError
from flowalign.config.paths import sought
from flowalign.data import Row
from flowalign.evaluate.intervals import clustered_error, combined_interval, mean_interval
from flowalign.policies.base import Policy
from flowalign.rollout import Progress, rollout
from flowalign.sampling.noise import EVALUATION
from rewards.combine import score_all


class Seen(NamedTuple):
    """What an audit looks at in one picture."""

    looks: dict[str, float]
    features: np.ndarray  # (D,), float32


Observe = Callable[[torch.Tensor], list[Seen]]


@dataclass
class Evaluated:
    """Scores of every picture, in the order of the prompts; `pictures` are the first few, (K, 3, H, W).

    `maps` are of those pictures, (K, H, W) in [0, 1], by the rewards that can say where they see what they punish.
    """

    rows: list[Row]
    scores: list[dict[str, float]]  # a reward that does not apply to a row is absent
    pictures: torch.Tensor
    maps: dict[str, torch.Tensor] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)  # of every picture, where asked for

    def summary(self, *, intervals: bool = False) -> dict[str, dict[str, Any]]:
        """Per reward: mean, standard error and count; by GenEval task where rows have one, and the tasks' mean.

        `intervals` of 95 % and the number of prompts are added where asked for, since they take a while.
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
    """Of scores with their rows. The standard error is over prompts, whose pictures succeed and fail together."""
    groups: dict[str, list[float]] = {}
    for row, value in judged:
        groups.setdefault(row.prompt, []).append(value)
    mean, own = float(np.mean([value for _, value in judged])), list(groups.values())
    result = {"mean": mean, "standard_error": clustered_error(own), "count": len(judged)}
    return {**result, "prompts": len(own), "interval": mean_interval(own)} if intervals else result


def load_rewards(
    settings: Mapping[str, RewardSettings],
    device: torch.device | str,
    given: Mapping[str, zoo.Reward] = MappingProxyType({}),
) -> dict[str, zoo.Reward]:
    """The rewards of a recipe, by the name it gives them, on a device; those `given` are there already."""
    for name, entry in settings.items():
        file = entry.loads(name).rpartition(":")[0]
        if name not in given and file.endswith(".py") and not Path(file).is_file():
            raise UserError(f"rewards.{name}.load: there is no file {file}{sought(file)}")
    return {
        name: given[name] if name in given else zoo.load_on(device, entry.loads(name), **entry.options)
        for name, entry in settings.items()
    }


def check_prompts(rows: Sequence[Row], rewards: Mapping[str, zoo.Reward], source: object) -> None:
    """Raises UserError for the first prompt that no reward can judge, before a model is loaded."""
    for row in rows:
        if not any(reward.applies_to({**row.metadata, "prompt": row.prompt}) for reward in rewards.values()):
            names = ", ".join(rewards)
            raise UserError(f"prompts {source}: prompt {row.index + 1} ({row.prompt!r}) cannot be judged by {names}")


def evaluate(
    policy: Policy,
    rows: Sequence[Row],
    rewards: Mapping[str, zoo.Reward],
    settings: Evaluation,
    size: tuple[int, int],
    progress: Progress | None = None,
    observe: Observe | None = None,
    unscored: Sequence[Row] = (),
) -> Evaluated:
    """Draw and score `images_per_prompt` pictures of every row; size: (height, width) in pixels.

    `observe` is asked what it sees in the pictures of each batch. The rows `unscored` are drawn alone: other processes
    wait for as many passes as theirs.

    The noise depends on (settings.seed, row, member) alone, so that two models are compared picture by picture.
    """
    scored: list[dict[str, float]] = []
    expanded: list[Row] = []
    pictures: list[torch.Tensor] = []
    seen: list[Seen] = []
    chunk = max(1, settings.batch // settings.images_per_prompt)
    drawn = [*rows, *unscored]
    for start in range(0, len(drawn), chunk):
        samples = rollout(
            policy,
            drawn[start : start + chunk],
            settings.images_per_prompt,
            settings,
            size,
            (EVALUATION, settings.seed, 0),
            batch=settings.batch,
            progress=progress,
        )
        count = max(0, len(rows) - start) * settings.images_per_prompt
        if count == 0:
            continue
        own, media = samples.rows[:count], samples.media[:count]
        scores = score_all(rewards, media, [row.prompt for row in own], [row.metadata for row in own])
        scored += [
            {name: float(s.values[index]) for name, s in scores.items() if s.applies[index]}
            for index in range(len(own))
        ]
        expanded += own
        seen += observe(media) if observe else []
        if sum(len(part) for part in pictures) < settings.pictures:
            pictures.append(media[:: settings.images_per_prompt].cpu())
    if not pictures:
        return Evaluated(expanded, scored, torch.empty(0), seen=seen)
    shown = torch.cat(pictures)[: settings.pictures]
    maps = {name: found.cpu() for name, reward in rewards.items() if (found := reward.maps(shown.clone())) is not None}
    return Evaluated(expanded, scored, shown, maps, seen)


def evaluated_by_all(own: Evaluated, pictures: int) -> Evaluated:
    """The evaluations of all processes as one, in the order of the prompts, with the first `pictures` pictures."""
    looked = own.seen or len(own.rows) * (None,)
    judged = gather_object(list(zip(own.rows, own.scores, looked, strict=True)))
    judged.sort(key=lambda one: one[0].index)
    shown = list(dict.fromkeys(row.index for row in own.rows))[: len(own.pictures)]
    own_maps = [{name: found[place] for name, found in own.maps.items()} for place in range(len(shown))]
    kept = gather_object(list(zip(shown, own.pictures, own_maps, strict=True)))
    kept.sort(key=lambda triple: triple[0])
    images = [picture for _, picture, _ in kept[:pictures]]
    stacked = torch.stack(images) if images else torch.empty(0)
    maps = {name: torch.stack([found[name] for _, _, found in kept[:pictures]]) for name in own.maps}
    rows, scores, seen = ([one[place] for one in judged] for place in range(3))
    return Evaluated(rows, scores, stacked, maps, [one for one in seen if one is not None])
