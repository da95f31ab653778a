"""Artifact judge: a vision-language model's probability that the image is free of artifacts.

Source: ArtifactReward, "Understanding Reward Hacking in Text-to-Image Reinforcement Learning" (2026, arXiv 2601.03468):
R = 1 - P(yes) of the first token, over yes and no; the prompt is not shown. What differs: the wording of the question,
which the paper optimises for Qwen2.5-VL-7B, is ours; a failed call is an error and not a missing score.
"""

from collections.abc import Sequence
from typing import Any

import torch

from rewards.base import RewardError, Rows
from rewards.vlm.base import VLM
from rewards.vlm.reward import VLMReward

QUESTION = (
    "Does this image contain unintended artifacts, such as distorted anatomy, malformed or melted objects, broken "
    "text, wrong lighting, bad blending or noise? Deliberate style and deliberately surreal content are no artifacts. "
    "Answer Yes or No."
)


class ArtifactVLM(VLMReward):
    """1 - P(yes) to `question`, which must ask whether there are artifacts; in [0, 1].

    The other options are those of `VLMReward`.
    """

    name = "artifact_vlm"
    prompt_sensitive = False

    def __init__(
        self,
        question: str = QUESTION,
        unparsable: str = "error",
        frames: int = 4,
        backend: VLM | None = None,
        **options: Any,
    ):
        if "{prompt}" in question:
            raise RewardError("reward 'artifact_vlm': the question is asked without the prompt; leave {prompt} out")
        super().__init__(frames, backend, options, unparsable)
        self.question = question

    def __call__(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        return self.of_frames(media, prompts, lambda images, _: 1 - self.yes(images, [self.question] * len(images)))
