"""Several rewards on one batch."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards import Reward, RewardError, as_reward
from rewards.combine import (
    Scores,
    agreement,
    base_and_bonus,
    centred_log_sigmoid,
    centred_sigmoid,
    score_all,
    standardised,
    uncertainty_weighted,
    weighted_sum,
    worst_case,
)

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


def flip(media, prompts, metadata):
    shown = media.numpy()
    shown[:] = shown[..., ::-1].copy()


SPOILERS = {
    "by torch": lambda media, prompts, metadata: media.mul_(0.5),
    "by numpy": lambda media, prompts, metadata: np.multiply(media.numpy(), 0.5, out=media.numpy()),
    "the data alone": lambda media, prompts, metadata: media.data.zero_(),
    "pixels in another order": flip,
    "prompts": lambda media, prompts, metadata: prompts.reverse(),
    "metadata": lambda media, prompts, metadata: metadata[0]["include"].clear(),
    "rows": lambda media, prompts, metadata: [row.clear() for row in metadata],
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_a_reward_that_writes_into_its_inputs_does_not_change_those_of_the_next(spoil):
    media = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prompts, rows = [*PROMPTS], [{"tag": "shape", "include": [{"class": "cat"}]} for _ in PROMPTS]
    seen = []

    def first(media, prompts, metadata):
        spoil(media, prompts, metadata)
        return [0.0] * len(media)

    def second(media, prompts, metadata):
        seen.extend(deepcopy([media, prompts, metadata]))
        return [0.0] * len(media)

    wanted = deepcopy([media, prompts, rows])
    score_all({"first": as_reward(first), "second": as_reward(second)}, media, prompts, rows)
    for found in (seen, [media, prompts, rows]):
        assert torch.equal(found[0], wanted[0]) and found[1:] == wanted[1:]


def test_a_total_is_the_weighted_mean_of_the_scores_that_apply():
    scores = score_all({"light": Brightness(), "text": Quotes(), "shape": Shapes()}, MEDIA, PROMPTS, ROWS)
    total = weighted_sum(scores, {"light": 1, "text": 3, "shape": 1})
    torch.testing.assert_close(total, torch.tensor([3 / 4, 3.25 / 2, 3.5 / 4, 3.75 / 2]))
    assert total.dtype == torch.float32


def test_a_single_reward_is_asked_about_every_item():
    with pytest.raises(RewardError, match="item 1 quotes nothing"):
        score_all({"text": Quotes()}, MEDIA, PROMPTS, ROWS)
    scores = score_all({"text": Quotes()}, MEDIA[::2], PROMPTS[::2])
    assert scores["text"].values.tolist() == [1, 1] and scores["text"].applies.all()


def test_a_reward_that_applies_to_nothing_is_not_called():
    quotes = Quotes()
    scores = score_all({"light": Brightness(), "text": quotes}, MEDIA[1::2], PROMPTS[1::2])
    assert scores["text"].values.tolist() == [0, 0] and not scores["text"].applies.any() and not quotes.asked


def test_applies_to_gets_the_given_prompt_not_the_one_in_the_metadata():
    rows = [{"prompt": "something else"}] * 4
    scores = score_all({"light": Brightness(), "text": Quotes()}, MEDIA, PROMPTS, rows)
    assert scores["text"].applies.tolist() == [True, False, True, False]


def test_an_item_to_which_no_reward_applies_is_named():
    with pytest.raises(RewardError, match=r"none of the rewards text, shape applies to item 1 \('a cat'\)"):
        score_all({"text": Quotes(), "shape": Shapes()}, MEDIA, PROMPTS, [{"tag": "text"}] * 4)


def test_a_failure_on_a_part_of_the_batch_names_the_part():
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
def test_an_invalid_weight_is_refused(weight):
    scores = score_all({"light": Brightness(), "text": Quotes()}, MEDIA, PROMPTS)
    with pytest.raises(RewardError, match="weight of reward 'text'"):
        weighted_sum(scores, {"light": 1, "text": weight})


def test_weights_must_name_the_same_rewards():
    scores = score_all({"light": Brightness(), "text": Quotes()}, MEDIA, PROMPTS)
    with pytest.raises(RewardError, match=r"no weight for \['text'\], no reward for \['txt'\]"):
        weighted_sum(scores, {"light": 1, "txt": 1})


def test_an_item_whose_rewards_all_have_weight_zero_is_named():
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


# Shaping and combinations, with the papers' own numbers where they give some


def scores_of(**values: list[float]) -> dict[str, Scores]:
    return {
        name: Scores(torch.tensor(listed), torch.ones(len(listed), dtype=torch.bool)) for name, listed in values.items()
    }


def test_par_is_the_mean_sigmoid_of_the_difference_to_the_references():
    values, references = torch.tensor([1.0, 3.0]), torch.tensor([[1.0, 0.0], [1.0, 5.0]])
    wanted = [(0.5 + 1 / (1 + math.exp(-1))) / 2, (1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(2))) / 2]
    torch.testing.assert_close(centred_sigmoid(values, references), torch.tensor(wanted))


@given(shift=st.floats(-5, 5))
def test_par_depends_on_differences_only_and_stays_between_0_and_1(shift):
    values, references = torch.tensor([-40.0, 0.3, 40.0]), torch.tensor([[0.0, 0.5]] * 3)
    shaped = centred_sigmoid(values, references)
    torch.testing.assert_close(centred_sigmoid(values + shift, references + shift), shaped, atol=1e-4, rtol=0)
    assert ((shaped >= 0) & (shaped <= 1)).all() and shaped[0] < shaped[1] < shaped[2]


def test_log_sigmoid_is_centred_on_the_quantile_of_the_fitted_gaussian():
    references = torch.tensor([[0.0, 2.0]])  # mean 1, deviation sqrt 2
    level = 1 + 2**0.5 * 1.0364334  # the 85 % quantile
    shaped = centred_log_sigmoid(torch.tensor([level]), references, 0.85)
    torch.testing.assert_close(shaped, torch.tensor([math.log(0.5)]))


def test_summed_log_sigmoids_are_the_log_probability_that_all_are_good():
    a, b = torch.tensor([0.4]), torch.tensor([-1.3])
    zero = torch.zeros(1, 1)
    both = centred_log_sigmoid(a, zero, 0.5) + centred_log_sigmoid(b, zero, 0.5)
    torch.testing.assert_close(both.exp(), a.sigmoid() * b.sigmoid())


def test_standardised_references_have_mean_0_and_deviation_1():
    references = torch.tensor([0.2, 0.4, 0.9, 0.1])
    shaped = standardised(references, references)
    assert shaped.mean().item() == pytest.approx(0, abs=1e-6) and shaped.std().item() == pytest.approx(1)
    with pytest.raises(RewardError, match="reference scores that differ"):
        standardised(references, torch.ones(3))


def test_the_worst_case_is_the_lowest_score_that_applies():
    scores = scores_of(a=[0.9, 0.1], b=[0.2, 0.8])
    scores["b"] = Scores(scores["b"].values, torch.tensor([True, False]))
    torch.testing.assert_close(worst_case(scores, {"a": 1.0, "b": 3.0}), torch.tensor([0.2, 0.1]))


def test_uncertainty_weighting_subtracts_the_variance_between_the_rewards():
    scores = scores_of(a=[1.0, 0.5], b=[0.0, 0.5])
    found = uncertainty_weighted(scores, {"a": 1.0, "b": 1.0}, penalty=2.0)
    torch.testing.assert_close(found, torch.tensor([0.5 - 2 * 0.25, 0.5]))


def test_the_forms_of_firm_give_the_numbers_of_the_paper():
    # CME: execution (0.6 + 0.4 consistency); QMA: instruction (0.4 + 0.6 quality).
    scores = scores_of(base=[1.0, 0.5, 0.0], bonus=[0.0, 0.5, 1.0])
    torch.testing.assert_close(base_and_bonus(scores, "base", "bonus", 0.6), torch.tensor([0.6, 0.4, 0.0]))
    torch.testing.assert_close(base_and_bonus(scores, "base", "bonus", 0.4), torch.tensor([0.4, 0.35, 0.0]))


def test_a_bonus_outside_0_to_1_is_refused_with_its_item():
    with pytest.raises(RewardError, match=r"reward 'bonus' scored item 1 as 1\.5"):
        base_and_bonus(scores_of(base=[1.0, 1.0], bonus=[0.0, 1.5]), "base", "bonus", 0.4)


def test_items_on_which_the_rewards_agree_get_more_trust():
    scores = scores_of(a=[0.5, 1.0], b=[0.5, 0.0])
    found = agreement(scores, {"a": 1.0, "b": 1.0}, scale=2.0)
    torch.testing.assert_close(found, torch.tensor([1.0, math.exp(-1.0)]))
