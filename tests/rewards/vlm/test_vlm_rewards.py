"""Rewards that ask a vision-language model: what they read in answers, a real HTTP server, judges made up here."""

import base64
import io
import itertools
import json
import math
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from rewards.vlm.base import VLM, VLMError
from rewards.vlm.verdicts import mark, preferred


def picture(height, width, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def media_of(*images):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])


class Judge(VLM):
    """Answers with what `say` makes of the pictures and the text; keeps what it was shown."""

    def __init__(self, say):
        self.say, self.shown = say, []

    def answer(self, images, texts, max_tokens):
        self.shown += list(zip(images, texts, strict=True))
        return [self.say(*question) for question in zip(images, texts, strict=True)]

    def choice_log_probs(self, images, texts, choices):
        self.shown += list(zip(images, texts, strict=True))
        return torch.tensor([[self.say(*question), 0.0] for question in zip(images, texts, strict=True)])

    def continuation_log_prob(self, images, question, continuations):
        raise NotImplementedError


def brightness(image):
    return np.asarray(image).mean()


def brighter(images, text):
    """Prefers the brighter picture, clearly or not at all."""
    difference = brightness(images[0]) - brightness(images[1])
    return "a tie" if abs(difference) < 2 else f"<answer>Image {1 if difference > 0 else 2} is better</answer>"


def greys(*levels):
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 4, 4) / 255


def test_win_rates_count_wins_and_half_the_ties_within_a_prompt():
    judge = Judge(brighter)
    media = greys(10, 90, 200, 50, 91, 10)
    found = rewards.score(rewards.load("pairwise", backend=judge), media, ["a", "a", "b", "a", "a", "b"])
    assert found.tolist() == pytest.approx([0, 2.5 / 3, 1, 1 / 3, 2.5 / 3, 0])
    assert len(judge.shown) == 6 + 1  # every pair once
    assert {text.splitlines()[-1] for _, text in judge.shown} == {"Caption: a", "Caption: b"}


