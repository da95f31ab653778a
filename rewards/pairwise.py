"""Pairwise: the share of its group's other pictures that a picture beats, as a vision-language model judges.

Source: Pref-GRPO (2025, arXiv 2508.20751): all pairs of a prompt's G pictures are judged once,
w_i = sum over j of y_ij / (G - 1), with y 1 for a win, 1/2 for a tie, 0 for a loss. What differs: which of the two is
shown first is drawn from the seed, the prompt and the two pictures, so it favours no place in the batch (published: the
earlier one, always); equal pictures tie unasked; an answer that names no winner is an error unless `unparsable` is
"tie", as published, or "mask", when the other pairs alone count; the wording of the question is ours, so give
`question` the one that a model was trained on.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch

from rewards.base import RewardError, shown
from rewards.vlm.base import VLM
from rewards.vlm.reward import VLMReward
from rewards.vlm.verdicts import preferred

QUESTION = """These two images were generated from the caption below. Compare how well each follows the caption, how \
good it looks and how free of flaws it is. You may reason first, inside <think> and </think>. Then give your verdict \
as exactly <answer>Image 1 is better</answer> or <answer>Image 2 is better</answer>.
Caption: {prompt}"""


class Pairwise(VLMReward):
    """The win rate, in [0, 1], of each picture among all pictures of equal prompt in the batch.

    seed: draws which picture of a pair is shown first. unparsable: with "mask", a pair whose answer names no winner
    does not count, and a picture without a pair that does is left out. question: what is asked about the two;
    "{prompt}" in it stands for the prompt. max_tokens: the longest answer.
    frames: how many of a video's frames are judged, each against the other video's frame at the same place; a pair's
    outcome is the mean. The other options are those of `VLMReward`.
    """

    name = "pairwise"
    scope = "group"
    range = (0.0, 1.0)
    prompt_sensitive = True

    def __init__(
        self,
        seed: int = 0,
        unparsable: str = "error",
        question: str = QUESTION,
        max_tokens: int = 1024,
        frames: int = 4,
        backend: VLM | None = None,
        **options: Any,
    ):
        super().__init__(frames, backend, options, unparsable, max_tokens)
        self.seed = seed
        self.question = question

    def __call__(
        self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        """Scores (B,); RewardError for a prompt with one picture only."""
        groups: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(index)
        for members in groups.values():
            if len(members) == 1:
                where = shown(members[0], prompts)
                raise RewardError(f"reward 'pairwise': {where} is the only one of its prompt; it needs two or more")
        images, items = self.pictures(media)
        count = len(images) // len(media)
        contents = [hashlib.sha256(image.tobytes()).digest() for image in images]
        wins, judged = torch.zeros(2, len(media), dtype=torch.float64)
        duels = []  # the numbers of the pictures shown first and second
        for members in groups.values():
            for pair in combinations(members, 2):
                for a, b in ((pair[0] * count + frame, pair[1] * count + frame) for frame in range(count)):
                    if contents[a] == contents[b]:
                        wins[list(pair)] += 0.5
                        judged[list(pair)] += 1
                    else:
                        duels.append(self._ordered(a, b, contents, prompts[pair[0]]))
        texts = [self.question.replace("{prompt}", prompts[items[first]]) for first, _ in duels]
        with self.naming(prompts, [items[first] for first, _ in duels]):
            outcomes = self.answered([[images[a], images[b]] for a, b in duels], texts, _outcome)
        for (first, second), outcome in zip(duels, outcomes, strict=True):
            if not outcome.isnan():
                wins[items[first]] += outcome
                wins[items[second]] += 1 - outcome
                judged[[items[first], items[second]]] += 1
        return (wins / judged).float()

    def _ordered(self, a: int, b: int, contents: Sequence[bytes], prompt: str) -> tuple[int, int]:
        """The two pictures in an order that depends on the seed, the prompt and their contents alone."""
        low, high = sorted((a, b), key=contents.__getitem__)
        drawn = hashlib.sha256(f"{self.seed}\n{prompt}\n".encode() + contents[low] + contents[high]).digest()
        return (low, high) if drawn[0] % 2 else (high, low)


def _outcome(answer: str) -> float | str:
    outcome = preferred(answer)
    return "names no winner" if outcome is None else outcome
