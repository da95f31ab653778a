"""Prompt lists, and which of their prompts a training step takes."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowalign.data import BUNDLED, Row, load_prompts, step_rows
from flowalign.settings import UserError

GENEVAL_ROW = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}


@pytest.fixture
def write(tmp_path):
    """Writes a file of this name and gives its path as text."""

    def _write(name, text):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return _write


def rows(count):
    return [Row(index, f"prompt {index}") for index in range(count)]


# Files


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_text_file_has_a_prompt_a_line(write, end):
    path = write("a.txt", 'a sign that says "CAT"\n  a dog \nein Häuschen' + end)
    assert load_prompts(path) == [Row(0, 'a sign that says "CAT"'), Row(1, "a dog"), Row(2, "ein Häuschen")]


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_jsonl_file_gives_metadata_beside_the_prompt(write, end):
    path = write("a.jsonl", json.dumps(GENEVAL_ROW) + '\n{"prompt": "plain"}' + end)
    first, second = load_prompts(path)
    assert first == Row(0, "a photo of a bench", {"tag": "single_object", "include": [{"class": "bench", "count": 1}]})
    assert second == Row(1, "plain")


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1, max_size=5)
)
def test_any_prompt_survives_a_jsonl_file(tmp_path_factory, prompts):
    path = tmp_path_factory.mktemp("prompts") / "a.jsonl"
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert [row.prompt for row in load_prompts(str(path))] == prompts


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("form", ["{}\r\n{}\r\n", "\ufeff{}\n{}\n"], ids=["carriage returns", "byte order mark"])
def test_files_written_on_windows_read_the_same(write, name, form):
    lines = ["a cat", "a dog"] if name == "a.txt" else ['{"prompt": "a cat"}', '{"prompt": "a dog"}']
    assert [row.prompt for row in load_prompts(write(name, form.format(*lines)))] == ["a cat", "a dog"]


def test_several_lists_are_one_with_continuing_indices(write):
    paths = [write("a.txt", "one\ntwo\nthree\n"), write("b.jsonl", '{"prompt": "four"}\n{"prompt": "five"}\n')]
    assert [(row.index, row.prompt) for row in load_prompts(paths)] == list(
        enumerate(["one", "two", "three", "four", "five"])
    )


def test_a_count_takes_the_first_of_each_list(write):
    paths = [write("a.txt", "one\ntwo\nthree\n"), write("b.txt", "four\n"), write("c.txt", "five\nsix\nseven\n")]
    assert [(row.index, row.prompt) for row in load_prompts(paths, count=2)] == list(
        enumerate(["one", "two", "four", "five", "six"])
    )


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_lists_load_by_name(name):
    loaded = load_prompts(name)
    assert [row.index for row in loaded] == list(range(len(loaded)))
    assert all("include" in row.metadata for row in loaded) == ("shapes" in name or name == "geneval")


# Mistakes


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', r"a\.jsonl, line 2: not JSON: .* at column \d+"),
        ("a.jsonl", '{"prompt": "a"}\nplain text\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"}\n', r"a\.jsonl, line 2: the line is empty"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', r'a\.jsonl, line 2: needs a mapping with a "prompt" of text'),
        ("a.jsonl", '{"prompt": 3}\n', r'a\.jsonl, line 1: needs a mapping with a "prompt" of text'),
        ("a.jsonl", '{"prompt": "  "}\n', r'a\.jsonl, line 1: needs a mapping with a "prompt" of text'),
        ("a.jsonl", '["a"]\n', r'a\.jsonl, line 1: needs a mapping with a "prompt" of text'),
        ("a.txt", "a\n\nb\n", r"a\.txt, line 2: the line is empty; remove it or write a prompt"),
        ("a.txt", "a\nb\n  \n", r"a\.txt, line 3: the line is empty"),
        ("a.txt", "", r"a\.txt' is empty; it needs a prompt a line"),
        ("a.txt", "\n \n", r"a\.txt' is empty"),
        ("a.jsonl", "", r"a\.jsonl' is empty"),
        ("a.csv", "a\n", r"a\.csv': use a \.txt or \.jsonl file, or one of toyworld/words_train"),
        ("a.txt", b"\xff\xfe\x00\x01", r"a\.txt' cannot be read"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence_with_its_place(write, name, text, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        load_prompts(write(name, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name}' cannot be read: .*No such file"):
        load_prompts(str(tmp_path / name))


def test_a_misspelt_bundled_name_is_answered_with_the_bundled_ones():
    with pytest.raises(UserError, match=r"'toyworld/word_train': .*toyworld/words_train, toyworld/words_test"):
        load_prompts("toyworld/word_train")


# Steps

lists = st.integers(1, 40)
steps = st.integers(0, 200)


@given(lists, st.data(), st.integers(0, 10), steps)
def test_a_step_takes_different_prompts_of_the_list(length, data, seed, step):
    count = data.draw(st.integers(1, length))
    chosen = step_rows(rows(length), count, seed, step)
    assert len(chosen) == len({row.index for row in chosen}) == count
    assert {row.index for row in chosen} <= set(range(length))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10), st.integers(1, 4))
def test_every_prompt_is_seen_equally_often_over_whole_turns(count, parts, seed, turns):
    seen = Counter(
        row.index for step in range(parts * turns) for row in step_rows(rows(count * parts), count, seed, step)
    )
    assert seen == dict.fromkeys(range(count * parts), turns)


@given(lists, st.data(), st.integers(0, 10), st.integers(0, 5))
def test_no_prompt_comes_twice_in_a_turn_that_leaves_some_over(length, data, seed, turn):
    count = data.draw(st.integers(1, length))
    per_turn = length // count
    seen = [
        row.index
        for step in range(turn * per_turn, (turn + 1) * per_turn)
        for row in step_rows(rows(length), count, seed, step)
    ]
    assert len(seen) == len(set(seen)) == per_turn * count


def test_prompts_left_over_in_one_turn_come_in_others():
    seen = {row.index for step in range(60) for row in step_rows(rows(7), 3, 0, step)}
    assert seen == set(range(7))


@given(st.integers(0, 10), st.lists(steps, min_size=1, max_size=5))
def test_a_step_depends_on_its_seed_and_number_alone(seed, order):
    alone = {step: step_rows(rows(12), 5, seed, step) for step in sorted(set(order))}
    assert [step_rows(rows(12), 5, seed, step) for step in order] == [alone[step] for step in order]


def test_turns_and_seeds_have_orders_of_their_own():
    def turn(seed, number):
        return [row.index for step in (2 * number, 2 * number + 1) for row in step_rows(rows(20), 10, seed, step)]

    assert turn(0, 0) != turn(0, 1)
    assert turn(0, 0) != turn(1, 0)


def test_a_list_shorter_than_a_step_is_refused():
    with pytest.raises(UserError, match=r"train\.prompts_per_step \(4\) exceeds the 3 prompts of the list"):
        step_rows(rows(3), 4, 0, 0)
