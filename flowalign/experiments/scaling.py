"""Test-time scaling, the baseline that training must beat: draw many images per prompt and keep the best.

Best-of-n draws n candidates of a prompt to the end and keeps the one with the highest reward. TTSnap (arXiv 2511.22242,
"noise-aware pruning") also scores the one-step predictions x0_hat = x - sigma v after chosen steps and continues only
the best fraction, so that the same number of transformer forwards covers more candidates. Difference from the paper:
any reward scores x0_hat directly; the paper distils a reward for noisy predictions.

Shape legend: P prompts, N candidates per prompt, K rewards.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata

import rewards as zoo
from flowalign.config import Sampler
from flowalign.config.base import UserError
from flowalign.config.options import parse_options
from flowalign.disk.files import replace_json_lines
from flowalign.disk.media import save_images
from flowalign.evaluate.evaluation import score_rows
from flowalign.policies.base import Policy
from flowalign.policies.request import MediaRequest
from flowalign.rollout.generate import Progress, Step, rollout
from flowalign.rollout.prompts import Row
from flowalign.rollout.stages import Drawn, RolloutRequest
from flowalign.score import refuse_learning
from rewards import Reward


class Prune(NamedTuple):
    """After `step` denoising steps the best `fraction` of a prompt's candidates continue: rounded, but at least one."""

    step: int
    fraction: float


class Cost(NamedTuple):
    """The cost of the candidates of one prompt: rows through the transformer, and images decoded and scored."""

    forwards: int
    decodes: int


class Judged(NamedTuple):
    """A candidate's last scores, the number of steps before them, and its rank if it was chosen."""

    row: Row
    candidate: int
    step: int
    scores: dict[str, float]  # a reward that does not apply to the prompt is absent
    rank: int | None  # among the chosen images of its prompt, from 0


@dataclass(frozen=True)
class BestOf:
    """The finished candidates, the chosen ones among them, and the last scores of every candidate."""

    samples: Drawn
    chosen: torch.Tensor  # (P, kept), indices into `samples`, the best first
    judged: list[Judged]  # of all candidates, prompt by prompt
    forwards: int
    decodes: int

    @property
    def media(self) -> torch.Tensor:
        """The chosen images (P * kept, 3, H, W), prompt by prompt."""
        return self.samples.media[self.chosen.flatten().to(self.samples.media.device)]


def parse_schedule(texts: Sequence[str]) -> tuple[Prune, ...]:
    """The pruning schedule from texts STEP:FRACTION; UserError for another text."""
    schedule = []
    for text in texts:
        step, _, fraction = text.partition(":")
        try:
            schedule.append(Prune(int(step), float(fraction)))
        except ValueError:
            raise UserError(f"--prune {text!r} must be written STEP:FRACTION, such as 2:0.5") from None
    return tuple(schedule)


def check_search(candidates: int, schedule: Sequence[Prune], sampler: Sampler, kept: int = 1) -> None:
    """Raises UserError if the schedule cannot prune these candidates, or leaves fewer than `kept` of them."""
    if candidates < 1:
        raise UserError(f"--best-of {candidates} must be at least 1")
    for prune in schedule:
        if not 1 <= prune.step < sampler.steps:
            raise UserError(
                f"--prune {prune.step}:{prune.fraction:g}: with {sampler.steps} steps, pruning saves work only after "
                f"step 1 to {sampler.steps - 1}"
            )
        if not 0 < prune.fraction <= 1:
            raise UserError(f"--prune {prune.step}:{prune.fraction:g}: the fraction must be above 0 and at most 1")
    for before, after in pairwise(schedule):
        if after.step <= before.step:
            raise UserError(f"--prune steps must rise, but {after.step} follows {before.step}")
    if schedule and sampler.solver != "euler":
        raise UserError(f"--prune needs solver euler; {sampler.solver} keeps a state of the dropped candidates")
    if (left := survivors(candidates, schedule)[-1]) < kept:
        raise UserError(f"--images {kept}: only {left} of a prompt's {candidates} candidates are drawn to the end")


