"""The reward server: `serve({"ocr": rewards.load("ocr")})`, for `rewards.load("http://host:8000/ocr")`.

It answers four requests:

- GET /health and GET /spec.
- POST /score/NAME, whose body is a request of `rewards.http.wire`, gives {"scores": [B numbers, null where the reward
  left an item out], "counted": {name: number}}.
- POST /applies/NAME, whose body is {"rows": [metadata with its "prompt"]}, gives {"applies": [B booleans]}.

A failure gives {"error": sentence} with one of the statuses 400 (the request is wrong), 401 (the token is wrong), 404
(there is no such reward), 408 (the body stopped coming), 413 (the request is too large), 500 (the reward failed) and
503 (too many requests wait; with Retry-After).
"""

import asyncio
import hmac
import json
import logging
import math
import re
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from rewards.base import Reward, RewardError, TrainableReward, as_scores, check_inputs, cut, nearest, reason
from rewards.devices import chosen_device, make_current
from rewards.http.asking import is_loopback
from rewards.http.wire import JSON, PROTOCOL, TEXT_BYTES, TOKEN_VARIABLE, Limits, TooLarge, decode, from_json, secret
from rewards.loading import FunctionReward

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Request, Response
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise RewardError("serving rewards needs FastAPI and uvicorn: pip install 'flowalign[serve]'") from error

MAX_ITEMS, MAX_BYTES, QUEUE = 256, 2**28, 8
IDLE_SECONDS = 30.0  # a request whose body stops coming for this time is refused
STOP_SECONDS = 30  # a stopping server gives the requests being scored this time to end
SENTENCE = 1000  # the most characters of an error, which may quote the whole request
ENDPOINTS = "GET /health, GET /spec, POST /score/NAME, POST /applies/NAME"
logger = logging.getLogger(__name__)


class Refused(HTTPException):
    """An answer other than 200: its status, its sentence, its headers."""


class _Desk:
    """One served reward: its thread, a lock that scores one request at a time, and the number of open requests."""

    def __init__(self, name: str, reward: Reward, queue: int):
        if isinstance(reward, TrainableReward) and reward.learns:
            raise RewardError(f"reward {name!r} learns during training and cannot be served; load it where you train")
        if not re.fullmatch(r"[\w.-]+", name):
            raise RewardError(
                f"a served name may have letters, digits, '_', '-' and '.' only, since it is part of an address; "
                f"it is {name!r}"
            )
        self.name, self.reward, self.queue = name, reward, queue
        self.worker = ThreadPoolExecutor(1, name, make_current, (chosen_device(),))
        self.turn = asyncio.Lock()
        self.inside = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue; it is taken before the body is read, so that the bodies held in memory are bounded."""
        if self.inside > self.queue:
            raise Refused(503, f"reward {self.name!r} is busy and {self.queue} requests wait", {"Retry-After": "1"})
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def spec(self) -> dict[str, Any]:
        reward = self.reward
        return {
            "scope": reward.scope,
            "range": [bound if math.isfinite(bound) else None for bound in reward.range],
            "prompt_sensitive": reward.prompt_sensitive,
            "class": type(reward).__qualname__,
            "masks": reward.masks,
            "applies_to_all": type(reward).applies_to is Reward.applies_to,
        }

    def scores(self, body: bytearray, kind: str, limits: Limits) -> dict[str, Any]:
        """The answer to a request; RewardError if the request is at fault, Refused with 500 if the reward is."""
        media, prompts, metadata = decode(body, kind, limits)
        metadata = check_inputs(self.reward.name, media, prompts, metadata)
        judge: Callable[..., Any] = self.reward
        if isinstance(self.reward, FunctionReward):  # its own check of a wrong result would look like a wrong request
            judge = partial(self.reward.function, **self.reward.options)
        with self._refusing(), torch.no_grad():
            result = judge(media, prompts, metadata)
        try:
            scores = as_scores(result, prompts, self.reward.name, self.reward.masks).tolist()
        except RewardError as error:
            raise Refused(500, str(error)) from error

        return {"scores": [None if math.isnan(one) else one for one in scores], "counted": self.reward.tally()}

    def applies(self, rows: list[dict[str, Any]]) -> list[bool]:
        """The reward's `applies_to` for each row; Refused as in `scores`."""
        with self._refusing():
            return [bool(self.reward.applies_to(row)) for row in rows]

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turns the reward's error into Refused, with 400 if it is about the items and with 500 if it is a failure."""
        try:
            yield
        except RewardError as error:  # an error without a cause is about the items
            raise Refused(400 if error.__cause__ is None else 500, str(error)) from error
        except Exception as error:
            raise Refused(500, f"reward {self.reward.name!r} failed: {reason(error)}") from error


def _answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(content, allow_nan=False), status, headers, JSON)


async def _body(request: Request, most: int) -> bytearray:
    """The request's body; Refused when it is longer than `most` bytes, is announced so, or stops coming."""
    too_large = Refused(413, f"the request is larger than {most} bytes")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused(400, "the body is compressed; send it uncompressed")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(IDLE_SECONDS) as clock:
            async for chunk in request.stream():
                if len(body) + len(chunk) > most:
                    raise too_large
                body += chunk
                clock.reschedule(asyncio.get_running_loop().time() + IDLE_SECONDS)
    except TimeoutError as error:
        raise Refused(408, f"the body stopped coming for {IDLE_SECONDS:g} s") from error
    return body


