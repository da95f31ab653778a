"""`load` builds a reward from its name, file or module, and imports no other reward."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rewards.base import Reward, RewardError, Rows, as_scores, import_object, nearest, reason
from rewards.catalogue import BUILT_IN, check_name, installed
from rewards.devices import given_device, on_device


class FunctionReward(Reward):
    """A plain `function(media, prompts, metadata, **options)` that returns B numbers, wrapped as a reward."""

    def __init__(self, function: Callable[..., Any], name: str | None = None, **options: Any):
        self.function = function
        self.options = options
        self.name = str(name or getattr(function, "__name__", type(function).__name__))
        self.scope = getattr(function, "scope", "sample")
        _check_scope(self)

    def __call__(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        return as_scores(self.function(media, prompts, metadata, **self.options), prompts, self.name)


@torch.inference_mode(False)  # tensors created in inference mode cannot learn
def load(name_or_path: str, /, **options: Any) -> Reward:
    """The reward that `name_or_path` names: "ocr", "my_reward.py:Brightness", "package.module:Name" or "http://...".

    A plain name is a built-in reward or an entry point of the group `flowalign.rewards`; an address is a served reward.
    The target is a class, which is built with the options; a function `(media, prompts, metadata, ...) -> B numbers`,
    which is called with the options as keyword arguments; or a Reward object, which takes no options. Raises
    RewardError when there is no such reward, when it cannot be imported or built, and for an option it does not have.
    """
    check_name(name_or_path)
    if name_or_path.startswith(("http://", "https://")):
        remote = import_object("rewards.http.remote:RemoteReward")
        return _built(remote, name_or_path, {"url": name_or_path, **options})
    if name_or_path in BUILT_IN:
        return _built(import_object(BUILT_IN[name_or_path]), name_or_path, options)
    if ":" in name_or_path:
        return _built(import_object(name_or_path), name_or_path.rpartition(":")[2], options)
    try:
        target = installed()[name_or_path].load()
    except Exception as error:
        raise RewardError(f"reward {name_or_path!r} cannot be imported: {reason(error)}") from error
    return _built(target, name_or_path, options)


def load_on(device: str | torch.device, name_or_path: str, /, **options: Any) -> Reward:
    """`load` onto one device; a custom reward gets the device as its option `device`, if it has that option."""
    with on_device(device):
        return load(name_or_path, **options)


def as_reward(target: Any, name: str | None = None, **options: Any) -> Reward:
    """`target` itself if it is a Reward, or a function wrapped with its options; RewardError for anything else."""
    if isinstance(target, Reward):
        _check_scope(target)
        return target
    if not callable(target) or isinstance(target, type):
        raise RewardError(f"reward {name or target!r} is neither a Reward nor a function (media, prompts, metadata)")
    return FunctionReward(target, name, **options)


def _built(target: Any, name: str, options: dict[str, Any]) -> Reward:
    if isinstance(target, Reward) and options:
        raise RewardError(f"reward {name!r} is already built and takes no option {next(iter(options))!r}")
    if isinstance(target, Reward) or not callable(target):
        return as_reward(target, name)
    device = given_device()
    if device is not None and "device" in inspect.signature(target).parameters:
        options = {"device": str(device), **options}
    _check_options(target, name, options)
    if not isinstance(target, type):
        return as_reward(target, name, **options)
    try:
        built = target(**options)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"reward {name!r} cannot be built: {reason(error)}") from error
    return as_reward(built, name)


def _check_options(target: Callable[..., Any], name: str, options: dict[str, Any]) -> None:
    """Raises RewardError for an option that the target does not have, and for a required option that is missing."""
    items: tuple[None, ...] = () if isinstance(target, type) else (None, None, None)  # media, prompts, metadata
    signature = inspect.signature(target)
    parameters = list(signature.parameters.values())[len(items) :]
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for option in options:
        if option not in known and not open_ended:
            hint = f"did you mean {nearest(option, known)!r}? (options: {', '.join(known)})" if known else "it has none"
            raise RewardError(f"reward {name!r} has no option {option!r}; {hint}")
    try:
        signature.bind(*items, **options)
    except TypeError as error:
        shape = "its options" if not items else "(media, prompts, metadata) and its options"
        raise RewardError(f"reward {name!r} cannot be called with {shape}: {error}") from error


def _check_scope(reward: Reward) -> None:
    if reward.scope not in ("sample", "group"):
        raise RewardError(f"reward {reward.name!r} has scope {reward.scope!r}; it must be 'sample' or 'group'")
