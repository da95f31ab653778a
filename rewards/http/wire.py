"""The messages between `remote` and `server`: media as safetensors or PNG, the rest as JSON, no pickle.

A request for scores is one of

- `application/safetensors`: one tensor "media", (B, 3, H, W) or (B, F, 3, H, W), of F16, BF16 or F32 in [0, 1], or of
  U8 (levels of 255); the file's metadata holds "prompts" and "metadata", each a JSON list of B entries.
- `application/json`: a list of {"png": base64, "prompt": text, "metadata": {}}; all images have one size, and they are
  read as `rewards.media` reads files.

The format of safetensors: https://github.com/huggingface/safetensors#format.
"""

import base64
import io
import json
import math
import os
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from rewards.base import RewardError, Rows, reason
from rewards.media import as_levels, as_viewed

PROTOCOL = 1
SAFETENSORS, JSON = "application/safetensors", "application/json"
TOKEN_VARIABLE = "FLOWALIGN_TOKEN"
TEXT_BYTES = 2**22  # the most bytes of the prompts and metadata of one request
# A parsed list takes twenty times the bytes of its text, so that the number of values needs a bound of its own.
JSON_VALUES = 10**6
DTYPES = {"U8": torch.uint8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class TooLarge(RewardError):
    """A request beyond the server's limits."""


class Limits(NamedTuple):
    """The most that one request may hold: items, and bytes of media counted as float32."""

    items: int
    bytes: int


class Request(NamedTuple):
    """Float media (B, ...), B prompts and B metadata rows; prompts and metadata are not yet checked."""

    media: torch.Tensor
    prompts: Any
    metadata: Any


def secret() -> str | None:
    """The token that clients send and servers require, from the environment; None if it is unset or blank."""
    return os.environ.get(TOKEN_VARIABLE, "").strip() or None


def to_json(value: Any, what: str) -> str:
    """The value as JSON that reads back equal; RewardError for a value that JSON cannot hold."""
    try:
        text = json.dumps(value, allow_nan=False)
        same = bool(json.loads(text) == value)
    except (TypeError, ValueError, RecursionError) as error:
        raise RewardError(f"{what} cannot be sent to a server: {reason(error)}") from error
    if not same:
        raise RewardError(f"{what} cannot be sent to a server: only lists, text keys and finite numbers survive JSON")
    return text


def from_json(text: bytes | bytearray, what: str) -> Any:
    """The value of JSON text; RewardError for anything else, TooLarge beyond JSON_VALUES."""
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > JSON_VALUES:
        raise TooLarge(f"{what} holds more than {JSON_VALUES} values")
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RewardError(f"{what} is not JSON: {reason(error)}") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def encode(media: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> bytes:
    """The safetensors form of a request; media are sent as 8-bit levels only if these give exactly the same float32."""
    if media.dtype not in DTYPES.values():
        known = ", ".join(str(dtype) for dtype in DTYPES.values())
        raise RewardError(f"media of {media.dtype} cannot be sent to a server; it takes {known}")
    media = media.detach().cpu().contiguous()
    if media.dtype == torch.float32:
        levels = as_levels(media)
        media = levels if torch.equal(levels.float() / 255, media) else media
    rows = to_json([dict(row) for row in metadata], "the metadata")
    return save({"media": media}, {"prompts": to_json(list(prompts), "the prompts"), "metadata": rows})


def decode(body: bytearray, kind: str, limits: Limits) -> Request:
    """The request in a body of content type `kind`; RewardError if it is malformed, TooLarge beyond the limits."""
    if kind == SAFETENSORS:
        request = _from_safetensors(body, limits)
    elif kind == JSON:
        request = _from_images(body, limits)
    else:
        raise RewardError(f"the content type is {kind or 'missing'}; it must be {SAFETENSORS} or {JSON}")
    try:
        json.dumps(request[1:], ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RewardError(f"the prompts or metadata hold text that is not valid Unicode: {reason(error)}") from error
    return request


def _from_safetensors(body: bytearray, limits: Limits) -> Request:
    length = struct.unpack_from("<Q", body)[0] if len(body) >= 8 else 0
    if not 0 < length <= len(body) - 8:
        raise RewardError("the body is not a safetensors file: its header is cut off")
    if length > TEXT_BYTES:
        raise TooLarge(f"the prompts and metadata take {length} bytes; this server takes at most {TEXT_BYTES}")
    header = from_json(body[8 : 8 + length], "the header of the safetensors file")
    if not isinstance(header, dict) or set(header) != {"media", "__metadata__"}:
        raise RewardError("the safetensors file must hold the tensor 'media' and metadata, and nothing else")
    about, texts, content = header["media"], header["__metadata__"], body[8 + length :]
    about = about if isinstance(about, dict) else {}
    dtype, shape = about.get("dtype"), about.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RewardError(f"the dtype of 'media' must be one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not 1 < len(shape) < 6 or not all(type(n) is int and n > 0 for n in shape):
        raise RewardError("the shape of 'media' must be (B, 3, H, W) or (B, F, 3, H, W) without a 0")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if about.get("data_offsets") != [0, len(content)] or size != len(content):
        raise RewardError(f"'media' of {dtype} and shape {shape} needs {size} bytes, but the file has {len(content)}")
    _check_size(shape, limits)
    if not isinstance(texts, dict) or not all(isinstance(texts.get(key), str) for key in ("prompts", "metadata")):
        raise RewardError("the safetensors file's metadata must hold 'prompts' and 'metadata', each a JSON list")
    # A bad surrogate passes, so that `from_json` refuses the text and gives the reason.
    prompts, metadata = (from_json(texts[key].encode(errors="surrogatepass"), key) for key in ("prompts", "metadata"))
    media = torch.frombuffer(content, dtype=DTYPES[dtype]).reshape(shape)
    return Request(media.float() / 255 if dtype == "U8" else media, prompts, metadata)


def _check_size(shape: Sequence[int], limits: Limits) -> None:
    """Raises TooLarge unless media of this shape lie within the limits."""
    if shape[0] > limits.items:
        raise TooLarge(f"the request has {shape[0]} items; this server takes at most {limits.items}")
    if 4 * math.prod(shape) > limits.bytes:
        raise TooLarge(f"media of shape {list(shape)} take more than the {limits.bytes} bytes that this server takes")


def _from_images(body: bytearray, limits: Limits) -> Request:
    rows = from_json(body, "the body")
    if not isinstance(rows, list) or not rows:
        raise RewardError("the body must be a JSON list of objects with 'png', 'prompt' and optionally 'metadata'")
    levels: list[torch.Tensor] = []
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not {"png", "prompt"} <= set(row) <= {"png", "prompt", "metadata"}:
            raise RewardError(f"item {index} must be an object with 'png', 'prompt' and optionally 'metadata'")
        levels.append(_decoded(row["png"], index, len(rows), limits))
        (_, height, width), first = levels[-1].shape, levels[0].shape
        if (3, height, width) != first:
            raise RewardError(
                f"item {index} is {width} x {height}, but the first item is {first[2]} x {first[1]}; "
                "all images of a request must have one size"
            )
    media = torch.stack(levels).float() / 255
    return Request(media, [row["prompt"] for row in rows], [row.get("metadata", {}) for row in rows])


def _decoded(text: Any, index: int, count: int, limits: Limits) -> torch.Tensor:
    """The levels (3, H, W) of an image of which the request holds `count`; TooLarge before it is decoded."""
    if not isinstance(text, str):
        raise RewardError(f"item {index}: 'png' must be the file in base64")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        _check_size((count, 3, image.height, image.width), limits)
        pixels = np.array(as_viewed(image))
    except TooLarge:
        raise
    except Image.DecompressionBombError as error:
        raise TooLarge(f"item {index}: its png is too large: {reason(error)}") from error
    except Exception as error:  # Pillow answers damaged files with many kinds of exceptions
        raise RewardError(f"item {index}: its png cannot be read: {reason(error)}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)
