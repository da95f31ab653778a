"""What passes between `remote` and `server`: media as safetensors or PNG, the rest as JSON, no pickle.

A request for scores is one of

- `application/safetensors`: one tensor "media", (B, 3, H, W) or (B, F, 3, H, W), of F16, BF16 or F32 in [0, 1] or of
  U8 (which counts levels of 255); the file's metadata holds "prompts" and "metadata", each a JSON list of B entries.
- `application/json`: a list of {"png": base64, "prompt": text, "metadata": {}}, the pictures all of one size, read as
  `rewards.media` reads files.

The format of safetensors: https://github.com/huggingface/safetensors#format.
"""

import base64
import io
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from rewards.base import RewardError, reason
from rewards.media import as_levels, as_viewed

PROTOCOL = 1
SAFETENSORS, JSON = "application/safetensors", "application/json"
TOKEN_VARIABLE = "FLOWALIGN_TOKEN"
TEXT_BYTES = 2**22  # of the prompts and metadata of one request
# A parsed list takes twenty times the bytes of its text, so what is parsed is bounded by its number of values too.
JSON_VALUES = 10**6
DTYPES = {"U8": torch.uint8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class TooLarge(RewardError):
    """A request beyond the server's limits."""


class Limits(NamedTuple):
    """The most that one request may hold: items, and bytes of media counted as float32."""

    items: int
    bytes: int


class Request(NamedTuple):
    """Float media (B, ...), B prompts and B metadata rows; prompts and metadata as they came, for `check_inputs`."""

    media: torch.Tensor
    prompts: Any
    metadata: Any


def secret() -> str | None:
    """The token that servers ask for and clients give, from the environment; None if it is unset or blank."""
    return os.environ.get(TOKEN_VARIABLE, "").strip() or None


def to_json(value: Any, what: str) -> str:
    """JSON that reads back as the same value; RewardError for what is not plain JSON."""
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
        raise RewardError(f"{what} is no JSON: {reason(error)}") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def encode(media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> bytes:
    """The safetensors form of a request, without loss: as 8-bit levels only where these give the very same float32."""
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
    """What a body of content type `kind` asks; RewardError if it is malformed, TooLarge beyond the limits."""
    if kind == SAFETENSORS:
        request = _from_safetensors(body, limits)
    elif kind == JSON:
        request = _from_pictures(body, limits)
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
        raise RewardError("the body is no safetensors file: its header is cut off")
    if length > TEXT_BYTES:
        raise TooLarge(f"the prompts and metadata take {length} bytes; this server takes {TEXT_BYTES}")
    header = from_json(body[8 : 8 + length], "the header of the safetensors file")
    if not isinstance(header, dict) or set(header) != {"media", "__metadata__"}:
        raise RewardError("the safetensors file must hold the tensor 'media' and metadata, nothing else")
    about, texts, content = header["media"], header["__metadata__"], body[8 + length :]
    about = about if isinstance(about, dict) else {}
    dtype, shape = about.get("dtype"), about.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RewardError(f"the dtype of 'media' must be one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not 1 < len(shape) < 6 or not all(type(n) is int and n > 0 for n in shape):
        raise RewardError("the shape of 'media' must be (B, 3, H, W) or (B, F, 3, H, W), none of them 0")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if about.get("data_offsets") != [0, len(content)] or size != len(content):
        raise RewardError(f"'media' of {dtype} and shape {shape} needs {size} bytes, the file has {len(content)}")
    _check_size(shape, limits)
    if not isinstance(texts, dict) or not all(isinstance(texts.get(key), str) for key in ("prompts", "metadata")):
        raise RewardError("the safetensors file's metadata must hold 'prompts' and 'metadata', each a JSON list")
    prompts, metadata = (from_json(_bytes(texts[key]), key) for key in ("prompts", "metadata"))
    media = torch.frombuffer(content, dtype=DTYPES[dtype]).reshape(shape)
    return Request(media.float() / 255 if dtype == "U8" else media, prompts, metadata)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # refused as JSON, with its reason


def _check_size(shape: Sequence[int], limits: Limits) -> None:
    """TooLarge unless media of this shape lie within the limits."""
    if shape[0] > limits.items:
        raise TooLarge(f"the request has {shape[0]} items; this server takes {limits.items}")
    if 4 * math.prod(shape) > limits.bytes:
        raise TooLarge(f"media of shape {list(shape)} take more than the {limits.bytes} bytes that this server takes")


def _from_pictures(body: bytearray, limits: Limits) -> Request:
    rows = from_json(body, "the body")
    if not isinstance(rows, list) or not rows:
        raise RewardError("the body must be a JSON list of objects with 'png', 'prompt' and, if wanted, 'metadata'")
    levels: list[torch.Tensor] = []
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not {"png", "prompt"} <= set(row) <= {"png", "prompt", "metadata"}:
            raise RewardError(f"item {index} must be an object with 'png', 'prompt' and, if wanted, 'metadata'")
        picture = _opened(row["png"], index)
        stated = (3, picture.height, picture.width)
        _check_size((len(rows), *stated), limits)  # before anything is decoded
        levels.append(_decoded(picture, index))
        (_, height, width), first = levels[-1].shape, levels[0].shape
        if (3, height, width) != first:
            raise RewardError(
                f"item {index} is {width} x {height}, the first {first[2]} x {first[1]}; one request has one size"
            )
    media = torch.stack(levels).float() / 255
    return Request(media, [row["prompt"] for row in rows], [row.get("metadata", {}) for row in rows])


def _opened(text: Any, index: int) -> Image.Image:
    if not isinstance(text, str):
        raise RewardError(f"item {index}: 'png' must be the file in base64")
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
    except Image.DecompressionBombError as error:
        raise TooLarge(f"item {index}: its png is refused for its size: {reason(error)}") from error
    except Exception as error:  # damaged files end in many ways, and none of them is a picture
        raise RewardError(f"item {index}: its png cannot be read: {reason(error)}") from error
    return picture


def _decoded(picture: Image.Image, index: int) -> torch.Tensor:
    try:
        pixels = np.array(as_viewed(picture))
    except Exception as error:  # as above
        raise RewardError(f"item {index}: its png cannot be read: {reason(error)}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)
