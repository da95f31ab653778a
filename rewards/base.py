"""The contract of a reward, and `score`: the one way to call one.

Shapes: B items; media are float tensors in [0, 1], images (B, 3, H, W) or videos (B, F, 3, H, W).
"""

import copy
import hashlib
import importlib
import importlib.util
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from rewards.catalogue import module_named
from rewards.errors import RewardError as RewardError
from rewards.errors import nearest as nearest

# Room for the rounding of a half-precision decoder, far less than one step of an 8-bit picture.
RANGE_TOLERANCE = 1e-3


class Golden(NamedTuple):
    """Items whose scores are known, for `rewards.check`: B media, prompts and metadata rows, scores (B,)."""

    media: torch.Tensor
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]
    scores: Sequence[float]
    tolerance: float = 1e-3


class Reward(ABC):
    """A score for each of B items; higher is better.

    `name` is the class's own name in lower case unless the class sets one. `scope` is "sample" when an item's score
    depends on that item alone, "group" when the reward must see all items of a prompt at once; items of one group then
    have equal prompts. `range` is the lowest and highest score there can be, `prompt_sensitive` says that another
    prompt may change the score; `rewards.check` holds a reward to both.
    """

    name: str
    scope: Literal["sample", "group"] = "sample"
    range: tuple[float, float] = (-math.inf, math.inf)
    prompt_sensitive: bool = False
    masks: bool = False
    """Whether it may leave an item out, with a score of NaN."""

    def golden(self) -> Golden | None:
        """Items with known scores, where the reward has them."""
        return None

    def maps(self, images: torch.Tensor) -> torch.Tensor | None:
        """Where in images (B, 3, H, W) it sees what it punishes, (B, H, W) in [0, 1]; None if it cannot say."""
        return None

    def tally(self) -> dict[str, int]:
        """What it counted since it was last asked, to be shown beside its scores."""
        return {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()

    def applies_to(self, row: Mapping[str, Any]) -> bool:
        """Whether the reward can judge an item, from its metadata with its prompt under the key "prompt".

        RewardError for an item that is meant for it and that it would judge wrongly. Asked before a run, and where
        several rewards share a batch (`rewards.combine`).
        """
        return True

    @abstractmethod
    def __call__(
        self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        """Scores (B,), float32, of media (B, ...) made from B prompts with their B metadata rows."""


class TrainableReward(Reward):
    """A reward that learns while the policy does, from the policy's own pictures.

    `alarm` says, in one sentence, why what it has learnt is no good as a reward any more; `update` sets it.
    """

    alarm: str | None = None
    learns: bool = True
    """False for one whose options leave nothing to learn."""
    _beginning: dict[str, torch.Tensor] | None = None

    def begin(self) -> None:
        """Make it as it was before its first run, for another."""
        if self._beginning is None:
            self._beginning = {key: value.clone() for key, value in self.state_dict().items()}
            return
        self.load_state_dict({key: value.clone() for key, value in self._beginning.items()})
        self.alarm = None

    @abstractmethod
    def update(
        self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], step: int
    ) -> dict[str, float]:
        """Learn from the pictures (B, ...) of training step `step`, after they were scored; returns figures to log."""

    @abstractmethod
    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that learning changes, for an exact resume."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state_dict` gave."""


def score(
    reward: Reward,
    media: torch.Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
) -> torch.Tensor:
    """The reward's scores (B,), float32, finite, detached, on the media's device.

    The reward gets copies, so that one which writes into them spoils nothing for whoever sees the same items next.
    NaN stands for an item that a reward which `masks` left out. Raises RewardError for media, prompts or metadata that
    do not fit the contract, for an exception inside the reward (kept as the cause), and for a result that is not one
    finite number per item: no failure becomes a score.
    """
    metadata = check_inputs(reward.name, media, prompts, metadata)
    return score_in_place(reward, media.clone(), list(prompts), copy.deepcopy(metadata))


def score_in_place(
    reward: Reward, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> torch.Tensor:
    """As `score`, of checked items that the reward gets as they are."""
    try:
        with torch.no_grad():
            result = reward(media, prompts, metadata)
    except RewardError:
        raise
    except Exception as error:
        first = shown(0, prompts)
        raise RewardError(
            f"reward {reward.name!r} failed on a batch of {len(prompts)} whose first is {first}: {reason(error)}"
        ) from error
    return as_scores(result, prompts, reward.name, reward.masks).to(media.device)


def check_inputs(
    name: str, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None
) -> Sequence[Mapping[str, Any]]:
    """The metadata, empty rows for None; RewardError unless all three fit the contract of `Reward.__call__`."""
    if not isinstance(media, torch.Tensor) or not media.is_floating_point():
        kind = media.dtype if isinstance(media, torch.Tensor) else type(media).__name__
        raise RewardError(f"reward {name!r}: media must be a float tensor in [0, 1], not {kind}")
    if media.ndim not in (4, 5) or media.shape[-3] != 3 or media.numel() == 0:
        shape = tuple(media.shape)
        raise RewardError(f"reward {name!r}: media must be (B, 3, H, W) or (B, F, 3, H, W) and not empty, not {shape}")
    metadata = [{}] * len(media) if metadata is None else metadata
    columns: tuple[tuple[str, Sequence[Any], type], ...] = (("prompts", prompts, str), ("metadata", metadata, Mapping))
    for title, rows, wanted in columns:
        many = isinstance(rows, Sequence) and not isinstance(rows, str)
        if not many or len(rows) != len(media):
            count = str(len(rows)) if many else f"a {type(rows).__name__}"
            raise RewardError(f"reward {name!r}: {len(media)} media but {count} for {title}; each item needs its own")
        for index, row in enumerate(rows):
            if not isinstance(row, wanted):
                raise RewardError(f"reward {name!r}: {title}[{index}] is {row!r}, which is no {wanted.__name__}")
    low, high = torch.aminmax(media)
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # written so that NaN is refused too
        inside = ((media >= -RANGE_TOLERANCE) & (media <= 1 + RANGE_TOLERANCE)).flatten(1).all(1)
        index = int((~inside).nonzero()[0])
        low, high = torch.aminmax(media[index])
        raise RewardError(
            f"reward {name!r}: {shown(index, prompts)} has media values from {low:.4g} to {high:.4g}, outside [0, 1]"
        )
    return metadata


def as_scores(result: Any, prompts: Sequence[str], name: str, masks: bool = False) -> torch.Tensor:
    """`result`, a tensor, array, list or tuple of B finite real numbers, as scores (B,), float32.

    Where the reward `masks`, NaN is one too. Raises RewardError, naming the first item that is at fault.
    """
    if isinstance(result, torch.Tensor) and not result.is_complex():
        scores = result.detach()
    elif isinstance(result, np.ndarray) and result.dtype.kind in "biuf":
        scores = torch.from_numpy(result.astype(np.float64))
    elif isinstance(result, list | tuple):
        for index, value in enumerate(result):
            if not isinstance(value, Real | np.bool_) and not (isinstance(value, torch.Tensor) and value.ndim == 0):
                where = shown(index, prompts) if index < len(prompts) else f"item {index}"
                kind = type(value).__name__
                raise RewardError(f"reward {name!r} returned a {kind} for {where}; a score is one number")
        scores = torch.tensor([float(value) for value in result], dtype=torch.float64)
    else:
        kind = str(result.dtype) if isinstance(result, torch.Tensor | np.ndarray) else type(result).__name__
        raise RewardError(f"reward {name!r} returned {kind}; it must return one number for each of its items")
    if tuple(scores.shape) != (len(prompts),):
        shape = tuple(scores.shape)
        raise RewardError(f"reward {name!r} returned shape {shape} for {len(prompts)} items; expected one score each")
    scores = scores.to(torch.float32)
    finite = torch.isfinite(scores) | (scores.isnan() if masks else False)
    if not finite.all():
        index = int((~finite).nonzero()[0])
        value = scores[index].item()
        raise RewardError(f"reward {name!r} scored {shown(index, prompts)} as {value}, which is not a finite number")
    return scores


def at_least_one(reward: str, **options: int | None) -> None:
    """RewardError for the first option below 1; None stands for a default."""
    for option, value in options.items():
        if value is not None and value < 1:
            raise RewardError(f"reward {reward!r}: {option} must be at least 1, not {value}")


def import_object(spec: str) -> Any:
    """What "file.py:Name" or "package.module:Name" names; RewardError when it cannot be had."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise RewardError(f"{spec!r} must be written 'file.py:Name' or 'package.module:Name'")
    try:
        if source.endswith(".py"):
            module = _import_file(Path(source).expanduser())
        else:
            module = importlib.import_module(module_named(source))
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"{source} cannot be imported: {reason(error)}") from error
    if not hasattr(module, name):
        known = [key for key in vars(module) if not key.startswith("_")]
        hint = f"; did you mean {nearest(name, known)!r}?" if known else ""
        raise RewardError(f"{source} has no {name!r}{hint}")
    return getattr(module, name)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RewardError(f"there is no file {path}")
    # Two files of one stem stay apart, and a class can find its own module by name.
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # always so for a name that ends in .py
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def shown(index: int, prompts: Sequence[str]) -> str:
    """How an error names an item: its number and its prompt, cut to one line."""
    prompt = prompts[index]
    return f"item {index} ({prompt if len(prompt) <= 100 else prompt[:97] + '...'!r})"


def reason(error: BaseException) -> str:
    """An exception's kind and the first line of its message, to end a sentence with."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
