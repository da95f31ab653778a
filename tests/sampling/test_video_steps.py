"""The stochastic steps of video recipes: Flow-GRPO's for Wan, LongCat's limited noise, Euphonium's guided step."""

import itertools

import pytest
import torch

from flowalign.advantages import advantages, group_advantages, has_spread
from flowalign.algorithms.euphonium import dual_reward_loss
from flowalign.algorithms.flow_grpo import clipped_ratio_loss
from flowalign.config import sections
from flowalign.sampling import gaussian_kl, longcat_weight, ode_step, sde_step
from flowalign.sampling.euphonium import guided_mean, guided_step, guided_steps


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def taken(case, velocity, **how):
    """The step of a golden case under a velocity, to the sample that the case drew."""
    sigmas, index = case["sigmas"], case["index"]
    return sde_step(
        velocity, case["sample"], sigmas[index], sigmas[index + 1], sigma_max=sigmas[1], next_sample=case["next"], **how
    )


def check_step(case, how, weight=1.0):
    """Compares a golden case of GRPO on a step; `weight` (B,) multiplies the policy loss, and squared the KL."""
    velocity = case["velocity"].clone().requires_grad_()
    step = taken(case, velocity, **how)
    reference = taken(case, case["velocity_ref"], **how)
    close(step.mean, case["mean"])
    close(step.std.expand_as(step.mean)[:, 0, 0, 0, 0], case["step_std"])
    close(step.log_prob, case["log_prob"])
    sigma, sigma_next = case["sigmas"][case["index"]], case["sigmas"][case["index"] + 1]
    close(ode_step(case["velocity"], case["sample"], sigma, sigma_next), case["deterministic"])
    drawn = sde_step(
        velocity, case["sample"], sigma, sigma_next, sigma_max=case["sigmas"][1], noise=case["noise"], **how
    )
    close(drawn.next_sample, case["next"])
    losses, _ = clipped_ratio_loss(step.log_prob, case["old_log_prob"], case["advantage"], case["clip"])
    assert losses.mean().item() == pytest.approx(case["policy_loss"], abs=1e-5, rel=1e-5)
    kl = gaussian_kl(step.mean, reference.mean, step.std)
    if case["kl"] is not None:
        assert kl.mean().item() == pytest.approx(case["kl"], rel=1e-5)
    loss = (weight * losses + case["beta"] * weight**2 * kl).mean()
    loss.backward()
    return loss.item(), velocity.grad


def test_wans_step_loss_and_gradient_agree_with_flow_grpo(video_golden):
    for case in video_golden("wan_linear_step"):
        loss, gradient = check_step(case, {"dynamics": "linear_sde"})
        assert loss == pytest.approx(case["loss"], abs=1e-5, rel=1e-5)
        close(gradient, case["grad_velocity"])


def test_longcats_step_agrees_and_every_row_has_its_own_weight_not_the_batchs_mean(video_golden):
    for case in video_golden("longcat_step"):
        weight = torch.ones(len(case["index"]))
        sigma, sigma_next = case["sigmas"][case["index"]], case["sigmas"][case["index"] + 1]
        if case["reweight"]:
            weight = longcat_weight(sigma, sigma_next, sigma_max=case["sigmas"][1])
            assert weight.mean().item() == pytest.approx(case["weight"], rel=1e-5)
        how = {"dynamics": "flow_sde", "noise_level": case["a"], "std_limit": case["cap"]}
        loss, gradient = check_step(case, how, weight)
        assert loss == pytest.approx(case["loss_per_row"], rel=1e-5)
        if case["case"] != "mixed_steps":  # the published gradient is that of the batch's mean weight
            scale = case["grad_velocity"].abs().max()
            close(gradient / scale, case["grad_velocity"] / scale)


def test_linear_noise_is_the_grids_second_value_times_sigma_and_a_level_scales_it():
    sample, velocity = torch.randn(2, 3), torch.randn(2, 3)
    for level in (None, 1.0, 0.5):
        step = sde_step(velocity, sample, 0.6, 0.5, dynamics="linear_sde", noise_level=level, sigma_max=0.95)
        assert step.std.item() == pytest.approx((level or 1.0) * 0.95 * 0.6 * 0.1**0.5, rel=1e-6)
    with pytest.raises(ValueError, match="linear_sde needs sigma_max, the schedule's second value"):
        sde_step(velocity, sample, 0.6, 0.5, dynamics="linear_sde")


