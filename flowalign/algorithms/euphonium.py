"""The dual-reward loss of Euphonium (2602.04928): the reward of the finished video, and that of each noisy step.

    loss = outcome_weight sum_k weights_k clipped(A_k) + process_weight clipped(B)

A_k are the advantages of a finished sample under each reward, B those of the trained step's noisy latents among the
same step of its group, and clipped(A) is PPO's loss max(-A ratio, -A clip(ratio, 1 - c, 1 + c)).
"""

from __future__ import annotations

from typing import NamedTuple

from flowalign.algorithms.flow_grpo import clipped_ratio_loss
from flowalign.lazy import torch


class DualRewardLoss(NamedTuple):
    """The loss, a scalar, and its two parts, scalars without their weights."""

    loss: torch.Tensor
    outcome_loss: torch.Tensor
    process_loss: torch.Tensor
    ratio: torch.Tensor  # (n,), the likelihood ratios


def dual_reward_loss(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    outcome: torch.Tensor,
    process: torch.Tensor,
    *,
    weights: torch.Tensor,
    outcome_weight: float = 1.0,
    process_weight: float = 1.0,
    clip_range: float = 1e-4,
    advantage_clip: float = 5.0,
) -> DualRewardLoss:
    """The loss of n trained steps in the module's formula, a mean over them.

    log_prob, old_log_prob: (n,), under the unguided means; outcome: advantages (n, K) of K rewards with `weights` (K,);
    process: advantages (n,). A weight of 0 switches one of the two off.
    """
    limited = torch.cat([outcome, process[:, None]], dim=1).clamp(-advantage_clip, advantage_clip)
    losses, ratio = clipped_ratio_loss(log_prob[:, None], old_log_prob[:, None], limited, clip_range)
    outcome_loss, process_loss = (losses[:, :-1] @ weights.to(losses)).mean(), losses[:, -1].mean()
    loss = outcome_weight * outcome_loss + process_weight * process_loss
    return DualRewardLoss(loss, outcome_loss, process_loss, ratio[:, 0])
