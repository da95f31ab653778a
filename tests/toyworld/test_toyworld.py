"""The embedded world: its pictures, its prompts, its exact judge, and the making of its model."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowalign.disk.assets import asset
from flowalign.rollout.prompts import BUNDLED, load_prompts
from flowalign.toyworld import grammar
from flowalign.toyworld.detector import ExactDetector, detect
from flowalign.toyworld.making.pretraining import MAX_TOKENS, make_tokenizer, train_transformer, write_prompts
from flowalign.toyworld.render import PALETTE, SHAPES, SIZE, Item, Scene, render
from rewards.geneval import TASKS, judge
from rewards.ocr import quoted_text


def scenes_of(task, count, seed=0):
    """`count` prompts of a task, spread over all of them, with a true scene each."""
    rng = np.random.default_rng([seed, TASKS.index(task)])
    prompts = grammar.task_prompts(task)
    for index in range(count):
        metadata = prompts[index * len(prompts) // count]
        yield metadata, grammar.shape_scene(metadata, rng)


def items_of(detections):
    """What was seen, without where."""
    return Counter((detection["class"], detection["color"]) for detection in detections)


def exact_detections(scene):
    return [{"class": item.shape, "box": list(item.box), "score": 1.0, "color": item.color} for item in scene.items]


# The judge


def test_the_detector_finds_the_classes_and_colours_in_nearly_all_images():
    wrong, total = [], 0
    for task in TASKS:
        for metadata, scene in scenes_of(task, 100):
            total += 1
            if items_of(detect(render(scene))) != items_of(exact_detections(scene)):
                wrong.append((metadata["prompt"], scene))
    assert len(wrong) <= 0.005 * total, wrong


@pytest.mark.parametrize("task", TASKS)
def test_nearly_all_images_of_a_prompt_are_judged_correct(task):
    verdicts = [judge(detect(render(scene)), metadata).correct for metadata, scene in scenes_of(task, 60, seed=1)]
    assert verdicts.count(False) <= 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", PALETTE)
def test_a_box_is_found_within_two_pixels(shape, color):
    item = Item(shape, color, 20, 13, 24)
    (found,) = detect(render(Scene(items=(item,))))
    assert (found["class"], found["color"]) == (shape, color)
    assert np.abs(np.subtract(found["box"], item.box)).max() <= 2


def test_an_empty_image_and_a_sign_hold_no_shapes_of_the_palette():
    assert detect(render(Scene())) == []
    signs = [grammar.sign_scene(["CAT", "MOON"], np.random.default_rng(seed)) for seed in range(20)]
    assert sum(len(detect(render(scene))) for scene in signs) <= 10  # an O is nearly a black ring


def test_the_detector_takes_batches_of_tensors():
    scenes = [scene for _, scene in scenes_of("color_attr", 5)]
    pictures = [render(scene) for scene in scenes]
    media = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    assert ExactDetector()(media) == [detect(picture) for picture in pictures]


# Pictures


@given(st.sampled_from(TASKS), st.integers(0, 2**32))
def test_a_scene_is_always_drawn_the_same_and_the_seed_decides_the_scene(task, seed):
    metadata = grammar.task_prompts(task)[seed % len(grammar.task_prompts(task))]
    first, second = (grammar.shape_scene(metadata, np.random.default_rng(seed)) for _ in range(2))
    assert first == second
    picture = render(first)
    assert picture.shape == (SIZE, SIZE, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, render(second))


@given(st.integers(0, 2**32))
def test_a_sign_is_drawn_whole_and_always_the_same(seed):
    lines = grammar.random_lines(np.random.default_rng(seed), grammar.words(held_out=False))
    first, second = (render(grammar.sign_scene(lines, np.random.default_rng(seed))) for _ in range(2))
    assert np.array_equal(first, second)
    assert first[0].min() > 200  # no ink on the border
    assert first[-1].min() > 200
    assert first.min() < 120


@pytest.mark.parametrize("item", [Item("square", "blue", 10, 20, 16), Item("diamond", "red", 2, 2, 30)])
def test_a_shape_has_its_colour_inside_and_the_background_outside(item):
    picture = render(Scene(items=(item,), background=((240.0,) * 3, (240.0,) * 3)))
    x0, y0, x1, y1 = item.box
    assert tuple(picture[(y0 + y1) // 2, (x0 + x1) // 2]) == PALETTE[item.color]
    outside = np.ones((SIZE, SIZE), dtype=bool)
    outside[y0:y1, x0:x1] = False
    assert (picture[outside] == 240).all()


# Prompts


@pytest.mark.parametrize("task", TASKS)
def test_every_prompt_has_a_scene_that_the_judge_accepts(task):
    rng = np.random.default_rng(0)
    for metadata in grammar.task_prompts(task):
        scene = grammar.shape_scene(metadata, rng)
        assert judge(exact_detections(scene), metadata) == (True, ""), metadata
        for item in scene.items:
            assert item.shape in metadata["prompt"]
            assert min(item.box) >= 0
            assert max(item.box) <= SIZE
        for color in (clause["color"] for clause in metadata["include"] if "color" in clause):
            assert color in metadata["prompt"]


def test_no_two_prompts_of_the_grammar_are_the_same():
    prompts = [row["prompt"] for task in TASKS for row in grammar.task_prompts(task)]
    assert len(prompts) == len(set(prompts))


def test_an_unknown_task_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown GenEval task 'colour'; the tasks are single_object, two_object"):
        grammar.task_prompts("colour")


def test_the_bundled_lists_are_those_that_the_code_writes(tmp_path):
    write_prompts(tmp_path)
    for name in (name for name in BUNDLED.values() if name.startswith("toyworld/")):
        bundled = asset(name)
        assert (tmp_path / bundled.name).read_text() == bundled.read_text()


@pytest.mark.parametrize("kind", ["words", "shapes"])
def test_training_and_held_out_prompts_are_disjoint(kind):
    train, test = ({row.prompt for row in load_prompts(f"toyworld/{kind}_{side}")} for side in ("train", "test"))
    assert train
    assert test
    assert not train & test


@pytest.mark.parametrize("held_out", [False, True])
def test_lists_of_shapes_hold_equally_many_rows_of_every_task(held_out):
    rows = load_prompts(f"toyworld/shapes_{'test' if held_out else 'train'}")
    counts = Counter(row.metadata["tag"] for row in rows)
    assert set(counts) == set(TASKS)
    assert len(set(counts.values())) == 1


def test_no_training_sign_has_a_held_out_word():
    train, test = (
        {word for row in load_prompts(f"toyworld/words_{side}") for word in quoted_text(row.prompt).split()}
        for side in ("train", "test")
    )
    assert not train & test
    assert train <= set(grammar.words(held_out=False))
    assert test <= set(grammar.words(held_out=True))
    assert not set(grammar.words(held_out=False)) & set(grammar.words(held_out=True))


# The tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def all_prompts():
    """All prompts of the grammar's tasks, and the longest signs."""
    shapes = [row["prompt"] for task in TASKS for row in grammar.task_prompts(task)]
    pool = grammar.words(held_out=False) + grammar.words(held_out=True)
    longest = max(pool, key=len)
    return [*shapes, *(grammar.sign_prompt([word, longest]) for word in pool), grammar.sign_prompt(["ABCDE", "VWXYZ"])]


