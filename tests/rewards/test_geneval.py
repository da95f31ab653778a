"""GenEval's verdict and its graded score: agreement with the published script, and where ours is meant to differ."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewards
from flowalign.toyworld.grammar import shape_scene, task_prompts
from rewards import RewardError
from rewards.detectors.base import COLORS
from rewards.geneval import RELATIONS, TASKS, GenEval, judge, kept_detections, relations, soft_score

CLASSES = ("cat", "dog", "cup")

coordinates = st.floats(0, 500)
boxes = st.tuples(coordinates, coordinates, st.floats(1, 300), st.floats(1, 300)).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
detections_of_anything = st.lists(
    st.fixed_dictionaries(
        {
            "class": st.sampled_from(CLASSES),
            "box": boxes,
            "score": st.floats(0, 1),
            "color": st.sampled_from(COLORS),
        }
    ),
    max_size=25,
)


@st.composite
def metadata_of_anything(draw):
    """Any clauses that GenEval's format can hold, on the classes of CLASSES."""
    include = []
    for index in range(draw(st.integers(1, 3))):
        clause = {"class": draw(st.sampled_from(CLASSES)), "count": draw(st.integers(1, 4))}
        if draw(st.booleans()):
            clause["color"] = draw(st.sampled_from(COLORS))
        if index and draw(st.booleans()):
            clause["position"] = [draw(st.sampled_from(RELATIONS)), draw(st.integers(0, index - 1))]
        include.append(clause)
    return {"tag": draw(st.sampled_from(TASKS)), "include": include}


@st.composite
def true_scenes(draw):
    """A prompt of the embedded world, and the detections of a scene that is true to it."""
    metadata = draw(st.sampled_from(task_prompts(draw(st.sampled_from(TASKS)))))
    scene = shape_scene(metadata, np.random.default_rng(draw(st.integers(0, 2**32))))
    return metadata, [seen(item.shape, item.box, item.color) for item in scene.items]


def seen(name, box, color="red", score=1.0):
    return {"class": name, "box": list(box), "score": score, "color": color}


def golden_cases(shared):
    return [json.loads(line) for line in (shared / "golden" / "geneval_cases.jsonl").read_text().splitlines()]


LEFT, RIGHT = (0, 0, 10, 10), (50, 0, 60, 10)
LEFT_OF = {
    "tag": "position",
    "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
}


# The verdict


def test_verdicts_and_reasons_agree_with_the_published_script(shared):
    cases = golden_cases(shared)
    assert len(cases) > 500
    for case in cases:
        verdict = judge(case["detections"], case["metadata"], nms_threshold=case["nms_threshold"])
        assert tuple(verdict) == (case["correct"], case["reason"]), case


@given(true_scenes())
def test_a_scene_true_to_its_prompt_is_correct_and_scores_one(scene):
    metadata, detections = scene
    assert judge(detections, metadata) == (True, "")
    assert soft_score(detections, metadata) == 1


@given(true_scenes(), st.randoms())
def test_the_order_of_detections_of_different_scores_does_not_matter(scene, random):
    metadata, detections = scene
    detections = [{**detection, "score": 1 - 0.01 * index} for index, detection in enumerate(detections)]
    shuffled = random.sample(detections, len(detections))
    assert judge(shuffled, metadata) == judge(detections, metadata)
    assert soft_score(shuffled, metadata) == soft_score(detections, metadata)


@pytest.mark.parametrize(("tag", "threshold"), [("counting", 0.9), ("colors", 0.3), ("position", 0.3)])
def test_detections_count_above_the_tasks_threshold(tag, threshold):
    found = [seen("cat", LEFT, score=threshold), seen("cat", RIGHT, score=threshold + 0.01)]
    assert kept_detections(found, tag) == {"cat": [found[1]]}


