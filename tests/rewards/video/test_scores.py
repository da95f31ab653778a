"""VBench's scores, their totals, optical flow and T2V-CompBench's motion: golden numbers, closed forms, properties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards.video.flow import flows
from rewards.video.formulas import (
    aesthetic_scores,
    consistency,
    flickering,
    gray,
    is_dynamic,
    is_static,
    kept_frames,
    largest_motion,
    mean_of_best,
    smoothness,
)
from rewards.video.motion import motion_binding
from rewards.video.totals import I2V, I2V_QUALITY, QUALITY, SEMANTIC, vbench_i2v_total, vbench_total


def noise(frames, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, size, size, 3), generator=generator, dtype=torch.uint8)


def videos_of(case, prefix="video"):
    return [case[key] for key in sorted(case) if key.removeprefix(prefix).isdigit()]


# VBench


def test_consistency_is_the_mean_over_frames_not_over_videos(video_golden):
    for case in video_golden("vbench_consistency"):
        videos = videos_of(case)
        if "raises" in case:
            with pytest.raises(ValueError, match="consistency needs 2 frames or more, and the video has 1"):
                consistency(videos[0])
            continue
        scores = [consistency(video) for video in videos]
        assert torch.cat(scores).mean().item() == pytest.approx(case["subject"], abs=1e-6)
        assert [score.mean().item() for score in scores] == pytest.approx(case["background_per_video"], abs=1e-6)
        assert [len(score) for score in scores] == [count - 1 for count in case["frames"]]


def test_flickering_agrees_with_vbench_and_one_frame_is_refused(video_golden):
    for case in video_golden("vbench_flickering"):
        if case["case"] == "one_frame":
            with pytest.raises(ValueError, match="flickering needs 2 frames or more, and the video has 1"):
                flickering(case["video0"])
            continue
        assert [flickering(video) for video in videos_of(case)] == pytest.approx(case["per_video"], abs=1e-6)


def test_smoothness_rounds_interpolated_frames_and_does_not_truncate_them(video_golden):
    for case in video_golden("vbench_smoothness"):
        if "raises" in case:
            with pytest.raises(ValueError, match="smoothness needs 3 frames or more, and the video has 2"):
                smoothness(case["frames"], case["frames"][:0])
            continue
        found = smoothness(case["frames"], case["interpolated"])
        assert found == pytest.approx(case["score_rounded"], abs=1e-9)
        levels = (case["interpolated"] * 255).round().clamp(0, 255).to(torch.uint8)
        assert smoothness(case["frames"], levels) == found


def test_a_video_of_two_kept_frames_is_dynamic_only_if_it_moves(video_golden):
    """Otherwise the decision is VBench's, and so are motions, thresholds and the frames that are kept."""
    for case in video_golden("vbench_dynamic"):
        if case["case"] == "kept_of_40":
            for fps, step, kept in case["rows"]:
                assert (kept_frames(40, fps).step, len(kept_frames(40, fps))) == (step, kept)
        elif case["case"] == "parameters":
            for height, width, kept, threshold, needed in case["rows"]:
                for passing, wanted in ((needed, True), (needed - 1, False)):
                    moving = torch.zeros(kept - 1, 2, height // 8, width // 8)
                    moving[:passing, 0] = (
                        1.001 * threshold / 8
                    )  # a field of an eighth of the size, and of the threshold
                    size = {"height": height // 8, "width": width // 8}
                    assert is_dynamic(moving, fps=8, frames=kept, **size) == wanted
        else:
            size = {"height": case["height"], "width": case["width"]}
            assert list(kept_frames(case["raw_frames"], case["fps"])) == case["kept"]
            motion = largest_motion(case["flow"], 0.05, **size)
            assert motion.tolist() == pytest.approx(case["scores_cropped"], abs=1e-5)
            found = is_dynamic(case["flow"], fps=case["fps"], frames=case["raw_frames"], **size)
            assert found == case["right_dynamic"]


def test_the_padding_of_a_flow_field_does_not_move():
    padded = torch.full((4, 2, 16, 16), 9.0)
    padded[..., 3:13, 1:15] = 0
    assert largest_motion(padded, 0.05, height=10, width=14).tolist() == [0] * 4
    assert not is_dynamic(padded, fps=8, frames=5, height=10, width=14)


def test_flows_must_be_those_of_the_kept_frames():
    with pytest.raises(ValueError, match="5 of 9 frames at 16 fps are kept, with 4 flows, not 8"):
        is_dynamic(torch.zeros(8, 2, 4, 4), fps=16, frames=9, height=4, width=4)
    with pytest.raises(ValueError, match="is_dynamic needs 1 frames or more"):
        is_dynamic(torch.zeros(0, 2, 4, 4), fps=8, frames=0, height=4, width=4)
    assert not is_dynamic(torch.zeros(0, 2, 4, 4), fps=8, frames=1, height=4, width=4)


def test_which_videos_stand_still_agrees_with_vbenchs_filter(video_golden):
    for case in video_golden("vbench_static_filter"):
        size = {"height": case["height"], "width": case["width"]}
        assert largest_motion(case["flow"], 0.02, **size).tolist() == pytest.approx(case["scores"], abs=1e-5)
        assert is_static(case["flow"], **size) == case["static"]


def test_aesthetic_scores_agree_with_vbench(video_golden):
    for case in video_golden("vbench_aesthetic"):
        means = [aesthetic_scores(f, case["weight"], case["bias"]).mean().item() for f in videos_of(case, "features")]
        assert means == pytest.approx(case["per_video"], abs=1e-5)


def test_totals_agree_with_vbench_and_a_missing_dimension_is_refused(video_golden):
    for case in video_golden("vbench_total"):
        if missing := case.get("missing"):
            given = {name: score for name, score in case["scores"].items() if name not in missing}
            with pytest.raises(ValueError, match=f"there is none of {missing[0]}"):
                vbench_total(given)
        elif case["kind"] == "t2v":
            found = vbench_total({name.replace(" ", "_"): score for name, score in case["scores"].items()})
            assert found == pytest.approx((case["quality"], case["semantic"], case["total"]), abs=1e-9)
        else:
            found = vbench_i2v_total(case["scores"])
            assert found == pytest.approx((case["quality"], case["i2v"], case["total"]), abs=1e-9)
        tables = (QUALITY, SEMANTIC) if case["kind"] == "t2v" else (I2V_QUALITY, I2V)
        for name, (low, high, weight) in {key: row for table in tables for key, row in table.items()}.items():
            raw = {key.lower(): score for key, score in case["scores"].items()}[name]
            own = {key.lower(): score for key, score in case["weighted"].items()}[name]
            assert weight * (raw - low) / (high - low) == pytest.approx(own, abs=1e-9)
    with pytest.raises(ValueError, match="no dimension beauty"):
        vbench_total({**dict.fromkeys([*QUALITY, *SEMANTIC], 1.0), "beauty": 1.0})


def test_a_still_video_has_the_highest_scores_and_does_not_move():
    still = noise(1, 16).expand(9, -1, -1, -1)
    assert flickering(still) == 1 and smoothness(still, still[:4]) == 1
    torch.testing.assert_close(consistency(torch.randn(1, 5).expand(9, -1)), torch.ones(8))
    assert not is_dynamic(flows(still), fps=8, frames=9, height=16, width=16)
    assert is_static(flows(torch.cat([still, still[:2]])), height=16, width=16)


def test_frames_in_the_unit_interval_are_refused():
    video = noise(5) / 255
    for score in (lambda: flickering(video), lambda: smoothness(video, video[:2])):
        with pytest.raises(ValueError, match=r"frames must be uint8 levels, not torch\.float32"):
            score()


def test_black_and_white_in_turn_flicker_the_most():
    video = torch.zeros(6, 4, 4, 3, dtype=torch.uint8)
    video[::2] = 255
    assert flickering(video) == 0


@given(st.integers(2, 6), st.integers(0, 99))
def test_scores_lie_in_the_unit_interval_and_do_not_know_the_direction_of_time(frames, seed):
    video = noise(frames, seed=seed)
    assert 0 <= flickering(video) <= 1
    assert flickering(video.flip(0)) == pytest.approx(flickering(video))
    features = torch.randn(frames, 5, generator=torch.Generator().manual_seed(seed))
    scores = consistency(features)
    assert ((scores >= 0) & (scores <= 1 + 1e-6)).all()
    torch.testing.assert_close(consistency(features * 7), scores)


# GenRL


def test_frames_are_reduced_as_in_genrl_and_gray_is_rounded_not_truncated(video_golden):
    for case in video_golden("genrl_frames"):
        if case["case"] == "count_of":
            for frames, count in zip(case["n"], case["count"], strict=True):
                best = mean_of_best(torch.arange(frames, dtype=torch.float64)[None])
                assert best.item() == pytest.approx(frames - 1 - (count - 1) / 2)
        elif case["case"] == "gray0":
            assert torch.equal(gray(case["video"]), case["gray_right"])
        else:
            means = torch.tensor(case["scores"])[..., 0]
            assert means.mean(1).tolist() == pytest.approx(case["general"], abs=1e-5)
            assert mean_of_best(means).tolist() == pytest.approx(case["percentile"], abs=1e-5)


# Optical flow


@pytest.mark.parametrize("preset", ["ultrafast", "fast", "medium"])
def test_flow_finds_a_known_motion_and_what_is_dynamic(video_golden, preset):
    for case in video_golden("dis_flow"):
        found = flows(case["video"], preset)
        assert found.shape == (4, 2, 64, 64) and found.dtype == torch.float32
        top, bottom, left, right = case["region"]
        region = found[: case["pairs_measured"], :, top:bottom, left:right].mean((0, 2, 3))
        assert region.tolist() == pytest.approx(case["true"], abs=case["tolerance"])
        measured = case["measured"][preset]
        # Releases of OpenCV differ a little.
        assert region.tolist() == pytest.approx(measured["mean"], abs=0.01)
        motion = largest_motion(found, 0.05, height=64, width=64)
        assert motion.tolist() == pytest.approx(measured["scores"], abs=0.02)
        assert is_dynamic(found, fps=8, frames=5, height=64, width=64) == case["expect"]["dynamic"]


def test_flow_of_one_frame_is_refused():
    with pytest.raises(ValueError, match="optical flow needs 2 frames or more, and the video has 1"):
        flows(noise(1))
    for frames in (noise(2), noise(2, 16) / 255):
        with pytest.raises(ValueError, match="optical flow needs uint8 frames of 12 pixels or more, not torch"):
            flows(frames)


# Motion binding


def test_motion_binding_counts_points_that_are_visible_at_both_ends(video_golden):
    for case in video_golden("t2v_motion_binding"):
        directions = [case[name] for name in ("direction_1", "direction_2") if case[name]]
        objects = [case.get(f"mask_{i + 1}") for i in range(len(directions))]
        found = motion_binding(case["tracks"], objects, case.get("mask_background"), directions)
        for ours, theirs in zip(found.net, case["net_right"], strict=True):
            assert ours == (None if theirs is None else pytest.approx(theirs, rel=1e-6, abs=1e-5))
        assert found.raw == pytest.approx(case["raw_right"], abs=1e-7)
        assert found.score == pytest.approx(case["score_right"], abs=1e-7)


def moving_tracks(frames=3, step=(-10.0, 0.0)):
    """Four points: two of an object that moves by `step` pixels a frame, two of a background that stands."""
    tracks = torch.ones(frames, 2, 2, 3)
    tracks[..., :2] = torch.arange(8.0).view(2, 2, 2)
    tracks[:, 0, :, :2] += torch.arange(frames)[:, None, None] * torch.tensor(step)
    mask = torch.tensor([[True, True], [False, False]])
    return tracks, mask, ~mask


def test_the_wrong_direction_scores_the_least_of_what_is_detected():
    tracks, mask, background = moving_tracks()
    right = motion_binding(tracks, [mask], background, ["left"])
    assert right.score == pytest.approx(0.2 + 0.8 * 20 / 856)
    assert motion_binding(tracks, [mask], background, ["right"]).score == 0.2
    assert motion_binding(tracks, [mask], background, ["up"]).score == 0.2


def test_an_undetected_object_counts_as_no_motion_and_the_other_keeps_its_own_direction():
    tracks, mask, background = moving_tracks(step=(0.0, 5.0))
    one = motion_binding(tracks, [mask], background, ["down"])
    second_alone = motion_binding(tracks, [None, mask], background, ["left", "down"])
    assert second_alone.raw == pytest.approx(one.raw / 2) and second_alone.net[0] is None


def test_without_background_or_visible_points_nothing_is_detected():
    tracks, mask, background = moving_tracks()
    assert motion_binding(tracks, [mask], None, ["left"]) == ((None,), -1.0, 0.0)
    tracks[0, 0, :, 2] = 0
    assert motion_binding(tracks, [mask], background, ["left"]) == ((None,), -1.0, 0.0)


def test_an_object_that_is_gradually_hidden_does_not_seem_to_move():
    tracks, mask, background = moving_tracks(step=(0.0, 0.0))
    tracks[1:, 0, 0, 2] = 0
    assert motion_binding(tracks, [mask], background, ["right"]).raw == 0


def test_each_object_needs_a_direction_and_a_video_two_frames():
    tracks, mask, background = moving_tracks()
    with pytest.raises(ValueError, match="1 objects have 2 directions; each needs one"):
        motion_binding(tracks, [mask], background, ["left", "up"])
    with pytest.raises(ValueError, match="motion_binding needs 2 frames or more, and the video has 1"):
        motion_binding(tracks[:1], [mask], background, ["left"])
