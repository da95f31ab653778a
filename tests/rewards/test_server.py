"""Rewards behind HTTP: a real server on a free port, and what it does with requests that are wrong."""

import base64
import importlib
import io
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager

import httpx2
import pytest
import torch
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from starlette.testclient import TestClient

import rewards
from rewards import Reward, RewardError
from rewards.base import TrainableReward
from rewards.http.asking import client_of, is_loopback
from rewards.http.remote import RemoteReward
from rewards.http.server import app, serve
from rewards.http.wire import JSON, SAFETENSORS, Limits, decode, encode

JUDGE = """
import os, time
from rewards import Reward
class Slow(Reward):
    range = (0.0, 1.0)
    def __init__(self, seconds):
        self.seconds = seconds
    def __call__(self, media, prompts, metadata):
        print("scoring", flush=True)
        time.sleep(self.seconds)
        return media.flatten(1).mean(1)
"""


class Contrast(Reward):
    """Of the picture's values, times the prompt's length, plus the metadata's bonus; counts what it is asked."""

    range = (0.0, math.inf)
    prompt_sensitive = True

    def __init__(self):
        self.batches = []

    def applies_to(self, row):
        return "cat" in row["prompt"] and row.get("bonus", 0) >= 0

    def __call__(self, media, prompts, metadata):
        self.batches.append((len(media), media.dtype))
        bonus = torch.tensor([row.get("bonus", 0) for row in metadata])
        return media.flatten(1).double().std(1) * torch.tensor([len(p) for p in prompts]) + bonus


class Brightness(Reward):
    range = (0.0, 1.0)

    def __call__(self, media, prompts, metadata):
        return media.flatten(1).mean(1)


class AboveGroup(Reward):
    """How much brighter an item is than its group."""

    scope = "group"

    def __call__(self, media, prompts, metadata):
        means = media.flatten(1).mean(1)
        groups = {p: torch.stack([m for m, q in zip(means, prompts, strict=True) if q == p]).mean() for p in prompts}
        return means - torch.stack([groups[p] for p in prompts])


class Failing(Reward):
    def __init__(self, error, cause=None):
        self.error, self.cause = error, cause

    def __call__(self, media, prompts, metadata):
        raise self.error from self.cause


class Gate(Reward):
    """Scores once it is opened."""

    def __init__(self):
        self.entered, self.opened = threading.Semaphore(0), threading.Event()

    def __call__(self, media, prompts, metadata):
        self.entered.release()
        assert self.opened.wait(10)
        return media.flatten(1).mean(1)