def test_only_the_sixteen_best_detections_of_a_class_count():
    found = [seen("cat", (20 * i, 0, 20 * i + 9, 9), score=0.5 + 0.01 * i) for i in range(20)]
    kept = kept_detections(found, "colors")["cat"]
    assert kept == found[:3:-1]


def test_overlapping_boxes_of_a_class_count_once_below_the_nms_threshold():
    """Boxes of 10 x 10 pixels, ends included, that share 9 x 10: overlap 90 / 110."""
    found = [seen("cat", (0, 0, 9, 9), score=0.9), seen("cat", (1, 0, 10, 9), score=0.8), seen("dog", (0, 0, 9, 9))]
    assert len(kept_detections(found, "colors", 0.81)["cat"]) == 1
    assert len(kept_detections(found, "colors", 0.82)["cat"]) == 2
    assert len(kept_detections(found, "colors", 1.0)["cat"]) == 2
    assert len(kept_detections(found, "colors", 0.1)["dog"]) == 1


def test_one_object_too_many_fails_an_exclude_clause():
    metadata = {
        "tag": "counting",
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
    }
    cats = [seen("cat", (20 * i, 0, 20 * i + 9, 9)) for i in range(3)]
    assert judge(cats[:2], metadata).correct
    assert judge(cats, metadata) == (False, "expected cat<3, found 3")


# Relations


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 50, 10, 60), {"left of"}),
        ((100, 50, 110, 60), {"right of"}),
        ((50, 0, 60, 10), {"above"}),
        ((50, 100, 60, 110), {"below"}),
        ((0, 0, 10, 10), {"left of", "above"}),
        ((100, 100, 110, 110), {"right of", "below"}),
        ((50, 50, 60, 60), set()),  # the same place
        ((52, 50, 62, 60), set()),  # 2 pixels off, a tenth of the summed widths
        ((51, 20, 61, 30), {"above"}),
    ],
)
def test_a_box_stands_to_another_as_its_centre_does(box, expected):
    assert relations(box, (50, 50, 60, 60)) == expected


def test_a_direction_holds_when_the_part_beyond_the_margin_is_over_half_of_the_offset():
    """Offset 4 of boxes 10 wide: a margin of 2 leaves 2 of 4, not over a half; offset 5 leaves 3 of 5."""
    assert relations((4, 0, 14, 10), (0, 0, 10, 10)) == set()
    assert relations((5, 0, 15, 10), (0, 0, 10, 10)) == {"right of"}


@given(boxes, boxes)
def test_swapping_the_boxes_reverses_their_relations(box, target):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert {opposite[relation] for relation in relations(box, target)} == relations(target, box)


@given(boxes, boxes)
def test_no_box_is_on_two_opposite_sides(box, target):
    found = relations(box, target)
    assert not {"left of", "right of"} <= found
    assert not {"above", "below"} <= found


# The graded score


def test_the_graded_score_of_every_published_case_lies_in_zero_to_one(shared):
    for case in golden_cases(shared):
        assert 0 <= soft_score(case["detections"], case["metadata"], nms_threshold=case["nms_threshold"]) <= 1, case


@given(detections_of_anything, metadata_of_anything(), st.sampled_from([1.0, 0.5]))
def test_the_graded_score_lies_in_zero_to_one(detections, metadata, nms_threshold):
    assert 0 <= soft_score(detections, metadata, nms_threshold=nms_threshold) <= 1


@given(detections_of_anything, metadata_of_anything())
def test_a_full_score_means_a_correct_image(detections, metadata):
    if soft_score(detections, metadata) == 1:
        assert judge(detections, metadata).correct


def test_a_violated_position_scores_zero_for_it_once():
    """Terms: the dog is there, the cat is there, its place is wrong. The published code adds a fourth term of 1."""
    wrong = [seen("dog", LEFT), seen("cat", RIGHT)]
    assert soft_score(wrong, LEFT_OF) == pytest.approx(2 / 3)
    assert soft_score([seen("dog", RIGHT), seen("cat", LEFT)], LEFT_OF) == 1


