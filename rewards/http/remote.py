"""A reward that a server computes: `rewards.load("http://host:8000/ocr")`.

The address may be that of a load balancer in front of several servers of the reward. `rewards.http.wire` sends media
without loss, so that the scores equal those of the reward in this process, bit for bit if both machines compute alike.
"""

import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from typing import Any

import httpx2
import torch

from rewards.base import Reward, RewardError, Rows, as_scores, nearest, reason
from rewards.http.asking import Server
from rewards.http.wire import JSON, PROTOCOL, SAFETENSORS, Limits, encode, secret, to_json


class RemoteReward(Reward):
    """A reward on a server.

    url: "http://host:8000/ocr"; the last part is the reward's name on the server. It may be left out if the server has
        only one reward, or if `reward` gives the name.
    timeout: seconds to wait for one answer, the time in the server's queue included; raise it for slow rewards.
    patience: seconds to go on asking while the server cannot be reached or has no room, before the scoring fails.
    batch: items in one request. A group reward gets whole groups (all items of a prompt), whatever their number.
    concurrency: requests sent at once, so that the server need not wait for the next one.
    start_timeout: seconds to wait for the server when the reward is loaded.
    """

    def __init__(
        self,
        url: str,
        reward: str | None = None,
        timeout: float = 60.0,
        patience: float = 300.0,
        batch: int = 16,
        concurrency: int = 2,
        start_timeout: float = 10.0,
    ):
        for option, value in (("timeout", timeout), ("start_timeout", start_timeout)):
            if not 0 < value < math.inf:
                raise RewardError(f"a remote reward: {option} must be a positive number of seconds, not {value}")
        if not 0 <= patience < math.inf:
            raise RewardError(f"a remote reward: patience must be at least 0 seconds, not {patience}")
        for option, value in (("batch", batch), ("concurrency", concurrency)):
            if value < 1 or value != int(value):
                raise RewardError(f"a remote reward: {option} must be a whole number of at least 1, not {value}")
        base, wanted = _place(url, reward)
        self.timeout, self.patience, self.batch, self.concurrency = timeout, patience, int(batch), int(concurrency)
        self._server = Server(base, secret())
        entry, self.limits = self._found(wanted, start_timeout)
        self.name, self.scope, self.prompt_sensitive = entry["name"], entry["scope"], entry["prompt_sensitive"]
        self.masks = entry.get("masks", False)
        self._counted: Counter[str] = Counter()
        self._counting = threading.Lock()
        low, high = entry["range"]
        self.range = (-math.inf if low is None else low, math.inf if high is None else high)
        self._applies_to_all = entry["applies_to_all"]
        self._ask_whether_once = lru_cache(maxsize=2**16)(self._ask_whether)

    def _found(self, wanted: str | None, seconds: float) -> tuple[dict[str, Any], Limits]:
        """The server's description of the reward, and its limits; RewardError when it has no such reward."""
        url = self._server.url
        spec = self._server.ask("GET", "/spec", timeout=min(seconds, self.timeout), patience=seconds)
        if not isinstance(spec, dict) or "protocol" not in spec:
            raise RewardError(f"{url} is not a reward server")
        if spec["protocol"] != PROTOCOL:
            raise RewardError(
                f"{url} runs flowalign {spec.get('version')} with protocol {spec['protocol']}, but this machine has "
                f"protocol {PROTOCOL}; install the same version on both"
            )
        entries: dict[str, dict[str, Any]] = spec["rewards"]
        name = next(iter(entries)) if wanted is None and len(entries) == 1 else wanted
        if name is None:
            some = f"{url}/{next(iter(entries))}"
            raise RewardError(f"{url} serves {', '.join(entries)}; name one of them, as in {some!r}")
        if name not in entries:
            hint = f"did you mean {nearest(name, entries)!r}? (it serves {', '.join(entries)})"
            raise RewardError(f"{url} serves no reward {name!r}; {hint}")
        return {"name": name, **entries[name]}, Limits(**spec["limits"])

    def applies_to(self, row: Mapping[str, Any]) -> bool:
        """The answer of the reward on the server; the server is asked about each row once."""
        return self._applies_to_all or self._ask_whether_once(to_json(dict(row), "a row of metadata"))

    def tally(self) -> dict[str, int]:
        with self._counting:
            counted, self._counted = self._counted, Counter(dict.fromkeys(self._counted, 0))
        return dict(counted)

    def _ask_whether(self, row: str) -> bool:
        return self._values("applies", f'{{"rows": [{row}]}}'.encode(), JSON, 1, threading.Event())[0]

    def __call__(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        """Scores (B,) from the server; RewardError that names it when it refuses or patience is over."""
        scores = torch.empty(len(prompts))
        over = threading.Event()

        def scores_of(part: list[int]) -> torch.Tensor:
            asked = [prompts[i] for i in part]
            body = encode(media[part], asked, [metadata[i] for i in part])
            values = self._values("scores", body, SAFETENSORS, len(part), over)
            values = [math.nan if one is None and self.masks else one for one in values]
            return as_scores(values, asked, self.name, self.masks)

        pool = ThreadPoolExecutor(self.concurrency)
        try:
            parts = {pool.submit(scores_of, part): part for part in self._parts(media, prompts)}
            for done in as_completed(parts):
                scores[parts[done]] = done.result()
        finally:
            over.set()  # after a failure, no other request tries again
            pool.shutdown(wait=False, cancel_futures=True)
        return scores

    def _parts(self, media: torch.Tensor, prompts: Sequence[str]) -> list[list[int]]:
        """The items of each request; the items of a group are never split between requests."""
        groups: dict[str | int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(prompt if self.scope == "group" else index, []).append(index)
        most = min(self.limits.items, self.limits.bytes // (4 * media[0].numel()))
        wanted = min(self.batch, most)
        parts: list[list[int]] = []
        for group in groups.values():
            if len(group) > most:
                shape, limits = tuple(media.shape[1:]), f"max_items {self.limits.items}, max_bytes {self.limits.bytes}"
                raise RewardError(
                    f"reward {self.name!r}: {len(group)} items of shape {shape} must be sent in one request, but the "
                    f"server takes at most {most} of them ({limits})"
                )
            if not parts or len(parts[-1]) + len(group) > wanted:
                parts.append([])
            parts[-1] += group
        return parts

    def _values(self, key: str, body: bytes, kind: str, count: int, over: threading.Event) -> list[Any]:
        """The `count` values of the server's answer under the key "scores" or "applies"."""
        path = f"/{'score' if key == 'scores' else key}/{self.name}"
        answer = self._server.ask(
            "POST", path, timeout=self.timeout, patience=self.patience, content=body, kind=kind, over=over
        )
        values = answer.get(key) if isinstance(answer, dict) else None
        if not isinstance(values, list) or len(values) != count:
            raise RewardError(f"the server of reward {self.name!r} answered {path} without {count} {key}")
        with self._counting:
            self._counted.update(answer.get("counted", {}))
        return values


def _place(url: str, reward: str | None) -> tuple[str, str | None]:
    """The server's address and the reward's name: `reward`, else the last part of `url`, else None."""
    if "," in url:
        raise RewardError(f"{url!r} is several addresses; give one, and for several servers that of a load balancer")
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise RewardError(f"{url!r} is not an address: {reason(error)}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise RewardError(f"{url!r} must be written 'http://host:port/reward'")
    base = url.rstrip("/")
    if reward is not None or parsed.path in ("", "/"):
        return base, reward
    base, _, name = base.rpartition("/")
    return base, name
