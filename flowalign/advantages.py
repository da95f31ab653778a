"""Advantages: how much better a sample is than the other samples of its prompt. Pure functions on tensors."""

from __future__ import annotations

from typing import Literal, NamedTuple

from flowalign.lazy import torch

Scale = Literal["global", "group", "largest_group", "none"]


class RewardTable(NamedTuple):
    """The rewards of N samples: their total, and the shaped values of each of K rewards."""

    total: torch.Tensor  # (N,), NaN for a sample that a reward left out
    values: torch.Tensor  # (K, N), after shaping
    applies: torch.Tensor  # (K, N) bool, whether a reward applies to a sample
    weights: torch.Tensor  # (K,)
    names: tuple[str, ...]
    previews: torch.Tensor | None = None  # (N, T), totals of the one-step predictions after each of T denoising steps
    measured: torch.Tensor | None = None  # (K, N), the values before shaping
    trust: torch.Tensor | None = None  # (N,) in (0, 1], the factor on a sample's advantage

    def trained(self) -> RewardTable:
        """The table without monitors, the rewards of weight 0: they are scored and logged, but not learnt from."""
        kept = self.weights > 0
        names = tuple(name for name, of in zip(self.names, kept.tolist(), strict=True) if of)
        return self._replace(
            values=self.values[kept], applies=self.applies[kept], weights=self.weights[kept], names=names, measured=None
        )

    def of(self, chosen: torch.Tensor) -> RewardTable:
        """The table of the samples where `chosen` (N,), bool, is true."""
        given = {name: part for name, part in self._asdict().items() if name not in ("weights", "names")}
        known = {name: part for name, part in given.items() if part is not None}
        return self._replace(
            **{name: part[chosen] if name == "previews" else part[..., chosen] for name, part in known.items()}
        )

    def shares(self, teaches: torch.Tensor) -> torch.Tensor:
        """Factors (K, N) on the losses of each reward, from `teaches` (N,), bool.

        A factor is 0 where the reward does not apply to the sample, and elsewhere 1 / f, where f is the fraction of the
        teaching samples to which it applies. The mean of factor times loss over all teaching samples is then the
        reward's mean loss where it applies. If f is 0, all factors of the reward are 0.
        """
        fractions = self.applies[:, teaches].float().mean(1, keepdim=True)  # NaN where nothing teaches
        return torch.where(self.applies & (fractions > 0), 1 / fractions, torch.zeros_like(fractions))


def _group_sums(values: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, index, values)


def _centred(values: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values minus their group's mean, and the population standard deviation of each value's group; both (N,)."""
    _, index = torch.unique(groups, return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    sizes = _group_sums(torch.ones_like(values), index, count)
    centred = values - (_group_sums(values, index, count) / sizes)[index]
    return centred, (_group_sums(centred**2, index, count) / sizes).sqrt()[index]


def group_advantages(
    rewards: torch.Tensor, groups: torch.Tensor, *, global_std: bool = False, eps: float = 1e-4
) -> torch.Tensor:
    """(reward - its group's mean) / (std + eps), (N,), float32.

    rewards: (N,); groups: (N,), equal numbers mark the samples of one prompt. `std` is the population standard
    deviation of the group, or with `global_std` of all N rewards. Source: Flow-GRPO (Liu et al. 2025, eq. 5) and its
    per-prompt statistics.
    """
    values = rewards.double()
    centred, std = _centred(values, groups)
    if global_std:
        std = values.std(correction=0)
    return (centred / (std + eps)).float()


def advantages(rewards: torch.Tensor, groups: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Advantages (N,): divided by the group's or the global deviation, or undivided (Dr. GRPO, Liu et al. 2025).

    largest_group: divided by the deviation of the group with the largest (LongCat-Video, 2510.22200), which does not
    enlarge the small differences within a group of nearly equal rewards.
    """
    if scale in ("largest_group", "none"):
        centred, std = _centred(rewards.double(), groups)
        return (centred if scale == "none" else centred / (std.max() + 1e-4)).float()
    return group_advantages(rewards, groups, global_std=scale == "global")


def reward_advantages(scored: RewardTable, groups: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Advantages (N, K), one column per reward, over the samples to which the reward applies; 0 for the others."""
    columns = torch.zeros(scored.values.shape, device=scored.total.device)
    for column, values, applies in zip(columns, scored.values, scored.applies, strict=True):
        if applies.any():
            column[applies] = advantages(values[applies], groups[applies], scale)
    return columns.T


def summed_advantages(scored: RewardTable, groups: torch.Tensor, scale: Scale, eps: float = 1e-4) -> torch.Tensor:
    """Advantages (N,): the weighted sum of each reward's own advantages, standardised over all samples.

    A reward with a small spread counts as much as one with a large spread. Source: GDPO (decoupled normalisation), as
    Flow-Factory's advantage processor computes it.
    """
    total = (reward_advantages(scored, groups, scale) * scored.weights).sum(1).double()
    return ((total - total.mean()) / (total.std(correction=0) + eps)).float()


def value_advantages(
    rewards: torch.Tensor, groups: torch.Tensor, *, discount: float, absolute: float, eps: float = 1e-4
) -> torch.Tensor:
    """VGPO's dense advantages (N, T) from the rewards (N, T) of one-step predictions after each of T denoising steps.

    Q_t = sum_k discount^k R_{t+k}, from step t to the end of the rollout; w_t = Q_t / mean_t Q_t;
    A_t = w_t ((Q_t - group mean) / (group std + eps) + absolute Q_t). With `absolute` > 0 a group of equal rewards
    still teaches. Source: VGPO (2512.12387, eq. 10-11); the form of eq. 12-13 is derived from their description. Raises
    ValueError for a reward below 0, since w_t is a ratio of values.
    """
    if (rewards < 0).any():
        raise ValueError("VGPO weighs steps by their values, so rewards must be at least 0")
    values = rewards.double().clone()
    for step in reversed(range(values.shape[1] - 1)):
        values[:, step] += discount * values[:, step + 1]
    weights = values / values.mean(1, keepdim=True).clamp(min=eps)
    relative = torch.stack([group_advantages(column, groups, eps=eps) for column in values.T], dim=1)
    return (weights * (relative + absolute * values)).float()


def has_spread(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """(N,) bool: whether the rewards of a sample's group differ; a group without spread teaches nothing."""
    _, index = torch.unique(groups, return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    low = torch.full((count,), torch.inf, device=rewards.device).scatter_reduce(0, index, rewards.float(), "amin")
    high = torch.full((count,), -torch.inf, device=rewards.device).scatter_reduce(0, index, rewards.float(), "amax")
    return (high > low)[index]