@pytest.mark.parametrize(
    ("count", "score"),
    [(0, 0), (1, 0.5), (2, 1), (3, 0.5), (4, 0), (9, 0)],  # the published code goes on to -2.5
)
def test_a_count_scores_by_its_distance_and_never_below_zero(count, score):
    metadata = {"tag": "counting", "include": [{"class": "cat", "count": 2}]}
    assert soft_score([seen("cat", (20 * i, 0, 20 * i + 9, 9)) for i in range(count)], metadata) == score


@pytest.mark.parametrize(
    ("colors", "score"),
    [
        (["red", "red"], 1),
        (["red", "blue"], (1 + 0.5) / 2),
        (["blue", "blue"], (1 + 0) / 2),
        (["red"], (0.5 + 0) / 2),  # no credit for colour while the count is wrong
        ([], 0),
    ],
)
def test_a_colour_scores_by_the_share_of_right_objects(colors, score):
    metadata = {"tag": "colors", "include": [{"class": "cat", "count": 2, "color": "red"}]}
    found = [seen("cat", (20 * i, 0, 20 * i + 9, 9), color) for i, color in enumerate(colors)]
    assert soft_score(found, metadata) == score


# The reward


def images(count):
    return torch.zeros(count, 3, 8, 8)


def by_brightness(media):
    """A detector as a plain function: dark pictures are right, bright ones have the cat on the wrong side."""
    right, wrong = [seen("dog", RIGHT), seen("cat", LEFT)], [seen("dog", LEFT), seen("cat", RIGHT)]
    return [wrong if image.mean() > 0.5 else right for image in media]


@pytest.mark.parametrize(
    ("strict_weight", "expected"), [(0.0, [1, 2 / 3]), (1.0, [1, 0]), (0.25, [1, 0.75 * 2 / 3])], ids=str
)
def test_a_plain_function_detects_and_the_verdict_is_mixed_in(strict_weight, expected):
    media = torch.cat([images(1), images(1) + 1])
    reward = GenEval(by_brightness, strict_weight=strict_weight)
    scores = rewards.score(reward, media, ["a", "b"], [LEFT_OF, LEFT_OF])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32))


def test_a_detector_is_found_by_its_name_and_a_class_is_built(monkeypatch):
    class Detector:
        def __call__(self, media):
            return by_brightness(media)

    module = ModuleType("some_detectors")
    module.function, module.Class = by_brightness, Detector
    monkeypatch.setitem(sys.modules, "some_detectors", module)
    for name in ("function", "Class"):
        reward = rewards.load("geneval", detector=f"some_detectors:{name}")
        assert rewards.score(reward, images(1), ["a"], [LEFT_OF]).tolist() == [1]


@pytest.mark.parametrize("row", [{}, {"tag": "position"}, {"include": []}])
def test_a_row_without_metadata_is_an_error_that_names_the_item(row):
    with pytest.raises(
        RewardError, match=r"geneval: item 1 \('a dog'\) has no GenEval metadata .* \.jsonl prompt file"
    ):
        rewards.score(GenEval(by_brightness), images(2), ["a cat", "a dog"], [LEFT_OF, row])


@pytest.mark.parametrize("strict_weight", [-0.1, 1.5])
def test_a_strict_weight_outside_zero_to_one_is_refused(strict_weight):
    with pytest.raises(RewardError, match=rf"strict_weight must lie in \[0, 1\], not {strict_weight}"):
        GenEval(by_brightness, strict_weight=strict_weight)


def test_a_detector_that_skips_an_image_is_an_error():
    with pytest.raises(RewardError, match="'geneval' failed"):
        rewards.score(GenEval(lambda media: []), images(2), ["a", "b"], [LEFT_OF, LEFT_OF])


def test_the_reward_applies_to_rows_with_clauses():
    reward = GenEval(by_brightness)
    assert reward.applies_to(LEFT_OF)
    assert not reward.applies_to({"prompt": "a sign"})
