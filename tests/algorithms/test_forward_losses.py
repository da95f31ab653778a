"""The losses of the forward process: golden numbers of the published codes, closed forms and invariants."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.optimize import minimize
from torch.nn import functional as F

from flowalign.algorithms.crd import centered_reward_loss
from flowalign.algorithms.forward import Decay, adaptive_error, reward_level
from flowalign.algorithms.gdro import GDROSettings, best_of_each, group_loss
from flowalign.algorithms.marble import (
    Marble,
    MarbleSettings,
    conflict_averse_weights,
    min_norm_weights,
    preferred_weights,
)
from flowalign.algorithms.nft import NFTSettings, nft_loss
from flowalign.algorithms.prdp import PRDPSettings, pair_loss
from flowalign.config import Rollout, Train


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# DiffusionNFT


def test_nft_agrees_with_the_published_code(shared):
    """The recorded policy_loss is the whole loss: the published code adds the KL to it in place before it logs it."""
    tensors = load_file(shared / "golden" / "nft.safetensors")
    for case in json.loads((shared / "golden" / "nft.json").read_text()):
        number = case.pop("case")
        given = {key.split(".")[1]: value for key, value in tensors.items() if key.startswith(f"{number}.")}
        expected = {name: given.pop(name).squeeze() for name in ("loss", "policy_loss", "kl", "grad")}
        given["velocity"].requires_grad_(True)
        result = nft_loss(**given, **case)
        torch.testing.assert_close(result.loss, expected["loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(result.loss, expected["policy_loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(result.kl, expected["kl"], rtol=1e-5, atol=0)
        torch.testing.assert_close(result.policy_loss + case["kl_weight"] * result.kl, result.loss)
        (grad,) = torch.autograd.grad(result.loss, given["velocity"])
        torch.testing.assert_close(grad, expected["grad"], rtol=1e-5, atol=1e-9)


def test_nfts_gradient_at_the_old_policy_points_along_the_advantage():
    """At v = v_old the gradient is 2 A / n times that of the adaptive error's numerator: better samples attract."""
    x0, noise, velocity = drawn(6, 4), drawn(6, 4, seed=1), drawn(6, 4, seed=2)
    sigma = torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 0.0, 2.0, 0.5, -3.0], dtype=torch.float64)
    moved = velocity.clone().requires_grad_(True)
    loss = nft_loss(x0, noise, sigma, moved, velocity, None, advantage, beta=0.5, kl_weight=0.0).loss
    (grad,) = torch.autograd.grad(loss, moved)
    state = (1 - sigma[:, None]) * x0 + sigma[:, None] * noise
    error = state - sigma[:, None] * velocity - x0
    weight = error.abs().mean(1, keepdim=True)
    expected = advantage[:, None] * -2 * sigma[:, None] * error / (4 * weight) / 6
    torch.testing.assert_close(grad, expected)


def test_a_sample_without_advantage_does_not_move_the_old_policy():
    x0, noise, velocity = drawn(3, 4), drawn(3, 4, seed=1), drawn(3, 4, seed=2)
    moved = velocity.clone().requires_grad_(True)
    loss = nft_loss(
        x0, noise, torch.full((3,), 0.5), moved, velocity, velocity, torch.zeros(3), beta=1.0, kl_weight=1.0
    )
    (grad,) = torch.autograd.grad(loss.loss, moved)
    assert grad.abs().max() < 1e-12


@given(st.floats(-20, 20), st.floats(0.1, 10))
def test_reward_levels_are_affine_in_the_clipped_advantage(advantage, clip):
    level = reward_level(torch.tensor(advantage, dtype=torch.float64), clip).item()
    assert level == pytest.approx(0.5 + min(max(advantage, -clip), clip) / (2 * clip))


def test_the_adaptive_error_is_scale_free_to_first_order_and_its_weight_takes_no_gradient():
    target, prediction = drawn(2, 5), drawn(2, 5, seed=1).requires_grad_(True)
    error = adaptive_error(prediction, target)
    far = adaptive_error(target + 3 * (prediction - target), target)
    torch.testing.assert_close(far, 3 * error)
    (grad,) = torch.autograd.grad(error.sum(), prediction)
    difference = (prediction - target).detach()
    torch.testing.assert_close(grad, 2 * difference / 5 / difference.abs().mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (Decay(), {0: 0, 1: 0, 1000: 0}),
        (Decay(slope=1e-3, last=0.5), {0: 0, 100: 0.1, 500: 0.5, 9999: 0.5}),
        (Decay(start=75, slope=7.5e-3, last=0.999), {0: 0, 75: 0, 77: 0.015, 500: 0.999}),
        (Decay(first=0.25, slope=5e-3, last=0.999), {0: 0.25, 10: 0.3, 500: 0.999}),
    ],
)
def test_decays_follow_the_published_schedules(decay, expected):
    assert {update: decay.at(update) for update in expected} == pytest.approx(expected)


