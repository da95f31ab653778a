"""Send malformed requests to a reward server and check its answers: `python scripts/fuzz_server.py --requests 10000`.

The script starts its own server. It prints how often each kind of request got each status, the scores of a valid
request before and after, and the server's memory. It fails if a malformed request got a score, if an answer has no
explanation, if a sound connection got a status of 500 or none, or if the server logged a traceback.
"""

import base64
import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import httpx2
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from rewards.http.wire import JSON, SAFETENSORS, encode

console = Console(highlight=False)
TOKEN = "fuzz"
SERVER = """
import rewards
from rewards.http.server import serve
serve({"colorfulness": rewards.load("colorfulness")}, port=0, max_items=8, max_bytes=2**20)
"""
MEDIA = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
RIGHT = encode(MEDIA, ["a cat", "a dog"], [{"tag": "colors"}, {}])
JUNK: list[Any] = [
    None,
    True,
    -1,
    2**70,
    1.5,
    "",
    "\ud800",
    "x" * 5000,
    [],
    [[]],
    {},
    {"a": []},
    [1, 2],
    "[",
    "[1]",
    "{}",
]
# Kinds that may give a valid request by chance, for example if only a pixel or a letter was changed.
LUCKY = {"damaged", "cut_image", "misstated", "wrong_row"}

Sent = tuple[str, str, dict[str, str], bytes]  # method, path, headers, body


def posted(body: bytes, kind: str = SAFETENSORS) -> Sent:
    """A request for scores."""
    return "POST", "/score/colorfulness", {"Content-Type": kind, "Authorization": f"Bearer {TOKEN}"}, body


def safetensors(header: object, content: bytes) -> bytes:
    """A safetensors file with this header and content, whether they match or not."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, *more: bytes) -> bytes:
    """A PNG that states this size, whatever its pixels are."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def rows(*pictures: bytes) -> bytes:
    """The JSON form of a request."""
    return json.dumps([{"png": base64.b64encode(p).decode(), "prompt": "x"} for p in pictures]).encode()


def damaged(dice: random.Random) -> Sent:
    """A request with some bytes changed, removed or inserted, most of them in the header."""
    body = bytearray(RIGHT)
    for _ in range(dice.randint(1, 4)):
        start = dice.randrange(dice.choice([8, 250, len(body)]))
        body[start : start + dice.randint(0, 8)] = dice.randbytes(dice.randint(0, 8))
    return posted(bytes(body))


def misstated(dice: random.Random) -> Sent:
    """A header that contradicts the file's contents or makes no sense."""
    tensor: dict[str, Any] = {"dtype": "F32", "shape": [1, 3, 2, 2], "data_offsets": [0, 48]}
    texts: dict[str, Any] = {"prompts": '["x"]', "metadata": "[{}]"}
    header: dict[str, Any] = {"media": tensor, "__metadata__": texts}
    place = dice.choice([tensor, texts, header])
    place[dice.choice([*place, "x"])] = dice.choice(JUNK)
    return posted(safetensors(header, dice.randbytes(dice.choice([0, 47, 48, 49]))))


def wrong_shape(dice: random.Random) -> Sent:
    """Shapes with zeros, with a wrong rank or number of channels, or far too large."""
    shape = dice.choice(
        [[0, 3, 2, 2], [1, 4, 2, 2], [12], [1] * 9, [2**40, 3, 2**40, 2], [-1, 3, -2, 2], [1, 3, 2, True]]
    )
    header = {"dtype": "F32", "shape": shape, "data_offsets": [0, 48]}
    texts = {"prompts": '["x"]', "metadata": "[{}]"}
    return posted(safetensors({"media": header, "__metadata__": texts}, bytes(48)))


def wrong_values(dice: random.Random) -> Sent:
    """Media with values that are not numbers or lie outside [0, 1]."""
    media = MEDIA.clone()
    media[1, 0, dice.randrange(16), dice.randrange(16)] = dice.choice([float("nan"), float("inf"), -1.0, 255.0])
    return posted(encode(media, ["x", "y"], [{}, {}]))


def wrong_count(dice: random.Random) -> Sent:
    """More or fewer prompts or rows of metadata than media."""
    return posted(encode(MEDIA, ["x"] * dice.choice([0, 1, 3, 999]), [{}] * dice.choice([0, 1, 3, 999])))


