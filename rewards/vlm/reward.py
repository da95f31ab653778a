"""What every reward with a vision-language model behind it shares: its pictures, questions and unreadable answers."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from rewards.base import Reward, RewardError, nearest, shown
from rewards.frames import chosen_frames, mean_of_frames
from rewards.media import as_levels
from rewards.vlm.base import CUT_OFF, UNPARSABLE, VLM, Pictures, Unparsable, VLMError, at_least, final, first_line


class VLMReward(Reward):
    """A reward that asks a VLM about pictures.

    frames: how many of a video's frames are judged, the middles of as many equal spans; its score is their mean.
    options: those of the `LocalVLM` (model, ...) or the `EndpointVLM` (url, model, ...) to ask, by name; or instead
    backend: a VLM object. unparsable: what becomes of an answer that cannot be read: "error" ends the scoring, "tie"
    gives it the middle of the scale, "mask" leaves its item out (NaN), also where the answer is about one frame of
    several. max_tokens: the longest answer, its reasoning included, where the reward reads one.
    """

    middle = 0.5

    def __init__(
        self,
        frames: int,
        backend: VLM | None,
        options: Mapping[str, Any],
        unparsable: str = "error",
        max_tokens: int = 1,
    ):
        try:
            at_least("frames", frames, 1)
            at_least("max_tokens", max_tokens, 1)
            if unparsable not in UNPARSABLE:
                raise VLMError(f"unparsable must be one of {', '.join(UNPARSABLE)}, not {unparsable!r}")
            if backend is not None and options:
                raise VLMError(f"backend is a VLM already, so the option {next(iter(options))!r} has no use")
            self.vlm = backend or opened(options)
        except VLMError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from error
        self.frames = frames
        self.max_tokens = max_tokens
        self.unparsable = unparsable
        self.masks = unparsable == "mask"
        self._counts = {"answers": 0, "unparsable": 0}

    def tally(self) -> dict[str, int]:
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        return counts

    def pictures(self, media: torch.Tensor) -> tuple[list[Image.Image], list[int]]:
        """The frames of media (B, ...) that are judged, in the items' order, and the item of each."""
        frames, count = chosen_frames(media, self.frames)
        images = [Image.fromarray(level) for level in as_levels(frames).permute(0, 2, 3, 1).cpu().numpy()]
        return images, [index // count for index in range(len(images))]

    def of_frames(
        self, media: torch.Tensor, prompts: Sequence[str], judge: Callable[[Pictures, list[str]], torch.Tensor]
    ) -> torch.Tensor:
        """Scores (B,) from what `judge` says of each frame alone and its prompt, (N,)."""
        images, items = self.pictures(media)
        with self.naming(prompts, items):
            scores = judge([[image] for image in images], [prompts[item] for item in items])
        return mean_of_frames(scores, len(images) // len(media))

    @contextmanager
    def naming(self, prompts: Sequence[str], items: Sequence[int]) -> Iterator[None]:
        """Makes a VLMError inside a sentence about this reward and the item that the question concerned."""
        try:
            yield
        except VLMError as error:
            where = "" if error.row is None else f"{shown(items[error.row], prompts)}: "
            raise RewardError(f"reward {self.name!r}: {where}{error}") from error

    def answered(self, images: Pictures, texts: Sequence[str], value: Callable[[str], float | str]) -> torch.Tensor:
        """(N,) float64: what `value` reads in each answer, after its reasoning; a text says why it reads nothing."""
        found: list[float | str] = []
        for answer in self.vlm.answer(images, texts, self.max_tokens):
            said = final(answer)
            found.append(CUT_OFF.format(self.max_tokens) if said is None else value(said))
            if isinstance(found[-1], str):
                found[-1] = f"the answer {first_line(answer)!r} {found[-1]}"
        problems = {row: one for row, one in enumerate(found) if isinstance(one, str)}
        values = [math.nan if isinstance(one, str) else one for one in found]
        return self.settled(torch.tensor(values, dtype=torch.float64), problems)

    def yes(self, images: Pictures, texts: Sequence[str]) -> torch.Tensor:
        """P(yes) / (P(yes) + P(no)), (N,), as the first token of the answers."""
        problems: Mapping[int, str] = {}
        try:
            log_probs = self.vlm.choice_log_probs(images, texts, ("Yes", "No"))
        except Unparsable as error:
            log_probs, problems = error.found, error.problems
        return self.settled(log_probs.softmax(1)[:, 0], problems)

    def settled(self, values: torch.Tensor, problems: Mapping[int, str]) -> torch.Tensor:
        """The values (N,), and what `unparsable` makes of the rows with problems; counts both."""
        broken = [row for row in values.isnan().nonzero().flatten().tolist() if row not in problems]
        if broken:
            raise VLMError(
                "the judge's probabilities are not numbers (NaN); its weights or its type are at fault", broken[0]
            )
        self._counts["answers"] += len(values)
        self._counts["unparsable"] += len(problems)
        if problems and self.unparsable == "error":
            row = min(problems)
            raise VLMError(problems[row], row)
        values[list(problems)] = self.middle if self.unparsable == "tie" else math.nan
        return values


def opened(options: Mapping[str, Any]) -> VLM:
    """The EndpointVLM of options with a `url`, else the LocalVLM of options with a `model`.

    Raises VLMError for an option that the one or the other does not have.
    """
    kind: type[VLM]
    if options.get("url"):  # imported here: each is heavy, and one is enough
        from rewards.vlm.endpoint import EndpointVLM as kind  # noqa: N813
    else:
        from rewards.vlm.local import LocalVLM as kind  # noqa: N813
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
