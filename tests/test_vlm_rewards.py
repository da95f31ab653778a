"""Rewards that ask a vision-language model: tiny models of real classes, a real HTTP server, judges made up here."""

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
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import rewards
from rewards.pairwise import verdict
from rewards.rubric import marks
from rewards.vlm import VLM, VLMError
from rewards.vlm_local import LocalVLM

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'image' %}IMAGE"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
YES = ("Yes", "yes", "YES", " Yes", " yes", " YES")
NO = ("No", "no", "NO", " No", " no", " NO")
CHAT = "<|im_start|>user\n{image}{text}<|im_end|>\n<|im_start|>assistant\n"


def tokenizer_of(*special):
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([*YES, *NO, "a photo of two red stars"] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def save(folder, model, processor):
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():  # far from uniform answers
        if weight.ndim > 1:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_qwen(folder):
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = tokenizer_of(*names)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(names))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
        ),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(patch_size=4, merge_size=2),
        chat_template=TEMPLATE.replace("IMAGE", "".join((names[0], names[2], names[1]))),
    )
    return save(folder, transformers.Qwen2_5_VLForConditionalGeneration(config), processor)


def make_llava(folder):
    tokenizer = tokenizer_of("<image>")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    square = {"height": 16, "width": 16}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size=square, crop_size=square),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return save(folder, transformers.LlavaForConditionalGeneration(config), processor)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return str(make_qwen(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module", params=[make_qwen, make_llava], ids=["qwen", "llava"])
def tiny(request, tmp_path_factory):
    return str(request.param(tmp_path_factory.mktemp("tiny")))


def picture(height, width, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def media_of(*images):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])


def questions():
    """Pictures of different sizes, one with a second beside it, and texts of different lengths."""
    images = [[picture(16, 24, 0)], [picture(32, 16, 1), picture(16, 16, 2)], [picture(24, 24, 3)]]
    return images, ["Is it?", "Is the second a photo of two red stars?", "Yes or no"]


def by_hand(folder, image, text, tail=""):
    """The processor's own inputs of one item whose answer begins with `tail`, and the model."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    chat = CHAT.format(image="<|vision_start|><|image_pad|><|vision_end|>", text=text) + tail
    inputs = processor(text=[chat], images=[image], return_tensors="pt")
    return inputs, transformers.AutoModelForImageTextToText.from_pretrained(folder), processor.tokenizer


@torch.no_grad()
def test_yes_no_is_the_share_of_yes_among_the_first_tokens_that_read_as_yes_or_no(qwen):
    image = picture(24, 32, 0)
    question = "Is it {prompt}? Yes or no."
    found = rewards.score(rewards.load("yes_no", model=qwen, question=question), media_of(image), ["a {star}"])
    inputs, model, tokenizer = by_hand(qwen, image, "Is it a {star}? Yes or no.")
    probabilities = model(**inputs).logits[0, -1].softmax(-1)
    single = [[i for (i, *more) in tokenizer(list(words)).input_ids if not more] for words in (YES, NO)]
    assert all(len(ids) >= 2 for ids in single)
    yes, no = (probabilities[ids].sum() for ids in single)
    torch.testing.assert_close(found[0], yes / (yes + no), atol=1e-6, rtol=1e-5)
    assert abs(found - 0.5) > 0.01


@torch.no_grad()
def test_prompt_echo_is_minus_the_models_own_cross_entropy_of_the_prompt(qwen):
    image, prompt = picture(24, 32, 0), "a photo of two red stars"
    found = rewards.score(rewards.load("prompt_echo", model=qwen), media_of(image), [prompt])
    inputs, model, tokenizer = by_hand(qwen, image, "Describe this image in detail.", prompt)
    length = len(tokenizer(prompt).input_ids)
    labels = inputs["input_ids"].clone()
    labels[:, :-length] = -100
    torch.testing.assert_close(found[0], -model(**inputs, labels=labels).loss)


def test_a_batch_of_different_sizes_and_lengths_is_judged_as_each_alone(tiny):
    images, texts = questions()
    vlm = LocalVLM(tiny)
    log_probs = vlm.choice_log_probs(images, texts, ("Yes", "No"))
    alone = torch.cat([vlm.choice_log_probs([i], [t], ("Yes", "No")) for i, t in zip(images, texts, strict=True)])
    torch.testing.assert_close(log_probs, alone, atol=1e-4, rtol=0)
    assert log_probs.std(0).min() > 0.01  # the questions do differ
    echoes = vlm.continuation_log_prob(images, "Describe.", texts)
    alone = torch.cat([vlm.continuation_log_prob([i], "Describe.", [t]) for i, t in zip(images, texts, strict=True)])
    torch.testing.assert_close(echoes, alone, atol=1e-4, rtol=0)
    answers = vlm.answer(images, texts, 6)
    assert answers == [vlm.answer([i], [t], 6)[0] for i, t in zip(images, texts, strict=True)]
    assert len(set(answers)) > 1


def test_the_batch_size_does_not_change_what_is_said(tiny):
    images, texts = questions()
    one, many = LocalVLM(tiny, batch_size=1), LocalVLM(tiny, batch_size=2)
    for ask in (lambda vlm: vlm.choice_log_probs(images, texts, ("Yes",)), lambda vlm: echo(vlm, images, texts)):
        torch.testing.assert_close(ask(many), ask(one), atol=1e-4, rtol=0)


def echo(vlm, images, texts):
    return vlm.continuation_log_prob(images, "Describe.", texts)


def test_an_answer_is_the_likeliest_token_at_every_step(qwen):
    image = picture(24, 32, 0)
    answer = LocalVLM(qwen).answer([[image]], ["Is it?"], 4)[0]
    inputs, model, tokenizer = by_hand(qwen, image, "Is it?")
    tokens = inputs["input_ids"]
    for _ in range(4):
        inputs["input_ids"] = tokens
        inputs["attention_mask"] = torch.ones_like(tokens)
        inputs["mm_token_type_ids"] = (tokens == model.config.image_token_id).int()
        tokens = torch.cat([tokens, model(**inputs).logits[:, -1:].argmax(-1)], 1)
    assert answer == tokenizer.decode(tokens[0, -4:], skip_special_tokens=True) != ""


def test_a_model_is_loaded_once_however_many_rewards_ask_it(qwen):
    first = rewards.load("yes_no", model=qwen, batch_size=2)
    second = rewards.load("artifact_vlm", model=qwen)
    assert first.vlm.model is second.vlm.model
    assert rewards.load("yes_no", model=qwen, dtype="float64").vlm.model is not first.vlm.model


def test_a_video_scores_as_the_mean_of_its_frames(qwen):
    frames = media_of(*(picture(16, 16, seed) for seed in range(3)))
    for name in ("prompt_echo", "yes_no", "artifact_vlm"):
        reward = rewards.load(name, model=qwen)
        alone = rewards.score(reward, frames, ["a star"] * 3)
        torch.testing.assert_close(rewards.score(reward, frames[None], ["a star"])[0], alone.mean())
        assert alone.std() > 1e-3


def test_artifacts_are_asked_about_without_the_prompt(qwen):
    media = media_of(picture(16, 16, 0), picture(16, 16, 1))
    reward = rewards.load("artifact_vlm", model=qwen, question="Artifacts?")
    found = rewards.score(reward, media, ["a star", "two stars"])
    asked = rewards.load("yes_no", model=qwen, question="Artifacts?")
    torch.testing.assert_close(found, 1 - rewards.score(asked, media, ["x", "y"]))
    assert found.std() > 1e-3 and not reward.prompt_sensitive


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


def test_a_pair_is_shown_in_an_order_that_the_pictures_and_the_seed_decide():
    media = greys(*range(10, 100, 10))
    prompts = ["a"] * 4 + ["b"] * 5
    judge = Judge(lambda images, text: "Image 1 is better")  # all depends on the order
    found = rewards.score(rewards.load("pairwise", backend=judge), media, prompts)
    order = torch.tensor([5, 0, 8, 3, 1, 7, 2, 6, 4])
    shuffled = rewards.score(rewards.load("pairwise", backend=judge), media[order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled, found[order])
    other = rewards.score(rewards.load("pairwise", backend=judge, seed=1), media, prompts)
    assert not torch.equal(other, found)


def test_a_judge_that_always_prefers_the_first_prefers_no_place_in_the_batch():
    levels = list(itertools.islice(itertools.product(range(0, 256, 5), repeat=3), 40))
    media = torch.tensor(levels).view(40, 3, 1, 1).expand(-1, -1, 2, 2) / 255
    judge = Judge(lambda images, text: "Image 1 is better")
    found = rewards.score(rewards.load("pairwise", backend=judge), media, ["a"] * 40)
    assert found.mean() == pytest.approx(0.5)
    assert (found[:20].mean() - 0.5).abs() < 0.1  # always the earlier one first: 0.76


def test_equal_pictures_tie_without_being_judged():
    judge = Judge(lambda images, text: "Image 1 is better")
    assert rewards.score(rewards.load("pairwise", backend=judge), greys(9, 9), ["a", "a"]).tolist() == [0.5, 0.5]
    assert judge.shown == []


def test_videos_duel_frame_by_frame():
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


def test_a_picture_alone_of_its_prompt_has_no_win_rate():
    with pytest.raises(rewards.RewardError, match=r"item 1 .'b'. is the only one of its prompt"):
        rewards.score(rewards.load("pairwise", backend=Judge(brighter)), greys(1, 2, 3), ["a", "b", "a"])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>Image 2 is better at first</think><answer>Image 1 is better</answer>", 1.0),
        ("image 2 is better.", 0.0),
        ("<answer>They are equally good</answer>", 0.5),
        ("Image 1 is better, or Image 2 is better", None),
        ("<think>Image 1 is better</think><answer></answer>", None),
    ],
)
def test_a_verdict_is_what_the_answer_says_last(answer, expected):
    assert verdict(answer) == expected


def test_marks_are_read_as_unified_reward_writes_them():
    answer = "Alignment Score (1-5): 4.5\n**Coherence Score (1-5)**: 2\nstyle score: 5/5"
    every = ("alignment", "coherence", "style")
    assert marks(answer, every) == {"alignment": 4.5, "coherence": 2.0, "style": 5.0}
    assert marks("Alignment Score (1-5): X\nCoherence Score (1-5): 7", every) == {}


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
    with pytest.raises(rewards.RewardError, match=r"item 0 .'a'. has the reference 'no.png', which is no picture"):
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
def test_wrong_options_are_refused_in_a_sentence(options, message):
    with pytest.raises(rewards.RewardError, match=message) as caught:
        rewards.load("yes_no", **options)
    assert str(caught.value).startswith("reward 'yes_no': ") and "\n" not in str(caught.value)


def test_an_empty_prompt_has_no_echo(qwen):
    reward = rewards.load("prompt_echo", model=qwen)
    with pytest.raises(rewards.RewardError, match=r"^reward 'prompt_echo': item 1 .''.: a text without tokens"):
        rewards.score(reward, media_of(picture(8, 8, 0), picture(8, 8, 1)), ["a", ""])


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
            status, content = reply
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
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


def test_a_choice_beyond_the_likeliest_tokens_has_no_probability():
    with serving(likely(Yes=0.9, Maybe=0.1)) as (url, _):
        assert rewards.score(served("artifact_vlm", url), greys(1), ["a"]).item() == 0


@pytest.mark.parametrize("failure", [(500, "busy"), (429, "slow down"), 0.0], ids=["500", "429", "lost"])
def test_a_failure_that_may_pass_is_tried_again(failure):
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
        ((200, "<html>"), 1, "sent something else than a chat completion: JSONDecodeError"),
        ((200, {"choices": []}), 1, "sent something else than a chat completion: IndexError"),
        (said("Yes"), 1, "sent no logprobs; its server must be able to give top_logprobs"),
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


def test_no_server_at_all_is_an_error():
    with serving(said("")) as (url, _):
        pass
    with pytest.raises(rewards.RewardError, match=f"{url} cannot be reached, 2 times in a row: ConnectError"):
        rewards.score(served("yes_no", url, retries=1), greys(1), ["a"])


def test_an_answer_without_text_is_an_error():
    with serving(said(None)) as (url, _), pytest.raises(rewards.RewardError, match="sent an answer without text"):
        rewards.score(served("rubric", url), greys(1), ["a"])


def test_a_server_cannot_echo_prompts():
    with pytest.raises(rewards.RewardError, match="reward 'prompt_echo': a server cannot tell how likely"):
        served("prompt_echo", "http://localhost:1/v1")
    with pytest.raises(VLMError, match="can only answer"):
        served("yes_no", "http://localhost:1/v1").vlm.continuation_log_prob([], "Describe.", [])
