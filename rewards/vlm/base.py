"""Vision-language models as judges: one interface to a local model or to an OpenAI-compatible server.

Every image is shown in 8-bit RGB. A video is judged frame by frame, with the published question about one image, and
its score is the mean over its frames. Shapes: N questions, each with one or more images and one text; C choices.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from rewards.base import RewardError, cut

Pictures = Sequence[Sequence[Image.Image]]  # the images of each of N questions
UNPARSABLE = ("error", "tie", "mask")
CUT_OFF = "was cut off before its verdict; raise max_tokens, now {}, or switch its reasoning off with `thinking: false`"
# The marks around a model's reasoning before its answer: <think>, [THINK] and similar ones.
REASONING = re.compile(r"[<\[◁](/?)(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning|reflection)[>\]▷]", re.IGNORECASE)


class VLMError(RewardError):
    """A judge's failure, in one sentence; `row` is the number of the question, if it concerns only one."""

    def __init__(self, message: str, row: int | None = None):
        super().__init__(message)
        self.row = row


class Unparsable(VLMError):
    """Some answers begin with none of the choices: `problems` says why, by row; `found` has NaN in these rows."""

    def __init__(self, problems: Mapping[int, str], found: torch.Tensor):
        row = min(problems)
        super().__init__(problems[row], row)
        self.problems, self.found = problems, found


class Unfinished(str):
    """The text of an answer that was cut off; no verdict is read from it."""


class VLM(ABC):
    """A judge that sees images; its answer to a question depends on that question alone."""

    @abstractmethod
    def answer(self, images: Pictures, texts: Sequence[str], max_tokens: int) -> list[str]:
        """The N greedy answers, of at most `max_tokens` tokens; answers that were cut off are `Unfinished`."""

    @abstractmethod
    def choice_log_probs(self, images: Pictures, texts: Sequence[str], choices: Sequence[str]) -> torch.Tensor:
        """Log-probabilities (N, C), float32, that the answer's first token reads as each choice.

        Case and surrounding spaces do not count: "Yes", " yes" and "YES" are one choice. Raises Unparsable when some
        answers begin with something else, such as the model's reasoning.
        """

    @abstractmethod
    def continuation_log_prob(self, images: Pictures, question: str, continuations: Sequence[str]) -> torch.Tensor:
        """Mean log-probabilities (N,), float32, of the tokens of each continuation as the answer to the question."""


def switches(thinking: bool | None, name: str, further: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keys and values in the option `name`; VLMError if it or `thinking` has the wrong type."""
    if thinking is not None and not isinstance(thinking, bool):
        raise VLMError(f"thinking must be true or false, not {thinking!r}")
    if further is not None and not isinstance(further, Mapping):
        raise VLMError(f"{name} must be keys and values, not {further!r}")
    return dict(further or {})


def at_least(option: str, value: int, lowest: int) -> None:
    """Raises VLMError unless the option's value is a whole number of at least `lowest`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise VLMError(f"{option} must be a whole number of at least {lowest}, not {value!r}")


def final(answer: str) -> str | None:
    """The answer after its reasoning; None if the answer or its reasoning was cut off."""
    marks = list(REASONING.finditer(answer))
    if isinstance(answer, Unfinished) or (marks and not marks[-1][1]):
        return None
    return answer[marks[-1].end() :].strip() if marks else answer.strip()


def plain(text: str) -> str:
    """A short answer in lower case, without the spaces around it."""
    return text.strip().lower()


def first_line(text: str) -> str:
    """The first line of a text, cut to 200 characters, for an error sentence."""
    return cut((text.strip().splitlines() or [""])[0], 200)
