"""What says to a person what is wrong with a reward; on its own, so that to use it costs no import."""

import difflib
from collections.abc import Iterable


class RewardError(ValueError):
    """What a person did wrong with a reward, in one sentence that names the reward and the item."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The entry of `known` (at least one) most like `word`, whatever the case of either."""
    return max(known, key=lambda entry: difflib.SequenceMatcher(None, word.lower(), entry.lower()).ratio())
