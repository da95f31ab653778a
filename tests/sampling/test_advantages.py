"""Group statistics: who is better than the other samples of the same prompt."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowalign.advantages import (
    RewardTable,
    advantages,
    group_advantages,
    has_spread,
    reward_advantages,
    summed_advantages,
    value_advantages,
)

scores = st.floats(-100, 100, allow_subnormal=False)
batches = st.lists(st.tuples(scores, st.integers(-3, 3)), min_size=1, max_size=24)


def columns(batch):
    """Rewards (N,) float64 and groups (N,) of pairs."""
    rewards, groups = zip(*batch, strict=True)
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)


def test_advantages_agree_with_the_published_code(shared):
    for case in json.loads((shared / "golden" / "advantages.json").read_text()):
        names = sorted(set(case["prompts"]))
        groups = torch.tensor([names.index(prompt) for prompt in case["prompts"]])
        advantages = group_advantages(torch.tensor(case["rewards"]), groups, global_std=case["global_std"])
        torch.testing.assert_close(advantages, torch.tensor(case["advantages"]), atol=1e-5, rtol=1e-5)


def test_a_reward_is_centred_in_its_group_and_divided_by_its_population_deviation():
    rewards, groups = torch.tensor([1.0, 5.0, 3.0, 10.0]), torch.tensor([7, 2, 7, 2])
    own = group_advantages(rewards, groups, eps=0)
    torch.testing.assert_close(own, torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    everyone = group_advantages(rewards, groups, global_std=True, eps=0)
    torch.testing.assert_close(everyone, torch.tensor([-1.0, -2.5, 1.0, 2.5]) / rewards.std(correction=0))


@given(batches, st.booleans())
def test_advantages_sum_to_zero_in_each_group(batch, global_std):
    rewards, groups = columns(batch)
    advantages = group_advantages(rewards, groups, global_std=global_std)
    assert advantages.dtype == torch.float32
    for group in groups.unique():
        assert advantages[groups == group].sum().abs() < 1e-4


@given(batches, st.booleans(), st.randoms())
def test_the_order_of_the_batch_does_not_matter(batch, global_std, random):
    rewards, groups = columns(batch)
    order = random.sample(range(len(batch)), len(batch))
    shuffled = group_advantages(rewards[order], groups[order], global_std=global_std)
    torch.testing.assert_close(shuffled, group_advantages(rewards, groups, global_std=global_std)[order])


@given(batches, st.lists(st.integers(-1000, 1000), min_size=7, max_size=7))
def test_a_constant_added_to_a_group_changes_nothing(batch, constants):
    rewards, groups = columns(batch)
    moved = rewards + torch.tensor(constants, dtype=torch.float64)[groups + 3]
    torch.testing.assert_close(group_advantages(moved, groups), group_advantages(rewards, groups), atol=1e-4, rtol=1e-4)


@given(batches, st.lists(st.integers(-3, 3), min_size=7, max_size=7, unique=True))
def test_the_names_of_groups_do_not_matter(batch, names):
    rewards, groups = columns(batch)
    renamed = torch.tensor(names)[groups + 3]
    torch.testing.assert_close(group_advantages(rewards, renamed), group_advantages(rewards, groups))


@given(batches)
def test_a_better_sample_of_a_group_never_has_the_lower_advantage(batch):
    rewards, groups = columns(batch)
    advantages = group_advantages(rewards, groups)
    for group in groups.unique():
        ordered = advantages[groups == group][rewards[groups == group].argsort()]
        assert (ordered.diff() >= 0).all()


@given(scores, st.integers(1, 30), st.booleans())
def test_equal_rewards_have_no_advantage(score, count, global_std):
    advantages = group_advantages(torch.full((count,), score), torch.zeros(count), global_std=global_std)
    assert advantages.abs().max() < 1e-6


def test_a_group_has_spread_when_its_rewards_differ():
    rewards, groups = torch.tensor([1.0, 2.0, 3.0, 2.0, 3.0, 9.0]), torch.tensor([4, 0, 4, 0, 4, 1])
    assert has_spread(rewards, groups).tolist() == [True, False, True, False, True, False]


@given(batches)
def test_groups_without_spread_are_those_without_advantages(batch):
    rewards, groups = columns(batch)
    rewards = rewards.round()
    advantages = group_advantages(rewards, groups)
    for group in groups.unique():
        rows = groups == group
        assert has_spread(rewards, groups)[rows].all() == (advantages[rows].abs().max() > 1e-3)


def test_an_empty_batch_has_empty_statistics():
    empty = torch.empty(0)
    assert group_advantages(empty, empty).shape == has_spread(empty, empty).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_rewards_that_differ_little_keep_their_order(dtype):
    rewards = torch.tensor([1024.0, 1032.0, 1040.0], dtype=dtype)
    advantages = group_advantages(rewards, torch.zeros(3))
    torch.testing.assert_close(advantages, torch.tensor([-1.2247, 0.0, 1.2247]), atol=1e-3, rtol=0)


# Several rewards


def scored(values, applies, weights):
    """K rewards of N samples; the total is the weighted mean of what applies."""
    values, applies, weights = torch.tensor(values), torch.tensor(applies), torch.tensor(weights)
    shares = weights[:, None] * applies
    total = (shares * values).sum(0) / shares.sum(0)
    return RewardTable(total, values, applies, weights, tuple("abc"[: len(weights)]))


GROUPS = torch.tensor([0, 0, 1, 1])
EVERYWHERE = [[True] * 4, [True] * 4]


def test_unscaled_advantages_are_the_differences_from_the_groups_mean():
    rewards = torch.tensor([1.0, 3.0, 10.0, 40.0])
    torch.testing.assert_close(advantages(rewards, GROUPS, "none"), torch.tensor([-1.0, 1.0, -15.0, 15.0]))
    torch.testing.assert_close(advantages(rewards, GROUPS, "group"), torch.tensor([-1.0, 1, -1, 1]), atol=1e-3, rtol=0)
    expected = torch.tensor([-1.0, 1.0, -15.0, 15.0]) / rewards.std(correction=0)
    torch.testing.assert_close(advantages(rewards, GROUPS, "global"), expected, atol=1e-4, rtol=1e-4)


def test_each_reward_has_its_own_advantages_where_it_applies():
    """The second reward's zeros, where it does not apply, count neither in its means nor in its deviation."""
    both = scored([[1.0, 3.0, 5.0, 5.0], [0.0, 0.0, 2.0, 4.0]], [[True] * 4, [False, False, True, True]], [1.0, 1.0])
    plain = reward_advantages(both, GROUPS, "none")
    assert plain.tolist() == [[-1, 0], [1, 0], [0, -1], [0, 1]]
    scaled = reward_advantages(both, GROUPS, "global")
    torch.testing.assert_close(
        scaled[:, 0], torch.tensor([-1.0, 1, 0, 0]) / both.values[0].std(correction=0), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(scaled[:, 1], torch.tensor([0.0, 0, -1, 1]), atol=1e-3, rtol=0)  # 2 and 4 deviate by 1


def test_a_reward_that_applies_nowhere_has_no_advantages():
    both = scored([[1.0, 3.0, 5.0, 9.0], [7.0] * 4], [[True] * 4, [False] * 4], [1.0, 1.0])
    assert reward_advantages(both, GROUPS, "global")[:, 1].tolist() == [0] * 4


def test_summed_advantages_weigh_a_reward_of_small_spread_like_one_of_large_spread():
    """By hand: group advantages (-1, 1, -1, 1) and (-1, 1, 1, -1), weights 3 and 1: (-4, 4, -2, 2) / sqrt(10)."""
    both = scored([[0.0, 100.0, 0.0, 100.0], [0.1, 0.2, 0.2, 0.1]], EVERYWHERE, [3.0, 1.0])
    expected = torch.tensor([-4.0, 4.0, -2.0, 2.0]) / 10**0.5
    torch.testing.assert_close(summed_advantages(both, GROUPS, "group"), expected, atol=5e-3, rtol=0)
    total = group_advantages(both.total, GROUPS)  # of which the second reward decides nothing
    torch.testing.assert_close(total, torch.tensor([-1.0, 1.0, -1.0, 1.0]), atol=1e-3, rtol=0)


@given(st.floats(0.01, 100), st.floats(-10, 10))
def test_the_scale_of_a_reward_does_not_change_summed_advantages(scale, shift):
    values = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = torch.stack([values[0] * scale + shift, values[1]])
    before, after = (scored(v.tolist(), EVERYWHERE, [1.0, 2.0]) for v in (values, moved))
    ours, theirs = (summed_advantages(one, GROUPS, "global") for one in (before, after))
    torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0.03)  # but for eps


