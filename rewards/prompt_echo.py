"""PromptEcho: how likely the prompt is as a vision-language model's description of the image.

Source: PromptEcho (2026, arXiv 2604.12652): R = mean over the prompt's tokens of log p(token | tokens before, image,
question), by teacher forcing. What differs: nothing; the tokens that close the answer do not count.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from rewards.base import RewardError, Rows
from rewards.vlm.base import VLM
from rewards.vlm.reward import VLMReward

QUESTION = "Describe this image in detail."


class PromptEcho(VLMReward):
    """The mean log-probability, at most 0, of the prompt's tokens as the answer to `question`.

    The other options are those of `VLMReward` with a local model; a server does not tell the probability of a text.
    """

    name = "prompt_echo"
    range = (-math.inf, 0.0)

    def __init__(self, question: str = QUESTION, frames: int = 4, backend: VLM | None = None, **options: Any):
        if options.get("url"):
            raise RewardError("reward 'prompt_echo': a server cannot tell how likely a prompt is; give a local `model`")
        if "{prompt}" in question:
            raise RewardError("reward 'prompt_echo': the prompt is the answer; leave {prompt} out of the question")
        super().__init__(frames, backend, options)
        self.question = question

    def __call__(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        return self.of_frames(
            media, prompts, lambda images, texts: self.vlm.continuation_log_prob(images, self.question, texts)
        )