def test_a_limit_of_the_noise_above_it_changes_nothing_and_below_it_is_the_noise():
    sample, velocity, noise = torch.randn(3, 2, 3).unbind()
    for dynamics, level in (("flow_sde", 0.9), ("dance_sde", 0.9), ("linear_sde", None)):
        how = {"dynamics": dynamics, "noise_level": level, "sigma_max": 0.95, "noise": noise}
        free = sde_step(velocity, sample, 0.6, 0.5, **how)
        loose = sde_step(velocity, sample, 0.6, 0.5, std_limit=2.0, **how)
        close(loose.mean, free.mean, 1e-6)
        tight = sde_step(velocity, sample, 0.6, 0.5, std_limit=0.01, **how)
        assert tight.std.max().item() == pytest.approx(0.01, rel=1e-5)
        close(tight.mean, ode_step(velocity, sample, 0.6, 0.5), 1e-3)
    for dynamics, level in (("cps", 0.5), ("memoryless", None)):
        with pytest.raises(ValueError, match=f"{dynamics} takes no std_limit"):
            sde_step(velocity, sample, 0.6, 0.5, dynamics=dynamics, noise_level=level, std_limit=0.4)


def test_a_recipe_with_linear_noise_has_the_published_level_unless_it_gives_one():
    assert sections.Rollout(dynamics="linear_sde").noise_level == 1.0
    assert sections.Rollout(dynamics="linear_sde", noise_level=0.5).noise_level == 0.5


# Advantages of GenRL


def test_advantages_over_the_largest_groups_deviation_agree_with_genrl(video_golden):
    scales = {"max": "largest_group", "group": "group", "global": "global"}
    for case in video_golden("genrl_advantages"):
        groups = torch.tensor([int(name[1:]) for name in case["prompts"]])
        total = torch.zeros(len(groups))
        for name, values in case["rewards"].items():
            own = advantages(torch.tensor(values), groups, scales[case["std"]])
            close(own, torch.tensor(case["per_reward"][name]))
            total += case["weights"][name] * own
        close(total, torch.tensor(case["advantages"]))


# Euphonium


def grid_step(case):
    return case["sigmas"][case["index"]], case["sigmas"][case["index"] + 1]


def scale_of(case):
    """The factor on the gradient in a golden case."""
    scale = case["guidance_scale"] if case["guidance_scale"] >= 0 else case["eta"] ** 2 / (2 * case["beta"])
    sigma, sigma_next = grid_step(case)
    return case["guide"] * scale * (float(sigma - sigma_next) if case["times_dt"] else 1.0)


def test_guided_steps_agree_with_euphonium(video_golden):
    for case in video_golden("euphonium_step"):
        velocity = case["velocity"].clone().requires_grad_()
        guide = {"gradient": case["gradient"], "scale": scale_of(case), "normalize": case["normalize"]}
        how = {"dynamics": "dance_sde", "noise_level": case["eta"]}
        step = guided_step(velocity, case["sample"], *grid_step(case), **guide, **how, noise=case["noise"])
        close(step.mean, case["mean"])
        close(guided_mean(step.mean, **guide), case["mean_guided"])
        close(step.next_sample, case["next"])
        close(step.log_prob, case["log_prob"])
        again = sde_step(velocity, case["sample"], *grid_step(case), **how, next_sample=case["next"])
        again.log_prob.sum().backward()
        close(velocity.grad, case["grad_velocity"])


def test_each_row_is_guided_by_its_own_norm_not_the_batchs():
    mean, gradient = torch.zeros(2, 3), torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 100.0]])
    pulled = guided_mean(mean, gradient, scale=torch.tensor([1.0, 2.0]), normalize=True)
    close(pulled, torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 2.0]]))


