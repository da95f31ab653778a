"""Pictures on disk that a reward compares with or learns from."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rewards.base import RewardError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_picture(path: Path) -> torch.Tensor:
    """(3, H, W) in [0, 1]; RewardError for a file that is no image."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except (OSError, Image.DecompressionBombError) as error:  # PIL's own error for what is no image is an OSError
        raise RewardError(f"{path} cannot be read as an image: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def folder_pictures(folder: str, reward: str, option: str) -> list[Path]:
    """The pictures of a folder, sorted by name; RewardError, naming the reward and its option, if there are none."""
    found = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise RewardError(f"reward {reward!r}: {option} {folder} is no folder with pictures ({', '.join(SUFFIXES)})")
    return found


def pictures_by_prompt(file: str, reward: str, option: str) -> dict[str, list[Path]]:
    """The pictures of each prompt, from a .json file {prompt: [picture, ...]} with paths from its own folder.

    Raises RewardError, naming the reward and its option, for a file that is none and for a picture that is missing.
    """
    place = Path(file)
    try:
        table = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RewardError(f"reward {reward!r}: {option} {file} cannot be read as JSON: {error}") from error
    if not isinstance(table, dict) or not table:
        raise RewardError(f"reward {reward!r}: {option} {file} must be a table {{prompt: [picture, ...]}}")
    pictures: dict[str, list[Path]] = {}
    for prompt, names in table.items():
        listed = [names] if isinstance(names, str) else names
        if not isinstance(listed, list) or not listed or not all(isinstance(name, str) for name in listed):
            raise RewardError(f"reward {reward!r}: {option} {file}: {prompt!r} needs one picture or a list of them")
        pictures[prompt] = [place.parent / name for name in listed]
        for path in pictures[prompt]:
            if not path.is_file():
                raise RewardError(f"reward {reward!r}: {option} {file}: there is no picture {path} for {prompt!r}")
    return pictures
