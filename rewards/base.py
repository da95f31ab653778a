"""The contract of a reward, and `score`, the one way to call a reward.

Shapes: B items; media are float tensors in [0, 1], images (B, 3, H, W) or videos (B, F, 3, H, W).
"""

import copy
import hashlib
import importlib
import importlib.util
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch

from rewards.catalogue import module_named
from rewards.errors import RewardError as RewardError
from rewards.errors import nearest as nearest

# A half-precision decoder rounds by less than this; one step of an 8-bit image is four times as large.
RANGE_TOLERANCE = 1e-3
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Rows = Sequence[Mapping[str, Any]]  # the metadata of B items


class Golden(NamedTuple):
    """Items with known scores, for `rewards.check`: B media, B prompts, B metadata rows and B scores."""

    media: torch.Tensor
    prompts: Sequence[str]
    metadata: Rows
    scores: Sequence[float]
    tolerance: float = 1e-3


class Reward(ABC):
    """A score for each of B items; higher is better.

    `name` is the class's own name in lower case unless the class sets one. `scope` is "sample" when an item's score
    depends on that item alone, and "group" when the reward must see all items of a prompt at once; the items of one
    group have equal prompts. `range` is the lowest and the highest possible score. `prompt_sensitive` says that another
    prompt may change the score. `rewards.check` tests the range and the sensitivity.
    """

    name: str
    scope: Literal["sample", "group"] = "sample"
    range: tuple[float, float] = (-math.inf, math.inf)
    prompt_sensitive: bool = False
    masks: bool = False
    """Whether the reward may leave an item out, by a score of NaN."""

    def golden(self) -> Golden | None:
        """Items with known scores; None if the reward has none."""
        return None

    def maps(self, images: torch.Tensor) -> torch.Tensor | None:
        """Maps (B, H, W) in [0, 1] of what the reward punishes in images (B, 3, H, W); None if it draws no maps."""
        return None

    def tally(self) -> dict[str, int]:
        """Counts by name since the last call, such as unreadable answers; they are shown beside the scores."""
        return {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()

    def applies_to(self, row: Mapping[str, Any]) -> bool:
        """Whether the reward can judge an item; `row` is its metadata, with its prompt under the key "prompt".

        Raises RewardError for an item that is meant for this reward but that it would judge wrongly. It is called
        before a run, and where several rewards share a batch (`rewards.combine`).
        """
        return True

    @abstractmethod
    def __call__(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        """Scores (B,), float32, of media (B, ...) generated from B prompts with their B metadata rows."""


class TrainableReward(Reward):
    """A reward that learns during the run, from the media that the policy generates.

    `alarm` says in one sentence why the reward is no longer usable, for example because it saturated; `update` sets it.
    """

    alarm: str | None = None
    learns: bool = True
    """False if the reward's options leave nothing to learn."""
    _beginning: dict[str, torch.Tensor] | None = None

    def begin(self) -> None:
        """Restores the state before the reward's first run; called at the beginning of every run."""
        if self._beginning is None:
            self._beginning = {key: value.clone() for key, value in self.state_dict().items()}
            return
        self.load_state_dict({key: value.clone() for key, value in self._beginning.items()})
        self.alarm = None

    @abstractmethod
    def update(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows, step: int) -> dict[str, float]:
        """Learns from the media (B, ...) of training step `step`, after they were scored; returns metrics to log."""

    @abstractmethod
    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors that learning changes, for an exact resume."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores the state that `state_dict` returned."""


def score(reward: Reward, media: torch.Tensor, prompts: Sequence[str], metadata: Rows | None = None) -> torch.Tensor:
    """The reward's scores (B,), float32, finite, detached, on the media's device.

    The reward gets copies of its inputs, so that a reward which writes into them does not change the caller's items.
    NaN stands for an item that a reward with `masks` left out. No failure becomes a score: RewardError is raised for
    media, prompts or metadata that break the contract, for an exception inside the reward (kept as the cause), and for
    a result that is not one finite number per item.
    """
    metadata = check_inputs(reward.name, media, prompts, metadata)
    return score_in_place(reward, media.clone(), list(prompts), copy.deepcopy(metadata))


def score_in_place(reward: Reward, media: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
    """As `score`, without checking or copying: the reward gets the items themselves."""
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


def check_inputs(name: str, media: torch.Tensor, prompts: Sequence[str], metadata: Rows | None) -> Rows:
    """The metadata (None: B empty rows); RewardError if an input breaks the contract of `Reward.__call__`."""
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
                raise RewardError(f"reward {name!r}: {title}[{index}] is {row!r}, not a {wanted.__name__}")
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

    With `masks`, NaN is allowed too. Raises RewardError that names the first item at fault.
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
    """Raises RewardError for the first option below 1; None is an option's default and passes."""
    for option, value in options.items():
        if value is not None and value < 1:
            raise RewardError(f"reward {reward!r}: {option} must be at least 1, not {value}")


def import_object(spec: str) -> Any:
    """The object that "file.py:Name" or "package.module:Name" names; RewardError when it cannot be imported."""
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
    # The hash keeps two files of one stem apart; the entry in sys.modules lets a class find its own module by name.
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
    """An item as an error names it: its number and its prompt, cut to 100 characters."""
    return f"item {index} ({cut(prompts[index], 100)!r})"


def cut(text: str, most: int) -> str:
    """The text, of at most `most` characters; "..." stands for what is left out at its end."""
    return text if len(text) <= most else text[: most - 3] + "..."


def grouped(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """The values of each key, in the order in which the keys first appear."""
    groups: dict[Key, list[Value]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def reason(error: BaseException) -> str:
    """An exception's type and the first line of its message, as the end of an error sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