@contextmanager
def running(served, port=0, **options):
    """The address of a server in this process."""
    listener = socket.create_server(("127.0.0.1", port))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = uvicorn.Server(uvicorn.Config(app(served, **options), log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class Process:
    """A server of its own, whose reward takes `seconds`."""

    def __init__(self, folder, seconds):
        (folder / "judge.py").write_text(JUDGE)
        load = f"rewards.load({f'{folder}/judge.py:Slow'!r}, seconds={seconds})"
        code = f"import rewards\nfrom rewards.http.server import serve\nserve({{'slow': {load}}}, port=0)"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.popen = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)

    def line(self):
        return self.popen.stdout.readline()

    def url(self):
        return self.line().split(";")[0].split()[-1]

    def end(self):
        self.popen.kill()
        self.popen.wait()


@pytest.fixture(scope="module", autouse=True)
def processes(tmp_path_factory):
    """Two servers that start while the first tests run."""
    folder = tmp_path_factory.mktemp("judges")
    made = {"killed": Process(folder, seconds=60), "stopped": Process(folder, seconds=1)}
    yield made
    for process in made.values():
        process.end()
        process.popen.stdout.close()


def pictures(count, seed=0, dtype=torch.float32):
    return torch.rand(count, 3, 6, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def png(size=(5, 6), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, 40).save(file, format="PNG")
    return file.getvalue()


def base64_of(data):
    return base64.b64encode(data).decode()


def client(served=None, **options):
    return TestClient(app(served or {"brightness": Brightness()}, **options))


def post(service, body, kind=SAFETENSORS, path="/score/brightness"):
    return service.post(path, content=body, headers={"Content-Type": kind})


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_remote_image_reward_scores_and_is_described_as_the_local_one(dtype):
    local = Contrast()
    prompts, rows = [f"cat {i}" * i for i in range(7)], [{"bonus": i / 3} for i in range(7)]
    with running({"contrast": local}) as url:
        remote = RemoteReward(f"{url}/contrast", batch=3)
        found = rewards.score(remote, pictures(7, dtype=dtype), prompts, rows)
        assert [size for size, _ in sorted(local.batches, reverse=True)] == [3, 3, 1]
        assert all(seen == dtype for _, seen in local.batches)
    assert torch.equal(found, rewards.score(local, pictures(7, dtype=dtype), prompts, rows))
    assert (remote.name, remote.scope, remote.range, remote.prompt_sensitive) == (
        "contrast",
        "sample",
        (0, math.inf),
        True,
    )


def test_a_remote_video_reward_scores_as_the_local_one():
    videos = pictures(8).unflatten(0, (2, 4))
    with running({"brightness": Brightness()}) as url:
        found = rewards.score(RemoteReward(url), videos, ["x", "y"])
    assert torch.equal(found, rewards.score(Brightness(), videos, ["x", "y"]))


def test_a_group_is_never_split_between_requests():
    prompts = [f"p{i % 3}" for i in range(10)]
    expected = rewards.score(AboveGroup(), pictures(10), prompts)
    with running({"above": AboveGroup()}) as url:
        remote = RemoteReward(f"{url}/above", batch=2)
        assert remote.scope == "group"
        assert torch.equal(rewards.score(remote, pictures(10), prompts), expected)


def test_a_group_beyond_the_servers_limits_is_refused_before_it_is_sent():
    with running({"above": AboveGroup()}, max_items=3) as url:
        remote = RemoteReward(f"{url}/above")
        with pytest.raises(
            RewardError, match=r"4 items of shape \(3, 6, 5\) must be sent .* takes at most 3 of them \(max_items 3"
        ):
            rewards.score(remote, pictures(4), ["p"] * 4)
        assert len(rewards.score(remote, pictures(4), ["p"] * 3 + ["q"])) == 4


def test_requests_keep_within_a_servers_bytes():
    local = Contrast()
    with running({"contrast": local}, max_bytes=2 * 4 * 90) as url:
        rewards.score(RemoteReward(url), pictures(5), ["cat"] * 5)
    assert sorted(size for size, _ in local.batches) == [1, 2, 2]


def test_a_server_is_asked_once_for_each_row_whether_its_reward_applies():
    local, asked = Contrast(), []
    local.applies_to = lambda row: (asked.append(row), Contrast.applies_to(local, row))[1]
    with running({"contrast": local, "brightness": Brightness()}) as url:
        remote = RemoteReward(f"{url}/contrast")
        row = {"prompt": "a cat", "bonus": 1}
        assert remote.applies_to(row) and remote.applies_to(row)
        assert not remote.applies_to({"prompt": "a dog"})
        assert asked == [row, {"prompt": "a dog"}]


def test_a_reward_that_judges_everything_is_not_asked_whether_it_applies():
    with running({"brightness": Brightness()}) as url:
        remote = RemoteReward(url)
    assert remote.applies_to({"prompt": "x"})  # the server is gone


def test_after_patience_is_over_the_error_names_the_server_and_its_failure():
    with running({"brightness": Brightness()}) as url:
        remote = RemoteReward(url, patience=0.4)
    begun = time.monotonic()
    with pytest.raises(RewardError, match=rf"in 0.4 s of trying \({url}: ConnectError: "):
        rewards.score(remote, pictures(2), ["x"] * 2)
    assert 0.4 <= time.monotonic() - begun < 2


def test_a_server_that_is_too_slow_is_named_with_the_timeout():
    gate = Gate()
    with running({"gate": gate}) as url:
        remote = RemoteReward(url, timeout=0.2, patience=0)
        with pytest.raises(RewardError, match=r"no answer within 0\.2 s"):
            rewards.score(remote, pictures(1), ["x"])
        gate.opened.set()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda url: RemoteReward(f"{url}/brihtness"), "serves no reward 'brihtness'; did you mean 'brightness'"),
        (lambda url: RemoteReward(url), "serves brightness, contrast; name one of them, as in 'http.*/brightness'"),
        (lambda url: RemoteReward(f"127.0.0.1:{url}"), "must be written 'http://host:port/reward'"),
        (lambda url: RemoteReward(f"{url}/contrast,{url}/contrast"), "is several addresses; give one, and"),
        (lambda url: RemoteReward(f"{url}/contrast", batch=0), "batch must be a whole number of at least 1, not 0"),
        (lambda url: RemoteReward(f"{url}/contrast", timeout=0), "timeout must be a positive number of seconds"),
        (lambda url: RemoteReward(f"{url}/contrast", patience=-1), "patience must be at least 0 seconds, not -1"),
        (lambda url: RemoteReward(f"{url}/deeper/contrast"), "answered 404 to GET /spec"),
        (
            lambda url: RemoteReward(f"http://127.0.0.1:{free_port()}", start_timeout=0.3),
            "in 0.3 s of trying .*Connect",
        ),
    ],
)
def test_a_wrong_address_fails_before_anything_is_scored(make, message):
    with (
        running({"brightness": Brightness(), "contrast": Contrast()}) as url,
        pytest.raises(RewardError, match=message),
    ):
        make(url)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [({"protocol": 0, "version": "0"}, "flowalign 0 with protocol 0, but this"), ({}, "is not a reward server")],
)
def test_another_version_and_another_kind_of_server_are_refused(monkeypatch, protocol, message):
    def answer(self, *asked, **_):
        return httpx2.Response(200, json=protocol, request=httpx2.Request(*asked))

    monkeypatch.setattr(httpx2.Client, "request", answer)
    with pytest.raises(RewardError, match=message):
        RemoteReward("http://judge:8000/ocr")


