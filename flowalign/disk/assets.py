"""Paths of the files that come with the package: they lie beside it in a checkout and inside it in a wheel."""

from pathlib import Path

from flowalign.config.base import UserError

EMBEDDED = "toyworld"  # the model that comes with the package
_PLACES = tuple(Path(__file__).parents[up] / "assets" for up in (1, 2))


def asset(name: str) -> Path:
    """The path of a bundled file or folder. Raises UserError when the installation lacks it."""
    for place in _PLACES:
        if (place / name).exists():
            return place / name
    raise UserError(f"the installation lacks assets/{name}; reinstall flowalign or build it with scripts/")
