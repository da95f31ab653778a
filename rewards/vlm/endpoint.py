"""A vision-language model behind an OpenAI-compatible server as a judge; images are sent as PNG."""

import base64
import io
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx2
import tenacity
import torch
from PIL import Image

from rewards.base import RewardError, reason
from rewards.http.asking import GrowingWait, asked_wait, asking_again, client_of
from rewards.vlm.base import (
    REASONING,
    VLM,
    Pictures,
    Unfinished,
    Unparsable,
    VLMError,
    at_least,
    first_line,
    plain,
    switches,
)

Answer = TypeVar("Answer")
LONGEST_WAIT = 120.0  # a server that asks for a longer wait, in seconds, is not asked again
OWN_KEYS = ("model", "messages", "max_tokens", "logprobs", "top_logprobs", "n", "stream")  # keys that the judge sets


class Passing(Exception):
    """A failure inside an answer of status 200, after which another try may succeed."""


class EndpointVLM(VLM):
    """A server with OpenAI's chat completions.

    url: the address up to the version, as in "http://localhost:8000/v1"; an address of this machine is reached without
        the proxies of the environment. model: the model's name on the server.
    api_key_env: name of the environment variable that holds the key, if the server needs one.
    timeout: seconds for one try; raise it if the model is slow to answer.
    retries: further tries after a timeout, a lost connection, a truncated answer, or status 408, 429 or 5xx.
    backoff: longest wait in seconds before the first further try; the limit doubles with each try, and no wait is
        shorter than the server's Retry-After.
    concurrency: requests at once; raise it until the server is busy.
    top_logprobs: number of likeliest first tokens that the server sends; a choice that is not among them gets
        probability 0, as in ArtifactReward.
    thinking: whether the model reasons first, sent as `enable_thinking` for the chat template of vLLM and SGLang; None
        leaves it to the server. body: further keys of the request, such as {"reasoning_effort": "none"}.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        concurrency: int = 8,
        top_logprobs: int = 20,
        thinking: bool | None = None,
        body: Mapping[str, Any] | None = None,
    ):
        given_body = switches(thinking, "body", body)
        at_least("retries", retries, 0)
        at_least("concurrency", concurrency, 1)
        at_least("top_logprobs", top_logprobs, 2)
        if not (0 < timeout < math.inf and 0 <= backoff < math.inf):
            raise VLMError(f"timeout must be positive and backoff not negative, not {timeout} and {backoff}")
        self.body = {"temperature": 0, **given_body}
        if taken := [key for key in OWN_KEYS if key in self.body]:
            raise VLMError(f"body: the judge sets {taken[0]!r} itself; leave it out")
        if thinking is not None:
            kwargs = dict(self.body.get("chat_template_kwargs") or {})
            self.body["chat_template_kwargs"] = {**kwargs, "enable_thinking": thinking}
        self.thinking = thinking
        if not url.startswith(("http://", "https://")):
            raise VLMError(f"url must begin with http:// or https://, not {url!r}")
        headers = {}
        if api_key_env is not None:
            if not os.environ.get(api_key_env):
                raise VLMError(
                    f"the environment variable {api_key_env}, which should hold the key of {url}, is not set"
                )
            headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        try:
            limits = httpx2.Limits(max_connections=concurrency)
            self.client = client_of(url, headers=headers, timeout=timeout, limits=limits)
        except RewardError as error:
            raise VLMError(str(error)) from error
        self.url = url.rstrip("/")
        self.model = model
        self.timeout = timeout
        self.concurrency = concurrency
        self.top_logprobs = top_logprobs
        self.stop = tenacity.stop_after_attempt(retries + 1)
        self.wait = GrowingWait(multiplier=backoff, max=max(backoff, 30))

    def answer(self, images: Pictures, texts: Sequence[str], max_tokens: int) -> list[str]:
        return self._ask_all(images, texts, self._said, {"max_tokens": max_tokens})

    def _said(self, choice: dict[str, Any]) -> str:
        message = choice["message"]
        content = message.get("content")
        if isinstance(content, list):  # some servers send even a single text as a list of parts
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        text = str(content or message.get("refusal") or "")
        marks = list(REASONING.finditer(text))
        thoughts = text[: marks[-1].end() if marks[-1][1] else None] if marks else ""
        if self.thinking is False and (_reasoning(message) or REASONING.sub("", thoughts).strip()):
            raise VLMError(f"{self.url} reasons in spite of `thinking: false`; the server or model has no such switch")
        return Unfinished(text) if choice.get("finish_reason") == "length" else text

    def choice_log_probs(self, images: Pictures, texts: Sequence[str], choices: Sequence[str]) -> torch.Tensor:
        def log_probs_of(choice: dict[str, Any]) -> list[float] | str:
            if not choice.get("logprobs"):
                raise VLMError(f"{self.url} sent no logprobs; the server must support top_logprobs")
            token = choice["logprobs"]["content"][0]
            first = token["top_logprobs"]
            if _reasoning(choice["message"]) or REASONING.fullmatch(token.get("token", "").strip()):
                return f"the model of {self.url} begins its answer with reasoning; try `thinking: false`"
            found = [[float(top["logprob"]) for top in first if plain(top["token"]) == plain(c)] for c in choices]
            if not any(found):
                seen = ", ".join(repr(top["token"]) for top in first[:5])
                return f"none of {', '.join(choices)} is among the likely answers of {self.url}, such as {seen}"
            # The logarithm of the sum of probabilities; a choice without tokens has probability 0.
            return [torch.tensor(values or [-math.inf]).logsumexp(0).item() for values in found]

        extra = {"max_tokens": 1, "logprobs": True, "top_logprobs": self.top_logprobs}
        found = self._ask_all(images, texts, log_probs_of, extra)
        problems = {row: one for row, one in enumerate(found) if isinstance(one, str)}
        values = torch.tensor([len(choices) * [math.nan] if isinstance(one, str) else one for one in found])
        if problems:
            raise Unparsable(problems, values)
        return values

    def continuation_log_prob(self, images: Pictures, question: str, continuations: Sequence[str]) -> torch.Tensor:
        raise VLMError(f"{self.url} cannot tell how likely a given text is; give a local `model` without `url`")

    def _ask_all(
        self,
        images: Pictures,
        texts: Sequence[str],
        read: Callable[[dict[str, Any]], Answer],
        extra: dict[str, Any],
    ) -> list[Answer]:
        """What `read` returns for each of the server's answers, in order; the first failure ends the other requests."""
        links = {id(image): _data_link(image) for row in images for image in row}
        over = threading.Event()
        retrying = asking_again(_may_pass, self.wait, self.stop, over)

        def ask(row: int) -> Answer:
            content: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": links[id(image)]}} for image in images[row]
            ]
            content.append({"type": "text", "text": texts[row]})
            messages = [{"role": "user", "content": content}]
            try:
                body = {"model": self.model, "messages": messages, **self.body, **extra}
                return read(self._choice(body, retrying))
            except VLMError as error:
                raise VLMError(str(error), row) from error
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise VLMError(
                    f"{self.url} sent an answer that is not a chat completion: {reason(error)}", row
                ) from error

        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(ask, row) for row in range(len(texts))]
            try:
                return [future.result() for future in futures]
            finally:
                over.set()  # after a failure, no other request tries again
                pool.shutdown(wait=False, cancel_futures=True)

    def _choice(self, body: dict[str, Any], retrying: tenacity.Retrying) -> dict[str, Any]:
        try:
            return retrying(self._post, body)
        except httpx2.TimeoutException as error:
            raise VLMError(f"{self.url} gave no answer within {self.timeout:g} s{_tries(retrying)}") from error
        except httpx2.HTTPStatusError as error:
            answer = error.response
            said = f" and said {first_line(' '.join(answer.text.split()))!r}" if answer.text.strip() else ""
            status = f"{answer.status_code} {answer.reason_phrase}"
            raise VLMError(f"{self.url} answered with status {status}{_tries(retrying)}{said}") from error
        except httpx2.HTTPError as error:
            raise VLMError(f"{self.url} cannot be reached{_tries(retrying)}: {reason(error)}") from error
        except Passing as error:
            raise VLMError(f"{self.url} {error}{_tries(retrying)}") from error

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        """The first choice of the answer; an error inside an answer of status 200 is raised too."""
        response = self.client.post(f"{self.url}/chat/completions", json=body).raise_for_status()
        try:
            answer = response.json()
        except ValueError as error:
            if not response.text.lstrip().startswith("{"):
                raise
            raise Passing(f"sent an answer that ends in the middle ({len(response.content)} bytes)") from error
        if isinstance(answer, dict) and answer.get("error"):
            said = answer["error"]
            message = said.get("message", said) if isinstance(said, dict) else said
            sentence = f"answered with the error {first_line(str(message))!r}"
            if isinstance(said, dict) and str(said.get("code")).isdecimal() and _passes(int(said["code"])):
                raise Passing(sentence)
            raise VLMError(f"{self.url} {sentence}")
        return answer["choices"][0]


def _data_link(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _tries(retrying: tenacity.Retrying) -> str:
    count = retrying.statistics["attempt_number"]  # the statistics of this thread's last call
    return f", {count} times in a row" if count > 1 else ""


def _reasoning(message: Mapping[str, Any]) -> bool:
    """Whether the server sent the model's reasoning in a field of its own."""
    return any(message.get(key) for key in ("reasoning_content", "reasoning"))


def _passes(status: int) -> bool:
    return status in (408, 429) or status >= 500


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, httpx2.HTTPStatusError):
        return _passes(error.response.status_code) and asked_wait(error) <= LONGEST_WAIT
    return isinstance(error, httpx2.TransportError | Passing)
