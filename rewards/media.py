"""The one reader of picture files: it shows what a viewer shows, or refuses in a sentence that names the file.

A picture is turned as its EXIF data say, brought from its own colours (an embedded profile, CMYK, grey of 16 bits) to
sRGB of 8 bits, and laid on white where it is transparent. What has several frames or pages is refused: there is no
saying which of them is meant.
"""

import io
import json
import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from rewards.base import RewardError, reason

SUFFIXES = (
    ".png",
    ".apng",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".webp",
    ".bmp",
    ".dib",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
)
# Kinds that lie among pictures and that Pillow does not read: to pass them over would shift all that come after.
UNREAD = (".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".exr", ".hdr", ".dng", ".tga", ".ico", ".ppm", ".pgm")
Image.init()
# By name, since Pillow would otherwise try every format it knows, PostScript with an interpreter of its own among them.
FORMATS = tuple(name for name in ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF") if name in Image.OPEN)
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF 6.0
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
logger = logging.getLogger(__name__)


def as_levels(images: torch.Tensor) -> torch.Tensor:
    """Images (..., 3, H, W) in [0, 1] as the 8-bit levels of a picture file, on which models are trained."""
    return (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)


def read_picture(path: Path) -> torch.Tensor:
    """(3, H, W) in [0, 1], of any size; RewardError as `open_picture`."""
    pixels = np.asarray(open_picture(path), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def open_picture(path: Path) -> Image.Image:
    """The file as a viewer shows it, RGB of 8 bits; RewardError for one that is no picture or not one alone."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return as_viewed(image)
    except Exception as error:  # damaged files end in many ways, and none of them is a picture
        raise RewardError(f"{path} cannot be read as an image: {_why(path, error)}") from error


def _why(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is empty" if path.stat().st_size == 0 else f"what it holds is none of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) if isinstance(error, ValueError | OSError) else reason(error)


def as_viewed(image: Image.Image) -> Image.Image:
    """An opened image as `open_picture` gives it; ValueError for what cannot be shown as one picture of 8 bits."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photograph with its own preview beside it, which no viewer shows
        raise ValueError(f"it has {frames} frames or pages; save the one that is meant as a picture of its own")
    _fit_clear_colour(image)
    image.load()
    image = ImageOps.exif_transpose(_eight_bits(image))
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    shown = _by_gamma(_in_srgb(image), image.info)
    if alpha is None or alpha.getextrema() == (255, 255):
        return shown
    _say_white()
    return Image.composite(shown, Image.new("RGB", shown.size, "white"), alpha)


@cache
def _say_white() -> None:
    """Once for a process, since a folder may be full of them."""
    logger.warning("pictures with transparent parts are laid on white")


def _fit_clear_colour(image: Image.Image) -> None:
    """A PNG's transparent colour as its pixels will be read, in 8 bits; ValueError for one of more bits than they."""
    clear, tiles = image.info.get("transparency"), getattr(image, "tile", [])  # of an opened file, until it is loaded
    raw = str(tiles[0][3]) if tiles else ""
    if image.format != "PNG" or clear is None:
        return
    if raw in ("L;2", "L;4"):
        image.info["transparency"] = clear * 255 // (2 ** int(raw[-1]) - 1)
    if raw.startswith("RGB;16"):
        raise ValueError("its transparent colour is one of 16 bits; save it with an alpha channel")


def _by_gamma(shown: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """By a PNG's own gamma, where it has nothing better and that is not the usual 1 / 2.2, as browsers do."""
    gamma = info.get("gamma")
    if not gamma or "srgb" in info or "icc_profile" in info or abs(2.2 * gamma - 1) < 0.05:
        return shown
    return shown.point(3 * [round(255 * (level / 255) ** (1 / (2.2 * gamma))) for level in range(256)])


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as the nearest of 8; ValueError for integers and floats of 32 bits, whose white nobody says."""
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are {'integers' if image.mode == 'I' else 'floats'} of 32 bits; save it with 8")
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float32)
    tags = getattr(image, "tag_v2", {})
    values = values / (2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 1 - values
    clear = image.info.get("transparency")
    if clear is not None:
        values[np.asarray(image) == clear] = 1.0  # on white, as below
    grey = Image.fromarray((values * 255).round().astype(np.uint8))
    grey.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return grey


def _in_srgb(image: Image.Image) -> Image.Image:
    """RGB without transparency, by the image's colour profile where it has one that fits its pixels.

    A profile that is damaged, or of another kind of colour, is passed over, as browsers do.
    """
    colour = image if image.mode in ("L", "CMYK") else image.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        about = ImageCms.getProfileDescription(profile)
    except (KeyError, OSError, ImageCms.PyCMSError):
        return colour.convert("RGB")
    mode = _PROFILE_MODES.get(profile.profile.xcolor_space.strip())
    fitting = {"1": ("RGB", "L"), "L": ("RGB", "L"), "LA": ("RGB", "L"), "CMYK": ("CMYK",)}.get(image.mode, ("RGB",))
    if mode not in fitting or "srgb" in about.lower():
        return colour.convert("RGB")
    made = ImageCms.profileToProfile(colour.convert(mode), profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert made is not None  # not in place
    return made


def natural(name: str) -> tuple[object, ...]:
    """A key by which names are sorted as people count: 9.png, 10.png; numbers by value, letters whatever their case."""
    stem, _, suffix = name.rpartition(".") if "." in name.lstrip(".") else (name, "", "")
    parts = [int(part) if place % 2 else part.casefold() for place, part in enumerate(re.split(r"(\d+)", stem))]
    return tuple(parts), suffix, name


def pictures_in(folder: Path) -> list[Path]:
    """The pictures that lie in a folder, in natural order, without hidden files; empty if there are none.

    RewardError for a folder that cannot be read, and for a picture of a kind that is not read.
    """
    try:
        there = [path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir()]
    except OSError as error:
        raise RewardError(f"{folder} cannot be read as a folder of pictures: {error.strerror or error}") from error
    if unread := sorted(path.name for path in there if path.suffix.lower() in UNREAD):
        raise RewardError(f"{folder}/{unread[0]} is a picture of a kind that is not read; save it as PNG, or remove it")
    return sorted((path for path in there if path.suffix.lower() in SUFFIXES), key=lambda path: natural(path.name))


def folder_pictures(folder: str, reward: str, option: str) -> list[Path]:
    """The pictures of a folder as `pictures_in`; RewardError, naming the reward and its option, if there are none."""
    place = Path(folder).expanduser()
    found = pictures_in(place) if place.is_dir() else []
    if not found:
        raise RewardError(f"reward {reward!r}: {option} {folder} is no folder with pictures ({', '.join(SUFFIXES)})")
    return found


def pictures_by_prompt(file: str, reward: str, option: str) -> dict[str, list[Path]]:
    """The pictures of each prompt, from a .json file {prompt: [picture, ...]} with paths from its own folder.

    Raises RewardError, naming the reward and its option, for a file that is none and for a picture that is missing.
    """
    place = Path(file)
    try:
        table = json.loads(place.read_text(encoding="utf-8-sig"))
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