def wrong_row(dice: random.Random) -> Sent:
    """JSON rows with arbitrary values."""
    row: dict[str, object] = {"png": base64.b64encode(picture()).decode(), "prompt": "x", "metadata": {}}
    row[dice.choice([*row, "x"])] = dice.choice(JUNK)
    return posted(json.dumps(dice.choice([[row], [row, row], row, {"items": [row]}, dice.choice(JUNK)])).encode(), JSON)


def picture() -> bytes:
    """A valid PNG."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (40, 80, 120)).save(file, format="PNG")
    return file.getvalue()


def cut_image(dice: random.Random) -> Sent:
    """A PNG with bytes changed or its end missing."""
    data = bytearray(picture())
    data[dice.randrange(len(data))] = dice.randrange(256)
    return posted(rows(bytes(data[: dice.randint(1, len(data))])), JSON)


def bomb(dice: random.Random) -> Sent:
    """A small PNG that would take a gigabyte, in its pixels or in a compressed text."""
    zeros = zlib.compress(bytes(2**22), 9)
    text = chunk(b"zTXt", b"k\0\0" + zeros)
    size = dice.choice([(20000, 20000), (9000, 9000), (2**31 - 1, 1), (1, 2**31 - 1)])
    return posted(rows(dice.choice([png(*size, zeros), png(16, 16, b"", text, text), png(0, 0, zeros)])), JSON)


def other_image(dice: random.Random) -> Sent:
    """A file of another format, or images of two sizes."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format=dice.choice(["JPEG", "GIF", "TIFF", "BMP"]))
    return posted(rows(*dice.choice([[file.getvalue()], [picture(), png(8, 8, zlib.compress(bytes(200)))]])), JSON)


def deep_json(dice: random.Random) -> Sent:
    """JSON with deep nesting, very many values, or a very large number."""
    kinds = [b"[" * 10**5, b'{"a":' * 10**5, b"[" + b"[]," * 1_100_000 + b"[]]", b"9" * 10**5, b"[NaN]", b"[1e999]"]
    return posted(dice.choice(kinds), JSON)


def oversized(dice: random.Random) -> Sent:
    """More items, media or text than the server takes."""
    return posted(
        dice.choice(
            [
                encode(MEDIA[:1].expand(9, 3, 16, 16), ["x"] * 9, [{}] * 9),
                encode(torch.zeros(1, 3, 300, 300), ["x"], [{}]),
                encode(MEDIA, ["x" * 2**22, ""], [{}, {}]),
                bytes(6 * 2**20),
            ]
        )
    )


def wrong_kind(dice: random.Random) -> Sent:
    """Another content type, a compressed body, or a body that does not match its content type."""
    method, path, headers, body = posted(RIGHT, dice.choice([JSON, "text/plain", "multipart/form-data", "", ";"]))
    return method, path, headers | dice.choice([{}, {"Content-Encoding": "gzip"}]), body


def wrong_place(dice: random.Random) -> Sent:
    """Another path, another method, or an unknown reward."""
    headers = posted(b"")[2]
    paths = ["/", "/score", "/score/", "/score/colour", "/score/..%2f..%2fetc", "/score/%ff", "/docs", "/openapi.json"]
    return dice.choice([("POST", p, headers, RIGHT) for p in paths] + [("DELETE", "/score/colorfulness", headers, b"")])


def wrong_token(dice: random.Random) -> Sent:
    """No token or a wrong one."""
    method, path, headers, body = posted(RIGHT)
    other = dice.choice(
        ["", "Bearer", "Bearer fuz", "Bearer fuzzy", "Basic fuzz", "bearer fuzz", "Bearer " + "x" * 9999]
    )
    return method, path, {**headers, "Authorization": other}, body


def wrong_question(dice: random.Random) -> Sent:
    """A malformed request that asks to which rows a reward applies."""
    body = json.dumps(dice.choice([*JUNK, {"rows": dice.choice(JUNK[:6])}, {"rows": [dice.choice(JUNK)]}])).encode()
    return "POST", "/applies/colorfulness", posted(b"", JSON)[2], body


def noise(dice: random.Random) -> Sent:
    """Random bytes."""
    return posted(dice.randbytes(dice.randrange(400)), dice.choice([SAFETENSORS, JSON]))


KINDS: list[Callable[[random.Random], Sent]] = [
    damaged,
    misstated,
    wrong_shape,
    wrong_values,
    wrong_count,
    wrong_row,
    cut_image,
    bomb,
    other_image,
    deep_json,
    oversized,
    wrong_kind,
    wrong_place,
    wrong_token,
    wrong_question,
    noise,
]