def test_only_the_token_of_the_environment_opens_a_server(monkeypatch):
    with running({"brightness": Brightness()}, token="s3cret") as url:
        monkeypatch.setenv("FLOWALIGN_TOKEN", "s3cret\n")
        assert len(rewards.score(RemoteReward(url), pictures(1), ["x"])) == 1
        for wrong in ("", "s3cre", "s3cret2", "gehéim"):
            monkeypatch.setenv("FLOWALIGN_TOKEN", wrong)
            with pytest.raises(
                RewardError, match="401 to GET /spec: the token is missing or wrong; set FLOWALIGN_TOKEN"
            ):
                RemoteReward(url)
    service = client(token="s3cret")
    assert [service.get(path).status_code for path in ("/health", "/spec")] == [401, 401]
    assert post(service, b"").status_code == 401


def test_nothing_is_served_beyond_this_machine_without_a_token(monkeypatch):
    monkeypatch.delenv("FLOWALIGN_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "judge.example"):
        with pytest.raises(RewardError, match=f"serving at {host} lets other machines in; set FLOWALIGN_TOKEN"):
            serve({"brightness": Brightness()}, host)


def test_a_port_in_use_is_an_error_of_one_sentence():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(RewardError, match="cannot listen at 127"),
    ):
        serve({"brightness": Brightness()}, port=taken.getsockname()[1])


def test_rewards_and_names_that_cannot_be_served_are_refused():
    class Learner(TrainableReward):
        update = state_dict = load_state_dict = __call__ = lambda *_: None

    with pytest.raises(RewardError, match="'learner' learns during training and cannot be served"):
        app({"learner": Learner()})
    with pytest.raises(RewardError, match=r"letters, digits, '_', '-' and '.' only, .*; it is 'a/b'"):
        app({"a/b": Brightness()})
    with pytest.raises(RewardError, match="max_items must be at least 1, not 0"):
        app({"brightness": Brightness()}, max_items=0)
    with pytest.raises(RewardError, match="no reward to serve"):
        app({})


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "rewards.http.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(RewardError, match=r"pip install 'flowalign\[serve\]'"):
        importlib.import_module("rewards.http.server")


def test_health_and_errors_are_json_and_name_what_is_right():
    service = client({"brightness": Brightness(), "contrast": Contrast()})
    assert service.get("/health").json() == {"ok": True, "rewards": ["brightness", "contrast"], "queue": 0}
    answer = post(service, b"", path="/score/contras")
    assert answer.status_code == 404 and "did you mean 'contrast'" in answer.json()["error"]
    answer = service.get("/nowhere")
    assert answer.status_code == 404 and "there is no GET /nowhere; there are GET /health" in answer.json()["error"]
    assert service.get("/score/brightness").status_code == 405
    answer = post(service, b'{"rows": [{}]}', JSON, "/applies/contrast")
    assert answer.status_code == 400 and "a text under 'prompt'" in answer.json()["error"]


