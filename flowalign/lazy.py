"""Modules that are imported when first used, so that `--help` and errors in a recipe load no heavy library."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Lazy(ModuleType):
    """A module that is imported when one of its attributes is first used."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import clarabel as clarabel
    import numpy as numpy
    import torch as torch
    from scipy import sparse as sparse
else:
    clarabel, numpy, sparse, torch = map(_Lazy, ("clarabel", "numpy", "scipy.sparse", "torch"))
