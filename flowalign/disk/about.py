"""What wrote a folder's contents: the command, the time and the package versions."""

import importlib.metadata
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

_PACKAGES = ("flowalign", "torch", "diffusers", "transformers", "accelerate", "peft", "rapidocr", "onnxruntime")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line() -> str:
    """The command that started this process."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