def test_images_may_be_sent_as_png_with_curl():
    file = io.BytesIO()
    Image.fromarray((pictures(1)[0] * 255).byte().permute(1, 2, 0).numpy()).save(file, format="PNG")
    body = json.dumps([{"png": base64_of(file.getvalue()), "prompt": "é", "metadata": {"a": 1}}]).encode()
    media, prompts, metadata = decode(bytearray(body), JSON, Limits(1, 1000))
    assert torch.equal(media, (pictures(1) * 255).byte().float() / 255)
    assert (prompts, metadata) == (["é"], [{"a": 1}])
    assert post(client(), body, JSON).json()["scores"] == [media.mean().item()]


@given(st.integers(1, 3), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.text(), st.booleans())
@settings(max_examples=40)
def test_a_request_reads_back_as_it_was_written(count, dtype, prompt, of_levels):
    media = pictures(count, dtype=dtype)
    media = (media.float() * 255).round() / 255 if of_levels else media
    body = encode(media, [prompt] * count, [{"prompt": prompt, "n": [1, None, 0.1]}] * count)
    read = decode(bytearray(body), SAFETENSORS, Limits(3, 4 * 90 * 3))
    assert torch.equal(read.media, media) and read.media.dtype == media.dtype
    assert (read.prompts, read.metadata) == ([prompt] * count, [{"prompt": prompt, "n": [1, None, 0.1]}] * count)
    assert (b'"dtype":"U8"' in body) == of_levels  # a quarter of the bytes, where nothing is lost by it


