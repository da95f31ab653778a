"""Several rewards on one batch: each reward's scores are shaped, then all are combined into one total per item.

A reward need not apply to every item. Shaping compares a score with reference scores, those of the model before
training. Each function names its source.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from rewards.base import Reward, RewardError, Rows, check_inputs, score, shown


class Scores(NamedTuple):
    """One reward's scores of B items.

    `values` (B,), float32, count where `applies` (B,), bool, is True. Elsewhere a value is 0 if the reward does not
    apply to the item, and NaN if the reward left the item out; the item's total is then NaN too.
    """

    values: torch.Tensor
    applies: torch.Tensor


def score_all(
    rewards: Mapping[str, Reward], media: torch.Tensor, prompts: Sequence[str], metadata: Rows | None = None
) -> dict[str, Scores]:
    """The Scores of every named reward; each reward scores only the items to which it applies.

    A single reward scores every item, so that a prompt it cannot judge is an error and not a gap. Raises RewardError as
    `score` does, and for an item to which no reward applies.
    """
    if not rewards:
        raise RewardError("there is no reward to score with; name at least one")
    metadata = check_inputs(", ".join(rewards), media, prompts, metadata)
    rows = [{**row, "prompt": prompt} for row, prompt in zip(metadata, prompts, strict=True)]
    asked = {
        key: [len(rewards) == 1 or reward.applies_to(dict(row)) for row in rows] for key, reward in rewards.items()
    }
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
        scores[key] = Scores(values, applies & ~values.isnan())
    return scores


def weighted_sum(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> torch.Tensor:
    """Total (B,) float32: for each item, the weighted mean of the scores of the rewards that apply to it.

    The total is NaN where a reward of positive weight left the item out: a mean without that reward could not be
    compared with the rest of the group. Weights are finite and at least 0, one for each reward. Raises RewardError for
    other weights, and for an item whose rewards all have weight 0; so do the other combinations.
    """
    shares, values = _shares(scores, weights)
    return (shares * values).sum(0)


def _shares(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each reward's share in each item's total, and its score, both (K, B); the shares of an item sum to 1."""
    if set(scores) != set(weights):
        missing, extra = sorted(set(scores) - set(weights)), sorted(set(weights) - set(scores))
        raise RewardError(f"weights and rewards differ: no weight for {missing}, no reward for {extra}")
    for key, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise RewardError(f"the weight of reward {key!r} is {weight}; it must be a finite number of at least 0")
    given = torch.stack([weights[key] * (one.applies | one.values.isnan()).float() for key, one in scores.items()])
    total = given.sum(0)
    if not (total > 0).all():
        raise RewardError(f"item {int((total <= 0).nonzero()[0])} has no reward of positive weight that applies to it")
    values = torch.stack([one.values for one in scores.values()])
    return given / total, values.where(given > 0, 0.0)


def standardised(values: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Values (B,) as standard deviations from the mean of all reference scores, which have any shape."""
    deviation = reference.std()
    if not deviation > 0:
        raise RewardError(
            f"standardise needs reference scores that differ; their standard deviation is {deviation.item():.4g}"
        )
    return (values - reference.mean()) / deviation


def centred_sigmoid(values: torch.Tensor, reference: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """PAR: the mean over m of sigmoid(scale (value - reference_m)), for values (B,) and reference (B, M); in [0, 1].

    Source: Fu et al. 2025, "Reward Shaping to Mitigate Reward Hacking in RLHF" (2502.18770).
    """
    return (scale * (values[:, None] - reference)).sigmoid().mean(1)


def centred_log_sigmoid(values: torch.Tensor, reference: torch.Tensor, quantile: float = 0.85) -> torch.Tensor:
    """log sigmoid(value - r), below 0; r is a quantile of the Gaussian fitted to each item's references (B, M).

    Its sum over rewards is log P(all rewards are good). Source: Wang et al. 2024, "Transforming and Combining Rewards"
    (2402.00742); the default quantile is the one in PAR's comparison.
    """
    deviation = reference.std(1) if reference.shape[1] > 1 else torch.zeros_like(reference[:, 0])
    level = reference.mean(1) + deviation * torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64)).item()
    return F.logsigmoid(values - level)


def worst_case(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> torch.Tensor:
    """Total (B,): for each item, the lowest score among the rewards of positive weight that apply to it.

    Source: Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization" (2310.02743), WCO.
    """
    shares, values = _shares(scores, weights)
    return torch.where(shares > 0, values, torch.inf).amin(0)


def uncertainty_weighted(scores: Mapping[str, Scores], weights: Mapping[str, float], penalty: float) -> torch.Tensor:
    """Total (B,): the rewards' weighted mean less `penalty` times their weighted variance (2310.02743, UWO)."""
    shares, values = _shares(scores, weights)
    mean = (shares * values).sum(0)
    return mean - penalty * (shares * (values - mean) ** 2).sum(0)


def base_and_bonus(scores: Mapping[str, Scores], base: str, bonus: str, floor: float) -> torch.Tensor:
    """Total (B,): base (floor + (1 - floor) bonus), for scores in [0, 1]; at base 0 the bonus adds nothing.

    Source: FIRM, "Trust Your Critic" (2603.12247): floor 0.6 for editing (CME, execution and consistency), 0.4 for
    generation (QMA, instruction following and quality). Raises RewardError for an item to which one of the two does not
    apply, and for a score outside [0, 1].
    """
    for name in (base, bonus):
        if name not in scores:
            raise RewardError(f"the combination needs the reward {name!r}; there are {', '.join(scores)}")
        values, applies = scores[name]
        judged = applies | values.isnan()
        if not judged.all():
            index = int((~judged).nonzero()[0])
            raise RewardError(f"reward {name!r} does not apply to item {index}; base and bonus both must apply")
        if (values < 0).any() or (values > 1).any():
            index = int(((values < 0) | (values > 1)).nonzero()[0])
            raise RewardError(
                f"reward {name!r} scored item {index} as {values[index]:.4g}; base and bonus must lie in [0, 1]"
            )
    return scores[base].values * (floor + (1 - floor) * scores[bonus].values)


def agreement(scores: Mapping[str, Scores], weights: Mapping[str, float], scale: float) -> torch.Tensor:
    """How far the rewards agree on each item, (B,) in (0, 1]: exp(-scale U), U their weighted standard deviation.

    It is the item's weight in learning. Source: Ctrl-U (2410.11236), where U is the difference between two answers of
    one model; here U is the disagreement of several models.
    """
    shares, values = _shares(scores, weights)
    mean = (shares * values).sum(0)
    return (-scale * (shares * (values - mean) ** 2).sum(0).sqrt()).exp()
