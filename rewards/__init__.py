"""The reward zoo, importable on its own: `import rewards; reward = rewards.load("ocr")`.

`rewards.score(reward, media, prompts, metadata)` calls a reward and checks the scores it returns. Each name below is
imported at its first use, so that a program which needs no reward does not wait for torch.
"""

from typing import TYPE_CHECKING

from rewards.lazy import exports

if TYPE_CHECKING:
    from rewards.base import Golden, Reward, TrainableReward, score
    from rewards.catalogue import available, describe
    from rewards.contract import Finding, Items, check
    from rewards.errors import RewardError
    from rewards.loading import as_reward, load, load_on

_FROM = {
    "base": ("Golden", "Reward", "TrainableReward", "score"),
    "errors": ("RewardError",),
    "catalogue": ("available", "describe"),
    "contract": ("Finding", "Items", "check"),
    "loading": ("as_reward", "load", "load_on"),
}

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
    "load_on",
    "score",
]

__getattr__ = exports(__name__, _FROM)