@pytest.mark.parametrize("settings", [{"first": 1.0}, {"first": 0.5, "last": 0.2}])
def test_a_decay_without_meaning_is_refused(settings):
    with pytest.raises(ValueError, match=r"never moves|must not be below"):
        Decay(**settings)


# The noise levels


GRID = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


@given(st.integers(0, 2**31), st.integers(1, 5))
def test_levels_drawn_from_the_schedule_do_not_repeat_and_are_never_zero(seed, timesteps):
    levels = NFTSettings(timesteps=timesteps).levels(GRID, torch.Generator().manual_seed(seed)).tolist()
    assert len(set(levels)) == timesteps and set(levels) <= set(GRID[:-1].tolist())


@given(st.integers(0, 2**31), st.sampled_from(["uniform", "logit_normal"]), st.integers(1, 6))
def test_levels_of_a_density_lie_in_its_range_one_in_each_stratum(seed, sampling, timesteps):
    algorithm = NFTSettings(timesteps=timesteps, timestep_sampling=sampling, timestep_range=(0.3, 0.9))
    levels = algorithm.levels(GRID, torch.Generator().manual_seed(seed))
    assert ((levels >= 0.3 - 1e-6) & (levels <= 0.9 + 1e-6)).all()
    share = (levels.double() - 0.3) / 0.6
    if sampling == "logit_normal":
        low, high = (torch.special.ndtr(torch.tensor(end, dtype=torch.float64).logit()) for end in (0.3, 0.9))
        share = (torch.special.ndtr(levels.double().logit()) - low) / (high - low)
    strata = (share * timesteps).clamp(1e-6, timesteps - 1e-6).floor()
    assert sorted(strata.tolist()) == list(range(timesteps))


def test_a_range_with_too_few_sigmas_is_refused():
    with pytest.raises(ValueError, match=r"holds 2 of the rollout's sigmas; algorithm.timesteps needs 3"):
        NFTSettings(timesteps=3, timestep_range=(0.5, 0.9)).levels(GRID, torch.Generator())


# CRD


def test_crd_agrees_with_the_published_code_on_one_group(shared):
    for case in json.loads((shared / "golden" / "crd_centering.json").read_text()):
        implicit = torch.tensor(case["implicit_reward"], dtype=torch.float64, requires_grad=True)
        reward = torch.tensor(case["reward"], dtype=torch.float64)
        temperature = case["weight_temperature"] if case["weight_temperature"] >= 0 else None
        loss = centered_reward_loss(
            implicit,
            reward,
            torch.zeros(len(reward)),
            beta=case["beta"],
            weight_temperature=temperature,
            kind=case["loss_type"],
        )
        assert loss.item() == pytest.approx(case["loss"], rel=1e-5), case["case"]
        (grad,) = torch.autograd.grad(loss, implicit)
        torch.testing.assert_close(grad, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_crd_centres_within_each_prompt(temperature, kind):
    """The public code centres over all that is in the batch: with two prompts the losses differ."""
    implicit, reward = drawn(10), drawn(10, seed=1) + torch.tensor([0.0] * 5 + [3.0] * 5)
    groups = torch.tensor([0] * 5 + [7] * 5)
    settings = {"beta": 0.5, "weight_temperature": temperature, "kind": kind}
    together = centered_reward_loss(implicit, reward, groups, **settings)
    parts = [centered_reward_loss(implicit[h], reward[h], groups[h], **settings) for h in (slice(5), slice(5, 10))]
    torch.testing.assert_close(together, (parts[0] + parts[1]) / 2)
    mixed = centered_reward_loss(implicit, reward, torch.zeros(10), **settings)
    assert abs(mixed - together) > 0.005


@given(st.floats(-5, 5), st.floats(-5, 5), st.sampled_from([None, 0.5]))
def test_a_constant_added_to_a_prompt_does_not_change_crds_loss(first, second, temperature):
    implicit, reward, groups = drawn(8), drawn(8, seed=1), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    shift = torch.tensor([first] * 4 + [second] * 4, dtype=torch.float64)
    settings = {"beta": 0.5, "weight_temperature": temperature}
    plain = centered_reward_loss(implicit, reward, groups, **settings)
    torch.testing.assert_close(centered_reward_loss(implicit, reward + shift, groups, **settings), plain)
    torch.testing.assert_close(centered_reward_loss(implicit + shift, reward, groups, **settings), plain)


@pytest.mark.parametrize("kind", ["mse", "bce"])
@pytest.mark.parametrize("level", [-0.3, 0.0, 0.4])
@pytest.mark.parametrize("constant", [2.0, -7.0])
def test_crds_loss_is_zero_at_equal_rewards_and_equal_implicit_rewards(level, constant, kind):
    """One pool of temperature 0 is empty, or both are: its centre is the mean, since log Z cancels with no other."""
    implicit = torch.full((6,), constant, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 0, 0, 4, 4, 4])
    settings = {"beta": 1.0, "weight_temperature": 0.0, "kind": kind}
    loss = centered_reward_loss(implicit, torch.full((6,), level, dtype=torch.float64), groups, **settings)
    assert loss.item() == pytest.approx(0 if kind == "mse" else np.log(2), abs=1e-12)
    (grad,) = torch.autograd.grad(loss, implicit)
    assert grad.abs().max() < 1e-12


