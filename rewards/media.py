"""The one reader of image files: it gives what a viewer shows, or an error sentence that names the file.

An image is turned as its EXIF data say, converted from its own colours (an embedded profile, CMYK, 16-bit grey) to
8-bit sRGB, and laid on white where it is transparent. A file with several frames or pages is refused, since it does not
say which of them is meant.
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
# Image kinds that are not read. A folder with one is refused: skipping the file would shift all images after it.
UNREAD = (".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".exr", ".hdr", ".dng", ".tga", ".ico", ".ppm", ".pgm")
Image.init()
# Named, since Pillow would otherwise try every format it knows, even PostScript, for which it starts an interpreter.
FORMATS = tuple(name for name in ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF") if name in Image.OPEN)
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # two tags and a value of TIFF 6.0
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
logger = logging.getLogger(__name__)


def as_levels(images: torch.Tensor) -> torch.Tensor:
    """Images (..., 3, H, W) in [0, 1] as 8-bit levels, as in an image file: models are trained on such levels."""
    return (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)


def read_image(path: Path) -> torch.Tensor:
    """The image in a file, (3, H, W) in [0, 1], of any size; RewardError as in `open_image`."""
    pixels = np.asarray(open_image(path), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def open_image(path: Path) -> Image.Image:
    """The image as a viewer shows it, 8-bit RGB; RewardError for a file that is no image or holds several."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return as_viewed(image)
    except Exception as error:  # Pillow answers damaged files with many kinds of exceptions
        raise RewardError(f"{path} cannot be read as an image: {_why(path, error)}") from error


def _why(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is empty" if path.stat().st_size == 0 else f"its content is none of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) if isinstance(error, ValueError | OSError) else reason(error)


def as_viewed(image: Image.Image) -> Image.Image:
    """An opened image as `open_image` returns it; ValueError if it cannot be shown as one 8-bit image."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # an MPO's second frame is a preview, which no viewer shows
        raise ValueError(f"it has {frames} frames or pages; save the one that is meant as an image of its own")
    _fit_clear_colour(image)
    image.load()
    image = ImageOps.exif_transpose(_eight_bits(image))
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    shown = _by_gamma(_in_srgb(image), image.info)
    if alpha is None or alpha.getextrema() == (255, 255):
        return shown
    _warn_of_white()
    return Image.composite(shown, Image.new("RGB", shown.size, "white"), alpha)


@cache
def _warn_of_white() -> None:
    """Warns once per process, since a folder may be full of transparent images."""
    logger.warning("images with transparent parts are laid on white")


def _fit_clear_colour(image: Image.Image) -> None:
    """Brings a PNG's transparent colour to 8 bits, as its pixels will be read; ValueError for a 16-bit RGB PNG."""
    clear, tiles = image.info.get("transparency"), getattr(image, "tile", [])  # `tile` is empty after loading
    raw = str(tiles[0][3]) if tiles else ""
    if image.format != "PNG" or clear is None:
        return
    if raw in ("L;2", "L;4"):
        image.info["transparency"] = clear * 255 // (2 ** int(raw[-1]) - 1)
    if raw.startswith("RGB;16"):
        raise ValueError("its transparent colour has 16 bits; save it with an alpha channel")


def _by_gamma(shown: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """Applies a PNG's gamma, as browsers do, if the file has no profile and the gamma is not the usual 1 / 2.2."""
    gamma = info.get("gamma")
    if not gamma or "srgb" in info or "icc_profile" in info or abs(2.2 * gamma - 1) < 0.05:
        return shown
    return shown.point(3 * [round(255 * (level / 255) ** (1 / (2.2 * gamma))) for level in range(256)])


def _eight_bits(image: Image.Image) -> Image.Image:
    """Rounds 16-bit grey to 8 bits; ValueError for 32-bit integers and floats, which have no defined white level."""
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are {'integers' if image.mode == 'I' else 'floats'} of 32 bits; save it with 8 bits"
        )
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float32)
    tags = getattr(image, "tag_v2", {})
    values = values / (2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 1 - values
    clear = image.info.get("transparency")
    if clear is not None:
        values[np.asarray(image) == clear] = 1.0  # laid on white, as `as_viewed` does
    grey = Image.fromarray((values * 255).round().astype(np.uint8))
    grey.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return grey


def _in_srgb(image: Image.Image) -> Image.Image:
    """The image in sRGB without transparency, converted by its colour profile if it has one that fits its pixels.

    A profile that is damaged, or meant for another kind of colour, is ignored, as browsers do.
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
    shown = ImageCms.profileToProfile(colour.convert(mode), profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert shown is not None  # None only for a conversion in place
    return shown


def natural(name: str) -> tuple[object, ...]:
    """A sort key that puts 9.png before 10.png: numbers are compared by value, letters without their case."""
    stem, _, suffix = name.rpartition(".") if "." in name.lstrip(".") else (name, "", "")
    parts = [int(part) if place % 2 else part.casefold() for place, part in enumerate(re.split(r"(\d+)", stem))]
    return tuple(parts), suffix, name


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, in natural order and without hidden files; empty if there are none.

    Raises RewardError for a folder that cannot be read, and for an image of a kind that is not read.
    """
    try:
        there = [path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir()]
    except OSError as error:
        raise RewardError(f"{folder} cannot be read as a folder of images: {error.strerror or error}") from error
    if unread := sorted(path.name for path in there if path.suffix.lower() in UNREAD):
        raise RewardError(f"{folder}/{unread[0]} is an image of a kind that is not read; save it as PNG, or remove it")
    return sorted((path for path in there if path.suffix.lower() in SUFFIXES), key=lambda path: natural(path.name))


def folder_images(folder: str, reward: str, option: str) -> list[Path]:
    """The image files as in `images_in`; RewardError that names the reward and its option if there are none."""
    place = Path(folder).expanduser()
    found = images_in(place) if place.is_dir() else []
    if not found:
        raise RewardError(f"reward {reward!r}: {option} {folder} is no folder with images ({', '.join(SUFFIXES)})")
    return found


def images_by_prompt(file: str, reward: str, option: str) -> dict[str, list[Path]]:
    """The image files of each prompt, from a .json file {prompt: [image, ...]} with paths relative to its folder.

    Raises RewardError that names the reward and its option, for a file of another form and for a missing image.
    """
    place = Path(file)
    try:
        table = json.loads(place.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise RewardError(f"reward {reward!r}: {option} {file} cannot be read as JSON: {error}") from error
    if not isinstance(table, dict) or not table:
        raise RewardError(f"reward {reward!r}: {option} {file} must be a table {{prompt: [image, ...]}}")
    images: dict[str, list[Path]] = {}
    for prompt, names in table.items():
        listed = [names] if isinstance(names, str) else names
        if not isinstance(listed, list) or not listed or not all(isinstance(name, str) for name in listed):
            raise RewardError(f"reward {reward!r}: {option} {file}: {prompt!r} needs one image or a list of images")
        images[prompt] = [place.parent / name for name in listed]
        for path in images[prompt]:
            if not path.is_file():
                raise RewardError(f"reward {reward!r}: {option} {file}: there is no image {path} for {prompt!r}")
    return images
