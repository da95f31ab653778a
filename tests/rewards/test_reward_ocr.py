"""The OCR reward: the score of what was read, and the reading itself by the real engine."""

import json
import logging
import random
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import rapidocr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

import rewards
from flowalign.rollout.prompts import Row
from flowalign.score import check_prompts
from rewards import RewardError
from rewards.combine import score_all
from rewards.detectors.ocr_engine import ink_lines
from rewards.detectors.quotes import plain
from rewards.ocr import OCR, quoted_text, text_score

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"

# Without words that the engine's model mistakes in this font and spacing: O for 0 and I for 1 in some of them.
WORDS = [
    "CAT",
    "DOG",
    "SUN",
    "OPEN",
    "SALE",
    "EXIT",
    "STOP",
    "PARK",
    "MOON",
    "FISH",
    "BREAD",
    "HOUSE",
    "APPLE",
    "WATER",
]

# Without what joins the letter before it, and without the marks of inches and backslashes before a quote.
letters = st.characters(max_codepoint=0x10FF, exclude_characters='"\\', exclude_categories=["Cs", "M"])
texts = st.text(letters, max_size=12)
quotable = texts.filter(plain)


# The score of what was read


def test_scores_agree_with_the_published_ones(shared):
    for case in json.loads((shared / "golden" / "ocr_score.json").read_text()):
        assert text_score(case["prompt"], case["recognised_lines"]) == case["score"], case


def test_every_published_prompt_quotes_a_text(shared):
    prompts = (shared / "data" / "ocr_prompts.txt").read_text().splitlines()
    assert all(quoted_text(prompt) for prompt in prompts)


@given(quotable, st.lists(texts, max_size=4), st.booleans())
def test_a_score_lies_between_zero_and_one(target, lines, strict):
    assert 0 <= text_score(f'a sign that says "{target}"', lines, strict=strict) <= 1


@given(quotable, st.lists(st.integers(0, 12), max_size=3), st.booleans())
def test_the_exact_text_scores_one_in_any_division_into_lines(target, breaks, strict):
    cuts = sorted({0, len(target), *(min(cut, len(target)) for cut in breaks)})
    lines = [target[start:end] for start, end in pairwise(cuts)]
    assert text_score(f'"{target}" on a wall', lines, strict=strict) == 1


@given(quotable, texts, texts)
def test_text_around_the_wanted_text_lowers_only_the_strict_score(target, before, after):
    prompt, lines = f'a sign that says "{target}"', [before, target, after]
    assert text_score(prompt, lines) == 1
    wanted, extra = (len(plain(text)) for text in (target, before + after))
    assert text_score(prompt, lines, strict=True) == pytest.approx(1 - min(extra, wanted) / wanted)


@pytest.mark.parametrize(
    ("prompt", "lines", "score"),
    [
        ('"SALE"', [], 0),
        ('"SALE"', ["S A", "le"], 1),
        ('"SALE"', ["\uff33\uff21\uff2c\uff25"], 1),
        ('"SALE"', ["SALT"], 0.75),
        ('"SALE"', ["ZZZZZZZZZZ"], 0),
        ("a “SALE”", ["sale"], 1),
        ("a “don’t walk”", ["DON'T", "WALK"], 1),
        ("a “Cafe\u0301\u00a0Noir”", ["Café\u3000noir"], 1),
    ],
)
def test_the_quoted_text_is_compared_in_its_plain_form(prompt, lines, score):
    assert text_score(prompt, lines) == score


@pytest.mark.parametrize(
    ("lines", "loose", "strict"),
    [
        (["SALE", "OFF"], 1, 1),
        (["OFF", "SALE"], 1, 1),
        (["SALE"], 4 / 7, 4 / 7),
        (["OFF"], 3 / 7, 3 / 7),
        (["SALE", "OF"], 6 / 7, 6 / 7),
        (["OX", "SALT"], 4 / 7, 4 / 7),
        (["SALE", "NOW", "OFF"], 1, 4 / 7),
        ([], 0, 0),
    ],
)
def test_all_quoted_texts_are_wanted_in_any_order(lines, loose, strict):
    prompt = 'one sign says "SALE", one says "OFF"'
    assert text_score(prompt, lines) == pytest.approx(loose)
    assert text_score(prompt, lines, strict=True) == pytest.approx(strict)


def test_a_letter_counts_for_one_text_only():
    assert text_score('a "CATALOG" about a "CAT"', ["CATALOG"]) == pytest.approx(7 / 10)