@given(st.floats(-5, 5), st.lists(st.floats(-0.5, 0.5), min_size=4, max_size=4), st.integers(0, 99))
def test_a_constant_added_to_a_prompt_does_not_change_crds_loss_at_temperature_zero_with_empty_pools(
    shift, rewards, seed
):
    implicit, reward, groups = drawn(8, seed=seed), drawn(8, seed=1), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    reward[:4] = torch.tensor(rewards, dtype=torch.float64)
    moved = implicit + torch.tensor([shift] * 4 + [0.0] * 4, dtype=torch.float64)
    plain, shifted = (
        centered_reward_loss(s, reward, groups, beta=0.5, weight_temperature=0.0) for s in (implicit, moved)
    )
    torch.testing.assert_close(shifted, plain)


# GDRO


def test_gdros_loss_of_three_samples_equals_the_one_by_hand():
    """s = (1, 0, -1), r = (2, 1, 0), temperature 1: the two terms of the paper's sum written out."""
    s, r = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([2.0, 1.0, 0.0])
    e = np.exp
    first = np.log(e(1) + 1 + e(-1)) - (e(2) * 1 + e(1) * 0 + e(0) * -1) / (e(2) + e(1) + 1)
    second = np.log(1 + e(-1)) - (e(1) * 0 + 1 * -1) / (e(1) + 1)
    groups = torch.zeros(3)
    assert group_loss(s, r, groups, temperature=1.0).item() == pytest.approx(first + second, rel=1e-6)
    assert group_loss(s, r, groups, temperature=1.0, top_1=True).item() == pytest.approx(first, rel=1e-6)


@given(st.permutations(range(4)), st.sampled_from([0.0, 0.05, 1.0]))
def test_the_order_of_the_samples_does_not_change_gdros_loss(order, temperature):
    s, r, groups = drawn(4), drawn(4, seed=1), torch.zeros(4)
    plain = group_loss(s, r, groups, temperature=temperature)
    torch.testing.assert_close(group_loss(s[list(order)], r[list(order)], groups, temperature=temperature), plain)


@given(st.floats(-5, 5), st.floats(-5, 5), st.sampled_from([0.0, 0.05, 1.0]))
def test_a_constant_added_to_a_prompt_does_not_change_gdros_loss(first, second, temperature):
    s, r, groups = drawn(6), drawn(6, seed=1), torch.tensor([0, 0, 0, 1, 1, 1])
    shift = torch.tensor([first] * 3 + [second] * 3, dtype=torch.float64)
    plain = group_loss(s, r, groups, temperature=temperature)
    torch.testing.assert_close(group_loss(s, r + shift, groups, temperature=temperature), plain)
    torch.testing.assert_close(group_loss(s + shift, r, groups, temperature=temperature), plain)


def test_gdro_of_two_hard_ranked_samples_is_diffusion_dpo():
    s, r = drawn(10), drawn(10, seed=1)
    groups = torch.arange(5).repeat_interleave(2)
    pairs = s.view(5, 2).gather(1, r.view(5, 2).argsort(1, descending=True))
    expected = -F.logsigmoid(pairs[:, 0] - pairs[:, 1]).mean()
    torch.testing.assert_close(group_loss(s, r, groups, temperature=0.0), expected)


def test_gdro_tends_to_the_hard_rank_as_the_temperature_falls():
    s, r, groups = drawn(5), torch.tensor([0.1, 0.5, 0.2, 0.9, 0.4], dtype=torch.float64), torch.zeros(5)
    hard = group_loss(s, r, groups, temperature=0.0)
    distances = [abs(group_loss(s, r, groups, temperature=t) - hard).item() for t in (0.5, 0.1, 0.02, 0.004)]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-9
    ranked = s[r.argsort(descending=True)]
    by_hand = sum(ranked[i:].logsumexp(0) - ranked[i] for i in range(4))
    torch.testing.assert_close(hard, by_hand)