def _rows(body: bytearray) -> list[dict[str, Any]]:
    content = from_json(body, "the body")
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(r, dict) and isinstance(r.get("prompt"), str) for r in rows):
        raise Refused(400, "the body must be {'rows': [...]}, where each row is an object with a text under 'prompt'")
    return rows


def _token_check(token: str | None) -> Callable[[Request], Awaitable[None]]:
    """The check that refuses requests without the token; without a token it refuses none."""

    async def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise Refused(
                401,
                f"the token is missing or wrong; set {TOKEN_VARIABLE} to the server's token",
                {"WWW-Authenticate": "Bearer"},
            )

    return check_token


def app(
    rewards: Mapping[str, Reward],
    *,
    token: str | None = None,
    max_items: int = MAX_ITEMS,
    max_bytes: int = MAX_BYTES,
    queue: int = QUEUE,
) -> FastAPI:
    """The service, an ASGI application; arguments as for `serve`. token: the one requests must bear, or None."""
    if not rewards:
        raise RewardError("there is no reward to serve; name at least one")
    for option, value, least in (("max_items", max_items, 1), ("max_bytes", max_bytes, 1), ("queue", queue, 0)):
        if value < least:
            raise RewardError(f"serving: {option} must be at least {least}, not {value}")
    limits = Limits(max_items, max_bytes)
    desks = {name: _Desk(name, reward, queue) for name, reward in rewards.items()}

    def desk_of(name: str) -> _Desk:
        if name not in desks:
            hint = f"did you mean {nearest(name, desks)!r}? (served: {', '.join(desks)})"
            raise Refused(404, f"there is no reward {name!r}; {hint}")
        return desks[name]

    service = FastAPI(dependencies=[Depends(_token_check(token))], openapi_url=None, redirect_slashes=False)

    @service.get("/health")
    async def health() -> Response:
        return _answer({"ok": True, "rewards": list(desks), "queue": sum(desk.inside for desk in desks.values())})

    @service.get("/spec")
    async def spec() -> Response:
        entries = {name: desk.spec() for name, desk in desks.items()}
        about = {"protocol": PROTOCOL, "version": version("flowalign"), "limits": limits._asdict()}
        return _answer({**about, "rewards": entries})

    @service.post("/score/{name}")
    async def score(name: str, request: Request) -> Response:
        desk = desk_of(name)
        with desk.place():
            body = await _body(request, max_bytes + TEXT_BYTES)
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            async with desk.turn:
                if await request.is_disconnected():  # the client gave up waiting, and may have asked again
                    raise ClientDisconnect
                loop = asyncio.get_running_loop()
                return _answer(await loop.run_in_executor(desk.worker, desk.scores, body, kind, limits))

    @service.post("/applies/{name}")
    async def applies(name: str, request: Request) -> Response:
        desk = desk_of(name)
        rows = _rows(await _body(request, TEXT_BYTES))
        return _answer({"applies": await run_in_threadpool(desk.applies, rows)})

    _explain_failures(service)
    return service


def _explain_failures(service: FastAPI) -> None:
    """Makes the service answer every failure with a sentence as JSON."""

    @service.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        sentence = str(error.detail)
        if not isinstance(error, Refused):  # raised by the router
            sentence = f"there is no {request.method} {request.url.path}; there are {ENDPOINTS}"
        elif error.status_code == 500:
            logger.error("%s", sentence, exc_info=error.__cause__)
        return _answer({"error": cut(sentence, SENTENCE)}, error.status_code, error.headers)

    @service.exception_handler(RewardError)
    async def wrong(request: Request, error: RewardError) -> Response:
        return await refused(request, Refused(413 if isinstance(error, TooLarge) else 400, str(error)))

    @service.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return _answer({"error": "the client went away"}, 400)

    @service.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _answer({"error": f"the server failed: {type(error).__name__}"}, 500)


def serve(
    rewards: Mapping[str, Reward],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    max_items: int = MAX_ITEMS,
    max_bytes: int = MAX_BYTES,
    queue: int = QUEUE,
) -> None:
    """Serves rewards under their names until SIGTERM or Ctrl-C; requests that are being scored are still answered.

    port: 0 takes a free port; the line printed at the start names it.
    max_items, max_bytes: limits of one request, with media counted as float32. Lower them to bound the memory.
    queue: requests that may wait for each reward; a reward scores one request at a time in a thread of its own.
    If $FLOWALIGN_TOKEN is set, requests must bear that token. Raises RewardError when `host` is open to other machines
    and there is no token, and when the address cannot be listened at.
    """
    token = secret()
    if token is None and not is_loopback(host):
        raise RewardError(
            f"serving at {host} lets other machines in; set {TOKEN_VARIABLE} to a secret that they must send"
        )
    service = app(rewards, token=token, max_items=max_items, max_bytes=max_bytes, queue=queue)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise RewardError(f"cannot listen at {host}, port {port}: {reason(error)}") from error
    where = f"[{host}]" if ":" in host else host
    # An answer's head and body are written separately, and without TCP_NODELAY the body would wait 40 ms until the head
    # is acknowledged. Connections inherit the option; asyncio sets it only on sockets with an explicit protocol number.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print(f"serving {', '.join(rewards)} at http://{where}:{listener.getsockname()[1]}; Ctrl-C stops", flush=True)
    config = uvicorn.Config(service, log_level="warning", timeout_graceful_shutdown=STOP_SECONDS)
    uvicorn.Server(config).run(sockets=[listener])