def check_judges(rewards: Mapping[str, Reward]) -> None:
    """Raises UserError for a reward that cannot score a single image."""
    refuse_learning(rewards, "choose by another reward")
    for name, reward in rewards.items():
        if reward.scope != "sample":
            raise UserError(f"reward {name!r} compares a prompt's images; best-of-N needs one that scores each alone")
        if reward.masks:
            raise UserError(
                f"reward {name!r} may leave images without a score (unparsable: mask), but best-of-N needs a score of "
                "each; use unparsable: tie"
            )


def survivors(candidates: int, schedule: Sequence[Prune]) -> list[int]:
    """The number of a prompt's candidates before, between and after the prunings."""
    counts = [candidates]
    for prune in schedule:
        counts.append(max(1, math.floor(prune.fraction * counts[-1] + 0.5)))
    return counts


def cost(candidates: int, schedule: Sequence[Prune], steps: int, guidance: float = 1.0) -> Cost:
    """The cost of best-of-N of one prompt; with guidance a step takes two forwards.

    This is N times TTSnap's cost per initial seed, sum_j Pi_{<j} [(s_j - s_{j-1}) x + y] + Pi_m [(S - s_m) x + y], with
    s_j counted from 1, the remaining share Pi, x forwards and y decodes; here with whole numbers of candidates.
    """
    counts = survivors(candidates, schedule)
    ends = [0, *(prune.step for prune in schedule), steps]
    forwards = sum(count * (end - start) for count, (start, end) in zip(counts, pairwise(ends), strict=True))
    return Cost(forwards * (1 if guidance == 1 else 2), sum(counts))


def standing(scores: np.ndarray) -> np.ndarray:
    """The values (N,) that order candidates, from scores (K, N): the only reward's score, or the sum of ranks (TTSnap).

    Equal scores get the mean of their ranks.
    """
    return scores[0] if len(scores) == 1 else rankdata(scores, axis=1).sum(0)


def best_first(standing: np.ndarray) -> list[int]:
    """The indices of (N,) from the highest value to the lowest; of equal values the earlier comes first."""
    order: list[int] = np.argsort(-standing, kind="stable").tolist()
    return order


def best_of(
    policy: Policy,
    rows: Sequence[Row],
    rewards: Mapping[str, Reward],
    candidates: int,
    sampler: Sampler,
    request: MediaRequest,
    key: tuple[int, ...],
    *,
    batch: int,
    schedule: Sequence[Prune] = (),
    kept: int = 1,
    progress: Progress | None = None,
) -> BestOf:
    """Draw `candidates` images of each row, pruned by the schedule, and choose the best `kept` of the finished ones.

    request, key and batch are those of `rollout`, and so is the noise: a candidate that is not pruned becomes the same
    image as without pruning, up to the rounding of smaller batches. Raises UserError as `check_search` and
    `check_judges` do, and RewardError as the rewards do.
    """
    check_search(candidates, schedule, sampler, kept)
    check_judges(rewards)
    before = policy.forwards
    counts = survivors(candidates, schedule)
    court = _Court(policy, rows, rewards, candidates)
    left = {prune.step: count for prune, count in zip(schedule, counts[1:], strict=True)}

    def watch(step: Step) -> None:
        if (count := left.get(step.index + 1)) is not None:
            step.going = court.prune(step.index + 1, count, step.predicted, step.places)

    drawn = RolloutRequest(rows, candidates, sampler, request, key, batch=batch)
    samples = rollout(policy, drawn, progress=progress, watch=watch, whole_groups=bool(schedule))
    numbered = zip(samples.groups.tolist(), samples.members, strict=True)
    places = [group * candidates + member for group, member in numbered]
    chosen = court.best(sampler.steps, kept, samples.media, places)
    for group in chosen:
        for rank, index in enumerate(group):
            court.judged[places[index]] = court.judged[places[index]]._replace(rank=rank)
    judged = [court.judged[place] for place in sorted(court.judged)]
    return BestOf(samples, torch.tensor(chosen), judged, policy.forwards - before, court.decodes)