def test_samples_of_equal_reward_share_a_rank():
    """With all rewards equal every order is as good: equal scores are the minimum, at log k! over the terms."""
    groups = torch.zeros(3)
    equal = group_loss(torch.zeros(3), torch.ones(3), groups, temperature=0.0)
    assert equal.item() == pytest.approx(np.log(3) + np.log(2))
    assert group_loss(torch.tensor([1.0, 0.0, 0.0]), torch.ones(3), groups, temperature=0.0) > equal


def test_gdros_loss_is_least_where_implicit_rewards_equal_rewards_over_temperature_up_to_a_constant():
    r, groups = torch.tensor([0.3, 0.0, 0.2, 0.1], dtype=torch.float64), torch.zeros(4)
    found = minimize(
        lambda s: group_loss(torch.from_numpy(s), r, groups, temperature=0.2).item(), np.zeros(4), tol=1e-12
    ).x
    np.testing.assert_allclose(found - found.mean(), (r - r.mean()).numpy() / 0.2, atol=1e-4)


def test_each_group_has_exactly_one_best_sample():
    reward = torch.tensor([0.1, 0.9, 0.9, 0.5, 0.2, 0.1])
    groups = torch.tensor([4, 4, 4, 2, 2, 2])
    assert best_of_each(reward, groups).tolist() == [False, True, False, True, False, False]


def test_gdro_refuses_a_kl_weight_and_names_beta():
    with pytest.raises(ValueError, match="beta sets its pull"):
        GDROSettings(kl_weight=0.1).check(Rollout(steps=4), Train(group_size=4, micro_batch=8), 1)


# The balance of gradients


def brute_force(objective, count, steps=60):
    """The least value on a grid of the simplex."""
    points = [p for p in itertools.product(range(steps + 1), repeat=count) if sum(p) == steps]
    return min(objective(np.array(p) / steps) for p in points)


@pytest.mark.parametrize("seed", range(4))
def test_min_norm_weights_find_the_shortest_combination(seed):
    vectors = drawn(3, 5, seed=seed)
    gram = vectors @ vectors.T
    weights = min_norm_weights(gram)
    assert weights.sum().item() == pytest.approx(1) and (weights >= 0).all()
    best = brute_force(lambda p: float(p @ gram.numpy() @ p), 3)
    assert (weights @ gram @ weights).item() <= best + 1e-6


