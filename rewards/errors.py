"""The error that tells a user what is wrong with a reward; this module imports no torch, so that it loads fast."""

from collections.abc import Iterable

from rapidfuzz.distance import OSA, Indel


class RewardError(ValueError):
    """A user's mistake with a reward: its message is one sentence that names the reward and the item."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The entry of `known` that is most like `word`; case does not count, and `known` must not be empty."""
    word = word.lower()
    return min(
        known, key=lambda one: (OSA.distance(word, one.lower()), -Indel.normalized_similarity(word, one.lower()))
    )
