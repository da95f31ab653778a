"""Several rewards on one batch, where each need not apply to every item."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from rewards.base import Reward, RewardError, check_inputs, score, shown


class Scores(NamedTuple):
    """One reward's scores of B items: `values` (B,) float32, 0 where `applies` (B,) bool is False."""

    values: torch.Tensor
    applies: torch.Tensor


def score_all(
    rewards: Mapping[str, Reward],
    media: torch.Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Scores]:
    """The Scores of every named reward, each asked only about the items to which it applies.

    A reward alone is asked about every item, so that a prompt it cannot judge is an error and not a hole. Raises
    RewardError as `score` does, and for an item to which no reward applies.
    """
    if not rewards:
        raise RewardError("there is no reward to score with; name at least one")
    metadata = check_inputs(", ".join(rewards), media, prompts, metadata)
    rows = [{**row, "prompt": prompt} for row, prompt in zip(metadata, prompts, strict=True)]
    asked = {key: [len(rewards) == 1 or reward.applies_to(row) for row in rows] for key, reward in rewards.items()}
    for index, judges in enumerate(zip(*asked.values(), strict=True)):
        if not any(judges):
            raise RewardError(f"none of the rewards {', '.join(rewards)} applies to {shown(index, prompts)}")
    scores = {}
    for key, reward in rewards.items():
        applies = torch.tensor(asked[key], device=media.device)
        values = torch.zeros(len(prompts), device=media.device)
        chosen = [index for index, true in enumerate(asked[key]) if true]
        if len(chosen) == len(prompts):
            values = score(reward, media, prompts, metadata)
        elif chosen:
            part = [prompts[i] for i in chosen], [metadata[i] for i in chosen]
            try:
                values[applies] = score(reward, media[applies], *part)
            except RewardError as error:
                raise RewardError(f"{error} (counting only the {len(chosen)} items to which it applies)") from error
        scores[key] = Scores(values, applies)
    return scores


def weighted_sum(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> torch.Tensor:
    """Total (B,) float32: of each item, the weighted mean of the scores of the rewards that apply to it.

    Weights are finite and at least 0, one for each reward. Raises RewardError for other weights and for an item to
    whose rewards only weight 0 is given.
    """
    if set(scores) != set(weights):
        missing, extra = sorted(set(scores) - set(weights)), sorted(set(weights) - set(scores))
        raise RewardError(f"weights and rewards differ: no weight for {missing}, no reward for {extra}")
    for key, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise RewardError(f"the weight of reward {key!r} is {weight}; it must be a finite number of at least 0")
    shares = torch.stack([weights[key] * scores[key].applies.float() for key in scores])
    values = torch.stack([scores[key].values for key in scores])
    total = shares.sum(0)
    if not (total > 0).all():
        raise RewardError(f"item {int((total <= 0).nonzero()[0])} has no reward of positive weight that applies to it")
    return (shares * values).sum(0) / total
