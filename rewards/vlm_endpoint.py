"""A vision-language model behind an OpenAI-compatible server as a judge; pictures travel as PNG."""

import base64
import io
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx2
import tenacity
import torch
from PIL import Image

from rewards.base import reason
from rewards.vlm import VLM, Pictures, VLMError, at_least, first_line, plain

Answer = TypeVar("Answer")


class EndpointVLM(VLM):
    """A server with OpenAI's chat completions.

    url: up to and with the version, as in "http://localhost:8000/v1". model: its name there. api_key_env: the
    environment variable that holds the key, if one is needed. timeout: seconds for one try. retries: further tries
    after a timeout, a lost connection, status 429 or 5xx. backoff: the first wait before a further try is at most this
    many seconds, each later one at most twice as long. concurrency: requests at once. top_logprobs: how many first
    tokens the server is asked for; a choice that is not among them has probability 0, as in ArtifactReward.
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
    ):
        at_least("retries", retries, 0)
        at_least("concurrency", concurrency, 1)
        at_least("top_logprobs", top_logprobs, 2)
        if timeout <= 0 or backoff < 0:
            raise VLMError(f"timeout must be positive and backoff not negative, not {timeout} and {backoff}")
        if not url.startswith(("http://", "https://")):
            raise VLMError(f"url must begin with http:// or https://, not {url!r}")
        headers = {}
        if api_key_env is not None:
            if not os.environ.get(api_key_env):
                raise VLMError(
                    f"the environment variable {api_key_env}, which should hold the key of {url}, is not set"
                )
            headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self.client = httpx2.Client(headers=headers, timeout=timeout, limits=httpx2.Limits(max_connections=concurrency))
        self.url = url.rstrip("/")
        self.model = model
        self.timeout = timeout
        self.concurrency = concurrency
        self.top_logprobs = top_logprobs
        self.retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(retries + 1),
            wait=tenacity.wait_random_exponential(multiplier=backoff, max=max(backoff, 30)),
            retry=tenacity.retry_if_exception(_may_pass),
            reraise=True,
        )

    def answer(self, images: Pictures, texts: Sequence[str], max_tokens: int) -> list[str]:
        def text_of(choice: dict[str, Any]) -> str:
            if not isinstance(choice["message"]["content"], str):
                raise VLMError(f"{self.url} sent an answer without text")
            return choice["message"]["content"]

        return self._ask_all(images, texts, text_of, {"max_tokens": max_tokens})

    def choice_log_probs(self, images: Pictures, texts: Sequence[str], choices: Sequence[str]) -> torch.Tensor:
        def log_probs_of(choice: dict[str, Any]) -> list[float]:
            if not choice.get("logprobs"):
                raise VLMError(f"{self.url} sent no logprobs; its server must be able to give top_logprobs")
            first = choice["logprobs"]["content"][0]["top_logprobs"]
            found = [[float(top["logprob"]) for top in first if plain(top["token"]) == plain(c)] for c in choices]
            if not any(found):
                seen = ", ".join(repr(top["token"]) for top in first[:5])
                raise VLMError(
                    f"none of {', '.join(choices)} is among the likely answers of {self.url}, such as {seen}"
                )
            # The sum of probabilities; that of none is 0.
            return [torch.tensor(values or [-math.inf]).logsumexp(0).item() for values in found]

        extra = {"max_tokens": 1, "logprobs": True, "top_logprobs": self.top_logprobs}
        return torch.tensor(self._ask_all(images, texts, log_probs_of, extra))

    def continuation_log_prob(self, images: Pictures, question: str, continuations: Sequence[str]) -> torch.Tensor:
        raise VLMError(
            f"{self.url} can only answer, not tell how likely a given text is; give a local `model` without `url`"
        )

    def _ask_all(
        self,
        images: Pictures,
        texts: Sequence[str],
        read: Callable[[dict[str, Any]], Answer],
        extra: dict[str, Any],
    ) -> list[Answer]:
        """What `read` makes of the server's answers, in the questions' order; the first failure ends the others."""
        links = {id(image): _data_link(image) for row in images for image in row}

        def ask(row: int) -> Answer:
            content: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": links[id(image)]}} for image in images[row]
            ]
            content.append({"type": "text", "text": texts[row]})
            messages = [{"role": "user", "content": content}]
            try:
                return read(self._choice({"model": self.model, "messages": messages, "temperature": 0, **extra}))
            except VLMError as error:
                raise VLMError(str(error), row) from error
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise VLMError(
                    f"{self.url} sent something else than a chat completion: {reason(error)}", row
                ) from error

        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(ask, row) for row in range(len(texts))]
            try:
                return [future.result() for future in futures]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            response = self.retrying(self._post, body)
        except httpx2.TimeoutException as error:
            raise VLMError(f"{self.url} gave no answer within {self.timeout:g} s{self._tries()}") from error
        except httpx2.HTTPStatusError as error:
            answer = error.response
            said = f" and said {first_line(' '.join(answer.text.split()))!r}" if answer.text.strip() else ""
            status = f"{answer.status_code} {answer.reason_phrase}"
            raise VLMError(f"{self.url} answered with status {status}{self._tries()}{said}") from error
        except httpx2.HTTPError as error:
            raise VLMError(f"{self.url} cannot be reached{self._tries()}: {reason(error)}") from error
        return response.json()["choices"][0]

    def _post(self, body: dict[str, Any]) -> httpx2.Response:
        return self.client.post(f"{self.url}/chat/completions", json=body).raise_for_status()

    def _tries(self) -> str:
        count = self.retrying.statistics["attempt_number"]  # of this thread's last call
        return f", {count} times in a row" if count > 1 else ""


def _data_link(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, httpx2.HTTPStatusError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, httpx2.TransportError)
