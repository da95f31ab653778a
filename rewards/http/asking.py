"""One question to whichever of several HTTP servers can answer it, with patience."""

import ipaddress
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, stop_any, stop_when_event_set
from tenacity.nap import sleep_using_event

from rewards.base import RewardError, reason

PASSING = (408, 429, 502, 503, 504)  # statuses that another try may change
FIRST_REST, LONGEST_REST = 0.25, 10.0  # seconds that a failing server is left alone, doubled from first to longest


def is_loopback(host: str) -> bool:
    """Whether a host, without brackets, is this machine itself."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def client_of(urls: Sequence[str], **options: Any) -> httpx2.Client:
    """A client for some addresses; those of this machine are reached past the proxies that the environment names.

    RewardError for an address or a proxy that is none.
    """
    try:
        own = [url for url in map(httpx2.URL, urls) if is_loopback(url.host) or url.host in ("0.0.0.0", "::")]
        return httpx2.Client(mounts={f"all://{url.netloc.decode()}": None for url in own}, **options)
    except (httpx2.InvalidURL, ValueError, ImportError) as error:
        proxies = "look at HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY"
        raise RewardError(f"{', '.join(urls)} cannot be asked: {reason(error)}; {proxies}") from error


class _Unavailable(Exception):
    """A server did not answer now; it may later."""


class Server:
    """One address: how many requests it has, and until when it is left alone after failing."""

    def __init__(self, url: str):
        self.url = url
        self.busy = self.failures = 0
        self.rests_until = 0.0
        self.trouble = "not asked"

    def failed(self, trouble: str, after: float = 0.0) -> None:
        self.trouble = trouble
        if time.monotonic() >= self.rests_until:  # requests that fail together count once
            self.failures += 1
            rest = max(after, FIRST_REST * 2 ** min(self.failures - 1, 16))
            self.rests_until = time.monotonic() + min(rest, LONGEST_REST)

    def answered(self) -> None:
        self.failures, self.rests_until = 0, 0.0


class Asker:
    """Asks servers, the least busy of those that do not rest after a failure; may be used by many threads at once.

    urls: all that it will ask. token: sent along as "Authorization: Bearer".
    """

    def __init__(self, urls: Sequence[str], token: str | None):
        headers = {b"Authorization": f"Bearer {token}".encode()} if token else {}
        self._client = client_of(urls, headers=headers, limits=httpx2.Limits(max_connections=None))
        self._lock = threading.Lock()

    def ask(
        self,
        servers: Sequence[Server],
        request: tuple[str, str],
        *,
        timeout: float,
        patience: float,
        content: bytes | None = None,
        kind: str | None = None,
        over: threading.Event | None = None,
    ) -> Any:
        """The JSON that a server answers to `request`, a method and a path; `content` is of content type `kind`.

        A server that cannot be reached, has no room or does not answer within `timeout` seconds is asked again, after
        the others and ever more seldom, for `patience` seconds or until `over` is set. RewardError when that has
        passed, and at once when a server answers anything else than 200.
        """
        over = over or threading.Event()

        def wait(state: RetryCallState) -> float:
            rest = min(server.rests_until for server in servers) - time.monotonic()
            return max(0.0, min(rest, patience - (state.seconds_since_start or 0.0)))

        retrying = Retrying(
            retry=retry_if_exception_type(_Unavailable),
            wait=wait,
            stop=stop_any(stop_after_delay(patience), stop_when_event_set(over)),
            sleep=sleep_using_event(over),
            reraise=True,
        )
        try:
            return retrying(self._try, servers, request, timeout, content, kind)
        except _Unavailable as error:
            troubles = "; ".join(f"{server.url}: {server.trouble}" for server in servers)
            raise RewardError(f"no answer to {' '.join(request)} in {patience:g} s of trying ({troubles})") from error

    def _try(
        self,
        servers: Sequence[Server],
        request: tuple[str, str],
        timeout: float,
        content: bytes | None,
        kind: str | None,
    ) -> Any:
        method, path = request
        with self._lock:
            now = time.monotonic()
            server = min(servers, key=lambda server: (max(server.rests_until - now, 0.0), server.busy))
            server.busy += 1
        trouble, after = None, 0.0
        try:
            response = self._client.request(
                method,
                server.url + path,
                content=content,
                headers={"Content-Type": kind} if kind else {},
                timeout=httpx2.Timeout(timeout, connect=min(timeout, LONGEST_REST)),
            )
            if response.status_code in PASSING:
                trouble, after = _error_in(response), _seconds(response.headers.get("retry-after", ""))
        except httpx2.ReadTimeout:
            trouble = f"no answer within {timeout:g} s"
        except httpx2.TransportError as error:
            trouble = reason(error)
        finally:
            with self._lock:
                server.busy -= 1
        with self._lock:
            if trouble is not None:
                server.failed(trouble, after)
                raise _Unavailable
            server.answered()
        where = f"{server.url} answered {response.status_code} to {method} {path}"
        if response.status_code != 200:
            raise RewardError(f"{where}: {_error_in(response)}")
        try:
            return response.json()
        except ValueError as error:
            raise RewardError(f"{where} without JSON; is it a server of rewards?") from error


def _error_in(response: httpx2.Response) -> str:
    """The server's sentence, or what HTTP calls the status."""
    try:
        return str(response.json()["error"])
    except (ValueError, TypeError, KeyError):
        return f"{response.status_code} {response.reason_phrase}"


def _seconds(text: str) -> float:
    return float(text) if text.isdecimal() else 0.0
