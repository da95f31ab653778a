"""`check` tries a reward on images and reports whether it keeps the contract that training relies on."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from rewards.base import Reward, RewardError, TrainableReward, score, score_in_place

TOLERANCE = 1e-4  # for scores of about 1; kernels round differently at another batch size
_SIZE = 64
_EXAMPLES = (
    ('a red circle above the word "STONE"', "circle", "red"),
    ('a blue square and a sign that says "LAMP"', "square", "blue"),
    ('a green star with the text "RIVER"', "star", "green"),
    ('two black rings beside "CLOUD"', "ring", "black"),
)


class Finding(NamedTuple):
    """The result of one check; `passed` is None where there was nothing to check."""

    check: str
    passed: bool | None
    detail: str


class Items(NamedTuple):
    """B items to try a reward on."""

    media: torch.Tensor
    prompts: list[str]
    metadata: list[Mapping[str, Any]]

    def of(self, places: Sequence[int]) -> "Items":
        """The items at `places`, in that order."""
        return Items(self.media[list(places)], [self.prompts[i] for i in places], [self.metadata[i] for i in places])


def examples() -> Items:
    """Eight drawn images, two for each of four prompts; each prompt quotes a text and carries GenEval's metadata."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.linspace(0, 1, _SIZE)
    media: list[torch.Tensor] = []
    prompts: list[str] = []
    metadata: list[Mapping[str, Any]] = []
    for prompt, shape, color in 2 * _EXAMPLES:
        tint = torch.rand(3, 1, 1, generator=generator)
        image = tint * (0.6 + 0.4 * rows[:, None]).expand(3, _SIZE, _SIZE)
        x, y, side = (int(value) for value in torch.randint(6, 24, (3,), generator=generator))
        image[:, y : y + side, x : x + side] = torch.rand(3, 1, 1, generator=generator)
        image = (image + 0.02 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
        media.append(image)
        prompts.append(prompt)
        clause = {"class": shape, "count": 1, "color": color}
        metadata.append({"tag": "colors", "include": [clause], "prompt": prompt})
    return Items(torch.stack(media), prompts, metadata)


def check(reward: Reward, items: Items | None = None) -> list[Finding]:
    """The findings of all checks on a reward, tried on the `items` it applies to (None: the drawn `examples`).

    Raises RewardError when the reward applies to fewer than two items, or fails to score them.
    """
    given = examples() if items is None else items
    rows = [{**row, "prompt": prompt} for row, prompt in zip(given.metadata, given.prompts, strict=True)]
    chosen = [index for index, row in enumerate(rows) if reward.applies_to(row)]
    if len(chosen) < 2:
        raise RewardError(
            f"reward {reward.name!r} applies to {len(chosen)} of the {len(rows)} items, and the check needs at least "
            "two; give images and prompts that it can judge"
        )
    tried = given.of(chosen)
    scores = _scores(reward, tried)
    touched = copy.deepcopy(tried)
    score_in_place(reward, *touched)
    findings = [
        Finding("one finite number per item", True, f"{len(scores)} items, {scores.min():.4g} to {scores.max():.4g}"),
        _untouched(tried, touched),
        _range(reward, scores),
        _same("deterministic", scores, _scores(reward, tried), tolerance=0),
        _order(reward, tried, scores),
        _alone(reward, tried, scores),
        _prompts(reward, tried, scores),
        _video(reward, tried, scores),
        _golden(reward),
    ]
    if isinstance(reward, TrainableReward):
        findings.append(_state(reward, tried))
    return findings


def _scores(reward: Reward, items: Items) -> torch.Tensor:
    return score(reward, *items).nan_to_num(0)  # so that an item left out (NaN) once must be left out every time


def _same(title: str, wanted: torch.Tensor, found: torch.Tensor, tolerance: float = TOLERANCE) -> Finding:
    difference = float((wanted - found).abs().max())
    allowed = tolerance * max(1.0, float(wanted.abs().max()))
    return Finding(title, difference <= allowed, f"greatest difference {difference:.2g}, allowed {allowed:.2g}")


def _untouched(before: Items, after: Items) -> Finding:
    """Whether the reward leaves its inputs unchanged; a caller of the reward itself, without `score`, relies on it."""
    found = _same("media are left as they were", before.media, after.media, tolerance=0)
    if before[1:] == after[1:]:
        return found
    return found._replace(passed=False, detail="it wrote into its prompts or metadata")


def _range(reward: Reward, scores: torch.Tensor) -> Finding:
    low, high = reward.range
    title = "within its declared range"
    if math.isinf(low) and math.isinf(high):
        return Finding(title, None, "it declares no range")
    inside = bool((scores >= low - 1e-6).all() and (scores <= high + 1e-6).all())
    return Finding(title, inside, f"[{low:g}, {high:g}]")


def _order(reward: Reward, items: Items, scores: torch.Tensor) -> Finding:
    places = torch.randperm(len(scores), generator=torch.Generator().manual_seed(1)).tolist()
    return _same("another order, the same scores", scores[places], _scores(reward, items.of(places)))


def _alone(reward: Reward, items: Items, scores: torch.Tensor) -> Finding:
    """Whether each item (each group, for a reward of scope "group") scores the same without the others."""
    parts = [[place] for place in range(len(scores))]
    if reward.scope == "group":
        parts = [[i for i, other in enumerate(items.prompts) if other == one] for one in dict.fromkeys(items.prompts)]
    found = torch.empty_like(scores)
    for part in parts:
        found[part] = _scores(reward, items.of(part))
    return _same(f"each {'group' if reward.scope == 'group' else 'item'} alone, the same scores", scores, found)


def _prompts(reward: Reward, items: Items, scores: torch.Tensor) -> Finding:
    """Whether the next group's prompts and metadata change the scores exactly if the reward is `prompt_sensitive`."""
    names = list(dict.fromkeys(items.prompts))
    title = "the prompt matters" if reward.prompt_sensitive else "the prompt does not matter"
    if len(names) < 2:
        return Finding(title, None, "all items have one prompt")
    first = {name: items.prompts.index(name) for name in names}
    following = {name: first[names[(index + 1) % len(names)]] for index, name in enumerate(names)}
    places = [following[prompt] for prompt in items.prompts]
    changed = Items(items.media, [items.prompts[i] for i in places], [items.metadata[i] for i in places])
    moved = float((_scores(reward, changed) - scores).abs().max())
    allowed = TOLERANCE * max(1.0, float(scores.abs().max()))
    passed = moved > 0 if reward.prompt_sensitive else moved <= allowed
    return Finding(title, passed, f"other prompts move a score by up to {moved:.2g}")


def _video(reward: Reward, items: Items, scores: torch.Tensor) -> Finding:
    title = "a video of equal frames scores as its frame"
    still = items._replace(media=items.media[:, None].repeat(1, 2, 1, 1, 1))
    try:
        found = _scores(reward, still)
    except RewardError as error:
        return Finding(title, None, f"images only: {error}")
    return _same(title, scores, found)


def _golden(reward: Reward) -> Finding:
    golden = reward.golden()
    if golden is None:
        return Finding("golden scores", None, "it has no golden scores")
    found = score(reward, golden.media, golden.prompts, golden.metadata)
    difference = float((found - torch.tensor(golden.scores)).abs().max())
    detail = f"{len(found)} items, greatest difference {difference:.2g}, allowed {golden.tolerance:.2g}"
    return Finding("golden scores", difference <= golden.tolerance, detail)


def _state(reward: TrainableReward, items: Items) -> Finding:
    """Whether loading the earlier state restores the scores, and the same update then gives the same scores again."""
    kept = {key: value.clone() for key, value in reward.state_dict().items()}
    before = _scores(reward, items)
    reward.update(*items, step=0)
    after = _scores(reward, items)
    reward.load_state_dict(kept)
    back = _scores(reward, items)
    reward.update(*items, step=0)
    again = _scores(reward, items)
    reward.load_state_dict(kept)
    exact = torch.equal(before, back) and torch.equal(after, again)
    return Finding("what it learns is saved and restored", exact, "scores before, after and again")
