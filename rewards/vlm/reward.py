"""The common part of the rewards that ask a vision-language model: images, questions and unreadable answers."""

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
    """A reward that asks a VLM about images.

    frames: frames of a video that are judged, the middles of equal spans; the video's score is their mean.
    backend: a VLM object to ask; None builds one from `options`, which are those of `LocalVLM` (model, ...) or of
        `EndpointVLM` (url, model, ...), by name.
    unparsable: the treatment of an answer that cannot be read: "error" ends the scoring, "tie" counts it as the middle
        of the scale, "mask" leaves the item out (NaN), even if the answer concerns one of several frames.
    max_tokens: the longest answer in tokens, its reasoning included; raise it if answers are cut off.
    """

    range = (0.0, 1.0)
    prompt_sensitive = True
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

    def images_of(self, media: torch.Tensor) -> tuple[list[Image.Image], list[int]]:
        """The frames of media (B, ...) to be judged, in the items' order, and the item of each frame."""
        frames, count = chosen_frames(media, self.frames)
        images = [Image.fromarray(level) for level in as_levels(frames).permute(0, 2, 3, 1).cpu().numpy()]
        return images, [index // count for index in range(len(images))]

    def of_frames(
        self, media: torch.Tensor, prompts: Sequence[str], judge: Callable[[Pictures, list[str]], torch.Tensor]
    ) -> torch.Tensor:
        """Scores (B,): for each item, the mean of the scores (N,) that `judge` gives its frames with its prompt."""
        images, items = self.images_of(media)
        with self.naming(prompts, items):
            scores = judge([[image] for image in images], [prompts[item] for item in items])
        return mean_of_frames(scores, len(images) // len(media))

    @contextmanager
    def naming(self, prompts: Sequence[str], items: Sequence[int]) -> Iterator[None]:
        """Turns a VLMError into a RewardError that names this reward and the item of the question."""
        try:
            yield
        except VLMError as error:
            where = "" if error.row is None else f"{shown(items[error.row], prompts)}: "
            raise RewardError(f"reward {self.name!r}: {where}{error}") from error

    def answered(self, images: Pictures, texts: Sequence[str], value: Callable[[str], float | str]) -> torch.Tensor:
        """Values (N,), float64, that `value` reads in the answers after their reasoning.

        `value` returns a number, or the reason why it reads none.
        """
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
        """P(yes) / (P(yes) + P(no)), (N,), for the first token of each answer."""
        problems: Mapping[int, str] = {}
        try:
            log_probs = self.vlm.choice_log_probs(images, texts, ("Yes", "No"))
        except Unparsable as error:
            log_probs, problems = error.found, error.problems
        return self.settled(log_probs.softmax(1)[:, 0], problems)

    def settled(self, values: torch.Tensor, problems: Mapping[int, str]) -> torch.Tensor:
        """The values (N,), with the rows with problems treated as `unparsable` says; both kinds of rows are counted."""
        broken = [row for row in values.isnan().nonzero().flatten().tolist() if row not in problems]
        if broken:
            raise VLMError(
                "the judge's probabilities are not numbers (NaN); check its weights and its dtype", broken[0]
            )
        self._counts["answers"] += len(values)
        self._counts["unparsable"] += len(problems)
        if problems and self.unparsable == "error":
            row = min(problems)
            raise VLMError(problems[row], row)
        values[list(problems)] = self.middle if self.unparsable == "tie" else math.nan
        return values


def opened(options: Mapping[str, Any]) -> VLM:
    """The judge that the options describe: an EndpointVLM if they have a `url`, else a LocalVLM.

    Raises VLMError for an option that the judge does not have, and for a missing `model`.
    """
    kind: type[VLM]
    if options.get("url"):  # imported here, since both modules are heavy and only one is needed
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
