"""`rewards.score`: what a reward is given and what may come back."""

import math

import numpy as np
import pytest
import torch

import rewards
from rewards import Reward, RewardError, as_reward, score

MEDIA = torch.linspace(0, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8)
PROMPTS = ["a cat", "a dog", "a red kite", "an owl"]


def returning(result):
    def fixed(media, prompts, metadata):
        return result

    return as_reward(fixed)


class Fixed(Reward):
    """Returns what it holds, unconverted, as a careless Reward might."""

    def __init__(self, result):
        self.result = result

    def __call__(self, media, prompts, metadata):
        return self.result


@pytest.mark.parametrize(
    "result",
    [
        [0, 0.5, 1, 2],
        (0.0, 0.5, 1.0, 2.0),
        np.array([0, 0.5, 1, 2]),
        np.array([0, 0.5, 1, 2], dtype=np.float16),
        [np.float32(0), np.float64(0.5), np.int64(1), torch.tensor(2.0)],
        torch.tensor([0, 0.5, 1, 2], dtype=torch.float64),
        torch.tensor([0, 0.5, 1, 2], requires_grad=True),
    ],
)
@pytest.mark.parametrize("made", [returning, Fixed])
def test_numbers_of_any_kind_become_a_detached_float32_tensor(made, result):
    scores = score(made(result), MEDIA, PROMPTS)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert scores.tolist() == [0, 0.5, 1, 2]


def test_booleans_count_as_zero_and_one():
    assert score(returning([True, False, np.bool_(True), False]), MEDIA, PROMPTS).tolist() == [1, 0, 1, 0]
    assert score(returning(MEDIA.mean((1, 2, 3)) > 0.5), MEDIA, PROMPTS).tolist() == [0, 0, 1, 1]


def test_a_reward_gets_media_prompts_and_metadata_as_they_are():
    seen = []

    def look(media, prompts, metadata):
        seen.extend([media, prompts, metadata])
        return media.mean((1, 2, 3))

    rows = [{"tag": str(index)} for index in range(4)]
    scores = score(as_reward(look), MEDIA, PROMPTS, rows)
    assert torch.equal(seen[0], MEDIA) and seen[1] == PROMPTS and seen[2] == rows
    torch.testing.assert_close(scores, MEDIA.mean((1, 2, 3)))


def test_videos_are_media_too():
    videos = torch.rand(2, 5, 3, 8, 8)
    scores = score(as_reward(lambda media, prompts, metadata: media.mean((1, 2, 3, 4))), videos, ["a", "b"])
    torch.testing.assert_close(scores, videos.mean((1, 2, 3, 4)))


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (None, "NoneType"),
        ("0.5", "str"),
        (0.5, "float"),
        ({"scores": [0] * 4}, "dict"),
        ((score_ for score_ in [0, 0, 0, 0]), "generator"),
        (torch.zeros(4, dtype=torch.complex64), "complex64"),
        (np.array(["0"] * 4), "<U1"),
        ([0.5, None, 1, 2], r"NoneType for item 1 \('a dog'\)"),
        ([0.5, 1, "2", 2], r"str for item 2 \('a red kite'\)"),
        ([0, 1, 2, [3]], r"list for item 3 \('an owl'\)"),
        ([0, 1, 2, 3, None], "NoneType for item 4"),
        ([0, 1, 2], r"shape \(3,\) for 4 items"),
        ([], r"shape \(0,\) for 4 items"),
        (torch.zeros(4, 1), r"shape \(4, 1\) for 4 items"),
        (torch.tensor(0.5), r"shape \(\) for 4 items"),
        (np.zeros((1, 4)), r"shape \(1, 4\) for 4 items"),
        ([0, 0, math.nan, math.inf], r"item 2 \('a red kite'\) as nan"),
        (torch.tensor([0, -math.inf, 0, 0]), r"item 1 \('a dog'\) as -inf"),
        ([0, 0, 0, 1e300], r"item 3 \('an owl'\) as inf"),
    ],
)
@pytest.mark.parametrize("made", [returning, Fixed])
def test_a_result_that_is_not_one_finite_number_per_item_is_refused(made, result, words):
    with pytest.raises(RewardError, match=words) as caught:
        score(made(result), MEDIA, PROMPTS)
    assert "'fixed'" in str(caught.value) and "\n" not in str(caught.value)


