"""Rubric: a vision-language model's marks from 1 to 5 for alignment, coherence and style.

Source: UnifiedReward (Wang et al., 2025), which writes one line "Alignment Score (1-5): X" for each dimension. What
differs: an answer without a mark is an error (Flow-GRPO counts it as 0, Pref-GRPO as the batch's mean); the wording of
the question is ours, so give `question` the one that a model was trained on; marks are mapped to [0, 1].
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rewards.base import RewardError
from rewards.frames import mean_of_frames
from rewards.vlm import VLM, VLMReward, unread

DIMENSIONS = ("alignment", "coherence", "style")
MAPPINGS = {"linear": lambda mark: (mark - 1) / 4, "fifths": lambda mark: mark / 5}
QUESTION = """This image was generated from the caption below. Rate it from 1 (worst) to 5 (best) in three respects:
- Alignment: how well its content matches the caption.
- Coherence: how free it is of visual glitches, distorted objects and contradictions.
- Style: how good it looks, whatever the caption says.
Answer with these three lines and nothing else, with numbers for X, Y and Z:
Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z
Caption: {prompt}"""


def marks(answer: str, dimensions: Sequence[str]) -> dict[str, float]:
    """The mark of each dimension that the answer's last "<dimension> Score (1-5): X" gives it, if in 1 to 5."""
    found = {}
    for dimension in dimensions:
        line = rf"\b{dimension}\b(?: score)?\W*(?:\(1\s*-\s*5\))?\W*:\W*(\d+(?:\.\d+)?)"
        numbers = [float(number) for number in re.findall(line, answer, re.IGNORECASE)]
        if numbers and 1 <= numbers[-1] <= 5:
            found[dimension] = numbers[-1]
    return found


class Rubric(VLMReward):
    """The mean over `dimensions` of the marks, mapped to [0, 1].

    dimensions: which of alignment, coherence and style count; all three are always asked for.
    mapping: "linear" for (mark - 1) / 4, "fifths" for the published mark / 5.
    question: what is asked; "{prompt}" in it stands for the item's prompt. max_tokens: the longest answer.
    The other options are those of `VLMReward`.
    """

    name = "rubric"
    range = (0.0, 1.0)
    prompt_sensitive = True

    def __init__(
        self,
        dimensions: Sequence[str] = DIMENSIONS,
        mapping: str = "linear",
        question: str = QUESTION,
        max_tokens: int = 128,
        frames: int = 4,
        backend: VLM | None = None,
        **options: Any,
    ):
        if isinstance(dimensions, str) or not dimensions or not set(dimensions) <= set(DIMENSIONS):
            raise RewardError(
                f"reward 'rubric': dimensions must be some of {', '.join(DIMENSIONS)}, not {dimensions!r}"
            )
        if mapping not in MAPPINGS:
            raise RewardError(f"reward 'rubric': mapping must be one of {', '.join(MAPPINGS)}, not {mapping!r}")
        super().__init__(frames, backend, options, max_tokens=max_tokens)
        self.dimensions = tuple(dimensions)
        self.mapping = MAPPINGS[mapping]
        self.question = question
        self.prompt_sensitive = "{prompt}" in question

    def __call__(
        self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        """Scores (B,); RewardError for an answer that lacks a mark."""
        images, items = self.pictures(media)
        texts = [self.question.replace("{prompt}", prompts[item]) for item in items]
        scores = []
        with self.naming(prompts, items):
            answers = self.vlm.answer([[image] for image in images], texts, self.max_tokens)
            for row, answer in enumerate(answers):
                found = marks(answer, self.dimensions)
                if missing := [dimension for dimension in self.dimensions if dimension not in found]:
                    raise unread(answer, f"has no mark from 1 to 5 for {' and '.join(missing)}", row)
                scores.append(sum(map(self.mapping, found.values())) / len(found))
        return mean_of_frames(torch.tensor(scores), len(images) // len(media))
