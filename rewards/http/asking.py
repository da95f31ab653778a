"""Requests to an HTTP server with retries: the client, and the wait before another try."""

import email.utils
import ipaddress
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, stop_any, stop_when_event_set
from tenacity.nap import sleep_using_event
from tenacity.stop import stop_base
from tenacity.wait import WaitBaseT, wait_random_exponential

from rewards.base import RewardError, reason

PASSING = (408, 429, 502, 503, 504)  # statuses after which another try may succeed
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0  # the longest wait in seconds before the first further try, and before any


def is_loopback(host: str) -> bool:
    """Whether a host, written without brackets, is this machine itself."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def client_of(url: str, **options: Any) -> httpx2.Client:
    """A client for an address; an address of this machine is reached without the proxies of the environment.

    Raises RewardError for an invalid address or proxy.
    """
    try:
        parsed = httpx2.URL(url)
        own = is_loopback(parsed.host) or parsed.host in ("0.0.0.0", "::")
        return httpx2.Client(mounts={f"all://{parsed.netloc.decode()}": None} if own else {}, **options)
    except (httpx2.InvalidURL, ValueError, ImportError) as error:
        proxies = "look at HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY"
        raise RewardError(f"{url} cannot be asked: {reason(error)}; {proxies}") from error


def asked_wait(error: BaseException | None) -> float:
    """The seconds that a server asks to wait, by its Retry-After (a number or a date); 0 if it does not ask."""
    text = error.response.headers.get("retry-after", "") if isinstance(error, httpx2.HTTPStatusError) else ""
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return float(text) if re.fullmatch(r"\s*\d+(\.\d*)?\s*", text) else 0.0


class GrowingWait(wait_random_exponential):
    """Random waits between 0 and a limit that doubles with each try, but at least as long as the server asks."""

    def __call__(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return max(super().__call__(state), asked_wait(error))


def asking_again(
    may_pass: Callable[[BaseException], bool], wait: WaitBaseT, stop: stop_base, over: threading.Event
) -> Retrying:
    """Tries while a failure may pass, until `stop` says so or `over` is set, which ends a wait too."""
    return Retrying(
        retry=retry_if_exception(may_pass),
        wait=wait,
        stop=stop_any(stop, stop_when_event_set(over)),
        sleep=sleep_using_event(over),
        reraise=True,
    )


class Server:
    """The server at an address, for use by many threads. token: sent as "Authorization: Bearer" with each request."""

    def __init__(self, url: str, token: str | None):
        self.url = url
        headers = {b"Authorization": f"Bearer {token}".encode()} if token else {}
        self._client = client_of(url, headers=headers, limits=httpx2.Limits(max_connections=None))

    def ask(
        self,
        method: str,
        path: str,
        *,
        timeout: float,
        patience: float,
        content: bytes | None = None,
        kind: str | None = None,
        over: threading.Event | None = None,
    ) -> Any:
        """The JSON that the server answers; `content` is the request's body, of content type `kind`.

        While the server cannot be reached, has no room or does not answer within `timeout` seconds, it is asked again
        after longer and longer waits, for `patience` seconds or until `over` is set. Raises RewardError after that, and
        at once when the server answers with any other status than 200.
        """
        over = over or threading.Event()
        growing = GrowingWait(multiplier=FIRST_WAIT, max=LONGEST_WAIT)

        def wait(state: RetryCallState) -> float:  # the last try begins when patience ends
            return max(0.0, min(growing(state), patience - (state.seconds_since_start or 0.0)))

        def post() -> httpx2.Response:
            return self._client.request(
                method,
                self.url + path,
                content=content,
                headers={"Content-Type": kind} if kind else {},
                timeout=httpx2.Timeout(timeout, connect=min(timeout, LONGEST_WAIT)),
            ).raise_for_status()

        tried = f"no answer to {method} {path} in {patience:g} s of trying"
        try:
            response = asking_again(_may_pass, wait, stop_after_delay(patience), over)(post)
        except httpx2.TransportError as error:
            trouble = f"no answer within {timeout:g} s" if isinstance(error, httpx2.ReadTimeout) else reason(error)
            raise RewardError(f"{tried} ({self.url}: {trouble})") from error
        except httpx2.HTTPStatusError as error:
            said = _error_in(error.response)
            if _may_pass(error):
                raise RewardError(f"{tried} ({self.url}: {said})") from error
            answered = f"{self.url} answered {error.response.status_code} to {method} {path}"
            raise RewardError(f"{answered}: {said}") from error
        try:
            return response.json()
        except ValueError as error:
            answered = f"{self.url} answered {response.status_code} to {method} {path}"
            raise RewardError(f"{answered} without JSON; is it a reward server?") from error


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, httpx2.HTTPStatusError):
        return error.response.status_code in PASSING
    return isinstance(error, httpx2.TransportError)


def _error_in(response: httpx2.Response) -> str:
    """The server's error sentence, or HTTP's name of the status."""
    try:
        return str(response.json()["error"])
    except (ValueError, TypeError, KeyError):
        return f"{response.status_code} {response.reason_phrase}"