def test_letters_and_the_gap_between_two_words_are_tokens(tokenizer):
    words = ["a", "sign", "that", "says", '"']
    assert tokenizer.tokenize(grammar.sign_prompt(["CAT"])) == [*words, "C", "A", "T", '"']
    assert tokenizer.tokenize(grammar.sign_prompt(["CAT", "DO"])) == [*words, "C", "A", "T", " ", "D", "O", '"']
    assert tokenizer.tokenize("a photo of a red ring") == ["a", "photo", "of", "a", "red", "ring"]


@given(st.lists(st.text(grammar.LETTERS, min_size=1, max_size=5), min_size=1, max_size=2))
def test_different_signs_have_different_tokens_that_spell_them(tokenizer, lines):
    tokens = tokenizer.tokenize(grammar.sign_prompt(lines))
    assert "".join(tokens[5:-1]) == " ".join(lines)


def test_the_tokenizer_knows_every_prompt_of_the_grammar_and_none_is_too_long(tokenizer):
    for prompt in all_prompts():
        ids = tokenizer(prompt).input_ids
        assert tokenizer.unk_token_id not in ids, prompt
        assert len(ids) <= MAX_TOKENS, prompt
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


# Pretraining


def cached_latents(tokenizer):
    """What the cache of latents holds: 24 of them with the tokens of shapes, of one word and of two."""
    prompts = ["a photo of a red ring", grammar.sign_prompt(["CAT"]), grammar.sign_prompt(["CAT", "DOG"])] * 8
    ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    latents = torch.randn(24, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return latents.half(), ids.to(torch.uint8)


@pytest.mark.slow
def test_a_killed_pretraining_resumes_to_the_same_weights(tmp_path, tokenizer):
    data = cached_latents(tokenizer)

    def train(folder, steps):
        folder.mkdir(exist_ok=True)
        # So few steps are all warm-up: the learning rate does not know how many are to come.
        parts = train_transformer(folder, data, tokenizer, seed=3, steps=steps, batch=4, decay=0.1, log=print)
        return [part.state_dict() for part in parts]

    unbroken = train(tmp_path / "unbroken", 3)
    killed = train(tmp_path / "killed", 2)
    resumed = train(tmp_path / "killed", 3)
    for whole, half, again in zip(unbroken, killed, resumed, strict=True):
        assert whole.keys() == again.keys()
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        assert any(not torch.equal(whole[name], half[name]) for name in whole)
