"""What is one run's at a time: a policy and rewards that learn, each changed by the run's steps."""

from collections.abc import Mapping
from weakref import WeakValueDictionary

from flowalign.config.base import UserError

_holders: WeakValueDictionary[int, "Claims"] = WeakValueDictionary()  # who last claimed a thing, by the thing's id


class Claims:
    """A run's claims on things, by what an error calls them. They hold the things, so that an id stays theirs."""

    def __init__(self, things: Mapping[str, object]):
        self._things = things
        for thing in things.values():
            _holders[id(thing)] = self

    def check(self) -> None:
        """Raises UserError for the first thing that another run has claimed since."""
        for name, thing in self._things.items():
            if _holders.get(id(thing)) is not self:
                raise UserError(
                    f"another Trainer was made with the same {name} since this one; make each when the last has run"
                )
