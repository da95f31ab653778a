"""Prompt lists, and the choice of a training step's prompts."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowalign.config.base import UserError
from flowalign.rollout.prompts import BUNDLED, Row, load_prompts, step_rows

GENEVAL_ROW = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}


@pytest.fixture
def write(tmp_path):
    """Writes a file of a name and returns its path as text."""

    def _write(name, text):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return _write


def rows(count):
    return [Row(index, f"prompt {index}") for index in range(count)]


# Files


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_text_file_has_one_prompt_on_each_line(write, end):
    path = write("a.txt", 'a sign that says "CAT"\n  a dog \nein Häuschen' + end)
    assert load_prompts(path) == [Row(0, 'a sign that says "CAT"'), Row(1, "a dog"), Row(2, "ein Häuschen")]


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_jsonl_file_has_metadata_beside_the_prompts(write, end):
    path = write("a.jsonl", json.dumps(GENEVAL_ROW) + '\n{"prompt": "plain"}' + end)
    first, second = load_prompts(path)
    assert first == Row(0, "a photo of a bench", {"tag": "single_object", "include": [{"class": "bench", "count": 1}]})
    assert second == Row(1, "plain")


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip), min_size=1, max_size=5
    )
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


# Tables, JSON, columns


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "PartiPrompts.tsv",
            'Prompt\tCategory\tNote\n"THE CAT"\tArts\t\nsays "a, b" here\tX\ty\n',
            ['"THE CAT"', 'says "a, b" here'],
        ),
        ("quoted.tsv", 'prompt\ttag\n"a ""b"""\t1\n"two\nlines"\t2\n', ['a "b"', "two\nlines"]),
        ("spreadsheet.tsv", 'prompt\ttag\n"a, b"\t1\nc\t2\n', ["a, b", "c"]),
        ("all.tsv", '"prompt"\t"tag"\n"a"\t"1"\n', ["a"]),
        ("DrawBench.csv", 'Prompts,Category\r\n"A, ""b""\r\nc",X\r\nd,Y\r\n\r\n', ['A, "b"\nc', "d"]),
        ("european.csv", "prompt;tag\na, b;1\n", ["a, b"]),
        ("spaced.csv", 'tag, prompt\n1, "a, b"\n', ["a, b"]),
        ("unigenbench.csv", 'index,prompt_en,sub_dims_en\n0,a cat,"{""Testpoints"": []}"\n', ["a cat"]),
        ("wise.json", '[{"Prompt": "a", "prompt_id": 1}]', ["a"]),
        ("hpd.json", '["a",\n "b"]', ["a", "b"]),
        ("columns.json", '{"caption": ["a", "b"], "n": [1, 2]}', ["a", "b"]),
        ("wrapped.json", '{"data": [{"text": "a"}]}', ["a"]),
        ("keyed.json", '{"1": {"prompt": "a"}, "2": {"prompt": "b"}}', ["a", "b"]),
        ("one.json", '{"prompt": "a", "include": [1, 2]}', ["a"]),
        ("lines.json", '{"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"]),
        ("list.jsonl", '["a",\n "b"]', ["a", "b"]),
        ("texts.jsonl", '"a"\n"b"\n\n', ["a", "b"]),
        ("both.jsonl", '{"text": "TEXT", "prompt": "a"}\n', ["a"]),
        ("trailing.txt", "a\nb\n\n  \n", ["a", "b"]),
        ("old_mac.txt", "a\rb\r", ["a", "b"]),
        ("BIG.TXT", "a\n", ["a"]),
        ("a#b.txt", "a\n", ["a"]),
        ("utf16.csv", "prompt,tag\né,1\n".encode("utf-16"), ["é"]),
        ("utf32.txt", "é\n".encode("utf-32"), ["é"]),
        ("marked.json", b'\xef\xbb\xbf["a"]', ["a"]),
    ],
)
def test_prompt_lists_of_the_field_are_read_as_they_are_published(write, name, text, expected):
    assert [row.prompt for row in load_prompts(write(name, text))] == expected


def test_a_column_is_named_after_the_file_and_the_others_are_metadata(write):
    path = write("tiif.jsonl", '{"type": "t", "short_description": "s", "long_description": "l"}\n')
    with pytest.raises(UserError, match=r"short_description, long_description may all hold the prompts"):
        load_prompts(path)
    assert load_prompts(f"{path}#long_description") == [Row(0, "l", {"type": "t", "short_description": "s"})]
    with pytest.raises(UserError, match=r"has no column 'long'; its columns are type, short_description, long_descr"):
        load_prompts([f"{path}#long"])
    table = write("a.csv", ",prompt,tag,empty\n0,a,x,\n")
    assert load_prompts(table) == [Row(0, "a", {"tag": "x"})]  # cells without a name or a value are left out
    with pytest.raises(UserError, match="has no column 'x'; it has no columns"):
        load_prompts(write("a.txt", "a\n") + "#x")


