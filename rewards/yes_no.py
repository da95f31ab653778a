"""Yes or no: a vision-language model's probability of "yes" to a question about the prompt and the image.

Source: RewardDance (2025, arXiv 2509.08826): r = P("yes" | image, prompt, instruction), or P("yes" | reference, image,
prompt, instruction) for an item with a reference image that it should surpass. What differs: the judge is any chat
model, not trained for the task; "yes" is normalised over yes and no; the wording of the questions is ours.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rewards.base import RewardError, Rows, shown
from rewards.frames import mean_of_frames
from rewards.media import open_image
from rewards.vlm.base import VLM
from rewards.vlm.reward import VLMReward

QUESTION = 'Does this image show exactly what the caption "{prompt}" says, in good quality? Answer Yes or No.'
COMPARISON = (
    'Two images were made from the caption "{prompt}". Does the second image follow the caption better and look better '
    "than the first? Answer Yes or No."
)


class YesNo(VLMReward):
    """P(yes) / (P(yes) + P(no)) as the first token of the answer, in [0, 1].

    question: the question about one image. comparison: the question about two images, for an item whose metadata names
    a file under "reference"; that file is the first image. "{prompt}" in either stands for the item's prompt.
    The other options are those of `VLMReward`.
    """

    name = "yes_no"

    def __init__(
        self,
        question: str = QUESTION,
        comparison: str = COMPARISON,
        unparsable: str = "error",
        frames: int = 4,
        backend: VLM | None = None,
        **options: Any,
    ):
        super().__init__(frames, backend, options, unparsable)
        self.question = question
        self.comparison = comparison
        self.prompt_sensitive = "{prompt}" in question + comparison

    def __call__(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        """Scores (B,); RewardError for a reference that is no image file."""
        references = [self._reference(index, prompts, row.get("reference")) for index, row in enumerate(metadata)]
        images, items = self.images_of(media)
        shows = [[*references[item], image] for item, image in zip(items, images, strict=True)]
        templates = [self.comparison if references[item] else self.question for item in items]
        texts = [text.replace("{prompt}", prompts[item]) for item, text in zip(items, templates, strict=True)]
        with self.naming(prompts, items):
            scores = self.yes(shows, texts)
        return mean_of_frames(scores, len(images) // len(media))

    def _reference(self, index: int, prompts: Sequence[str], path: Any) -> list[Image.Image]:
        if path is None:
            return []
        try:
            return [open_image(Path(path))]
        except (RewardError, TypeError) as error:
            where = f"reward {self.name!r}: {shown(index, prompts)}"
            raise RewardError(f"{where} has the reference {path!r}, which is no image: {error}") from error