def test_the_images_and_the_seed_decide_the_order_in_which_a_pair_is_shown():
    media = greys(*range(10, 100, 10))
    prompts = ["a"] * 4 + ["b"] * 5
    judge = Judge(lambda images, text: "Image 1 is better")  # all depends on the order
    found = rewards.score(rewards.load("pairwise", backend=judge), media, prompts)
    order = torch.tensor([5, 0, 8, 3, 1, 7, 2, 6, 4])
    shuffled = rewards.score(rewards.load("pairwise", backend=judge), media[order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled, found[order])
    other = rewards.score(rewards.load("pairwise", backend=judge, seed=1), media, prompts)
    assert not torch.equal(other, found)


def test_a_judge_that_always_prefers_the_first_image_favours_no_place_in_the_batch():
    levels = list(itertools.islice(itertools.product(range(0, 256, 5), repeat=3), 40))
    media = torch.tensor(levels).view(40, 3, 1, 1).expand(-1, -1, 2, 2) / 255
    judge = Judge(lambda images, text: "Image 1 is better")
    found = rewards.score(rewards.load("pairwise", backend=judge), media, ["a"] * 40)
    assert found.mean() == pytest.approx(0.5)
    assert (found[:20].mean() - 0.5).abs() < 0.1  # always the earlier one first: 0.76


def test_equal_images_tie_without_being_judged():
    judge = Judge(lambda images, text: "Image 1 is better")
    assert rewards.score(rewards.load("pairwise", backend=judge), greys(9, 9), ["a", "a"]).tolist() == [0.5, 0.5]
    assert judge.shown == []


def test_videos_are_compared_frame_by_frame():
    media = torch.stack([greys(10, 90), greys(50, 50)])  # loses the first frame, wins the second
    assert rewards.score(rewards.load("pairwise", backend=Judge(brighter)), media, ["a", "a"]).tolist() == [0.5, 0.5]


def test_an_answer_without_a_winner_is_an_error_unless_it_counts_as_a_tie():
    judge = Judge(
        lambda images, text: (
            "I cannot say\nreally" if brightness(images[0]) + brightness(images[1]) > 60 else "Image 1 is better"
        )
    )
    with pytest.raises(
        rewards.RewardError, match=r"^reward 'pairwise': item \d \('a'\): .*'I cannot say' names no winner"
    ):
        rewards.score(rewards.load("pairwise", backend=judge), greys(10, 50, 60), ["a"] * 3)
    reward = rewards.load("pairwise", backend=judge, unparsable="tie")
    assert rewards.score(reward, greys(10, 50, 60), ["a"] * 3).sum() == pytest.approx(1.5)
    assert rewards.score(reward, greys(50, 60), ["a"] * 2).tolist() == [0.5, 0.5]


def test_the_only_image_of_a_prompt_has_no_win_rate():
    with pytest.raises(rewards.RewardError, match=r"item 1 .'b'. is the only item of its prompt"):
        rewards.score(rewards.load("pairwise", backend=Judge(brighter)), greys(1, 2, 3), ["a", "b", "a"])


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (
            ["Image 1 is better", "image 1.", "A", "Answer: A", "[[A]]", "the first image is better", "First", "(a)"],
            1.0,
        ),
        (["The better image is Image 2.", '{"reason": "Image 1 is dim", "winner": 2}', r"\boxed{B}", "option B"], 0.0),
        (
            ["<answer>Image 1 is better</answer> no: <answer>Image 2 is better</answer>", "I prefer the second one."],
            0.0,
        ),
        (
            ["I think both are sharp. Image 2 looks better.", "Verdict: **Image 2**", '{"better": 1, "winner": "B"}'],
            0.0,
        ),
        (["Image 1 is better: sharper, and Image 2 is dim", "Winner: 2\nNo, that is wrong.\nWinner: 1"], 1.0),
        (["a tie", "<answer>They are equally good</answer>", "Neither image is better.", "[[C]]", "Winner: tie"], 0.5),
        (["Image 1 is better, or Image 2 is better", "<answer></answer>", "", "Image 1/2", "I cannot say"], None),
        (['{"winner": "Image 1/2"}', "A photo of a dog", "Image 1 shows 2 dogs", "Image 1 is not better", "3"], None),
        (["Image 1 is better in colour. Image 2 is better in shape."], None),
    ],
)
def test_a_verdict_names_one_side_and_the_last_stated_counts(answers, expected):
    assert {answer: preferred(answer) for answer in answers} == dict.fromkeys(answers, expected)


def test_marks_are_read_as_unified_reward_writes_them():
    answer = "Alignment Score (1-5): 4.5\n**Coherence Score (1-5):** 2\nstyle score: 5/5"
    every = ("alignment", "coherence", "style")
    assert [mark(answer, name, 1, 5) for name in every] == [4.5, 2.0, 5.0]
    unreadable = "Alignment Score (1-5): X\nCoherence Score (1-5): 7\nStyle: 2 dogs"
    assert [mark(unreadable, name, 1, 5) for name in every] == [None] * 3
    for style in (
        '{"style": {"score": 3, "why": "2 dogs"}}',
        "<style>3</style>",
        "Style: 5\nStyle \u2013 3",
        "style = 3,0",
    ):
        assert mark(style, "style", 1, 5) == 3


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (
            [
                "Final Score: 7",
                "**Final Score**: 7",
                "final score\uff1a7",
                "Final Score (1-10): 7",
                '{"overall_score": 7}',
            ],
            7.0,
        ),
        (
            [
                "Score: 7/10",
                "**Score**: 7",
                "7 out of 10",
                "<score>7</score>",
                r"It is $\boxed{7}$.",
                "Rating \u2013 7",
                "7",
            ],
            7.0,
        ),
        (
            ['```json\n{"why": "2 dogs, 3 cats", "score": "7"}\n```', "There are 2 dogs. Score: 7", "a score of 7.0"],
            7.0,
        ),
        (["Score: 3\nNo, wait.\nScore: 7", "Final Score: 7\nStyle Score: 3", "Only 2 of 3 stars; 7/10 for it"], 7.0),
        (["Rating: 7,5", "Score = 7.5 because it is dim", "I would rate this image 7.5"], 7.5),
        (
            ["2 dogs", "There are 2 dogs.", "Score: X", "Score: 6-7", "Score: 6 or 7", "", "Score: 2 dogs", "3 of 4"],
            None,
        ),
        (["Score: 11", "Score: 0", "Score: -7", "Score: 7/5", "70%", "4/5", "Score (1-5): 4", "Score: 1,000"], None),
        (["Style score: 7", "Score: 7\nScore: 12"], None),
    ],
)
def test_the_final_mark_is_the_last_one_stated(answers, expected):
    assert {answer: mark(answer, "final", 1, 10) for answer in answers} == dict.fromkeys(answers, expected)


