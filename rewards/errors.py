"""The error that a person's mistake with a reward raises; on its own, so that to name it costs no import."""


class RewardError(ValueError):
    """What a person did wrong with a reward, in one sentence that names the reward and the item."""