@pytest.mark.parametrize("prompt", ["a sign", "", 'a sign that says "CAT', '""', 'a sign that says "  "', 'a 12" disc'])
def test_a_prompt_that_quotes_no_text_is_an_error_that_names_it(prompt):
    with pytest.raises(RewardError, match=r"'ocr': the prompt .* has no text in quotes") as caught:
        text_score(prompt, ["CAT"])
    assert repr(prompt) in str(caught.value)


# Finding the lines of a small picture


def mask(*rows):
    ink = np.zeros((40, 40), dtype=bool)
    for top, bottom, left, right in rows:
        ink[top:bottom, left:right] = True
    return ink


def test_lines_are_parted_by_rows_without_ink_and_keep_a_margin():
    assert ink_lines(mask((8, 17, 10, 30), (22, 31, 5, 20))) == [(5, 20, 7, 33), (19, 34, 2, 23)]


def test_margins_stop_at_the_neighbouring_line():
    assert ink_lines(mask((8, 17, 10, 30), (18, 27, 10, 30))) == [(5, 18, 7, 33), (17, 30, 7, 33)]


def test_dots_and_accents_belong_to_their_line():
    dots_of_the_second_line = (20, 22, 12, 14)
    found = ink_lines(mask((8, 17, 10, 30), dots_of_the_second_line, (24, 31, 10, 30)))
    assert [(top, bottom) for top, bottom, _, _ in found] == [(5, 20), (17, 34)]


def test_a_speck_and_an_empty_mask_give_no_line():
    assert ink_lines(mask((8, 17, 10, 30), (36, 38, 2, 4))) == ink_lines(mask((8, 17, 10, 30)))
    assert ink_lines(mask()) == []


@given(st.lists(st.tuples(st.integers(6, 9), st.integers(4, 8)), min_size=1, max_size=5), st.integers(0, 30))
def test_every_line_of_similar_height_is_found(lines, left):
    ink, top, tops = np.zeros((100, 40), dtype=bool), 3, []
    for height, gap in lines:
        ink[top : top + height, left : left + 10] = True
        tops.append(top - 3 if not tops else max(top - 3, tops[-1]))
        top += height + gap
    assert [box[0] for box in ink_lines(ink)] == tops


# Reading


@pytest.fixture(scope="module")
def lines_reward():
    return rewards.load("ocr", mode="lines", threads=2)


@pytest.fixture(scope="module")
def page_reward():
    return rewards.load("ocr", threads=2)


def quoting(lines):
    return f'a sign that says "{" ".join(lines)}"'


@pytest.mark.parametrize("count", [1, 2])
def test_clean_signs_are_read_right(lines_reward, sign, count):
    draw = random.Random(count)
    texts = [[draw.choice(WORDS) for _ in range(count)] for _ in range(40)]
    colours = [
        {"ink": tuple(draw.randint(0, 110) for _ in "rgb"), "background": tuple(draw.randint(205, 255) for _ in "rgb")}
        for _ in texts
    ]
    media = torch.stack([sign(text, **colour) for text, colour in zip(texts, colours, strict=True)])
    scores = rewards.score(lines_reward, media, [quoting(text) for text in texts])
    wrong = [(text, read) for text, read, s in zip(texts, lines_reward.read(media), scores, strict=True) if s < 1]
    assert not wrong


def test_letters_with_dots_and_longer_lines_are_read_too(lines_reward, page):
    wide = torch.stack([page(["jumping"], size=20), page(["Mind the Gap", "at 20:26"], size=24)])
    assert ["".join(lines).replace(" ", "") for lines in lines_reward.read(wide)] == ["jumping", "MindtheGapat20:26"]


def test_ink_may_be_lighter_than_the_background_and_touch_the_edge(lines_reward, sign):
    inverted = 1 - sign(["MOON"])
    cut = sign(["MOON"])[:, 24:, :].roll(-2, 1)
    assert [line.upper() for line in lines_reward.read(inverted[None])[0]] == ["MOON"]
    assert [line.replace(" ", "").upper() for line in lines_reward.read(cut[None])[0]] == ["MOON"]


def test_an_image_without_ink_has_no_lines_and_scores_zero(lines_reward, sign):
    media = torch.stack([sign([]), torch.zeros(3, 64, 64), sign(["CAT"])])
    assert lines_reward.read(media)[:2] == [[], []]
    assert rewards.score(lines_reward, media, ['"CAT"'] * 3).tolist() == [0, 0, 1]


