"""Several rewards on one batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards import Reward, RewardError, as_reward
from rewards.combine import Scores, score_all, weighted_sum

MEDIA = torch.linspace(0, 0.75, 4).view(4, 1, 1, 1).expand(4, 3, 2, 2)
PROMPTS = ['a sign "CAT"', "a cat", 'a sign "DOG"', "a dog"]
ROWS = [{"tag": "text"}, {"tag": "shape"}, {"tag": "text"}, {"tag": "shape"}]


class Brightness(Reward):
    def __call__(self, media, prompts, metadata):
        return media.mean((1, 2, 3))


class Quotes(Reward):
    """Applies to prompts with quotes and fails on others."""

    def __init__(self):
        self.asked = []

    def applies_to(self, row):
        return '"' in row["prompt"]

    def __call__(self, media, prompts, metadata):
        self.asked.append((media, prompts, metadata))
        for index, prompt in enumerate(prompts):
            if '"' not in prompt:
                raise RewardError(f"item {index} quotes nothing")
        return [1.0] * len(prompts)


class Shapes(Reward):
    def applies_to(self, row):
        return row["tag"] == "shape"

    def __call__(self, media, prompts, metadata):
        return [3.0] * len(prompts)


def test_a_reward_is_asked_only_about_the_items_it_applies_to():
    quotes = Quotes()
    scores = score_all({"light": Brightness(), "text": quotes}, MEDIA, PROMPTS, ROWS)
    assert scores["light"].values.tolist() == [0, 0.25, 0.5, 0.75] and scores["light"].applies.all()
    assert scores["text"].values.tolist() == [1, 0, 1, 0]
    assert scores["text"].applies.tolist() == [True, False, True, False]
    (media, prompts, metadata) = quotes.asked[0]
    assert torch.equal(media, MEDIA[[0, 2]]) and prompts == PROMPTS[::2] and metadata == ROWS[::2]


def test_a_total_is_the_weighted_mean_of_the_scores_that_apply():
    scores = score_all({"light": Brightness(), "text": Quotes(), "shape": Shapes()}, MEDIA, PROMPTS, ROWS)
    total = weighted_sum(scores, {"light": 1, "text": 3, "shape": 1})
    torch.testing.assert_close(total, torch.tensor([3 / 4, 3.25 / 2, 3.5 / 4, 3.75 / 2]))
    assert total.dtype == torch.float32


def test_a_reward_alone_is_asked_about_every_item():
    with pytest.raises(RewardError, match="item 1 quotes nothing"):
        score_all({"text": Quotes()}, MEDIA, PROMPTS, ROWS)
    scores = score_all({"text": Quotes()}, MEDIA[::2], PROMPTS[::2])
    assert scores["text"].values.tolist() == [1, 1] and scores["text"].applies.all()


def test_a_reward_that_applies_to_nothing_is_not_called():
    quotes = Quotes()
    scores = score_all({"light": Brightness(), "text": quotes}, MEDIA[1::2], PROMPTS[1::2])
    assert scores["text"].values.tolist() == [0, 0] and not scores["text"].applies.any() and not quotes.asked


def test_the_prompt_given_is_the_prompt_asked_about():
    rows = [{"prompt": "something else"}] * 4
    scores = score_all({"light": Brightness(), "text": Quotes()}, MEDIA, PROMPTS, rows)
    assert scores["text"].applies.tolist() == [True, False, True, False]


def test_an_item_to_which_no_reward_applies_is_named():
    with pytest.raises(RewardError, match=r"none of the rewards text, shape applies to item 1 \('a cat'\)"):
        score_all({"text": Quotes(), "shape": Shapes()}, MEDIA, PROMPTS, [{"tag": "text"}] * 4)


def test_a_failure_on_a_part_of_the_batch_says_so():
    quotes = Quotes()
    quotes.applies_to = lambda row: row["prompt"] != PROMPTS[0]
    with pytest.raises(RewardError, match=r"item 0 quotes nothing \(counting only the 3 items to which it applies\)"):
        score_all({"light": Brightness(), "text": quotes}, MEDIA, PROMPTS)


def test_inputs_are_checked_before_any_reward_is_asked():
    with pytest.raises(RewardError, match="4 media but 3 for prompts"):
        score_all({"light": Brightness(), "text": Quotes()}, MEDIA, PROMPTS[:3])
    with pytest.raises(RewardError, match="at least one"):
        score_all({}, MEDIA, PROMPTS)


def test_a_nan_from_one_of_several_rewards_is_an_error():
    bad = as_reward(lambda media, prompts, metadata: [math.nan] * len(prompts), "bad")
    with pytest.raises(RewardError, match=r"'bad' scored item 0 .* as nan"):
        score_all({"light": Brightness(), "bad": bad}, MEDIA, PROMPTS)


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf])
def test_a_weight_that_is_no_weight_is_refused(weight):
    scores = score_all({"light": Brightness(), "text": Quotes()}, MEDIA, PROMPTS)
    with pytest.raises(RewardError, match="weight of reward 'text'"):
        weighted_sum(scores, {"light": 1, "text": weight})


def test_weights_must_name_the_same_rewards():
    scores = score_all({"light": Brightness(), "text": Quotes()}, MEDIA, PROMPTS)
    with pytest.raises(RewardError, match=r"no weight for \['text'\], no reward for \['txt'\]"):
        weighted_sum(scores, {"light": 1, "txt": 1})


def test_an_item_with_no_weight_left_is_named():
    scores = score_all({"light": Brightness(), "text": Quotes()}, MEDIA, PROMPTS)
    with pytest.raises(RewardError, match="item 1 has no reward of positive weight"):
        weighted_sum(scores, {"light": 0, "text": 1})


@given(
    st.lists(
        st.tuples(st.floats(-10, 10), st.booleans(), st.floats(0.01, 100)),
        min_size=1,
        max_size=5,
    ).filter(lambda rows: any(applies for _, applies, _ in rows))
)
def test_a_total_lies_between_the_least_and_the_greatest_score_that_applies(rows):
    scores = {
        str(i): Scores(torch.tensor([value * applies]), torch.tensor([applies]))
        for i, (value, applies, _) in enumerate(rows)
    }
    total = weighted_sum(scores, {str(i): weight for i, (_, _, weight) in enumerate(rows)}).item()
    applying = [value for value, applies, _ in rows if applies]
    assert min(applying) - 1e-4 <= total <= max(applying) + 1e-4