def broken_connection(dice: random.Random, address: tuple[str, int]) -> str:
    """Send bad HTTP or close the connection early; returns the answer's status, or "closed"."""
    head = f"POST /score/colorfulness HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
    text = dice.choice(
        [
            dice.randbytes(200),
            head + b"Content-Length: 999\r\n\r\nshort",
            head + b"Content-Length: -5\r\n\r\n",
            head + b"Content-Length: 99999999999999\r\n\r\n",
            head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            head + b"Transfer-Encoding: chunked\r\n\r\nffffffff\r\nx",
            head + b"X: " + b"y" * 10**5,
        ]
    )
    with socket.create_connection(address, timeout=10) as line:
        line.sendall(text)
        line.shutdown(socket.SHUT_WR)
        try:
            answer = line.recv(100)
        except ConnectionError:
            answer = b""
    return answer.split()[1].decode() if answer.startswith(b"HTTP/") else "closed"


def memory(process: int) -> dict[str, int]:
    """Resident megabytes of a process, now and at their peak; empty on systems other than Linux."""
    status = Path(f"/proc/{process}/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    fields = {"VmRSS": "now", "VmHWM": "peak"}
    return {fields[line[:5]]: int(line.split()[1]) // 1024 for line in lines if line[:5] in fields}


def is_explained(answer: httpx2.Response) -> bool:
    """Whether an answer explains the mistake in one short sentence."""
    try:
        sentence = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return 0 < len(sentence) <= 1000 and "Traceback" not in sentence


def main(
    requests: Annotated[int, typer.Option(help="number of malformed requests")] = 10000,
    seed: Annotated[int, typer.Option(help="seed of the requests; the same seed sends the same requests")] = 0,
) -> None:
    """Send a reward server malformed requests."""
    dice = random.Random(seed)
    counts: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    environment = {**os.environ, "FLOWALIGN_TOKEN": TOKEN}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        try:
            assert server.stdout is not None
            url = httpx2.URL(server.stdout.readline().split(";")[0].split()[-1])
            with httpx2.Client(base_url=url, timeout=60) as client:

                def ask(sent: Sent) -> httpx2.Response:
                    method, path, headers, body = sent
                    return client.request(method, path, headers=headers, content=body)

                scores = ask(posted(RIGHT)).json()["scores"]
                console.print(f"valid request: {scores}; server memory in MB: {memory(server.pid)}")
                begun = time.monotonic()
                for _ in range(requests):
                    kind = dice.choice([*KINDS, None])
                    if kind is None:
                        counts["broken_connection", broken_connection(dice, (url.host, url.port or 80))] += 1
                        continue
                    answer = ask(kind(dice))
                    status, name = answer.status_code, kind.__name__
                    counts[name, str(status)] += 1
                    right = status == 200 and name in LUCKY
                    if not right and (not 400 <= status < 500 or not is_explained(answer)):
                        faults.append(f"{name} got {status}: {answer.text[:200]}")
                console.print(f"{requests} requests in {time.monotonic() - begun:.0f} s; memory: {memory(server.pid)}")
                if ask(posted(RIGHT)).json() != {"scores": scores}:
                    faults.append("the valid request has other scores than before")
                waiting = client.get("/health", headers=posted(b"")[2]).json()["queue"]
                if waiting:
                    faults.append(f"{waiting} requests still hold a place")
        finally:
            server.terminate()
            server.wait()
        log.seek(0)
        logged = log.read()
    if "Traceback" in logged:
        first = logged[logged.index("Traceback") :][:2000]
        faults.append(f"the server logged {logged.count('Traceback')} tracebacks, such as {first}")
    console.print(answers(counts))
    for fault in faults[:10]:
        console.print(f"fault: {fault}", markup=False)
    if faults:
        raise SystemExit(f"{len(faults)} faults")
    console.print("no faults")


def answers(counts: Counter[tuple[str, str]]) -> Table:
    """A table of how often each kind of request got each status."""
    statuses = sorted({status for _, status in counts})
    table = Table("request", *statuses)
    for name in sorted({name for name, _ in counts}):
        table.add_row(name, *(str(counts[name, status] or "") for status in statuses))
    table.add_row("all", *(str(sum(n for (_, s), n in counts.items() if s == status)) for status in statuses))
    return table


if __name__ == "__main__":
    typer.run(main)