@pytest.mark.parametrize("row", [{"a": float("nan")}, {"a": (1, 2)}, {1: 2}, {"a": torch.ones(1)}])
def test_metadata_that_json_would_change_is_not_sent(row):
    with pytest.raises(RewardError, match="the metadata cannot be sent to a server"):
        encode(pictures(1), ["x"], [row])


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height):
    """A PNG that says it is large; its pixels, never to be decoded, are no zlib stream."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"pixels") + chunk(b"IEND", b"")


@pytest.mark.parametrize(("size", "status"), [((9000, 9000), 413), ((60000, 60000), 413), ((5, 6), 400)])
def test_a_png_is_refused_by_its_stated_size_before_it_is_decoded(size, status):
    answer = post(client(), json.dumps([{"png": base64_of(bomb(*size)), "prompt": "x"}]).encode(), JSON)
    sentence = answer.json()["error"]
    assert answer.status_code == status
    assert ("cannot be read" in sentence) == (status == 400)


def test_a_request_that_is_too_large_is_refused_by_its_header_and_while_it_arrives():
    service = client(max_items=2, max_bytes=1000)
    body = encode(pictures(3), ["x"] * 3, [{}] * 3)
    assert "3 items; this server takes at most 2" in post(service, body).json()["error"]
    assert post(service, encode(pictures(3)[:, :, :1], ["x"] * 3, [{}] * 3)).status_code == 413
    assert post(service, encode(torch.zeros(1, 3, 9, 10), ["x"], [{}])).status_code == 413  # 1080 bytes as float32
    text = encode(pictures(1), ["x" * 2**22], [{}])
    assert post(service, text).status_code == 413
    values = b"[" + b"[]," * 10**6 + b"[]]"
    assert "more than 1000000 values" in post(service, values, JSON).json()["error"]
    with running({"brightness": Brightness()}, max_bytes=1000) as url:
        huge = 2**22 + 2000
        for content in (b"0" * huge, (b"0" * 1000 for _ in range(huge // 1000 + 1))):  # with and without a length
            answer = post(httpx2, content, path=f"{url}/score/brightness")
            assert answer.status_code == 413 and "larger than" in answer.json()["error"]


def test_a_full_queue_is_refused_with_a_time_and_a_patient_client_gets_its_turn():
    gate = Gate()
    with running({"gate": gate}, queue=1) as url:
        remote = RemoteReward(url, patience=10)
        results = []
        body = encode(pictures(1), ["x"], [{}])

        def ask():
            results.append(post(httpx2, body, path=f"{url}/score/gate"))

        calls = [threading.Thread(target=ask) for _ in range(2)]
        for call in calls:
            call.start()
        assert gate.entered.acquire(timeout=5)
        while httpx2.get(f"{url}/health").json()["queue"] < 2:
            time.sleep(0.01)
        refused = post(httpx2, body, path=f"{url}/score/gate")
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert "busy and 1 requests wait" in refused.json()["error"]
        threading.Timer(0.2, gate.opened.set).start()
        assert len(rewards.score(remote, pictures(1), ["x"])) == 1
        for call in calls:
            call.join()
    assert [answer.status_code for answer in results] == [200, 200]


@pytest.mark.parametrize(
    ("function", "status", "message"),
    [
        (lambda *_: torch.tensor([math.nan]), 500, r"scored item 0 \('x'\) as nan, which is not a finite number"),
        (lambda *_: torch.zeros(2), 500, r"returned shape \(2,\) for 1 items"),
        (lambda *_: 1 / 0, 500, "'judge' failed: ZeroDivisionError: division by zero"),
        (Failing(RewardError("item 0 quotes nothing")), 400, "item 0 quotes nothing"),
        (Failing(RewardError("the engine failed"), OSError("gone")), 500, "the engine failed"),
    ],
)
def test_a_failing_reward_answers_the_reason_and_whose_fault_it_is(function, status, message):
    with running({"judge": rewards.as_reward(function, "judge")}) as url:
        answer = post(httpx2, encode(pictures(1), ["x"], [{}]), path=f"{url}/score/judge")
        assert answer.status_code == status and "Traceback" not in answer.text
        with pytest.raises(RewardError, match=f"answered {status} to POST /score/judge: .*{message}"):
            rewards.score(RemoteReward(url), pictures(1), ["x"])


VALID = encode(pictures(2), ["a cat", "é"], [{"tag": 1}, {}])
PICTURE = base64_of(png())
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def damaged(draw):
    """A request that was right before some of its bytes were changed, cut or doubled."""
    body = bytearray(VALID)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(body)))
        body[start : start + draw(st.integers(0, 9))] = draw(st.binary(max_size=9))
    return bytes(body), SAFETENSORS


@st.composite
def misstated(draw):
    """A safetensors file whose header says anything."""
    tensor = {"dtype": "F32", "shape": [1, 3, 2, 2], "data_offsets": [0, 48]}
    tensor[draw(st.sampled_from([*tensor, "x"]))] = draw(VALUES | st.lists(st.integers(-1, 2**70), max_size=5))
    texts = {"prompts": '["x"]', "metadata": "[{}]"}
    texts[draw(st.sampled_from([*texts, "x"]))] = draw(VALUES | VALUES.map(json.dumps))
    header = {"media": draw(st.sampled_from([tensor, texts])), "__metadata__": texts}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + draw(st.binary(max_size=50)), SAFETENSORS


@st.composite
def wrong_rows(draw):
    """JSON rows, some of them with a picture."""
    row = st.fixed_dictionaries(
        {"png": st.sampled_from([PICTURE, PICTURE[:-40], "AAAA"]) | VALUES, "prompt": VALUES},
        optional={"metadata": VALUES, "x": VALUES},
    )
    return json.dumps(draw(VALUES | st.lists(row, min_size=1, max_size=3))).encode(), JSON


KINDS = st.sampled_from([SAFETENSORS, JSON, "text/plain", ""])


@pytest.fixture(scope="module")
def service():
    with client(max_bytes=10000) as made:
        yield made


@given(sent=damaged() | misstated() | wrong_rows() | st.tuples(st.binary(max_size=99), KINDS))
@settings(max_examples=300)
def test_no_malformed_request_gets_anything_but_an_explanation(service, sent):
    answer = post(service, *sent)
    if answer.status_code == 200:  # what was changed was a pixel or a letter
        assert all(math.isfinite(score) for score in answer.json()["scores"])
    else:
        assert answer.status_code in (400, 413)
        assert 10 < len(answer.json()["error"]) <= 1000 and "Traceback" not in answer.text


def test_requests_that_python_cannot_parse_are_refused_too(service):
    deep = b"[" * 10**5
    for body in (deep, b"1" * 5000, b'[{"png": "", "prompt": "\\ud800"}]', b"\xff\xfe", save({"other": pictures(1)})):
        for kind in (JSON, SAFETENSORS):
            assert post(service, body, kind).status_code == 400
    surrogate = json.dumps([{"png": PICTURE, "prompt": "\ud800"}]).encode()
    assert "not valid Unicode" in post(service, surrogate, JSON).json()["error"]
    assert service.post("/score/brightness", content=VALID, headers={"Content-Encoding": "gzip"}).status_code == 400


def test_a_server_killed_and_restarted_during_a_call_still_answers_it(processes):
    process = processes["killed"]
    url = process.url()
    remote = RemoteReward(f"{url}/slow", patience=20)
    results = []
    call = threading.Thread(target=lambda: results.append(rewards.score(remote, pictures(2), ["x"] * 2)))
    call.start()
    assert process.line() == "scoring\n"
    process.end()
    time.sleep(0.5)
    assert call.is_alive()
    with running({"slow": Brightness()}, port=int(url.rpartition(":")[2])):
        call.join(10)
    assert torch.equal(results[0], pictures(2).flatten(1).mean(1))


def test_a_server_that_is_told_to_stop_answers_what_it_is_scoring(processes):
    process = processes["stopped"]
    url, body, results = process.url(), encode(pictures(1), ["x"], [{}]), []
    call = threading.Thread(target=lambda: results.append(post(httpx2, body, path=f"{url}/score/slow")))
    call.start()
    assert process.line() == "scoring\n"
    process.popen.send_signal(signal.SIGTERM)
    call.join(10)
    assert results[0].status_code == 200 and len(results[0].json()["scores"]) == 1
    assert process.popen.wait(10) == -signal.SIGTERM


class Masking(Reward):
    """Leaves dark pictures out, and counts what it is asked."""

    masks = True
    asked = 0

    def __call__(self, media, prompts, metadata):
        self.asked += len(media)
        level = media.flatten(1).mean(1)
        return torch.where(level < 0.5, math.nan, level)

    def tally(self):
        counts, self.asked = {"answers": self.asked}, 0
        return counts


def test_masked_items_and_counts_of_a_served_reward_reach_the_client():
    expected = rewards.score(Masking(), pictures(9), ["x"] * 9)
    assert 0 < expected.isnan().sum() < 9
    with running({"masking": Masking()}) as url:
        remote = RemoteReward(f"{url}/masking", batch=2)
        torch.testing.assert_close(
            rewards.score(remote, pictures(9), ["x"] * 9), expected, rtol=0, atol=0, equal_nan=True
        )
        assert remote.tally() == {"answers": 9} and remote.tally() == {"answers": 0}


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "all_proxy", "ALL_PROXY"])
def test_no_proxy_is_used_for_a_server_of_this_machine(monkeypatch, variable):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")
    with running({"brightness": Brightness()}) as url:
        for host in ("127.0.0.1", "localhost", "LOCALHOST"):
            remote = RemoteReward(url.replace("127.0.0.1", host), start_timeout=5)
            assert len(rewards.score(remote, pictures(1), ["x"])) == 1


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.2", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("judge.localhost", True),
        ("10.0.0.1", False),
        ("localhost.example", False),
    ],
)
def test_which_hosts_are_this_machine(monkeypatch, host, own):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    url = f"http://[{host}]:8000/x" if ":" in host else f"http://{host}:8000/x"
    client = client_of(url)
    direct = client._transport_for_url(httpx2.URL(url)) is client._transport
    assert is_loopback(host) is direct is own
    assert client._transport_for_url(httpx2.URL("http://elsewhere.example")) is not client._transport


def test_load_takes_an_address_for_a_reward():
    with running({"brightness": Brightness()}) as url:
        remote = rewards.load(f"{url}/brightness", patience=1)
        assert remote.patience == 1 and torch.equal(
            remote(pictures(3), ["x"] * 3, [{}] * 3), pictures(3).flatten(1).mean(1)
        )
        with pytest.raises(RewardError, match="has no option 'pateince'; did you mean 'patience'"):
            rewards.load(f"{url}/brightness", pateince=1)
