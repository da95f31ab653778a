"""GenEval's prompts: the bundled test list, and training lists without its prompts."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowalign.config.base import UserError
from flowalign.evaluate.geneval_prompts import (
    PUBLISHED_MIX,
    object_names,
    task_counts,
    training_prompts,
    write_training_prompts,
)
from flowalign.rollout.prompts import Row, load_prompts
from flowalign.toyworld.tasks import NUMBERS, plural
from rewards.detectors.base import COLORS
from rewards.geneval import RELATIONS, TASKS

NAMES = ("cat", "orange", "bus", "person", "wine glass")
OFFICIAL = dict(zip(TASKS, (80, 99, 80, 94, 100, 100), strict=True))
ONLY = {task: {task: 1.0} for task in TASKS}

mixes = st.dictionaries(st.sampled_from(TASKS), st.floats(0.01, 10), min_size=1)


def article(noun):
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def described(row):
    """The prompt that a row's clauses call for, and whether they are what its task asks."""
    task, include = row["tag"], row["include"]
    nouns = [article(" ".join(filter(None, (clause.get("color"), clause["class"])))) for clause in include]
    assert all(("color" in clause) == (task in ("colors", "color_attr")) for clause in include)
    assert all(clause.get("color") in (None, *COLORS) for clause in include)
    assert len({clause["class"] for clause in include}) == len(include)
    assert [clause["class"] for clause in include if "color" in clause].count("person") == 0
    assert ("exclude" in row) == (task == "counting")
    if task == "counting":
        (clause,) = include
        assert row["exclude"] == [{"class": clause["class"], "count": clause["count"] + 1}]
        return f"a photo of {NUMBERS[clause['count']]} {plural(clause['class'])}"
    assert all(clause["count"] == 1 for clause in include)
    if task == "position":
        target, named = include
        relation, index = named["position"]
        assert relation in RELATIONS and index == 0 and "position" not in target
        return f"a photo of {nouns[1]} {relation} {nouns[0]}"
    assert len(include) == (2 if task in ("two_object", "color_attr") else 1)
    assert task != "color_attr" or include[0]["color"] != include[1]["color"]
    return f"a photo of {' and '.join(nouns)}"


# The bundled list


def test_the_bundled_list_is_the_official_one(shared):
    rows = load_prompts("geneval")
    assert Counter(row.metadata["tag"] for row in rows) == OFFICIAL
    official = (shared / "data" / "geneval_prompts.jsonl").read_text().splitlines()
    assert [{**row.metadata, "prompt": row.prompt} for row in rows] == [json.loads(line) for line in official]
    assert len(object_names()) == 80
    assert {clause["class"] for row in rows for clause in row.metadata["include"]} == set(object_names())


def test_the_official_prompts_follow_the_grammar_of_the_training_lists():
    for row in load_prompts("geneval"):
        assert row.prompt == described(row.metadata)


@pytest.mark.parametrize(("name", "many"), [("cat", "cats"), ("bus", "buses"), ("bench", "benchs"), ("skis", "skises")])
def test_plurals_are_the_benchmarks(name, many):
    assert plural(name) == many


# Training lists


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(0, 2**32), mixes)
def test_prompts_match_their_clauses_and_are_not_in_the_test_list(count, seed, mix):
    several = {task: 1.0 for task in TASKS if task != "single_object"}  # of which five names have but five prompts
    test = [Row(i, row["prompt"], row) for i, row in enumerate(training_prompts(20, 1, mix=several, classes=NAMES))]
    rows = training_prompts(count, seed, test, mix, NAMES)
    assert Counter(row["tag"] for row in rows) == +Counter(task_counts(count, mix))
    assert {row["prompt"] for row in rows}.isdisjoint(row.prompt for row in test)
    for row in rows:
        assert row["prompt"] == described(row)
        assert {clause["class"] for clause in row["include"]} <= set(NAMES)


@settings(max_examples=40)
@given(st.integers(1, 100_000), mixes)
def test_every_task_gets_its_share_to_within_one_row(count, mix):
    counts = task_counts(count, mix)
    assert sum(counts.values()) == count
    for task in TASKS:
        assert abs(counts[task] - count * mix.get(task, 0) / sum(mix.values())) < 1


