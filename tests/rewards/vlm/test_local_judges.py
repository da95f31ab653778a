"""Local vision-language judges: a batch is judged as its rows alone, by tiny models of real classes; how they load."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import rewards
from rewards.vlm.base import Unfinished, VLMError, final
from rewards.vlm.local import PADDED, LocalVLM

YES = ("Yes", "yes", "YES", " Yes", " yes", " YES")
NO = ("No", "no", "NO", " No", " no", " NO")
CHAT = "<|im_start|>user\n{image}{text}<|im_end|>\n<|im_start|>assistant\n"
QUICK = (
    "aya_vision",
    "internvl",
    "lfm2_vl",
    "llava",
    "qwen2_5_vl",
)  # among them those whose processor pads on the left


@pytest.fixture
def qwen(tiny_judge):
    return str(tiny_judge("qwen2_5_vl"))


@pytest.fixture(
    params=[
        *QUICK,
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in sorted({*PADDED, "mllama"} - {*QUICK})),
    ]
)
def tiny(request, tiny_judge):
    return str(tiny_judge(request.param))


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


def test_questions_to_an_unknown_model_type_share_a_batch_only_without_padding(tiny_judge, monkeypatch):
    vlm = LocalVLM(str(tiny_judge("llava")), batch_size=3)
    vlm.pads = False
    seen, inputs_of = [], vlm._inputs
    monkeypatch.setattr(vlm, "_inputs", lambda *given: seen.append(inputs_of(*given)) or seen[-1])
    small, wide = [picture(16, 16, 0)], [picture(16, 24, 1)]
    images, texts = [small, wide, small, wide, small, small], ["a?", "a?", "b?", "longer?", "c?", "d?"]
    found = vlm.choice_log_probs(images, texts, ("Yes", "No"))
    assert [len(inputs["input_ids"]) for inputs in seen] == [3, 1, 1, 1]
    assert all(inputs["attention_mask"].all() for inputs in seen)
    alone = [vlm.choice_log_probs([i], [t], ("Yes", "No")) for i, t in zip(images, texts, strict=True)]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-4, rtol=0)


def test_an_answer_takes_the_likeliest_token_at_every_step(qwen):
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


def test_an_answer_that_reaches_its_limit_is_unfinished(qwen):
    vlm, question = LocalVLM(qwen), ([[picture(24, 32, 0)]], ["Is it?"])
    (cut,) = vlm.answer(*question, 3)
    assert isinstance(cut, Unfinished) and final(cut) is None
    tokens = vlm.processor.tokenizer(cut, add_special_tokens=False).input_ids
    ends, vlm.model.generation_config.eos_token_id = vlm.model.generation_config.eos_token_id, [tokens[-1]]
    (whole,) = vlm.answer(*question, 3)
    vlm.model.generation_config.eos_token_id = ends
    assert whole == cut and final(whole) == whole.strip()


def test_thinking_sets_the_switch_in_the_chat_template(qwen):
    image, text = [[picture(16, 16, 0)]], ["Is it?"]
    plain, without, reasoning = (LocalVLM(qwen, thinking=thinking) for thinking in (None, False, True))
    assert without._chats(image, text)[0].endswith("</think>\n\n")
    assert torch.isfinite(without.choice_log_probs(image, text, ("Yes", "No"))).all()
    assert not torch.equal(*(vlm.choice_log_probs(image, text, ("Yes",)) for vlm in (plain, without)))
    with pytest.raises(VLMError, match=r"begins every answer with <think>, .*; try `thinking: false`"):
        reasoning.choice_log_probs(image, text, ("Yes", "No"))
    with pytest.raises(VLMError, match="begins every answer with <think>"):
        reasoning.continuation_log_prob(image, "Describe.", ["a star"])
    assert reasoning.answer(image, text, 2)[0].startswith("<think>")
    assert LocalVLM(qwen, template={"enable_thinking": False})._chats(image, text) == without._chats(image, text)


def test_a_switch_that_the_chat_template_lacks_is_refused(qwen, tmp_path):
    shutil.copytree(qwen, tmp_path / "model")
    file = tmp_path / "model" / "chat_template.jinja"
    file.write_text(file.read_text().replace("enable_thinking", "other"))
    with pytest.raises(VLMError, match="has no switch 'enable_thinking' or 'thinking'; leave it out"):
        LocalVLM(str(tmp_path / "model"), thinking=False)
    with pytest.raises(VLMError, match="does not know 'budget'"):
        LocalVLM(qwen, template={"budget": 0})
    with pytest.raises(VLMError, match="thinking must be true or false, not 'off'"):
        LocalVLM(qwen, thinking="off")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights, name: weights.pop(name), "the weights lack .*layers.1.mlp.up_proj.weight"),
        (lambda weights, name: weights.update({name: weights[name][:8]}), "layers.1.mlp.up_proj.weight"),
        (
            lambda weights, name: weights.update({name.replace(".1.", ".2."): weights[name].clone()}),
            "more layers than the configuration says, such as .*layers.2.mlp.up_proj.weight",
        ),
    ],
    ids=["lacking", "of another shape", "of more layers"],
)
def test_weights_that_are_not_the_whole_model_are_refused_by_name(qwen, tmp_path, change, message):
    shutil.copytree(qwen, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    change(weights, next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight")))
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        rewards.RewardError, match=rf"reward 'yes_no': the model .* cannot be loaded: .*{message}"
    ) as caught:
        rewards.load("yes_no", model=str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_rewards_with_the_same_model_load_it_once(qwen):
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


def test_an_empty_prompt_has_no_echo(qwen):
    reward = rewards.load("prompt_echo", model=qwen)
    with pytest.raises(rewards.RewardError, match=r"^reward 'prompt_echo': item 1 .''.: a text without tokens"):
        rewards.score(reward, media_of(picture(8, 8, 0), picture(8, 8, 1)), ["a", ""])