def test_an_exception_in_a_reward_names_the_reward_and_stays_as_the_cause():
    def broken(media, prompts, metadata):
        return metadata[0]["missing"]

    with pytest.raises(RewardError, match=r"'broken' failed on a batch of 4 .*a cat.* KeyError: 'missing'") as caught:
        score(as_reward(broken), MEDIA, PROMPTS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_rewards_own_error_is_raised_unchanged():
    own = RewardError("item 3 has no clause")

    def strict(media, prompts, metadata):
        raise own

    with pytest.raises(RewardError) as caught:
        score(as_reward(strict), MEDIA, PROMPTS)
    assert caught.value is own


@pytest.mark.parametrize(
    ("media", "prompts", "metadata", "words"),
    [
        (MEDIA.numpy(), PROMPTS, None, "media must be a float tensor .* not ndarray"),
        ((MEDIA * 255).to(torch.uint8), PROMPTS, None, "media must be a float tensor .* not torch.uint8"),
        (MEDIA[0], PROMPTS[:3], None, r"not \(3, 8, 8\)"),
        (MEDIA[:, :1], PROMPTS, None, r"not \(4, 1, 8, 8\)"),
        (MEDIA.permute(0, 2, 3, 1), PROMPTS, None, r"not \(4, 8, 8, 3\)"),
        (MEDIA[:0], [], None, r"not empty, not \(0, 3, 8, 8\)"),
        (MEDIA[:, :, :0], PROMPTS, None, r"not empty, not \(4, 3, 0, 8\)"),
        (MEDIA, PROMPTS[:3], None, "4 media but 3 for prompts"),
        (MEDIA, "a cat", None, "4 media but a str for prompts"),
        (MEDIA, None, None, "4 media but a NoneType for prompts"),
        (MEDIA, [*PROMPTS[:3], None], None, r"prompts\[3\] is None"),
        (MEDIA, PROMPTS, [{}] * 5, "4 media but 5 for metadata"),
        (MEDIA, PROMPTS, [{}, {}, "tag", {}], r"metadata\[2\] is 'tag'"),
        (MEDIA * 2 - 1, PROMPTS, None, r"item 0 \('a cat'\) has media values from -1 to"),
        (MEDIA * 1.1, PROMPTS, None, r"item 3 \('an owl'\) has media values from .* to 1.1,"),
        (torch.where(MEDIA == 1, math.nan, MEDIA), PROMPTS, None, r"item 3 \('an owl'\) has media values from nan"),
    ],
)
def test_media_prompts_and_metadata_that_do_not_fit_are_refused_before_the_reward_runs(media, prompts, metadata, words):
    def never(media, prompts, metadata):
        pytest.fail("the reward was called")

    with pytest.raises(RewardError, match=words) as caught:
        score(as_reward(never), media, prompts, metadata)
    assert "'never'" in str(caught.value)


def test_half_precision_rounding_at_the_edge_of_the_range_is_no_error():
    media = (MEDIA * 1.0002).to(torch.float16)
    assert score(returning([0] * 4), media, PROMPTS).tolist() == [0] * 4


def test_a_long_prompt_is_cut_in_the_error():
    with pytest.raises(RewardError) as caught:
        score(returning([math.nan]), MEDIA[:1], ["long " * 200])
    assert len(str(caught.value)) < 220


def test_a_reward_is_named_after_its_class_unless_it_says_otherwise():
    class Brightness(Reward):
        def __call__(self, media, prompts, metadata):
            return media.mean((1, 2, 3))

    class Darkness(Brightness):
        name = "night"

    assert (Brightness().name, Darkness().name) == ("brightness", "night")
    assert Brightness().scope == "sample" and Brightness().applies_to({"prompt": ""})


def test_a_class_without_a_call_cannot_be_a_reward():
    class Empty(Reward):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Empty()


def test_a_function_may_say_that_it_needs_whole_groups():
    def rank(media, prompts, metadata):
        return list(range(len(prompts)))

    rank.scope = "group"
    assert as_reward(rank).scope == "group"
    rank.scope = "batch"
    with pytest.raises(RewardError, match="'rank' has scope 'batch'"):
        as_reward(rank)


@pytest.mark.parametrize("target", [0.5, "ocr", Fixed])
def test_an_object_that_is_no_function_is_refused_as_a_reward(target):
    with pytest.raises(RewardError, match="neither a Reward nor a function"):
        rewards.as_reward(target)
