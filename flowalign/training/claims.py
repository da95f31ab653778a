"""Claims of a run on its policy and its learning rewards: a run's steps change them, so one run at a time has them."""

from collections.abc import Mapping
from weakref import WeakValueDictionary

from flowalign.config.base import UserError

_holders: WeakValueDictionary[int, "Claims"] = WeakValueDictionary()  # an object's id -> the last Claims on it


class Claims:
    """A run's claims on objects, under the names for errors. It holds the objects, so that no other gets their ids."""

    def __init__(self, things: Mapping[str, object]):
        self._things = things
        for thing in things.values():
            _holders[id(thing)] = self

    def check(self) -> None:
        """Raises UserError for the first object that another run has claimed since."""
        for name, thing in self._things.items():
            if _holders.get(id(thing)) is not self:
                raise UserError(
                    f"another Trainer was made with the same {name} since this one; run each before making the next"
                )
