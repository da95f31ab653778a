"""Group statistics: who is better than the other samples of the same prompt."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowalign.advantages import group_advantages, has_spread

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