def test_shares_make_the_mean_over_all_samples_a_rewards_mean_where_it_applies():
    """One of 3 samples that teach has the second reward, so it counts 3 times; the fourth sample does not teach."""
    both = scored([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]], [[True] * 4, [True, False, False, True]], [1.0, 1.0])
    teaches = torch.tensor([True, True, True, False])
    shares = both.shares(teaches)
    torch.testing.assert_close(shares[:, teaches], torch.tensor([[1.0, 1.0, 1.0], [3.0, 0.0, 0.0]]))
    means = (shares * both.values)[:, teaches].mean(1)
    torch.testing.assert_close(means, torch.tensor([2.0, 5.0]))


def test_a_share_is_never_infinite():
    """Where a reward applies to no sample that teaches, another process may wait with one to which it applies."""
    both = scored([[1.0, 2.0, 3.0, 3.0], [0.0, 0.0, 5.0, 5.0]], [[True] * 4, [False, False, True, True]], [1.0, 1.0])
    assert both.shares(torch.tensor([True, True, False, False])).tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert both.shares(torch.zeros(4, dtype=torch.bool)).tolist() == [[0] * 4, [0] * 4]


def test_the_trained_table_has_no_monitors():
    both = scored([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]], [[True, True]] * 3, [1.0, 0.0, 2.0]).trained()
    assert both.names == ("a", "c") and both.weights.tolist() == [1, 2]
    assert both.values.tolist() == [[1, 2], [5, 7]] and both.applies.shape == (2, 2)