def test_a_rubric_is_the_mean_of_the_marks_that_count():
    judge = Judge(lambda images, text: "Alignment Score (1-5): 1\nCoherence Score (1-5): 3\nStyle Score (1-5): 5")
    expected = {(): 0.5, (("dimensions", ("style",)),): 1.0, (("mapping", "fifths"),): 0.6}
    for options, value in expected.items():
        reward = rewards.load("rubric", backend=judge, **dict(options))
        assert rewards.score(reward, greys(1), ["two stars"]).item() == pytest.approx(value)
    assert judge.shown[0][1].endswith("Caption: two stars")


def test_an_answer_without_a_mark_is_an_error_that_shows_it():
    judge = Judge(lambda images, text: "Alignment Score (1-5): 4\nStyle: good" if "b" in text[-1] else "")
    with pytest.raises(
        rewards.RewardError,
        match=r"^reward 'rubric': item 0 .'b'.: the answer 'Alignment .*: 4' has no mark .* for coherence and style$",
    ):
        rewards.score(rewards.load("rubric", backend=judge), greys(1), ["b"])


def test_an_item_with_a_reference_is_compared_with_it(tmp_path):
    reference = picture(8, 8, 0)
    reference.save(tmp_path / "reference.png")
    judge = Judge(lambda images, text: float(len(images)))
    reward = rewards.load("yes_no", backend=judge, question="Good {prompt}?", comparison="Better {prompt}?")
    found = rewards.score(reward, greys(1, 2), ["a", "b"], [{}, {"reference": str(tmp_path / "reference.png")}])
    torch.testing.assert_close(found, torch.sigmoid(torch.tensor([1.0, 2.0])))
    (alone, first), (both, second) = judge.shown
    assert (first, second, len(alone)) == ("Good a?", "Better b?", 1)
    assert both[0].tobytes() == reference.tobytes() and brightness(both[1]) == 2
    with pytest.raises(rewards.RewardError, match=r"item 0 .'a'. has the reference 'no.png', which is no image"):
        rewards.score(reward, greys(1), ["a"], [{"reference": "no.png"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "reward 'yes_no': it lacks `model` .folder or hub id. or `url`"),
        ({"url": "http://localhost:1/v1"}, "it lacks `model`, its name on the server"),
        ({"modle": "x"}, "a local model has no option 'modle'; did you mean 'model'?"),
        ({"model": "x", "timeout": 3}, "a local model has no option 'timeout'"),
        ({"url": "http://localhost:1/v1", "model": "x", "device": "cpu"}, "a server has no option 'device'"),
        ({"url": "localhost:1", "model": "x"}, "url must begin with http:// or https://"),
        ({"url": "http://localhost:1/v1", "model": "x", "api_key_env": "NO_SUCH_KEY"}, "variable NO_SUCH_KEY, which"),
        ({"model": "/no/such/folder"}, "the model '/no/such/folder' cannot be loaded"),
        ({"model": "x", "batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"model": "x", "dtype": "big"}, "dtype must be 'auto' or a type of torch"),
        ({"frames": 0, "backend": Judge(brighter)}, "frames must be a whole number"),
        ({"model": "x", "backend": Judge(brighter)}, "backend is a VLM already"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options, message):
    with pytest.raises(rewards.RewardError, match=message) as caught:
        rewards.load("yes_no", **options)
    assert str(caught.value).startswith("reward 'yes_no': ") and "\n" not in str(caught.value)


def said(text):
    return 200, {"choices": [{"message": {"content": text}, "logprobs": None}]}


def likely(**tokens):
    top = [{"token": token, "logprob": math.log(p)} for token, p in tokens.items()]
    return 200, {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"top_logprobs": top}]}}]}


