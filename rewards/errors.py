"""What says to a person what is wrong with a reward; on its own, so that to use it costs no import."""

from collections.abc import Iterable

from rapidfuzz.distance import OSA, Indel


class RewardError(ValueError):
    """What a person did wrong with a reward, in one sentence that names the reward and the item."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The entry of `known` (at least one) most like `word`, whatever the case of either."""
    word = word.lower()
    return min(
        known, key=lambda one: (OSA.distance(word, one.lower()), -Indel.normalized_similarity(word, one.lower()))
    )