@settings(max_examples=6, deadline=None)
@given(st.permutations(range(8)), st.integers(1, 9))
def test_neither_order_nor_batch_size_changes_what_is_read(lines_reward, sign, order, batch_size):
    texts = [["SUN"], ["OPEN", "KEY"], [], ["Q"], ["WATER"], ["HOUSE", "TRAIN"], ["X", "APPLE"], ["TIGER"]]
    media = torch.stack([sign(text) for text in texts])
    whole = lines_reward.read(media)
    usual, lines_reward.reader.batch_size = lines_reward.reader.batch_size, batch_size
    try:
        assert lines_reward.read(media[list(order)]) == [whole[index] for index in order]
    finally:
        lines_reward.reader.batch_size = usual


def test_whole_pages_are_read_from_top_to_bottom(page_reward, page):
    media = torch.stack([page(["NO PARKING"]), page(["Mind the", "Gap 2026"]), page([])])
    assert page_reward.read(media) == [["NO PARKING"], ["Mind the", "Gap 2026"], []]


@pytest.mark.parametrize(("side", "tilt"), [(384, 8), (768, 2)])
def test_tilted_words_are_read_in_order(page_reward, side, tilt):
    picture, size = Image.new("RGB", (side, side), (235, 230, 220)), side // 14
    font = ImageFont.truetype(FONT, size)
    for row, (left, right) in enumerate([("LEFT", "RIGHT"), ("UP", "DOWN")]):
        for word, place in ((left, 0.25), (right, 0.75)):
            at = (place * side, side / 2 + (1.5 * row - 0.75) * size)
            ImageDraw.Draw(picture).text(at, word, (20, 30, 90), font, anchor="mm")
    turned = np.array(picture.rotate(tilt, Image.Resampling.BICUBIC, fillcolor=(235, 230, 220)))
    media = torch.from_numpy(turned).permute(2, 0, 1)[None] / 255
    assert page_reward.read(media) == [["LEFT", "RIGHT", "UP", "DOWN"]]


def test_lines_mode_warns_once_that_it_cannot_read_photographs(lines_reward, sign, caplog):
    noisy = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    lines_reward.reader.warned = False
    lines_reward.read(torch.stack([sign(["CAT", "APPLE"]), sign([]), 1 - sign(["WATER"])]))
    assert not caplog.records
    lines_reward.read(noisy)
    lines_reward.read(noisy)
    assert [record.getMessage() for record in caplog.records] == [
        "reward 'ocr': mode lines reads only words on a plain background, which 3 of 3 images do not have; "
        "what it reads in them is chance: use mode page"
    ]


def test_strict_lowers_the_score_for_extra_text(sign):
    media = torch.stack([sign(["OPEN", "SALE"])])
    loose, strict = (rewards.load("ocr", mode="lines", strict=strict) for strict in (False, True))
    assert rewards.score(loose, media, ['"SALE"']).item() == 1
    assert rewards.score(strict, media, ['"SALE"']).item() == 0
    assert rewards.score(strict, media, ['"OPEN SALE"']).item() == 1


@pytest.mark.parametrize(("frames", "score"), [(1, 1), (2, 0.5), (3, 1 / 3), (6, 2 / 6), (99, 2 / 6)])
def test_a_video_scores_the_mean_over_evenly_spaced_frames(sign, frames, score):
    blank, text = sign([]), sign(["CAT"])
    video = torch.stack([blank, blank, blank, text, text, blank])
    reward = rewards.load("ocr", mode="lines", frames=frames)
    scores = rewards.score(reward, torch.stack([video, blank.expand_as(video)]), ['"CAT"', '"CAT"'])
    assert scores.tolist() == pytest.approx([score, 0])


# Letters that the recogniser does not know


CYRILLIC = str.maketrans("STOP", "\u0421\u0422\u041e\u041f")


@pytest.fixture(scope="module")
def cyrillic_reward(tmp_path_factory):
    """A custom recogniser: a model and a list of its characters, four of which are Cyrillic."""
    folder = tmp_path_factory.mktemp("recogniser")
    model = next((Path(rapidocr.__file__).parent / "models").glob("*rec*.onnx"))
    (folder / "mine.onnx").symlink_to(model)
    known = OCR("lines", threads=1).reader.recogniser.postprocess_op.character[1:-1]
    (folder / "keys.txt").write_text("".join(f"{letter.translate(CYRILLIC)}\n" for letter in known), "utf-8")
    return rewards.load("ocr", mode="lines", recogniser=str(folder / "mine.onnx"), keys=str(folder / "keys.txt"))