def test_the_share_of_a_reward_that_applies_to_no_teaching_sample_is_zero():
    both = scored([[1.0] * 4, [2.0] * 4], [[True] * 4, [False, False, True, True]], [1.0, 1.0])
    teaches = torch.tensor([True, True, False, False])
    assert both.shares(teaches)[1, teaches].tolist() == [0, 0]


# Values of previews


def test_the_value_of_a_step_is_the_discounted_sum_of_the_rewards_after_it():
    """Two samples, two steps, discount 1/2: Q = (1 + 1, 2) and (0 + 1/2, 1); w = (1, 1) and (2/3, 4/3).

    Both columns' group advantages are (1, -1); with absolute = 1/10 the step's value is added before it is weighed.
    """
    rewards, groups = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([0, 0])
    plain = value_advantages(rewards, groups, discount=0.5, absolute=0.0)
    torch.testing.assert_close(plain, torch.tensor([[1.0, 1.0], [-2 / 3, -4 / 3]]), atol=1e-3, rtol=0)
    more = value_advantages(rewards, groups, discount=0.5, absolute=0.1)
    expected = torch.tensor([[1.2, 1.2], [2 / 3 * (-1 + 0.05), 4 / 3 * (-1 + 0.1)]])
    torch.testing.assert_close(more, expected, atol=1e-3, rtol=0)


def test_values_discount_each_later_preview_once_more():
    """Q = (1 + 1/2 + 4/4, 1 + 4/2, 4) = (2.5, 3, 4) and (1/4, 1/2, 1), of means 19/6 and 7/12."""
    rewards = torch.tensor([[1.0, 1.0, 4.0], [0.0, 0.0, 1.0]])
    dense = value_advantages(rewards, torch.zeros(2), discount=0.5, absolute=0.0)
    expected = torch.tensor([[15 / 19, 18 / 19, 24 / 19], [-3 / 7, -6 / 7, -12 / 7]])
    torch.testing.assert_close(dense, expected, atol=1e-3, rtol=0)


def test_a_single_preview_of_equal_weights_is_the_group_advantage():
    rewards, groups = torch.tensor([0.2, 0.9, 0.4, 0.5]), GROUPS
    dense = value_advantages(rewards[:, None], groups, discount=0.9, absolute=0.0)
    torch.testing.assert_close(dense[:, 0], group_advantages(rewards, groups))


def test_with_the_absolute_term_a_group_of_equal_rewards_teaches():
    rewards = torch.full((2, 3), 0.5)
    assert value_advantages(rewards, torch.zeros(2), discount=0.9, absolute=0.0).abs().max() == 0
    assert (value_advantages(rewards, torch.zeros(2), discount=0.9, absolute=0.1) > 0).all()


def test_values_of_negative_rewards_are_refused():
    with pytest.raises(ValueError, match="VGPO weighs steps by their values, so rewards must be at least 0"):
        value_advantages(torch.tensor([[0.1, -0.1], [0.2, 0.3]]), torch.zeros(2), discount=0.9, absolute=0.0)


def test_rewards_of_zero_have_values_of_zero():
    assert value_advantages(torch.zeros(4, 3), GROUPS, discount=0.9, absolute=0.5).abs().max() == 0
