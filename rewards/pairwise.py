"""Pairwise: the share of the other images of its group that an image beats, by a vision-language model's judgement.

Source: Pref-GRPO (2025, arXiv 2508.20751): every pair of a prompt's G images is judged once,
w_i = sum over j of y_ij / (G - 1), with y 1 for a win, 1/2 for a tie, 0 for a loss. What differs:

- The seed, the prompt and the two images decide which image is shown first, so that no place in the batch is favoured
  (published: always the earlier one).
- Equal images tie, and the model is not asked.
- An answer that names no winner is an error, unless `unparsable` is "tie", as published, or "mask".
- The wording of the question is ours, so set `question` to the wording that your model was trained on.
"""

import hashlib
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch

from rewards.base import RewardError, Rows, grouped, shown
from rewards.vlm.base import VLM
from rewards.vlm.reward import VLMReward
from rewards.vlm.verdicts import preferred

QUESTION = """These two images were generated from the caption below. Compare how well each follows the caption, how \
good it looks and how free of flaws it is. You may reason first, inside <think> and </think>. Then give your verdict \
as exactly <answer>Image 1 is better</answer> or <answer>Image 2 is better</answer>.
Caption: {prompt}"""


class Pairwise(VLMReward):
    """The win rate, in [0, 1], of each image among all images of equal prompt in the batch.

    seed: draws which image of a pair is shown first.
    unparsable: as in `VLMReward`; "mask" does not count a pair whose answer names no winner, and leaves out an image
        none of whose pairs counts.
    question: the question about a pair; "{prompt}" in it stands for the prompt. max_tokens: the longest answer, in
        tokens.
    frames: frames of a video that are judged, each against the other video's frame at the same place; the outcome of a
        pair is their mean. The other options are those of `VLMReward`.
    """

    scope = "group"

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

    def __call__(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        """Scores (B,); RewardError for a prompt with one image only."""
        groups = grouped((prompt, index) for index, prompt in enumerate(prompts)).values()
        for members in groups:
            if len(members) == 1:
                where = shown(members[0], prompts)
                raise RewardError(f"reward 'pairwise': {where} is the only item of its prompt; a pair needs two")
        images, items = self.images_of(media)
        count = len(images) // len(media)
        contents = [hashlib.sha256(image.tobytes()).digest() for image in images]
        wins, judged = torch.zeros(2, len(media), dtype=torch.float64)
        duels = []  # the numbers of the images shown first and second
        for members in groups:
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
        """The two images in an order that depends on the seed, the prompt and the images' contents alone."""
        low, high = sorted((a, b), key=contents.__getitem__)
        drawn = hashlib.sha256(f"{self.seed}\n{prompt}\n".encode() + contents[low] + contents[high]).digest()
        return (low, high) if drawn[0] % 2 else (high, low)


def _outcome(answer: str) -> float | str:
    outcome = preferred(answer)
    return "names no winner" if outcome is None else outcome
