"""The reward zoo, importable on its own: `import rewards; reward = rewards.load("ocr")`.

`rewards.score(reward, media, prompts, metadata)` calls one and checks what comes back.
"""

from rewards.base import Golden, Reward, RewardError, TrainableReward, score
from rewards.loading import as_reward, available, load

__all__ = ["Golden", "Reward", "RewardError", "TrainableReward", "as_reward", "available", "load", "score"]