def test_a_text_with_unknown_letters_is_refused_by_name_before_any_image_is_read(lines_reward, sign):
    prompt = f'a sign that says "{"STOP".translate(CYRILLIC)}"'
    words = r"does not know \u0441 \u0442 \u043e \u043f and cannot read.*option recogniser"
    for ask in (
        lambda: lines_reward.applies_to({"prompt": prompt}),
        lambda: rewards.score(lines_reward, sign(["STOP"])[None], [prompt]),
        lambda: check_prompts([Row(0, prompt)], {"ocr": lines_reward, "other": lines_reward}, "mine.txt"),
    ):
        with pytest.raises(RewardError, match=words) as caught:
            ask()
        assert repr(prompt) in str(caught.value)


def test_another_recogniser_reads_its_own_characters(cyrillic_reward, sign):
    prompt = f'a sign that says "{"STOP".translate(CYRILLIC)}"'
    assert cyrillic_reward.applies_to({"prompt": prompt})
    assert rewards.score(cyrillic_reward, sign(["STOP"])[None], [prompt]).item() == 1


def test_whole_quoted_prompts_quote_no_text(lines_reward):
    assert not lines_reward.applies_to({"prompt": '"a cat on a mat"'})
    assert lines_reward.applies_to({"prompt": '"a sign that says ""OPEN"""'})


# What goes wrong


def test_a_prompt_without_quotes_is_an_error_for_ocr_alone_and_is_left_to_other_rewards(lines_reward, sign):
    media, prompts = torch.stack([sign(["CAT"]), sign(["DOG"])]), ['a "CAT"', "a dog"]
    with pytest.raises(RewardError, match="'a dog'"):
        rewards.score(lines_reward, media, prompts)
    with pytest.raises(RewardError, match="'a dog'"):
        score_all({"ocr": lines_reward}, media, prompts)
    flat = rewards.as_reward(lambda media, prompts, metadata: [0.5] * len(prompts))
    scores = score_all({"ocr": lines_reward, "flat": flat}, media, prompts)["ocr"]
    assert scores.values.tolist() == [1, 0] and scores.applies.tolist() == [True, False]


def test_a_failing_engine_is_an_error_that_names_the_image(sign, monkeypatch):
    media = torch.stack([sign([]), sign(["CAT"]), sign(["DOG"])])

    def out_of_memory(*args, **kwargs):
        raise MemoryError("no room")

    lines = OCR("lines", batch_size=1)
    monkeypatch.setattr(lines.reader.recogniser, "session", out_of_memory)
    with pytest.raises(RewardError, match=r"'ocr': the engine failed on .*image 1: MemoryError: no room"):
        rewards.score(lines, media, ['"CAT"'] * 3)
    page = OCR("page")
    for engine in page.reader.engines:
        monkeypatch.setattr(engine, "detect_and_crop", out_of_memory)
    with pytest.raises(RewardError, match="'ocr': the engine failed on image 0: MemoryError: no room"):
        rewards.score(page, media, ['"CAT"'] * 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "line"}, "mode must be one of page, lines, not 'line'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"threads": -1}, "threads must be at least 1"),
        ({"frames": 0}, "frames must be at least 1"),
        ({"recogniser": "cyrilic"}, r"'cyrilic' is neither .* did you mean 'cyrillic'\? \(known: arabic, .*korean"),
        ({"recogniser": "none.onnx"}, r"'none.onnx' is neither .*; there is no such file"),
        ({"recogniser": __file__}, r"recogniser .*test_reward_ocr.py cannot be loaded: "),
        ({"keys": "none.txt"}, "keys none.txt cannot be loaded: FileNotFoundError"),
        ({"keys": __file__}, r"keys .* has \d+ lines, but the recogniser knows 18708 characters"),
    ],
)
def test_a_wrong_setting_is_named(options, words):
    with pytest.raises(RewardError, match=words):
        rewards.load("ocr", **options)


def test_only_images_can_be_read(lines_reward):
    with pytest.raises(RewardError, match=r"not shape \(1, 2, 3, 64, 64\)"):
        lines_reward.read(torch.zeros(1, 2, 3, 64, 64))


def test_the_engine_logs_nothing_and_leaves_the_root_logger_unchanged(page, capfd):
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    reward = rewards.load("ocr", threads=1)
    assert reward.read(page([])[None]) == [[]]
    assert (root.level, list(root.handlers)) == before
    assert capfd.readouterr() == ("", "")