class _Court:
    """Scores candidates and keeps the last scores of each, by its place: its number, counted prompt by prompt."""

    def __init__(self, policy: Policy, rows: Sequence[Row], rewards: Mapping[str, Reward], candidates: int):
        self.policy, self.rows, self.rewards, self.candidates = policy, rows, rewards, candidates
        self.judged: dict[int, Judged] = {}
        self.decodes = 0

    def prune(self, step: int, count: int, predicted: torch.Tensor, places: Sequence[int]) -> list[int]:
        """The candidates that continue, ascending: the best `count` of each prompt by predictions x0_hat (R, ...)."""
        chosen = self.best(step, count, self.policy.decode(predicted), places)
        return sorted(index for group in chosen for index in group)

    def best(self, step: int, count: int, media: torch.Tensor, places: Sequence[int]) -> list[list[int]]:
        """The best `count` of media (R, 3, H, W) for each prompt, as indices into `places`, the best first."""
        self.decodes += len(places)
        rows = [self.rows[place // self.candidates] for place in places]
        found = score_rows(self.rewards, media, rows)
        groups: dict[int, list[int]] = {}
        for index, (place, row, scores) in enumerate(zip(places, rows, found, strict=True)):
            self.judged[place] = Judged(row, place % self.candidates, step, scores, None)
            groups.setdefault(place // self.candidates, []).append(index)
        return [self._ordered(group, places)[:count] for group in groups.values()]

    def _ordered(self, group: Sequence[int], places: Sequence[int]) -> list[int]:
        """The indices of one prompt's candidates, the best first."""
        scores = [self.judged[places[index]].scores for index in group]
        values = np.array([[one[name] for one in scores] for name in scores[0]])
        return [group[index] for index in best_first(standing(values))]


def load_judges(rewards: Sequence[str], options: Sequence[str], device: torch.device | str) -> dict[str, Reward]:
    """The rewards that choose, by their own names; options as `parse_options` takes them.

    Raises UserError for two rewards with one name, and as `check_judges` does.
    """
    if not rewards:
        raise UserError("--best-of needs a --reward to choose by")
    judges = load_by_name(rewards, parse_options(rewards, options), device)
    check_judges(judges)
    return judges


def load_by_name(
    specs: Sequence[str], options: Mapping[str, dict[str, Any]], device: torch.device | str
) -> dict[str, Reward]:
    """The rewards that a command names, with the options of each, by their own names; UserError for equal names."""
    loaded: dict[str, Reward] = {}
    for spec in specs:
        one = zoo.load_on(device, spec, **options[spec])
        if one.name in loaded:
            raise UserError(f"--reward {spec}: there is already a reward {one.name!r}; give each once")
        loaded[one.name] = one
    return loaded


def save_best_of(folder: Path, found: BestOf) -> list[tuple[Path, str]]:
    """Write the chosen images, and scores.jsonl with the last scores of every candidate; returns paths and prompts.

    A candidate's `step` is the number of denoising steps before its last scores; `picture` is null unless chosen.
    """
    prompts, kept = found.chosen.shape
    rows = [one.row for one in found.judged[:: len(found.judged) // prompts] for _ in range(kept)]
    paths = save_images(folder, found.media, [row.about for row in rows])
    lines = []
    for place, one in enumerate(found.judged):
        picture = None
        if one.rank is not None:
            picture = paths[place * prompts // len(found.judged) * kept + one.rank].name
        about = {"prompt": one.row.prompt, "candidate": one.candidate, "step": one.step}
        lines.append({**about, "scores": one.scores, "picture": picture})
    replace_json_lines(folder / "scores.jsonl", lines)
    return [(path, row.prompt) for path, row in zip(paths, rows, strict=True)]