@pytest.mark.parametrize(
    "key",
    ["image", "images", "source_image", "input_image", "init_img", "image_path", "reference_image", "video", "source"],
)
def test_rows_that_name_an_image_to_edit_are_refused_unless_a_column_is_named(write, key):
    path = write("edits.jsonl", json.dumps({"prompt": "make it red", key: "a/1.PNG"}) + "\n")
    with pytest.raises(UserError, match=rf"line 1: the row names an image to edit \({key} 'a/1.PNG'\), but samples"):
        load_prompts(path)
    assert load_prompts(f"{path}#prompt")[0].prompt == "make it red"
    assert load_prompts(write("none.jsonl", json.dumps({"prompt": "red", key: None, "source": "coco"}) + "\n"))
    assert load_prompts(write("count.jsonl", json.dumps({"prompt": "red", "images": 4}) + "\n"))


# Mistakes


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', r"a\.jsonl, line 2: not JSON: .* at column \d+"),
        ("a.jsonl", '{"prompt": "a"}\nplain text\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"}\n', r"a\.jsonl, line 2: the line is empty"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', r'a\.jsonl, line 2: the row needs a text as its "prompt"'),
        ("a.jsonl", '{"prompt": 3}\n', r'a\.jsonl, line 1: the row needs a text as its "prompt"'),
        ("a.jsonl", '{"prompt": "  "}\n', r'a\.jsonl, line 1: the row needs a text as its "prompt"'),
        ("a.jsonl", "7\n", r'a\.jsonl, line 1: the row needs a text as its "prompt"'),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', r"a\.jsonl, line 1: the prompt holds an invalid character"),
        ("a.txt", "a\n\nb\n", r"a\.txt, line 2: the line is empty; remove it or write a prompt"),
        ("a.csv", "prompt,tag\na,1\n\nb,2\n", r"a\.csv, line 3: the line is empty"),
        ("a.tsv", "prompt\ttag\na\t1\n\t2\n", r'a\.tsv, line 3: the row needs a text as its "prompt"'),
        ("a.csv", 'prompt\n"a\nb\n', r"a\.csv, line 2: unexpected end of data; put a field that holds quotes in"),
        ("a.csv", "prompt\na, b\n", r"a\.csv, line 2: 2 fields for 1 columns; put a field that holds commas in quotes"),
        ("a.csv", "prompt,tag,tag\na,1,2\n", r"a\.csv: two columns are called 'tag'"),
        ("a.csv", ",,\n", r"a\.csv' is empty"),
        ("a.json", "[]", r"a\.json' is empty"),
        ("a.json", '["a",\n "b"', r"a\.json, line 2: not JSON"),
        ("a.json", '{"prompt": ["a"], "tag": []}', r"a\.json: its lists differ in length \(prompt 1, tag 0\)"),
        (
            "a.json",
            '{"0": "a", "1": "b"}',
            r"none of its columns \(0, 1\) is called prompt, text or caption; .*a\.json#0$",
        ),
        ("a.csv", "a cat\na dog\n", r"none of its columns \(a cat\) is called prompt, text or caption"),
        ("a.csv", "text,caption\na,b\n", r"text, caption may all hold the prompts; name one, as .*a\.csv#text$"),
        ("a.txt", "", r"a\.txt' is empty; it needs a prompt on each line"),
        ("a.txt", "\n \n", r"a\.txt' is empty"),
        ("a.jsonl", "", r"a\.jsonl' is empty"),
        ("a.xlsx", "a\n", r"a\.xlsx': use a file of \.txt, .*, or one of toyworld/words_train"),
        (
            "a.txt",
            b"a\nb\ncaf\xe9\n",
            r"a\.txt' cannot be read: line 3 is not UTF-8, but perhaps Windows-1252, .* save the file as UTF-8",
        ),
        ("a.csv", "prompt\r\na café\r\n".encode("cp1252"), r"line 2 is not UTF-8, but perhaps Windows-1252"),
        ("a.txt", '{"prompt": "a"}\n{"prompt": "b"}\n', r"a\.txt' holds lines of JSON; rename it to a\.jsonl$"),
        ("a.jsonl", '{"prompt": "a\\u0000b"}\n', r"line 1: the prompt holds the control character U\+0000; remove it"),
        ("a.txt", "a\x1b[31m cat\n", r"line 1: the prompt holds the control character U\+001B"),
        ("a.txt", "ab\n".encode("utf-16-le"), r"a\.txt' cannot be read: it holds NUL bytes"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence_with_its_place(write, name, text, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        load_prompts(write(name, text))
    assert "\n" not in str(caught.value)


def test_json_that_python_cannot_read_is_answered_in_one_sentence(write):
    for text in ("[" * 100_000, '{"a":' * 100_000, '{"prompt": "a", "n": ' + 5000 * "9" + "}"):
        with pytest.raises(UserError, match=r"a\.json, line 1: not JSON: .*(recursion|digits)"):
            load_prompts(write("a.json", text))


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
def test_no_prompt_comes_twice_in_a_turn_that_leaves_prompts_over(length, data, seed, turn):
    count = data.draw(st.integers(1, length))
    per_turn = length // count
    seen = [
        row.index
        for step in range(turn * per_turn, (turn + 1) * per_turn)
        for row in step_rows(rows(length), count, seed, step)
    ]
    assert len(seen) == len(set(seen)) == per_turn * count


def test_prompts_left_over_in_one_turn_come_in_a_later_turn():
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
