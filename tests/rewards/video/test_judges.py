"""What video judges are made of: losses on pairs, heads, transport plans. Golden numbers, closed forms, properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards.video.heads import (
    VIDEOALIGN,
    AttentionHead,
    HPQAHead,
    HPSv3Head,
    at_tokens,
    last_token,
    mean_of_tokens,
    scoring_head,
    videoalign_rewards,
    videoalign_scores,
)
from rewards.video.losses import (
    bradley_terry_with_ties,
    pair_accuracy,
    rating_loss,
    uncertainty_loss,
    win_tie_loss,
)
from rewards.video.pisces import fused_attention, token_places, transport_cost, transport_prior
from rewards.video.transport import partial_transport, relaxed_transport


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance, check_dtype=False)


# Losses on pairs


def videoalign_loss(case, a, b):
    """The mean loss of a golden case over the entries that count, and how many count."""
    if case["kind"] == "reg":
        ratings = torch.stack([case["scores_a"], case["scores_b"]])
        return rating_loss(torch.stack([a, b]), ratings), case["label"].numel()
    label = case["label"]
    margin, tie, valid = torch.where(label == -1, b - a, a - b), label == 0, label != 22
    if case["kind"] == "bt":
        valid = valid & ~tie
        return win_tie_loss(margin, tie, at_least=0.0, valid=valid), int(valid.sum())
    return bradley_terry_with_ties(margin, tie, k=5, valid=valid), int(valid.sum())


def test_videoaligns_losses_are_means_over_the_pairs_that_count_not_over_all(video_golden):
    for case in video_golden("videoalign_loss"):
        a, b = (case[f"rewards_{name}"].clone().requires_grad_() for name in "ab")
        loss, count = videoalign_loss(case, a, b)
        diluted = count / case["label"].numel()
        assert diluted * loss.item() == pytest.approx(case["loss"], rel=1e-5)
        if "mean_over_valid" in case:
            assert loss.item() == pytest.approx(case["mean_over_valid"], rel=1e-5)
        (diluted * loss).backward()
        close(a.grad, case["grad_a"])
        close(b.grad, case["grad_b"])
        for row, column in torch.cartesian_prod(*(torch.arange(size) for size in case["label"].shape)).tolist():
            alone = {
                name: value[row : row + 1, column : column + 1] if isinstance(value, torch.Tensor) else value
                for name, value in case.items()
            }
            element = videoalign_loss(alone, alone["rewards_a"], alone["rewards_b"])[0]
            close(element, case["element"][row, column])


def test_an_entry_that_does_not_count_may_be_nan_and_has_no_gradient():
    margin = torch.tensor([1.0, float("nan"), -2.0], requires_grad=True)
    tie, valid = torch.tensor([True, False, False]), torch.tensor([True, False, True])
    loss = bradley_terry_with_ties(margin, tie, k=5, valid=valid)
    close(loss, bradley_terry_with_ties(margin[valid], tie[valid], k=5))
    loss.backward()
    assert margin.grad[1] == 0 and margin.grad.isfinite().all()
    none = torch.zeros(3, dtype=torch.bool)
    assert win_tie_loss(margin, tie, at_least=3.0, valid=none).item() == 0


def test_bradley_terry_with_ties_is_a_distribution_over_win_loss_and_tie():
    for margin in (-2.0, 0.0, 1.5):
        d = torch.tensor([margin])
        win, loss, tie = (
            math.exp(-bradley_terry_with_ties(sign * d, torch.tensor([even]), k=5).item())
            for sign, even in ((1, False), (-1, False), (1, True))
        )
        assert win + loss + tie == pytest.approx(1, abs=1e-6)


@given(st.floats(-6, 6), st.floats(1.1, 20))
def test_a_tie_costs_the_same_whichever_video_comes_first_and_least_at_equal_rewards(margin, k):
    d, tie = torch.tensor([margin], dtype=torch.float64), torch.tensor([True])
    for loss in (
        lambda d: bradley_terry_with_ties(d, tie, k=k).item(),
        lambda d: win_tie_loss(d, tie, at_least=math.log(k)).item(),
    ):
        assert loss(d) == pytest.approx(loss(-d))
        assert loss(d) >= loss(0 * d) - 1e-12


def test_known_values_of_the_losses():
    zero, win, tie = torch.zeros(1), torch.tensor([False]), torch.tensor([True])
    assert bradley_terry_with_ties(zero, win, k=5).item() == pytest.approx(math.log(6))
    assert bradley_terry_with_ties(zero, tie, k=5).item() == pytest.approx(2 * math.log(6) - math.log(24))
    assert win_tie_loss(zero, tie, at_least=3.0).item() == pytest.approx(2 * math.log1p(math.exp(3)))
    even = win_tie_loss(torch.tensor([1.3]), win, at_least=0.0, smoothing=0.5)
    assert even.item() == pytest.approx(win_tie_loss(torch.tensor([-1.3]), win, at_least=0.0, smoothing=0.5).item())
    with pytest.raises(ValueError, match="k must be above 1"):
        bradley_terry_with_ties(zero, win, k=1)


def test_solirewards_loss_without_ties_is_the_mean_over_wins_not_over_all(video_golden):
    for case in video_golden("solireward_loss"):
        win, lose = (case[name].clone().requires_grad_() for name in ("win", "lose"))
        tie = case["quality_win"] == case["quality_lose"]
        valid = torch.ones_like(tie) if case["ties"] else ~tie
        how = {"at_least": case["margin"], "win_weight": case["bt_coeff"], "tie_weight": case["btt_coeff"]}
        loss = win_tie_loss(win - lose, tie, **how, smoothing=case["smoothing"], valid=valid)
        diluted = valid.float().mean() * loss
        assert diluted.item() == pytest.approx(case["loss"], rel=1e-5)
        diluted.backward()
        close(win.grad, case["grad_win"])
        close(lose.grad, case["grad_lose"])
        margins = (win - lose).detach()
        for row in valid.nonzero().flatten().tolist():
            close(win_tie_loss(margins[row : row + 1], tie[row : row + 1], **how), case["element"][row])


def test_hpsv3s_loss_keeps_its_draws_in_full_precision_or_integrates(video_golden):
    for case in video_golden("hpsv3_loss"):
        a, b = (case[f"output_{name}"].clone().requires_grad_() for name in "ab")
        assert uncertainty_loss(a, b, case["draws"]).item() == pytest.approx(case["loss_full"], rel=1e-5)
        assert uncertainty_loss(a, b).item() == pytest.approx(case["expected"], rel=1e-5)
        published = uncertainty_loss(a, b, case["draws"].half().float())
        assert published.item() == pytest.approx(case["loss"], rel=1e-5)
        published.backward()
        close(a.grad, case["grad_a"])
        close(b.grad, case["grad_b"])


def test_hpsv3s_loss_without_uncertainty_is_bradley_and_terrys():
    chosen, rejected = torch.tensor([[0.7, -30.0]]), torch.tensor([[-0.1, -30.0]])
    assert uncertainty_loss(chosen, rejected).item() == pytest.approx(math.log1p(math.exp(-0.8)), rel=1e-6)


def test_pairs_of_equal_margins_are_not_split(video_golden):
    for case in video_golden("videoalign_accuracy"):
        found = pair_accuracy(torch.tensor(case["h"]), torch.tensor(case["m"], dtype=torch.float64))
        assert found == pytest.approx((case["with_ties_right"], case["without_ties"]))


# Heads


def test_special_tokens_are_read_by_their_ids_and_the_mean_has_the_last_token(video_golden):
    for case in video_golden("videoalign_read"):
        if case["case"] == "constants":
            assert {name: list(values) for name, values in VIDEOALIGN.items()} == case["values"]
            continue
        hidden, ids, mask = case["hidden"], case["ids"], case["ids"] != case["pad"]
        if case["mode"] == "special":
            rewards = videoalign_rewards(hidden, ids, case["head"], case["special"])
            close(rewards, case.get("logits_right", case["logits"]))
            scores = videoalign_scores(case["logits"])
            close(scores, torch.tensor(case["normalised"]))
            close(scores.sum(-1), torch.tensor(case["overall"]))
        elif case["mode"] == "last":
            close(last_token(hidden, mask) @ case["head"].T, case["logits"])
        else:
            close(mean_of_tokens(hidden, mask) @ case["head"].T, case["mean_right"])


def test_a_special_token_must_stand_once_in_each_row():
    ids = torch.tensor([[1, 2, 3], [1, 3, 3]])
    with pytest.raises(ValueError, match="token 2 must stand once in row 1, and stands 0 times"):
        at_tokens(torch.zeros(2, 3, 4), ids, [1, 2])


def loaded(head, case):
    """A head with the weights of a golden case, by their published names."""
    weights = {name.removeprefix("weight."): value for name, value in case.items() if name.startswith("weight.")}
    head.load_state_dict({name: value.float() for name, value in weights.items()})
    return head.eval()


def test_solirewards_heads_load_the_published_weights_and_agree(video_golden):
    for case in video_golden("solireward_head"):
        hidden, mask, width = case["hidden"], case["mask"], case["width"]
        if case["kind"] == "attention":
            close(loaded(AttentionHead(width), case)(hidden[-1], mask), case["reward"])
        elif case["kind"] == "last_token_hidden_state":
            head = torch.nn.ModuleDict({"reward_head": scoring_head(width)})
            close(loaded(head, case)["reward_head"](last_token(hidden[-1], mask)).flatten(), case["reward"])
        else:
            head = loaded(HPQAHead(width, len(case["layers"])), case)
            last = hidden[-1].clone().requires_grad_()
            rewards = head([hidden[layer] for layer in case["layers"][:-1]] + [last], last, mask)
            close(rewards, case["reward"])
            rewards.sum().backward()
            close(head.attention_query_first_layer.query.weight.grad, case["grad.query_first"])
            close(head.attention_query_final_layer.query.weight.grad, case["grad.query_last"])
            close(last.grad, case["grad.hidden_last"])


def test_padding_does_not_change_a_reward_and_the_seed_reaches_both_queries():
    torch.manual_seed(0)
    head = HPQAHead(16, 3).eval()
    hidden, mask = torch.randn(4, 2, 6, 16), torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    rewards = head(hidden[:3], hidden[3], mask)
    other = torch.where(mask.bool()[None, ..., None], hidden, 100.0)
    close(head(other[:3], other[3], mask), rewards)
    rewards.sum().backward()
    for part in (head.attention_query_first_layer, head.attention_query_final_layer):
        assert part.query.weight.grad.abs().max() > 0


def test_hpsv3s_head_loads_the_published_weights_and_agrees(video_golden):
    for case in video_golden("hpsv3_head"):
        if case["head"] == "ranknet":
            outputs = loaded(HPSv3Head(case["width"]), case)(case["hidden"], case["ids"], case["special"])
        else:
            outputs = at_tokens(case["hidden"], case["ids"], [case["special"]])[:, 0] @ case["weight.rm_head.weight"].T
        close(outputs, case["output"])


# Transport


def test_plans_agree_with_pot(video_golden):
    for case in video_golden("partial_ot"):
        a, b, cost = case["a"], case["b"], case["cost"]
        for name in ("0.05", "0.2"):
            epsilon = float(name)
            partial = partial_transport(a, b, cost, mass=case["mass"], epsilon=epsilon)
            close(partial, case[f"entropic.{name}"], 1e-6)
            assert (partial * cost).sum().item() == pytest.approx(case["value_entropic"][name], abs=1e-6)
            relaxed = relaxed_transport(a, b, cost, exponent=0.9, epsilon=epsilon)
            close(relaxed, case[f"unbalanced.{name}"], 1e-6)
            assert relaxed.sum().item() == pytest.approx(case["unbalanced"][name]["sum"], abs=1e-6)


def test_the_cost_of_a_partial_plan_tends_to_the_least_possible(video_golden):
    for case in video_golden("partial_ot"):
        for epsilon in (0.1, 0.02):
            plan = partial_transport(case["a"], case["b"], case["cost"], mass=case["mass"], epsilon=epsilon)
            gap = (plan * case["cost"]).sum().item() - case["value_exact"]
            assert -1e-9 < gap < epsilon * case["mass"] * math.log(plan.numel())


masses = st.lists(st.floats(0.05, 1), min_size=1, max_size=5)


@given(masses, masses, st.floats(0.1, 1), st.integers(0, 99))
def test_a_partial_plan_moves_its_mass_and_no_row_or_column_gives_more_than_it_has(a, b, mass, seed):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    cost = torch.rand(len(a), len(b), generator=torch.Generator().manual_seed(seed))
    plan = partial_transport(a, b, cost, mass=mass, epsilon=0.1)
    assert plan.sum().item() == pytest.approx(mass * min(a.sum().item(), b.sum().item()), rel=1e-6)
    assert (plan.sum(1) <= a + 1e-6).all() and (plan.sum(0) <= b + 1e-6).all()
    close(partial_transport(b, a, cost.T, mass=mass, epsilon=0.1).T, plan, 1e-6)


def test_small_costs_and_empty_rows_are_no_trouble():
    a, b = torch.tensor([0.5, 0.0, 0.5]), torch.full((2,), 0.5)
    cost = torch.tensor([[0.0, 80.0], [0.0, 0.0], [80.0, 0.0]])
    plan = partial_transport(a, b, cost, mass=0.9, epsilon=0.05)
    close(plan, torch.tensor([[0.45, 0.0], [0.0, 0.0], [0.0, 0.45]]))
    with pytest.raises(ValueError, match=r"mass is a share in \(0, 1\], and is 1.5"):
        partial_transport(a, b, cost, mass=1.5, epsilon=0.1)
    with pytest.raises(ValueError, match="epsilon must be above 0"):
        relaxed_transport(a, b, cost, exponent=0.9, epsilon=0.0)


def test_piscess_prior_agrees_and_its_plan_is_converged_not_cut_off(video_golden):
    for case in video_golden("pisces_prior"):
        frame, place = token_places(case["frames"], case["patches"])
        assert torch.equal(frame, case["frame"])
        close(place, case["position"])
        valid, attention = torch.tensor(case["valid"]), case["attention"][0].clone().requires_grad_()
        query, key = case["query"][0], case["key"][0]
        for head in range(case["heads"]):
            video = key.transpose(0, 1).flatten(1)
            cost = transport_cost(query[valid], video, attention[head, valid].detach(), frame, place)
            close(cost, case["cost"][head])
            a, b = (torch.full((size,), 1 / size) for size in cost.shape)
            plan = relaxed_transport(a, b, case["cost"][head], exponent=0.9, epsilon=0.05)
            close(plan, case["plan_converged"][head], 1e-6)
            close(plan, case["plan"][head], 1e-3)  # published: stopped at a change of 1e-3
        prior = transport_prior(query, key, attention, valid, patches=case["patches"])
        converged = case["plan_converged"]
        close(prior, converged / converged.sum(-1, keepdim=True))
        close(prior, case["prior"], 1e-3)
        fused = fused_attention(attention, case["prior"], valid)
        close(fused, case["fused"][0])
        (fused * case["weight"][0]).sum().backward()
        close(attention.grad, case["grad_attention"][0])