def test_a_step_with_scale_zero_is_the_unguided_step_bit_for_bit():
    velocity, sample, noise, gradient = torch.randn(4, 2, 3, 4).unbind()
    how = {"dynamics": "dance_sde", "noise_level": 0.25, "noise": noise}
    plain = sde_step(velocity, sample, 0.6, 0.5, **how)
    guided = guided_step(velocity, sample, 0.6, 0.5, gradient=gradient, scale=0.0, **how)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(guided, plain, strict=True))


def test_the_kl_of_euphoniums_steps_is_the_gaussians_not_the_published_one(video_golden):
    for case in video_golden("euphonium_kl"):
        how = {"dynamics": "dance_sde", "noise_level": case["eta"], "noise": torch.zeros_like(case["sample"])}
        ours, theirs = (
            sde_step(case[name], case["sample"], *grid_step(case), **how) for name in ("velocity", "velocity_ref")
        )
        kl = gaussian_kl(ours.mean, theirs.mean, ours.std).item()
        assert kl == pytest.approx(case["exact"], rel=1e-5)
        square = (case["velocity"] - case["velocity_ref"]).square().mean().item()
        assert kl == pytest.approx(case["weight_v2"] * square, rel=1e-5)


def test_the_guided_steps_are_those_of_the_published_schedule(video_golden):
    for case in video_golden("euphonium_schedule"):
        if case["enabled"]:
            end = None if case["end"] < 0 else case["end"]
            found = guided_steps(case["total"], start=case["start"], end=end, interval=case["interval"])
            assert list(found) == case["steps"]
    with pytest.raises(ValueError, match="do not lie within 16 steps"):
        guided_steps(16, start=3, end=17)


def unbiased(rewards, groups, size):
    """Group advantages over the sample standard deviation, as published; 0 for a group of equal rewards."""
    own = group_advantages(rewards, groups, eps=1e-12) * ((size - 1) / size) ** 0.5
    return torch.where(has_spread(rewards, groups), own, 0.0)


def test_the_dual_reward_loss_agrees_with_euphonium(video_golden):
    for case in video_golden("euphonium_loss"):
        groups = torch.arange(case["prompts"]).repeat_interleave(case["group"])
        outcome = torch.stack([unbiased(case[f"reward.{name}"], groups, case["group"]) for name in case["rewards"]], 1)
        process = torch.stack([unbiased(column, groups, case["group"]) for column in case["process"].T], 1)
        for column, name in zip(outcome.T, case["rewards"], strict=True):
            close(column, case[f"advantage.{name}"])
        if "process_advantage" in case:
            close(process, case["process_advantage"])
        new = case["new"].clone().requires_grad_()
        rows, turns = case["order"].shape
        divisor = case["accumulation"] * case["trained_steps"]
        settings = {
            "weights": torch.tensor(case["weights"]),
            "outcome_weight": case["outcome_coef"] * (case["mode"] != "only"),
            "process_weight": case["process_coef"] * (case["mode"] != "none"),
            "clip_range": case["clip"],
            "advantage_clip": case["advantage_clip"],
        }
        total = torch.zeros(())
        for row, turn in itertools.product(range(rows), range(turns)):
            step = case["order"][row, turn]
            item = slice(row, row + 1)
            loss = dual_reward_loss(
                new[item, step], case["old"][item, step], outcome[item], process[item, step], **settings
            ).loss
            close(loss / divisor, case["loss"][row, turn])
            total = total + loss / divisor
        assert total.item() == pytest.approx(case["total"], abs=1e-5)
        total.backward()
        close(new.grad, case["grad_new"])


def test_the_dual_reward_loss_is_the_mean_of_its_rows():
    new, old, process = torch.randn(3, 6).mul(0.01).unbind()
    outcome, weights = torch.randn(6, 2), torch.tensor([0.7, 0.3])
    how = {"weights": weights, "process_weight": 0.5, "clip_range": 0.005}
    whole = dual_reward_loss(new, old, outcome, process, **how)
    rows = [
        dual_reward_loss(new[i : i + 1], old[i : i + 1], outcome[i : i + 1], process[i : i + 1], **how)
        for i in range(6)
    ]
    close(torch.stack([row.loss for row in rows]).mean(), whole.loss)
    close(whole.loss, whole.outcome_loss + 0.5 * whole.process_loss)
