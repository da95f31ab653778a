"""Vision-language models as judges: one interface, a model of one's own or an OpenAI-compatible server behind it.

Every picture is shown in 8-bit RGB. A video is judged frame by frame, with the published question about one picture,
and scores the mean of its frames. Shapes: N questions, each with one or more pictures and one text; C choices.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from rewards.base import Reward, RewardError, nearest, shown
from rewards.frames import chosen_frames
from rewards.preprocessing import as_levels

Pictures = Sequence[Sequence[Image.Image]]  # of N questions, those that each is about


class VLMError(RewardError):
    """What went wrong with a judge, in one sentence, and the number of the question where only one is concerned."""

    def __init__(self, message: str, row: int | None = None):
        super().__init__(message)
        self.row = row


class VLM(ABC):
    """A judge that sees pictures; what it answers to a question depends on that question alone."""

    @abstractmethod
    def answer(self, images: Pictures, texts: Sequence[str], max_tokens: int) -> list[str]:
        """The N greedy answers, of at most `max_tokens` tokens."""

    @abstractmethod
    def choice_log_probs(self, images: Pictures, texts: Sequence[str], choices: Sequence[str]) -> torch.Tensor:
        """Log-probabilities (N, C), float32, that the answer's first token reads as each choice.

        Case and surrounding spaces do not count: "Yes", " yes" and "YES" are one choice.
        """

    @abstractmethod
    def continuation_log_prob(self, images: Pictures, question: str, continuations: Sequence[str]) -> torch.Tensor:
        """Mean log-probabilities (N,), float32, of the tokens of each continuation as the answer to the question."""


class VLMReward(Reward):
    """A reward that asks a VLM about pictures.

    frames: how many of a video's frames are judged, the middles of as many equal spans; its score is their mean.
    options: those of the `LocalVLM` (model, ...) or the `EndpointVLM` (url, model, ...) to ask, by name; or instead
    backend: a VLM object. max_tokens: the longest answer, where the reward reads one.
    """

    def __init__(self, frames: int, backend: VLM | None, options: Mapping[str, Any], max_tokens: int = 1):
        try:
            at_least("frames", frames, 1)
            at_least("max_tokens", max_tokens, 1)
            if backend is not None and options:
                raise VLMError(f"backend is a VLM already, so the option {next(iter(options))!r} has no use")
            self.vlm = backend or opened(options)
        except VLMError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from error
        self.frames = frames
        self.max_tokens = max_tokens

    def pictures(self, media: torch.Tensor) -> tuple[list[Image.Image], list[int]]:
        """The frames of media (B, ...) that are judged, in the items' order, and the item of each."""
        frames, count = chosen_frames(media, self.frames)
        images = [Image.fromarray(level) for level in as_levels(frames).permute(0, 2, 3, 1).cpu().numpy()]
        return images, [index // count for index in range(len(images))]

    @contextmanager
    def naming(self, prompts: Sequence[str], items: Sequence[int]) -> Iterator[None]:
        """Makes a VLMError inside a sentence about this reward and the item that the question concerned."""
        try:
            yield
        except VLMError as error:
            where = "" if error.row is None else f"{shown(items[error.row], prompts)}: "
            raise RewardError(f"reward {self.name!r}: {where}{error}") from error


def opened(options: Mapping[str, Any]) -> VLM:
    """The EndpointVLM of options with a `url`, else the LocalVLM of options with a `model`.

    Raises VLMError for an option that the one or the other does not have.
    """
    kind: type[VLM]
    if options.get("url"):  # imported here, since both build on this file
        from rewards.vlm_endpoint import EndpointVLM as kind  # noqa: N813
    else:
        from rewards.vlm_local import LocalVLM as kind  # noqa: N813
    known = list(inspect.signature(kind).parameters)
    for option in options:
        if option not in known:
            judge = "a server" if options.get("url") else "a local model"
            hint = f"did you mean {nearest(option, known)!r}? (options: {', '.join(known)})"
            raise VLMError(f"{judge} has no option {option!r}; {hint}")
    if not options.get("model"):
        missing = "`model`, its name on the server" if options.get("url") else "`model` (folder or hub id) or `url`"
        raise VLMError(f"it lacks {missing}")
    return kind(**options)


def at_least(option: str, value: int, lowest: int) -> None:
    """VLMError unless the option's value is a whole number of at least `lowest`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise VLMError(f"{option} must be a whole number of at least {lowest}, not {value!r}")


def unread(answer: str, lacks: str, row: int) -> VLMError:
    """The error for an answer that lacks what was asked for; asking again would give the same one."""
    return VLMError(f"the answer {first_line(answer)!r} {lacks}", row)


def yes_probability(vlm: VLM, images: Pictures, texts: Sequence[str]) -> torch.Tensor:
    """P(yes) / (P(yes) + P(no)), (N,), as the first token of the answers."""
    return vlm.choice_log_probs(images, texts, ("Yes", "No")).softmax(1)[:, 0]


def plain(text: str) -> str:
    """A short answer without what does not count: its case and the spaces around it."""
    return text.strip().lower()


def first_line(text: str) -> str:
    """What an error shows of a text."""
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= 200 else line[:197] + "..."
