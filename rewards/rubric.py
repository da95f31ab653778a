"""Rubric: a vision-language model's marks from 1 to 5 for alignment, coherence and style, or one mark for all.

Source: UnifiedReward (Wang et al., 2025), which answers one line "Alignment Score (1-5): X" for each dimension, or in
its first form "Final Score: X". What differs: an answer without a mark, or with a mark outside the scale, is unparsable
(Flow-GRPO counts it as 0, Pref-GRPO as the batch's mean), and no mark is clamped; marks are mapped to [0, 1]; the
wording of the question is ours, so set `question` to the wording that your model was trained on.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from rewards.base import RewardError, Rows
from rewards.vlm.base import VLM, Pictures
from rewards.vlm.reward import VLMReward
from rewards.vlm.verdicts import mark, statement

DIMENSIONS = ("alignment", "coherence", "style")
MAPPINGS = ("linear", "fifths")
QUESTION = """This image was generated from the caption below. Rate it from 1 (worst) to 5 (best) in three respects:
- Alignment: how well its content matches the caption.
- Coherence: how free it is of visual glitches, distorted objects and contradictions.
- Style: how good it looks, whatever the caption says.
Answer with these three lines and nothing else, with numbers for X, Y and Z:
Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z
Caption: {prompt}"""


class Rubric(VLMReward):
    """The mean of the marks for `dimensions`, mapped to [0, 1].

    dimensions: the marks that count, some of "alignment", "coherence" and "style" (the default question asks for all
        three). A custom question may ask for others; "final" is one mark for everything ("Final Score: X", "7/10"). By
        default the three count, or the final mark where an answer has none of the three.
    mapping: "linear" for (mark - lowest) / (highest - lowest), "fifths" for the published mark / 5.
    question: the text that is asked; "{prompt}" in it stands for the item's prompt.
    scale: the lowest and the highest mark that the question asks for.
    max_tokens: the longest answer, in tokens. The other options are those of `VLMReward`.
    """

    def __init__(
        self,
        dimensions: Sequence[str] | None = None,
        mapping: str = "linear",
        question: str = QUESTION,
        scale: Sequence[float] = (1, 5),
        max_tokens: int = 128,
        unparsable: str = "error",
        frames: int = 4,
        backend: VLM | None = None,
        **options: Any,
    ):
        given = DIMENSIONS if dimensions is None else dimensions
        if isinstance(given, str) or not given or not all(isinstance(one, str) and one.strip() for one in given):
            raise RewardError(f"reward 'rubric': dimensions must be a list of names, not {dimensions!r}")
        if question == QUESTION and not set(given) <= set(DIMENSIONS):
            raise RewardError(
                f"reward 'rubric': dimensions must be some of {', '.join(DIMENSIONS)}, not {dimensions!r}, unless a "
                "custom `question` asks for them"
            )
        if mapping not in MAPPINGS:
            raise RewardError(f"reward 'rubric': mapping must be one of {', '.join(MAPPINGS)}, not {mapping!r}")
        if not _is_scale(scale) or (mapping == "fifths" and scale[1] != 5) or (question == QUESTION and scale[1] != 5):
            raise RewardError(
                f"reward 'rubric': scale must be the lowest and the highest mark, at least 0, not {scale!r}; the "
                "default question and the mapping 'fifths' are for marks up to 5"
            )
        super().__init__(frames, backend, options, unparsable, max_tokens)
        self.dimensions = tuple(given)
        self.or_final = dimensions is None
        self.low, self.high = map(float, scale)
        self.mapping = mapping
        self.question = question
        self.prompt_sensitive = "{prompt}" in question
        self.middle = self._mapped((self.low + self.high) / 2)

    def __call__(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        """Scores (B,); RewardError for an answer that lacks a mark, unless `unparsable` says otherwise."""

        def marked(images: Pictures, texts: list[str]) -> torch.Tensor:
            return self.answered(images, [self.question.replace("{prompt}", text) for text in texts], self._read)

        return self.of_frames(media, prompts, marked)

    def _read(self, answer: str) -> float | str:
        names = self.dimensions
        if self.or_final and statement(answer, "final") and not any(statement(answer, name) for name in names):
            names = ("final",)
        marks = [mark(answer, name, self.low, self.high) for name in names]
        if missing := [name for name, one in zip(names, marks, strict=True) if one is None]:
            return f"has no mark from {self.low:g} to {self.high:g} for {' and '.join(missing)}"
        return sum(self._mapped(one) for one in marks if one is not None) / len(marks)

    def _mapped(self, mark: float) -> float:
        return mark / 5 if self.mapping == "fifths" else (mark - self.low) / (self.high - self.low)


def _is_scale(scale: Any) -> bool:
    numbers = isinstance(scale, list | tuple) and len(scale) == 2 and all(type(one) in (int, float) for one in scale)
    return numbers and 0 <= scale[0] < scale[1] < math.inf
