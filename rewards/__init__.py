"""The reward zoo, importable on its own: `import rewards; reward = rewards.load("ocr")`.

`rewards.score(reward, media, prompts, metadata)` calls one and checks what comes back.
"""

from rewards.base import Golden, Reward, RewardError, TrainableReward, score
from rewards.contract import Finding, Items, check
from rewards.loading import as_reward, available, describe, load

__all__ = [
    "Finding",
    "Golden",
    "Items",
    "Reward",
    "RewardError",
    "TrainableReward",
    "as_reward",
    "available",
    "check",
    "describe",
    "load",
    "score",
]