@given(st.floats(-0.99, 0.99))
def test_two_unit_gradients_weigh_the_same(cosine):
    weights = min_norm_weights(torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(weights, torch.full((2,), 0.5, dtype=torch.float64), atol=1e-5, rtol=0)


def test_the_min_norm_step_helps_every_reward():
    """Its inner product with each gradient is at least its own squared length: no reward is harmed."""
    vectors = drawn(4, 50, seed=3)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    gram = vectors @ vectors.T
    weights = min_norm_weights(gram)
    assert (gram @ weights >= (weights @ gram @ weights) - 1e-6).all()


@pytest.mark.parametrize(("first", "second"), [(1, 1), (100, 1), (1, 3), (2.5, 2.5), (1e4, 1)])
@given(cosine=st.floats(-0.95, 0.95))
def test_the_weights_of_two_gradients_are_those_of_the_closed_form(first, second, cosine):
    """alpha ~ (w1 - c w2, w2 - c w1), at least 0: at a right angle the weights themselves."""
    gram = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
    expected = torch.tensor([first - cosine * second, second - cosine * first], dtype=torch.float64).clamp(min=0)
    found = preferred_weights(gram, torch.tensor([first, second]))
    torch.testing.assert_close(found, expected / expected.sum(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_every_reward_gains_in_proportion_to_its_weight_or_more(seed):
    vectors, preference = drawn(4, 50, seed=seed), torch.tensor([8.0, 1.0, 0.5, 3.0], dtype=torch.float64)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    gram = vectors @ vectors.T
    weights = preferred_weights(gram, preference)
    gains = gram @ weights / preference
    assert weights.sum().item() == pytest.approx(1) and (gains > 0).all()
    least = gains[weights > 1e-6]
    torch.testing.assert_close(least, least[:1].expand(len(least)), rtol=1e-4, atol=0)
    assert (gains >= least.min() - 1e-6).all()


@pytest.mark.parametrize("weight", [1.0, 0.1, 3.0])
def test_equal_weights_give_the_shortest_combination_bit_for_bit(weight):
    vectors = drawn(3, 5, seed=1)
    gram = vectors @ vectors.T
    assert torch.equal(preferred_weights(gram, torch.full((3,), weight)), min_norm_weights(gram))


@pytest.mark.parametrize("seed", range(3))
def test_conflict_averse_weights_solve_racos_problem(seed):
    """The unclipped part is checked against a grid search, the clip and the joining against the paper's formula."""
    vectors, fixed, radius = drawn(3, 4, seed=seed), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 0.4
    gram = vectors @ vectors.T
    inner, plain = gram.numpy(), fixed.numpy()
    length = radius * np.sqrt(plain @ inner @ plain)

    def objective(p):
        return p @ inner @ plain + length * np.sqrt(p @ inner @ p)

    points = [np.array(p) / 60 for p in itertools.product(range(61), repeat=3) if sum(p) == 60]
    chosen = min(points, key=objective)
    clipped = np.minimum(chosen, plain)
    expected = plain + length * clipped / np.sqrt(clipped @ inner @ clipped)
    np.testing.assert_allclose(conflict_averse_weights(gram, fixed, radius).numpy(), expected, atol=0.03)


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 1e3, 1e6])
def test_conflict_averse_weights_do_not_depend_on_the_size_of_the_gradients(size):
    vectors, fixed = drawn(3, 5, seed=1), torch.tensor([0.125, 0.25, 0.625], dtype=torch.float64)
    vectors[1] -= 2 * vectors[0]
    found = conflict_averse_weights((size * vectors) @ (size * vectors).T, fixed, 0.4)
    expected = conflict_averse_weights(vectors @ vectors.T, fixed, 0.4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_without_a_radius_raco_is_the_fixed_sum():
    vectors, fixed = drawn(3, 4), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    torch.testing.assert_close(conflict_averse_weights(vectors @ vectors.T, fixed, 0.0), fixed)


# PRDP


def test_prdp_is_zero_at_the_tilted_density_and_twice_the_centred_errors_elsewhere():
    reward = drawn(5)
    optimal = (reward / 2.0)[:, None] + 1.0
    wide = {"beta": 2.0, "proximity": 1e9}
    assert pair_loss(optimal, optimal, reward, **wide).item() == pytest.approx(0, abs=1e-20)
    ratio = drawn(5, 3, seed=1)
    error = ratio.sum(1) - reward / 2.0
    centred = 2 * ((error - error.mean()) ** 2).sum() / 4
    torch.testing.assert_close(pair_loss(ratio, ratio, reward, **wide), centred)


def test_prdp_has_no_gradient_where_a_step_has_moved_beyond_the_proximity():
    """Both samples' ratios moved the right way past the clip: the larger, clipped error teaches nothing."""
    reward, old = torch.tensor([1.0, 0.0]), torch.zeros(2, 1)
    ratio = torch.tensor([[0.3], [-0.3]], requires_grad=True)
    (grad,) = torch.autograd.grad(pair_loss(ratio, old, reward, beta=1.0, proximity=0.1), ratio)
    assert (grad == 0).all()
    (grad,) = torch.autograd.grad(pair_loss(ratio, old, reward, beta=1.0, proximity=0.5), ratio)
    assert grad[0] < 0 < grad[1]


# Settings that would be ignored


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (GDROSettings(advantage_std="none"), "algorithm.advantage_std: gdro ranks rewards and has no advantages"),
        (PRDPSettings(advantage_clip=1.0), "algorithm.advantage_clip: prdp regresses on rewards"),
        (MarbleSettings(radius=0.1), "algorithm.radius: belongs to balance: raco"),
        (MarbleSettings(advantage="summed"), "algorithm.advantage: belongs to balance: fixed"),
        (
            MarbleSettings(balance="fixed", uniform_from=10),
            "algorithm.uniform_from: a fixed balance has no weights to move",
        ),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(algorithm, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        algorithm.check(Rollout(steps=4), Train(group_size=4, micro_batch=32), 2)


def test_marbles_last_stage_uses_the_recipes_weights_and_one_backward_pass():
    marble = Marble(MarbleSettings(every=2, uniform_from=5))
    assert [marble._balances(update) for update in range(8)] == [True, False, True, False, True, False, False, False]
    marble._names, marble._fixed = ("a", "b"), (0.5, 0.5)
    marble.state["weights"] = torch.tensor([0.9, 0.1])
    assert marble.mean_weights(4).tolist() == pytest.approx([0.9, 0.1])
    assert marble.mean_weights(5).tolist() == [0.5, 0.5]
