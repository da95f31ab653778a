"""Where a reward's weights come from: a folder or file of one's own, the hub, or the package itself."""

from pathlib import Path

import torch

from rewards.base import RewardError

# In a checkout beside the package, in an installation inside its sister package.
_PLACES = tuple(Path(__file__).parent.parent / place for place in ("assets", "flowalign/assets"))
BUNDLED = "toyworld/"


def bundled(name: str) -> Path:
    """The path of a file or folder that comes with the package; RewardError when the installation lacks it."""
    for place in _PLACES:
        if (place / name).exists():
            return place / name
    raise RewardError(f"the installation lacks assets/{name}; reinstall flowalign")


def located(model: str) -> str:
    """A bundled name ("toyworld/judges/clip") as its path; any other path or hub id as it is."""
    return str(bundled(model)) if model.startswith(BUNDLED) and not Path(model).exists() else model


def default_device() -> str:
    """The accelerator's type if there is one, else "cpu"."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]