@contextmanager
def serving(*replies):
    """A server that gives the replies in turn, the last one for ever: (status, JSON or text), or seconds to sleep."""
    requests, left = [], list(replies)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers, body))
            reply = left.pop(0) if len(left) > 1 else left[0]
            if callable(reply):
                reply = reply(body)
            if isinstance(reply, float):
                time.sleep(reply)
                return
            status, content, *headers = reply
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def served(name, url, **options):
    return rewards.load(name, url=url, model="judge", backoff=0.001, **options)


def test_a_server_is_asked_as_openai_prescribes(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    image = picture(8, 8, 0)
    with serving(likely(Yes=0.3, **{" yes": 0.1}, No=0.2, Maybe=0.4)) as (url, requests):
        reward = served("yes_no", url, api_key_env="JUDGE_KEY", question="Is it {prompt}?", top_logprobs=7)
        found = rewards.score(reward, media_of(image), ["a star"])
    assert found.item() == pytest.approx(0.4 / 0.6)
    ((path, headers, body),) = requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sesame"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 1)
    assert body["logprobs"] is True and body["top_logprobs"] == 7
    link, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "Is it a star?"}
    kind, data = link["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), np.asarray(image))


def test_concurrent_answers_stay_with_their_items():
    def answer(body):
        mark = int(body["messages"][0]["content"][1]["text"][-1])
        time.sleep(0.02 * (5 - mark))  # the later, the sooner
        return said(f"Alignment Score (1-5): {mark}")

    with serving(answer) as (url, _):
        reward = served("rubric", url, dimensions=["alignment"], mapping="fifths", question="{prompt}", concurrency=4)
        assert rewards.score(reward, greys(1, 2, 3, 4), list("1234")).tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_a_choice_beyond_the_likeliest_tokens_has_probability_zero():
    with serving(likely(Yes=0.9, Maybe=0.1)) as (url, _):
        assert rewards.score(served("artifact_vlm", url), greys(1), ["a"]).item() == 0


@pytest.mark.parametrize("failure", [(500, "busy"), (429, "slow down"), 0.0], ids=["500", "429", "lost"])
def test_a_request_is_tried_again_after_a_temporary_failure(failure):
    with serving(failure, likely(Yes=0.5, No=0.5)) as (url, requests):
        assert rewards.score(served("yes_no", url, retries=1), greys(1), ["a"]).item() == pytest.approx(0.5)
    assert len(requests) == 2


@pytest.mark.parametrize(
    ("reply", "tries", "message"),
    [
        (
            (401, {"error": "bad key"}),
            1,
            r"answered with status 401 Unauthorized and said '\{\"error\": \"bad key\"\}'",
        ),
        (
            (503, "over\nloaded"),
            3,
            "answered with status 503 Service Unavailable, 3 times in a row and said 'over loaded'",
        ),
        (0.3, 3, "gave no answer within 0.1 s, 3 times in a row"),
        ((200, "<html>"), 1, "sent an answer that is not a chat completion: JSONDecodeError"),
        ((200, {"choices": []}), 1, "sent an answer that is not a chat completion: IndexError"),
        (said("Yes"), 1, "sent no logprobs; the server must support top_logprobs"),
        (
            likely(Maybe=0.9, Perhaps=0.1),
            1,
            "none of Yes, No is among the likely answers of .*, such as 'Maybe', 'Perhaps'",
        ),
    ],
)
def test_a_server_that_fails_is_named_with_the_reward_and_the_item(reply, tries, message):
    timeout = 0.1 if isinstance(reply, float) else 30.0  # the others answer soon, on a busy machine too
    with serving(reply) as (url, requests):
        with pytest.raises(rewards.RewardError, match=message) as caught:
            rewards.score(served("yes_no", url, retries=2, timeout=timeout), greys(1), ["a star"])
        assert len(requests) == tries or isinstance(reply, float)  # whose last request may still be on its way
    text = str(caught.value)
    assert text.startswith("reward 'yes_no': item 0 ('a star'): ") and url in text and "\n" not in text


def test_a_missing_server_is_an_error():
    with serving(said("")) as (url, _):
        pass
    with pytest.raises(rewards.RewardError, match=f"{url} cannot be reached, 2 times in a row: ConnectError"):
        rewards.score(served("yes_no", url, retries=1), greys(1), ["a"])


def test_an_answer_without_text_is_an_error():
    with (
        serving(said(None)) as (url, _),
        pytest.raises(rewards.RewardError, match="the answer '' has no mark from 1 to 5"),
    ):
        rewards.score(served("rubric", url), greys(1), ["a"])


LINE = "Alignment Score (1-5): 4"


def thought(content=LINE, finish="stop", **message):
    return 200, {"choices": [{"message": {"content": content, **message}, "finish_reason": finish}]}


@pytest.mark.parametrize(
    "reply",
    [
        thought(f"<think>Alignment Score (1-5): 1</think>\n{LINE}"),
        thought(f"Alignment Score (1-5): 1</think>hm</think>{LINE}"),
        thought(f"[THINK]Alignment Score (1-5): 1[/THINK]{LINE}"),
        thought(reasoning_content="Alignment Score (1-5): 1"),
        thought([{"type": "text", "text": "Alignment Score"}, {"type": "text", "text": " (1-5): 4"}]),
    ],
    ids=["tags", "several closings", "brackets", "apart", "parts"],
)
def test_an_answer_is_read_after_its_reasoning(reply):
    with serving(reply) as (url, _):
        reward = served("rubric", url, dimensions=["alignment"])
        assert rewards.score(reward, greys(1), ["a"]).item() == 0.75


@pytest.mark.parametrize("name", ["rubric", "pairwise"])
@pytest.mark.parametrize(
    "reply",
    [
        thought(f"<think>{LINE}. Image 1 is better"),
        thought(f"{LINE}. Image 1 is better", finish="length"),
        thought(f"<think>a</think>{LINE} <think>Image 1 is better"),
        thought(None, finish="length", reasoning_content=f"{LINE}. Image 1 is better"),
    ],
    ids=["open", "cut", "open again", "apart"],
)
def test_no_verdict_is_taken_from_unfinished_reasoning(name, reply):
    options = {"dimensions": ["alignment"]} if name == "rubric" else {}
    with serving(reply) as (url, _):
        with pytest.raises(rewards.RewardError, match=r"was cut off before its verdict; raise max_tokens, now \d+, or"):
            rewards.score(served(name, url, **options), greys(1, 99), ["a", "a"])
        tied = served(name, url, unparsable="tie", **options)
        assert rewards.score(tied, greys(1, 99), ["a", "a"]).tolist() == [0.5, 0.5]
        assert tied.tally() == {"answers": 2 - (name == "pairwise"), "unparsable": 2 - (name == "pairwise")}
        left = rewards.score(served(name, url, unparsable="mask", **options), greys(1, 99), ["a", "a"])
        assert left.isnan().all()


@pytest.mark.parametrize(
    "reply",
    [
        thought(None, finish="length", reasoning_content="Hm"),
        (200, {"choices": [{"message": {"content": "<think>"}}]}),
    ],
    ids=["apart", "a mark"],
)
def test_the_first_token_of_reasoning_is_not_an_answer(reply):
    top = [{"token": "Okay", "logprob": -0.1}, {"token": "Yes", "logprob": -5.0}]
    reply[1]["choices"][0]["logprobs"] = {
        "content": [{"token": reply[1]["choices"][0]["message"]["content"] or "Okay"}]
    }
    reply[1]["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = top
    with serving(reply) as (url, _):
        for name in ("yes_no", "artifact_vlm"):
            with pytest.raises(rewards.RewardError, match="begins its answer with reasoning; try `thinking: false`"):
                rewards.score(served(name, url), greys(1), ["a"])
            assert rewards.score(served(name, url, unparsable="tie"), greys(1), ["a"]).item() == 0.5


def test_one_odd_answer_changes_no_other_score():
    def answer(body):
        return likely(Yes=0.3, No=0.1) if "odd" not in json.dumps(body["messages"]) else likely(Maybe=1.0)

    with serving(answer) as (url, _):
        for unparsable, odd in (("tie", 0.5), ("mask", math.nan)):
            reward = served("yes_no", url, unparsable=unparsable, question="{prompt}")
            found = rewards.score(reward, greys(1, 2, 3), ["a", "odd", "b"])
            torch.testing.assert_close(found, torch.tensor([0.75, odd, 0.75]), equal_nan=True)
            assert reward.tally() == {"answers": 3, "unparsable": 1}
            assert reward.tally() == {"answers": 0, "unparsable": 0}


def test_a_masked_pair_without_a_winner_does_not_count():
    judge = Judge(
        lambda images, text: "?" if brightness(images[0]) + brightness(images[1]) > 240 else brighter(images, text)
    )
    reward = rewards.load("pairwise", backend=judge, unparsable="mask")
    found = rewards.score(reward, greys(10, 90, 200), ["a"] * 3)  # 90 against 200 is not read
    assert found.tolist() == [0.0, 1.0, 1.0]
    assert rewards.score(reward, greys(150, 200), ["a"] * 2).isnan().all()


def test_an_unreadable_answer_counted_as_a_tie_gets_the_middle_of_the_scale():
    judge = Judge(lambda images, text: "?")
    for options, middle in (({}, 0.5), ({"mapping": "fifths"}, 0.6), ({"scale": [0, 10], "question": "?"}, 0.5)):
        reward = rewards.load("rubric", backend=judge, unparsable="tie", **options)
        assert rewards.score(reward, greys(1), ["a"]).item() == pytest.approx(middle)


def test_a_rubric_reads_one_mark_for_everything():
    for answer, options, value in (
        ("Final Score: 4", {}, 0.75),
        ("I see 2 dogs.\nFinal Score: 7/10", {"question": "?", "scale": [0, 10]}, 0.7),
        ("realism: 9\nFinal Score: 2", {"question": "?", "scale": [1, 9], "dimensions": ["realism"]}, 1.0),
    ):
        reward = rewards.load("rubric", backend=Judge(lambda images, text, said=answer: said), **options)
        assert rewards.score(reward, greys(1), ["a"]).item() == pytest.approx(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unparsable": "ignore"}, "unparsable must be one of error, tie, mask, not 'ignore'"),
        ({"dimensions": ["realism"]}, "dimensions must be some of alignment, coherence, style"),
        ({"scale": [1, 10]}, "scale must be .* the default question and the mapping 'fifths' are for marks up to 5"),
        ({"scale": [5, 1], "question": "?"}, r"scale must be the lowest and the highest mark.*not \[5, 1\]"),
    ],
)
def test_a_rubric_refuses_options_that_do_not_fit_together(options, message):
    with pytest.raises(rewards.RewardError, match=message):
        rewards.load("rubric", backend=Judge(brighter), **options)


@pytest.mark.parametrize("name", ["artifact_vlm", "prompt_echo"])
def test_a_question_without_the_prompt_must_not_contain_its_placeholder(name):
    with pytest.raises(rewards.RewardError, match=rf"^reward '{name}': the .* leave {{prompt}} out"):
        rewards.load(name, backend=Judge(brighter), question="Is {prompt} in it?")


def test_thinking_and_further_keys_reach_the_server():
    with serving(thought()) as (url, requests):
        options = {"dimensions": ["alignment"], "body": {"reasoning_effort": "none", "chat_template_kwargs": {"a": 1}}}
        rewards.score(served("rubric", url, thinking=False, **options), greys(1), ["a"])
        rewards.score(served("rubric", url, dimensions=["alignment"]), greys(1), ["a"])
    first, second = (body for _, _, body in requests)
    assert first["reasoning_effort"] == "none"
    assert first["chat_template_kwargs"] == {"a": 1, "enable_thinking": False}
    assert "chat_template_kwargs" not in second
    with pytest.raises(rewards.RewardError, match="body: the judge sets 'messages' itself"):
        served("rubric", url, body={"messages": []})


def test_a_server_that_reasons_in_spite_of_the_switch_is_an_error():
    with (
        serving(thought(f"<think>hm</think>{LINE}")) as (url, _),
        pytest.raises(rewards.RewardError, match="reasons in spite of `thinking: false`"),
    ):
        rewards.score(served("rubric", url, thinking=False, dimensions=["alignment"]), greys(1), ["a"])
    with serving(thought(f"<think>\n\n</think>{LINE}")) as (url, _):  # an empty block is how some do without
        rewards.score(served("rubric", url, thinking=False, dimensions=["alignment"]), greys(1), ["a"])


@pytest.mark.parametrize(
    ("reply", "tries", "message"),
    [
        ((200, '{"choices": [{"mess'), 2, "sent an answer that ends in the middle .19 bytes., 2 times in a row"),
        ((200, {"error": {"message": "busy", "code": 429}}), 2, "answered with the error 'busy', 2 times in a row"),
        ((200, {"error": {"message": "no such model", "code": 404}}), 1, "answered with the error 'no such model'"),
        ((200, {"error": "out of credit"}), 1, "answered with the error 'out of credit'"),
        ((200, []), 1, "sent an answer that is not a chat completion"),
        ((200, {"choices": [{"message": {"content": [3]}}]}), 1, "sent an answer that is not a chat completion"),
    ],
)
def test_an_odd_answer_of_status_200_is_tried_again_or_is_an_error_of_one_sentence(reply, tries, message):
    with serving(reply) as (url, requests), pytest.raises(rewards.RewardError, match=message) as caught:
        rewards.score(served("rubric", url, retries=1), greys(1), ["a"])
    assert len(requests) == tries and "\n" not in str(caught.value)


def test_no_server_is_asked_again_before_its_retry_after():
    def busy(after):
        return lambda body: (429, "slow", {"Retry-After": after})

    started = time.monotonic()
    with serving(busy("0.4"), thought()) as (url, requests):
        rewards.score(served("rubric", url, dimensions=["alignment"], retries=1), greys(1), ["a"])
    assert len(requests) == 2 and time.monotonic() - started >= 0.4
    with (
        serving(busy("86400")) as (url, requests),
        pytest.raises(rewards.RewardError, match="answered with status 429"),
    ):
        rewards.score(served("rubric", url), greys(1), ["a"])
    assert len(requests) == 1


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_no_proxy_is_used_for_a_server_of_this_machine(monkeypatch, variable):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")  # where nothing listens
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(thought()) as (url, _):
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            reward = served("rubric", url.replace("127.0.0.1", host), dimensions=["alignment"], retries=0)
            assert rewards.score(reward, greys(1), ["a"]).item() == 0.75


def test_the_proxy_is_used_for_any_other_server(monkeypatch):
    with serving(thought()) as (proxy, requests):
        monkeypatch.setenv("http_proxy", proxy.removesuffix("/v1"))
        reward = served("rubric", "http://judge.invalid/v1", dimensions=["alignment"], retries=0)
        assert rewards.score(reward, greys(1), ["a"]).item() == 0.75
    assert requests[0][0] == "http://judge.invalid/v1/chat/completions"
    monkeypatch.setenv("http_proxy", "nonsense://x")
    with pytest.raises(rewards.RewardError, match="look at HTTP_PROXY"):
        served("rubric", "http://judge.invalid/v1")


def test_a_server_cannot_echo_prompts():
    with pytest.raises(rewards.RewardError, match="reward 'prompt_echo': a server cannot tell how likely"):
        served("prompt_echo", "http://localhost:1/v1")
    with pytest.raises(VLMError, match="cannot tell how likely a given text is"):
        served("yes_no", "http://localhost:1/v1").vlm.continuation_log_prob([], "Describe.", [])
