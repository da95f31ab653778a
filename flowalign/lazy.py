"""What is imported when it is first used: `--help` and a mistake in a recipe need no heavy library."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Lazy(ModuleType):
    """A module that is imported when something is first taken from it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def exports(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package that hands on names of its modules."""

    def get(name: str) -> Any:
        for module, names in modules.items():
            if name in names:
                return getattr(importlib.import_module(f"{package}.{module}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get


if TYPE_CHECKING:
    import clarabel as clarabel
    import numpy as numpy
    import torch as torch
    from scipy import sparse as sparse
else:
    clarabel, numpy, sparse, torch = map(_Lazy, ("clarabel", "numpy", "scipy.sparse", "torch"))
