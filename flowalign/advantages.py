"""How much better a sample is than the other samples of its prompt. Pure functions of (N,) tensors."""

import torch


def _group_sums(values: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, index, values)


def group_advantages(
    rewards: torch.Tensor, groups: torch.Tensor, *, global_std: bool = False, eps: float = 1e-4
) -> torch.Tensor:
    """(reward - its group's mean) / (std + eps), (N,), float32.

    rewards: (N,); groups: (N,), equal numbers mark the samples of one prompt. The population standard deviation is the
    group's own, or with `global_std` that of all N rewards. Source: Flow-GRPO (Liu et al. 2025, eq. 5) and its
    per-prompt statistics.
    """
    values = rewards.double()
    _, index = torch.unique(groups, return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    sizes = _group_sums(torch.ones_like(values), index, count)
    means = _group_sums(values, index, count) / sizes
    centred = values - means[index]
    if global_std:
        std = values.std(correction=0)
    else:
        std = (_group_sums(centred**2, index, count) / sizes).sqrt()[index]
    return (centred / (std + eps)).float()


def has_spread(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """(N,) bool: whether the rewards of a sample's group differ at all; groups without spread teach nothing."""
    _, index = torch.unique(groups, return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    low = torch.full((count,), torch.inf, device=rewards.device).scatter_reduce(0, index, rewards.float(), "amin")
    high = torch.full((count,), -torch.inf, device=rewards.device).scatter_reduce(0, index, rewards.float(), "amax")
    return (high > low)[index]
