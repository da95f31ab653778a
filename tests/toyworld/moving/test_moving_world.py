"""The moving world's prompts and lists, and the clips that are drawn for them."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowalign.rollout.prompts import load_prompts
from flowalign.toyworld.grammar import COLORS, apart
from flowalign.toyworld.moving import grammar
from flowalign.toyworld.moving.grammar import BOUNCE, DIRECTIONS, FRAMES, MOTIONS, SPEEDS, STAY, TASKS
from flowalign.toyworld.moving.render import render
from flowalign.toyworld.moving.scenes import Clip, Mover, random_clip
from flowalign.toyworld.render import PALETTE, SHAPES, SIZE, SUBPIXELS
from flowalign.toyworld.tasks import Metadata
from rewards.errors import RewardError

ROWS = {task: grammar.task_prompts(task) for task in TASKS}


def random_row(seed: int) -> Metadata:
    rows = ROWS[TASKS[seed % len(TASKS)]]
    return rows[seed // len(TASKS) % len(rows)]


def combinations(rows: list[Metadata]) -> set[tuple[str, str, str]]:
    return {(one["color"], one["shape"], one["motion"]) for row in rows for one in row["objects"]}


# Prompts


@pytest.mark.parametrize(
    ("task", "prompt"),
    [
        ("direction", "an orange ring moves left"),
        ("speed", "a red circle moves up slowly"),
        ("stays", "a blue star stays in place"),
        ("bounce", "a green square bounces off the top wall"),
        ("two_objects", "a red circle moves left and a blue star stays in place"),
        ("counting", "three purple crosses move down"),
    ],
)
def test_a_prompt_of_each_task_is_a_plain_sentence(task: str, prompt: str) -> None:
    assert prompt in [row["prompt"] for row in ROWS[task]]


def test_no_two_prompts_are_the_same() -> None:
    prompts = [row["prompt"] for rows in ROWS.values() for row in rows]
    assert len(prompts) == len(set(prompts))


@given(st.integers(0, 2**32))
def test_a_row_demands_what_its_prompt_says(seed: int) -> None:
    row = random_row(seed)
    halves = row["prompt"].split(" and ")
    assert len(halves) == len(row["objects"])
    for said, clause in zip(halves, row["objects"], strict=True):
        words = said.split()
        assert clause["color"] in words and clause["shape"] in said
        assert ("bounce" in said, "stay" in said) == (clause["motion"].startswith(BOUNCE), clause["motion"] == STAY)
        assert clause["motion"] == STAY or clause["motion"].removeprefix(BOUNCE) in words
        assert clause.get("speed") == next((word for word in SPEEDS if word in words), None)
        assert clause["count"] == {"two": 2, "three": 3, "four": 4}.get(words[0], 1)
    assert len(grammar.demands(row)) == sum(clause["count"] for clause in row["objects"])


def test_a_row_of_another_world_and_a_misspelt_word_are_answered_with_one_sentence() -> None:
    with pytest.raises(ValueError, match="unknown task 'sped' of the moving world; the tasks are direction, speed"):
        grammar.task_prompts("sped")
    with pytest.raises(RewardError, match="the row has no key 'objects'"):
        grammar.demands({"tag": "colors", "include": []})
    (clause,) = grammar.task_prompts("speed")[0]["objects"]
    with pytest.raises(RewardError, match="an object's speed is 'quickli'; the nearest that it can be is 'quickly'"):
        grammar.demands({"objects": [{**clause, "speed": "quickli"}]})
    with pytest.raises(RewardError, match="an object's motion is None"):
        grammar.demands({"objects": [{**clause, "motion": None}]})
    with pytest.raises(RewardError, match="an object's count is 9, not 1 to 4"):
        grammar.demands({"objects": [{**clause, "count": 9}]})


# Lists


def bundled(name: str) -> list[Metadata]:
    return [{**row.metadata, "prompt": row.prompt} for row in load_prompts(f"toyworld/moving_{name}")]


@pytest.mark.parametrize("name", ["train", "test", "unseen"])
def test_a_list_holds_equally_many_rows_of_every_task(name: str) -> None:
    rows = bundled(name)
    assert [sum(row["task"] == task for row in rows) for task in TASKS] == [len(rows) / len(TASKS)] * len(TASKS)
    written = {row["prompt"]: row for known in ROWS.values() for row in known}
    assert all(row == written[row["prompt"]] for row in rows)


def test_the_lists_share_no_prompt() -> None:
    lists = [{row["prompt"] for row in bundled(name)} for name in ("train", "test", "unseen")]
    assert all(lists) and not any(a & b for a, b in itertools.combinations(lists, 2))


def test_unseen_combinations_are_in_no_training_prompt_and_the_unseen_list_has_no_others() -> None:
    trained = combinations([row for task in TASKS for row in grammar.training_prompts(task)])
    unseen = combinations(bundled("unseen"))
    assert combinations(bundled("train")) <= trained and combinations(bundled("test")) <= trained
    assert not unseen & trained
    assert len(unseen | trained) == len(COLORS) * len(SHAPES) * len(MOTIONS)
    assert len(unseen) == pytest.approx(len(unseen | trained) / 8, abs=1)


def test_every_pair_of_colour_shape_and_motion_is_trained() -> None:
    trained = combinations([row for task in TASKS for row in grammar.training_prompts(task)])
    assert {(color, shape) for color, shape, _ in trained} == set(itertools.product(COLORS, SHAPES))
    assert {(color, motion) for color, _, motion in trained} == set(itertools.product(COLORS, MOTIONS))
    assert {(shape, motion) for _, shape, motion in trained} == set(itertools.product(SHAPES, MOTIONS))


# Clips


@given(st.integers(0, 2**32))
def test_a_clip_is_always_the_same_and_the_seed_decides_it(seed: int) -> None:
    row = random_row(seed)
    first, second = (random_clip(row, np.random.default_rng(seed)) for _ in range(2))
    assert first == second != random_clip(row, np.random.default_rng(seed + 1))
    frames = render(first)
    assert frames.shape == (FRAMES, 3, SIZE, SIZE) and frames.dtype == np.uint8
    assert np.array_equal(frames, render(second))


@given(st.integers(0, 2**32))
def test_objects_stay_whole_in_the_frame_and_apart(seed: int) -> None:
    clip = random_clip(random_row(seed), np.random.default_rng(seed))
    for frame in range(FRAMES):
        boxes = [mover.box(frame) for mover in clip.movers]
        assert all(min(box) >= 0 and max(box) <= SIZE for box in boxes)
        assert all(apart(a, b) for a, b in itertools.combinations(boxes, 2))


@given(st.integers(0, 2**32), st.sampled_from(sorted(SPEEDS)), st.sampled_from(sorted(DIRECTIONS)))
def test_a_speed_has_steps_of_its_own(seed: int, speed: str, motion: str) -> None:
    clause = {"shape": "ring", "color": "red", "count": 1, "motion": motion, "speed": speed}
    (mover,) = random_clip({"objects": [clause]}, np.random.default_rng(seed)).movers
    steps = np.diff(np.array(mover.path), axis=0) / SUBPIXELS
    assert (steps == steps[0]).all()
    assert np.array_equal(np.sign(steps[0]), MOTIONS[motion])
    assert np.abs(steps[0]).max() in SPEEDS[speed]


@given(st.integers(0, 2**32), st.sampled_from(["left", "right", "top", "bottom"]))
def test_a_bounce_touches_its_wall_once_within_the_clip(seed: int, wall: str) -> None:
    clause = {"shape": "ring", "color": "red", "count": 1, "motion": BOUNCE + wall}
    (mover,) = random_clip({"objects": [clause]}, np.random.default_rng(seed)).movers
    boxes = np.array([mover.box(frame) for frame in range(FRAMES)])
    gaps = {"left": boxes[:, 0], "right": SIZE - boxes[:, 2], "top": boxes[:, 1], "bottom": SIZE - boxes[:, 3]}[wall]
    (turn,) = np.flatnonzero(gaps == 0)
    assert 3 <= turn <= 5
    assert (np.diff(gaps)[:turn] < 0).all() and (np.diff(gaps)[turn:] > 0).all()


def test_a_quarter_of_a_pixel_moves_a_quarter_of_the_colour() -> None:
    grey = ((240.0,) * 3, (240.0,) * 3)
    path = [(40 + shift, 40) for shift in range(FRAMES)]
    frames = render(Clip(movers=(Mover("square", "black", 16, tuple(path)),), background=grey))
    left = frames[:5, 0, 18, 10].astype(float)  # the column that the square leaves
    assert left == pytest.approx(np.linspace(PALETTE["black"][0], 240, 5), abs=1)
    assert np.array_equal(frames[4, :, :, 1:], frames[0, :, :, :-1])  # four quarters are a pixel


def test_an_object_that_stays_has_one_place() -> None:
    clause = {"shape": "star", "color": "blue", "count": 1, "motion": STAY}
    frames = render(random_clip({"objects": [clause]}, np.random.default_rng(0)))
    assert (frames == frames[0]).all()
