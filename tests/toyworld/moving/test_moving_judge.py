"""The moving world's judge: right clips are right, and each kind of wrong clip is wrong for the stated reason."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from flowalign.toyworld.moving import grammar
from flowalign.toyworld.moving.grammar import BOUNCE, FRAMES, STAY, TASKS
from flowalign.toyworld.moving.judge import Verdict, judge
from flowalign.toyworld.moving.render import render
from flowalign.toyworld.moving.scenes import Clip, Mover, random_clip
from flowalign.toyworld.moving.tracks import follow
from flowalign.toyworld.tasks import Metadata
from rewards.errors import RewardError


def object_of(motion: str, color: str = "red", shape: str = "circle", count: int = 1, **more: str) -> Metadata:
    return {"shape": shape, "color": color, "count": count, "motion": motion, **more}


def clip_of(*objects: Metadata, seed: int = 0) -> Clip:
    return random_clip({"objects": objects}, np.random.default_rng(seed))


def frames_of(clip: Clip) -> torch.Tensor:
    return torch.from_numpy(render(clip)) / 255


def judged(shown: Clip | torch.Tensor, *objects: Metadata) -> Verdict:
    return judge(frames_of(shown) if isinstance(shown, Clip) else shown, {"objects": objects})


def along(places: Sequence[float], size: int = 16, across: float = 20) -> Clip:
    """A red circle whose left edge is at these places, in pixels."""
    return Clip(movers=(Mover("circle", "red", size, tuple((round(4 * x), round(4 * across)) for x in places)),))


def wrong_in(rows: list[Metadata], count: int, rng: np.random.Generator) -> list[tuple[str, Verdict]]:
    picked = [rows[i] for i in rng.integers(len(rows), size=count)]
    verdicts = [(row["prompt"], judge(frames_of(random_clip(row, rng)), row)) for row in picked]
    # A true clip also has nearly all of every part.
    return [(prompt, one) for prompt, one in verdicts if not one.strict or min(one.soft, one.motion) < 0.9]


@pytest.mark.parametrize("task", TASKS)
def test_all_clips_of_a_prompt_are_judged_right(task: str) -> None:
    assert wrong_in(grammar.task_prompts(task), 50, np.random.default_rng([0, TASKS.index(task)])) == []


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_all_of_five_hundred_clips_of_a_task_are_judged_right(task: str) -> None:
    assert wrong_in(grammar.task_prompts(task), 500, np.random.default_rng([1, TASKS.index(task)])) == []


# Wrong clips


@pytest.mark.parametrize("demand", [object_of("left"), object_of("up", speed="slowly"), object_of(BOUNCE + "right")])
def test_a_still_video_does_not_move(demand: Metadata) -> None:
    shown = frames_of(clip_of(demand))[:1].expand(FRAMES, -1, -1, -1)
    verdict = judged(shown, demand)
    assert not verdict.strict and verdict.reason == "the red circle does not move"
    assert verdict.motion == 0 and verdict.soft < 0.8


@pytest.mark.parametrize(("motion", "other"), [("left", "right"), ("up", "down"), ("down", "up")])
def test_a_reversed_motion_is_named(motion: str, other: str) -> None:
    demand = object_of(motion)
    verdict = judged(frames_of(clip_of(demand)).flip(0), demand)
    assert verdict.reason == f"the red circle moves {other}" and verdict.motion == 0


def test_an_object_that_should_stay_and_moves_is_wrong() -> None:
    assert judged(clip_of(object_of("left")), object_of(STAY)).reason == "the red circle moves"


def test_a_frozen_object_beside_a_moving_one_is_wrong() -> None:
    demands = object_of("left"), object_of("down", "blue", "star")
    clip = clip_of(*demands)
    frozen = replace(clip.movers[1], path=(clip.movers[1].path[0],) * FRAMES)
    verdict = judged(replace(clip, movers=(clip.movers[0], frozen)), *demands)
    assert verdict.reason == "the blue star does not move"
    assert verdict.motion == pytest.approx(0.5, abs=0.01)


def test_an_object_that_stops_halfway_or_jumps_once_stands_still_too_long() -> None:
    halfway, jump = along([10, 12, 14, 16, 18, 20, 20, 20, 20]), along([10] * 8 + [30])
    assert judged(halfway, object_of("right")).reason == "the red circle stands still in 3 of 8 steps"
    assert judged(jump, object_of("right")).reason == "the red circle stands still in 7 of 8 steps"


def test_back_and_forth_and_a_slanted_or_winding_path_are_no_direction() -> None:
    assert "goes back and forth" in judged(along([10, 13, 16, 15, 14, 17, 20, 23, 26]), object_of("right")).reason
    for down in ([3 * frame for frame in range(FRAMES)], [0, 20] * 4 + [0]):
        path = tuple((40 + 8 * frame, 40 + y) for frame, y in enumerate(down))
        shown = Clip(movers=(Mover("circle", "red", 16, path),))
        assert judged(shown, object_of("right")).reason == "the red circle drifts sideways"


def test_a_flickering_colour_is_wrong_in_the_frames_that_have_it() -> None:
    demand = object_of("right")
    clip = clip_of(demand)
    media = frames_of(clip)
    media[3::4] = frames_of(replace(clip, movers=(replace(clip.movers[0], color="blue"),)))[3::4]
    verdict = judged(media, demand)
    assert verdict.reason == "the red circle is blue in frame 3, blue in frame 7"
    assert verdict.soft > 0.9 and verdict.motion == 1


def test_a_changing_shape_or_size_is_wrong() -> None:
    demand = object_of("right")
    clip = along(list(np.arange(FRAMES) * 2.0 + 10), size=20)
    media = frames_of(clip)
    media[5] = frames_of(replace(clip, movers=(replace(clip.movers[0], shape="square"),)))[5]
    assert judged(media, demand).reason == "the red circle is square in frame 5"
    grown = [replace(clip.movers[0], size=14 + 2 * frame) for frame in range(FRAMES)]
    media = torch.stack([frames_of(replace(clip, movers=(one,)))[frame] for frame, one in enumerate(grown)])
    assert "the red circle changes its size" in judged(media, demand).reason.splitlines()


def test_an_object_that_vanishes_in_a_middle_frame_is_missed_but_followed() -> None:
    demand = object_of("left")
    clip = clip_of(demand)
    media = frames_of(clip)
    media[4] = frames_of(replace(clip, movers=()))[4]
    verdict = judged(media, demand)
    assert verdict.reason == "expected 1 object, found 0 in frame 4"
    assert verdict.motion > 0.99 and 0.9 < verdict.soft < 1


def test_an_empty_clip_scores_nothing() -> None:
    verdict = judged(Clip(movers=()), object_of("left"), object_of("up", "blue", "star"))
    assert (verdict.strict, verdict.soft, verdict.motion) == (False, 0.0, 0.0)


@pytest.mark.parametrize(("shown", "wanted"), [(2, 3), (3, 2), (4, 3), (3, 4)])
def test_a_wrong_count_is_wrong_and_scores_by_how_far(shown: int, wanted: int) -> None:
    demand = object_of("up", "green", "square", wanted)
    verdict = judged(clip_of({**demand, "count": shown}), demand)
    assert not verdict.strict and verdict.reason.startswith(f"expected {wanted} objects, found {shown} in frame 0")
    assert verdict.soft < 0.95
    assert judged(clip_of(demand), demand).strict


def test_one_of_three_that_moves_elsewhere_is_wrong() -> None:
    demand = object_of("up", "green", "square", 3)
    clip = clip_of(demand)
    movers = [
        replace(mover, size=14, path=tuple((40 + 80 * i, y) for _, y in mover.path))
        for i, mover in enumerate(clip.movers)
    ]
    movers[2] = replace(movers[2], path=movers[2].path[::-1])
    verdict = judged(replace(clip, movers=tuple(movers)), demand)
    assert verdict.reason == "the green square moves down"
    assert verdict.motion == pytest.approx(2 / 3, abs=0.01)


def test_swapped_motions_of_two_objects_are_wrong() -> None:
    first, second = object_of("left"), object_of("down", "blue", "star")
    swapped = clip_of({**first, "motion": "down"}, {**second, "motion": "left"})
    assert judged(swapped, first, second).reason == "the red circle moves down\nthe blue star moves left"


def test_swapped_colours_of_two_objects_are_wrong() -> None:
    first, second = object_of("left"), object_of("down", "blue", "star")
    swapped = clip_of({**first, "color": "blue"}, {**second, "color": "red"})
    verdict = judged(swapped, first, second)
    assert not verdict.strict and "is blue in frame 0" in verdict.reason


@pytest.mark.parametrize(("shown", "wanted"), [("quickly", "slowly"), ("slowly", "quickly")])
def test_another_speed_is_wrong(shown: str, wanted: str) -> None:
    verdict = judged(clip_of(object_of("left", speed=shown)), object_of("left", speed=wanted))
    assert verdict.reason == f"the red circle is too {shown.removesuffix('ly')}" and verdict.soft < 0.98
    assert judged(clip_of(object_of("left", speed=shown)), object_of("left")).strict


def test_a_bounce_needs_its_wall_and_the_way_back() -> None:
    demand = object_of(BOUNCE + "left")
    there, back = [20, 17, 14, 11, 8], [11, 14, 17, 20]
    assert judged(along([x - 8 for x in there + back]), demand).strict
    assert judged(along(there + back), demand).reason == "the red circle turns 8 pixels from the left wall"
    to_the_wall = judged(clip_of(object_of("left")), demand)
    assert to_the_wall.reason == "the red circle does not move to the left wall and back" and to_the_wall.motion == 0
    assert "does not move to the left wall and back" in judged(clip_of(object_of(BOUNCE + "right")), demand).reason
    assert judged(clip_of(demand), object_of(BOUNCE + "top")).motion == 0


def test_smoothness_is_in_the_soft_score_alone() -> None:
    smooth, jerky = along([10 + 2 * x for x in range(9)]), along([10, 11, 14, 15, 18, 19, 22, 23, 26])
    first, second = (judged(clip, object_of("right")) for clip in (smooth, jerky))
    assert first.strict and second.strict
    assert first.soft - second.soft > 0.1


# Tracks and errors


def test_objects_keep_their_tracks_whatever_order_they_are_found_in() -> None:
    def found(color: str, x: float) -> Metadata:
        return {"class": "ring", "color": color, "center": [x, 20.0]}

    frames = [[found("red", 10 + 3 * i), found("red", 50 - 3 * i)][:: (-1) ** i] for i in range(6)]
    first, second = follow(frames)
    assert [seen["center"][0] for seen in first if seen] == [10 + 3 * i for i in range(6)]
    assert [seen["center"][0] for seen in second if seen] == [50 - 3 * i for i in range(6)]
    late = follow([[found("red", 10)], [], [found("blue", 40), found("red", 12)]])
    assert [[seen and seen["color"] for seen in track] for track in late] == [
        ["red", None, "red"],
        [None, None, "blue"],
    ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda media: media[:8], r"a clip is \(9, 3, 64, 64\), not \(8, 3, 64, 64\)"),
        (lambda media: media[0], r"not \(3, 64, 64\)"),
        (lambda media: media / 0, "values that are not finite"),
    ],
)
def test_a_clip_of_another_shape_or_not_finite_is_one_clear_error(
    spoil: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    with pytest.raises(RewardError, match=f"moving world: .*{message}"):
        judged(spoil(frames_of(clip_of(object_of("left")))), object_of("left"))