def test_the_default_mix_gives_the_published_lists_counts():
    published = {"position": 20588, "color_attr": 8824, "colors": 2941, "counting": 14706, "two_object": 2941}
    assert task_counts(50_000, PUBLISHED_MIX) == {"single_object": 0, **published}


def test_a_prompt_is_repeated_only_when_its_task_has_used_all_others():
    rows = training_prompts(2 * 15 + 1, 0, mix=ONLY["counting"], classes=NAMES)
    assert sorted(Counter(row["prompt"] for row in rows).values()) == [2] * 14 + [3]
    everything = training_prompts(300, 0, load_prompts("geneval"))
    position = [row["prompt"] for row in everything if row["tag"] in ("position", "color_attr", "two_object")]
    assert len(set(position)) == len(position)


def test_a_seed_decides_the_list():
    assert training_prompts(40, 3) == training_prompts(40, 3)
    assert training_prompts(40, 3) != training_prompts(40, 4)


def test_tasks_are_mixed_from_the_first_row_on():
    tags = [row["tag"] for row in training_prompts(200, 0)]
    assert len(set(tags[:50])) >= 4


CLAUSES = {"tag": "two_object", "include": [{"class": "bus", "count": 1}, {"count": 1, "class": "cat"}]}


@pytest.mark.parametrize(
    ("excluded", "left"),
    [(Row(0, "A photo of  a cat and a bus"), 19), (Row(0, "one cat, one bus", CLAUSES), 18)],
    ids=["its text in another case", "its clauses in another order"],
)
def test_a_test_prompt_is_recognised_in_another_form(excluded, left):
    prompts = {row["prompt"] for row in training_prompts(40, 0, [excluded], ONLY["two_object"], NAMES)}
    assert "a photo of a cat and a bus" not in prompts
    assert len(prompts) == left


def test_a_position_with_swapped_objects_may_be_trained_on():
    rows = training_prompts(80, 0, mix=ONLY["position"], classes=NAMES)
    (left,) = (row for row in rows if row["prompt"] == "a photo of a cat left of a bus")
    kept = {row["prompt"] for row in training_prompts(80, 0, [Row(0, left["prompt"], left)], ONLY["position"], NAMES)}
    assert kept == {row["prompt"] for row in rows} - {left["prompt"]}


def test_a_written_list_loads_and_is_disjoint_from_the_bundled_one(tmp_path):
    path = tmp_path / "train.jsonl"
    write_training_prompts(path, 500, 0, "geneval", {"single_object": 0, "counting": 1})
    rows = load_prompts(str(path))
    assert len(rows) == 500 and list(tmp_path.iterdir()) == [path]
    assert {row.prompt for row in rows}.isdisjoint(row.prompt for row in load_prompts("geneval"))
    assert len({row.prompt for row in rows}) == 160  # of 240 counting prompts 80 are the benchmark's


# Mistakes


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"count": 0}, "count must be at least 1 prompt, not 0"),
        ({"mix": {"color": 1}}, "mix: there is no task 'color'; did you mean 'colors'?"),
        ({"mix": {"colors": -1}}, "mix: the weight of colors must be a number from 0 to 1e9, not -1"),
        ({"mix": {"colors": float("nan")}}, "the weight of colors must be a number"),
        ({"mix": {"colors": 0}}, "at least one task needs a weight above 0"),
        ({"mix": {}}, "at least one task needs a weight above 0"),
        ({"mix": {"single_object": 1}}, "single_object: all prompts of this task are excluded"),
        ({"path": "train.txt"}, r"train\.txt: prompts with metadata need a \.jsonl file"),
        ({"path": "absent/train.jsonl"}, r"cannot write .*absent.train\.jsonl: No such file"),
        ({"exclude": "absent.jsonl"}, r"prompts 'absent\.jsonl' cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(tmp_path, options, sentence):
    options = {"count": 20, "seed": 0, "exclude": "geneval", "path": "train.jsonl", **options}
    with pytest.raises(UserError, match=sentence) as raised:
        write_training_prompts(**{**options, "path": tmp_path / options["path"]})
    assert not re.search(r"\n", str(raised.value))
    assert not list(tmp_path.iterdir())
