"""Keys and values that recipes had under other names: old recipes and run folders go on being read."""

from collections.abc import Mapping
from typing import Any

from flowalign.config.paths import Keys

_KEYS: dict[Keys, str] = {
    ("store",): "dataset",
    ("rollout", "grid"): "schedule",
    ("evaluation", "grid"): "schedule",
    ("evaluation", "pictures"): "keep_media",
    ("train", "passes"): "inner_epochs",
}
_VALUES: dict[Keys, dict[str, str]] = {
    ("algorithm", "timestep_sampling"): {"grid": "schedule", "grid_strata": "schedule_strata"},
}


def of_today(keys: Keys) -> Keys:
    """A key of a recipe under the name that it has today."""
    return (*keys[:-1], _KEYS.get(keys, keys[-1]))


def with_names_of_today(values: Any, within: Keys = ()) -> Any:
    """A recipe's plain values, with what was renamed under its name of today.

    An old key beside the new one stays, so that the recipe refuses it.
    """
    if not isinstance(values, Mapping):
        return _VALUES.get(within, {}).get(values, values) if isinstance(values, str) else values
    named = {}
    for key, value in values.items():
        keys = (*within, str(key))
        new = of_today(keys)[-1]
        named[key if new in values else new] = with_names_of_today(value, keys)
    return named
