"""Flow-GRPO: its clipped ratio in closed form, and its loss on a policy of a few numbers."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from flowalign.algorithms.batches import TransitionBatch
from flowalign.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings, clipped_ratio_loss
from flowalign.config import Rollout
from flowalign.policies.base import Condition, Conditioning, TextPolicy
from flowalign.policies.request import MediaRequest
from flowalign.rollout.generate import rollout
from flowalign.rollout.prompts import Row
from flowalign.rollout.stages import RolloutRequest
from flowalign.sampling import DYNAMICS, sde_step

ROLLOUT = Rollout(steps=6, window=(0, 4))


def flow_grpo(**settings):
    return FlowGRPO(FlowGRPOSettings(**settings))


class LinearVelocity(nn.Module):
    """v = W [x, prompt, sigma], for latents of two numbers and prompts of one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x, sigma, prompt):
        return self.linear(torch.cat([x, prompt, sigma[:, None]], dim=1))


class TinyPolicy(TextPolicy):
    """A policy whose reference is the snapshot of how it began."""

    request = MediaRequest(8, 8)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.transformer = LinearVelocity()
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.reference_visits = 0
        self.snapshot("reference")

    def encode_prompts(self, prompts):
        return Condition({"prompt": torch.tensor([[float(len(prompt))] for prompt in prompts])})

    def _forward(self, module, x, sigma, condition):
        return module(x, sigma, condition.tensors["prompt"])

    def decode(self, latents):
        return latents.sigmoid()[:, :, None, None].expand(-1, 2, 3, 3)

    def latent_shape(self, request):
        return (2,)

    def sigmas(self, steps, schedule="model"):
        return torch.linspace(1, 0, steps + 1)

    def export(self, folder):
        raise NotImplementedError

    @contextmanager
    def reference(self):
        self.reference_visits += 1
        with super().reference():
            yield

    def move(self, amount):
        """Step away from the reference."""
        with torch.no_grad():
            for parameter in self.transformer.parameters():
                parameter += amount * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


def rolled_batch(policy, *, step=1, settings=ROLLOUT, guidance=1.0, reference_guidance=1.0, advantages=None):
    """The items of one denoising step of a real rollout: 2 prompts, 3 pictures each."""
    rows = [Row(0, "cat"), Row(1, "house")]
    settings = settings.model_copy(update={"guidance": guidance})
    samples = rollout(
        policy, RolloutRequest(rows, 3, settings, policy.request, (0, 0, 0), batch=6), keep={"trajectory", "means"}
    )
    taken = samples.trajectory
    count = len(samples.latents)
    return TransitionBatch(
        condition=samples.condition[samples.groups],
        advantages=torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, -1.5]) if advantages is None else advantages,
        groups=samples.groups,
        latents=samples.latents,
        guidance=guidance,
        reference_guidance=reference_guidance,
        samples=torch.arange(count),
        rewards=torch.zeros(count),
        shares=torch.ones(count, 1),
        sigma=taken.sigmas[step].expand(count),
        sigma_next=taken.sigmas[step + 1].expand(count),
        sigma_max=taken.sigma_max,
        state=taken.states[:, step],
        next_state=taken.states[:, step + 1],
        log_prob=taken.log_probs[:, step],
        dynamics=taken.dynamics,
        noise_level=taken.noise_level,
        mean=taken.means[:, step],
    )


def gradients(policy, loss):
    return torch.autograd.grad(loss, list(policy.transformer.parameters()))


# The clipped ratio


@given(st.floats(-5, 5), st.floats(1e-5, 0.5))
def test_at_ratio_one_the_clip_is_inactive_and_the_gradient_is_minus_the_advantage(advantage, clip_range):
    log_prob = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    loss, ratio = clipped_ratio_loss(log_prob, log_prob.detach(), advantages, clip_range)
    assert ratio.item() == 1
    assert loss.item() == -advantage
    (grad,) = torch.autograd.grad(loss.sum(), log_prob)
    assert grad.item() == pytest.approx(-advantage)


@pytest.mark.parametrize(
    ("advantage", "moved", "expected", "teaches"),
    [
        (2.0, 0.5, -2.0 * 1.2, False),  # better, and already likelier than the clip allows
        (-2.0, -0.5, 2.0 * 0.8, False),  # worse, and already less likely than the clip allows
        (2.0, -0.5, -2.0 * 0.6065306597, True),  # better, but less likely
        (-2.0, 0.5, 2.0 * 1.6487212707, True),  # worse, but likelier
        (2.0, 0.1, -2.0 * 1.1051709181, True),  # within the clip
    ],
)
def test_an_item_has_no_gradient_once_it_moved_far_enough_in_the_right_direction(advantage, moved, expected, teaches):
    log_prob = torch.tensor([moved], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    loss, ratio = clipped_ratio_loss(log_prob, torch.zeros(1), advantages, 0.2)
    assert loss.item() == pytest.approx(expected)
    (grad,) = torch.autograd.grad(loss.sum(), log_prob)
    assert grad.item() == pytest.approx(-advantage * ratio.item() if teaches else 0)


@given(st.floats(-5, 5), st.floats(-2, 2), st.floats(1e-5, 0.5))
def test_the_clipped_loss_is_never_below_the_plain_one(advantage, moved, clip_range):
    log_prob, advantages = torch.tensor([[moved], [advantage]], dtype=torch.float64)
    loss, ratio = clipped_ratio_loss(log_prob, torch.zeros(1), advantages, clip_range)
    assert loss.item() >= -advantage * ratio.item() - 1e-12


# The policy loss


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_in_the_first_inner_epoch_the_ratio_is_exactly_one(dynamics, step, guidance):
    policy = TinyPolicy()
    settings = Rollout(steps=6, window=(0, 4), dynamics=dynamics)
    batch = rolled_batch(policy, step=step, settings=settings, guidance=guidance)
    loss, figures = flow_grpo().loss(policy, batch)
    assert figures["ratio_distance"].tolist() == [0] * 6
    assert figures["clipped"].tolist() == [0] * 6
    assert loss.item() == pytest.approx(-batch.advantages.mean().item())


def test_the_first_gradient_equals_reinforces():
    policy = TinyPolicy()
    batch = rolled_batch(policy)
    loss, _ = flow_grpo().loss(policy, batch)
    step = batch
    replayed = sde_step(
        policy.velocity(step.state, step.sigma, batch.condition.positive),
        step.state,
        step.sigma,
        step.sigma_next,
        noise_level=step.noise_level,
        sigma_max=step.sigma_max,
        next_sample=step.next_state,
    )
    expected = gradients(policy, -(batch.advantages * replayed.log_prob).mean())
    for ours, theirs in zip(gradients(policy, loss), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_advantages_of_zero_teach_nothing():
    policy = TinyPolicy()
    batch = rolled_batch(policy, advantages=torch.zeros(6))
    policy.move(0.01)
    loss, _ = flow_grpo().loss(policy, batch)
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in gradients(policy, loss))


def test_advantages_are_clipped_on_both_sides():
    policy = TinyPolicy()
    far = rolled_batch(policy, advantages=torch.tensor([9.0, -7.0, 0.0, 0.0, 0.0, 0.0]))
    loss, _ = flow_grpo(advantage_clip=2.0).loss(policy, far)
    assert loss.item() == pytest.approx(-(2 - 2) / 6)
    loss, _ = flow_grpo(advantage_clip=8.0).loss(policy, far)
    assert loss.item() == pytest.approx(-(8 - 7) / 6)


def test_a_gradient_step_makes_the_better_samples_likelier():
    policy = TinyPolicy()
    batch = rolled_batch(policy)
    loss, _ = flow_grpo(clip_range=0.5).loss(policy, batch)
    with torch.no_grad():
        for parameter, grad in zip(policy.transformer.parameters(), gradients(policy, loss), strict=True):
            parameter -= 1e-3 * grad
    after, figures = flow_grpo(clip_range=0.5).loss(policy, batch)
    assert after < loss
    assert (figures["ratio_distance"] > 0).all()


def test_clipped_items_are_counted_and_teach_nothing():
    policy = TinyPolicy()
    batch = rolled_batch(policy)
    policy.move(0.3)
    _, figures = flow_grpo(clip_range=1e-6).loss(policy, batch)
    assert figures["clipped"].tolist() == [1] * 6
    log_ratio = flow_grpo(clip_range=1e3).loss(policy, batch)[1]["policy_loss"] / -batch.advantages
    done = (log_ratio > 1).float() * 2 - 1  # the sign of the way each item moved
    loss, _ = flow_grpo(clip_range=1e-6).loss(policy, TransitionBatch(**{**vars(batch), "advantages": done}))
    assert all((grad == 0).all() for grad in gradients(policy, loss))


# The KL to the reference


def divergence(policy, batch, **settings):
    loss, figures = flow_grpo(kl_weight=1.0, **settings).loss(policy, batch)
    torch.testing.assert_close(loss, (figures["policy_loss"] + figures["kl"]).mean())
    return figures["kl"]


def still_batch(policy, **more):
    """Without advantages: the loss is the KL's alone."""
    return rolled_batch(policy, advantages=torch.zeros(6), **more)


def test_the_divergence_is_zero_at_the_reference_and_grows_away_from_it():
    policy = TinyPolicy()
    batch = still_batch(policy)
    loss, figures = flow_grpo(kl_weight=1.0).loss(policy, batch)
    assert figures["kl"].tolist() == [0] * 6
    assert all((grad == 0).all() for grad in gradients(policy, loss))
    policy.move(0.01)
    loss, figures = flow_grpo(kl_weight=1.0).loss(policy, batch)
    assert (figures["kl"] > 0).all()
    assert all((grad != 0).any() for grad in gradients(policy, loss))


def test_descending_the_divergence_leads_back_to_the_reference():
    policy = TinyPolicy()
    batch = still_batch(policy)
    policy.move(0.1)
    before = divergence(policy, batch).mean()
    for _ in range(100):
        loss, _ = flow_grpo(kl_weight=1.0).loss(policy, batch)
        with torch.no_grad():
            for parameter, grad in zip(policy.transformer.parameters(), gradients(policy, loss), strict=True):
                parameter -= 0.05 * grad
    assert divergence(policy, batch).mean() < 0.5 * before


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_exact_divergence_is_the_gaussians_mean_over_dimensions(dynamics, guidance):
    policy = TinyPolicy()
    settings = Rollout(steps=6, window=(0, 4), dynamics=dynamics)
    batch = still_batch(policy, settings=settings, reference_guidance=guidance)
    policy.move(0.1)
    step = batch

    def gaussian(guidance):
        velocity = policy.guided_velocity(step.state, step.sigma, batch.condition, guidance)
        taken = sde_step(
            velocity,
            step.state,
            step.sigma,
            step.sigma_next,
            dynamics=dynamics,
            noise_level=step.noise_level,
            sigma_max=step.sigma_max,
        )
        return Normal(taken.mean, taken.std)

    with torch.no_grad():
        ours = gaussian(1.0)
        with policy.reference():
            theirs = gaussian(guidance)
    torch.testing.assert_close(divergence(policy, batch), kl_divergence(ours, theirs).mean(1))


@pytest.mark.parametrize(("dynamics", "factor"), [("flow_sde", 1 / 6), ("dance_sde", 1 / 6), ("cps", 1)])
def test_the_published_divergence_is_weaker_by_the_step_except_for_cps(dynamics, factor):
    policy = TinyPolicy()
    batch = still_batch(policy, settings=Rollout(steps=6, window=(0, 4), dynamics=dynamics))
    policy.move(0.1)
    torch.testing.assert_close(divergence(policy, batch, kl="flow_grpo"), factor * divergence(policy, batch))


def test_the_kl_weight_scales_the_divergence():
    policy = TinyPolicy()
    batch = still_batch(policy)
    policy.move(0.1)
    losses = [flow_grpo(kl_weight=weight).loss(policy, batch)[0].item() for weight in (0.0, 0.04, 1.0)]
    assert losses[0] == 0
    assert losses[1] == pytest.approx(0.04 * losses[2])


def test_without_a_kl_weight_the_reference_needs_no_forward_pass():
    policy = TinyPolicy()
    batch = rolled_batch(policy)
    policy.forwards = 0
    _, figures = flow_grpo(kl_weight=0.0).loss(policy, batch)
    assert (policy.forwards, policy.reference_visits) == (6, 0)
    assert "kl" not in figures
    flow_grpo(kl_weight=0.1).loss(policy, batch)
    assert (policy.forwards, policy.reference_visits) == (6 + 12, 1)


def test_the_reference_gets_no_gradient_and_leaves_the_weights_unchanged():
    policy = TinyPolicy()
    batch = rolled_batch(policy)
    policy.move(0.1)
    before, kept = policy.trainable_state(), {k: v.clone() for k, v in policy.snapshots["reference"].items()}
    loss, figures = flow_grpo(kl_weight=0.1).loss(policy, batch)
    loss.backward()
    assert not any(figure.requires_grad for figure in figures.values())
    for name, parameter in policy.trainable_parameters().items():
        assert torch.equal(parameter, before[name])
        assert torch.equal(policy.snapshots["reference"][name], kept[name])


# GRPO-Guard


@pytest.mark.parametrize("dynamics", ["flow_sde", "dance_sde", "memoryless"])
@pytest.mark.parametrize("step", range(4))
def test_the_guarded_ratio_of_a_policy_that_has_not_moved_is_exactly_one(dynamics, step):
    policy = TinyPolicy()
    batch = rolled_batch(policy, step=step, settings=Rollout(steps=6, window=(0, 4), dynamics=dynamics))
    loss, figures = flow_grpo(ratio="guard").loss(policy, batch)
    assert figures["ratio_distance"].tolist() == [0] * 6
    assert loss.item() == pytest.approx(-batch.advantages.mean().item() * 6)  # divided by a step of 1 / 6


def test_the_guarded_ratio_takes_each_items_own_bias_and_noise():
    """By hand: log ratio_i = std_i (log p_i - log p_rollout_i + mean (m_i - m_rollout_i)^2 / (2 std_i^2))."""
    policy = TinyPolicy()
    early, late = rolled_batch(policy, step=1), rolled_batch(policy, step=3)
    policy.move(0.1)
    expected = []
    for batch in (early, late):
        step = batch
        mean, std = gaussian_now(policy, batch)
        gain = (Normal(mean, std).log_prob(step.next_state) - Normal(step.mean, std).log_prob(step.next_state)).mean(1)
        bias = ((mean - step.mean) ** 2 / (2 * std**2)).mean(1)
        ratio = ((gain + bias) * std.flatten()).exp()
        expected.append(-batch.advantages * ratio * 6)
        plain = flow_grpo(clip_range=1e3).loss(policy, batch)[1]["policy_loss"]
        torch.testing.assert_close(plain, -batch.advantages * gain.exp())
    both = join(early, late)
    loss, figures = flow_grpo(ratio="guard", clip_range=1e3, advantage_clip=9.0).loss(policy, both)
    torch.testing.assert_close(figures["policy_loss"], torch.cat(expected))
    torch.testing.assert_close(loss, torch.cat(expected).mean())


def test_a_sample_at_the_rollouts_mean_has_the_guarded_ratio_one_however_far_the_policy_moved():
    """That is what the bias takes away: there the plain ratio is below 1 for every other policy."""
    policy = TinyPolicy()
    batch = rolled_batch(policy)
    _, std = gaussian_now(policy, batch)
    step = batch
    log_prob = Normal(step.mean, std).log_prob(step.mean).mean(1)
    middle = replace(batch, next_state=step.mean, log_prob=log_prob)
    policy.move(0.3)
    guarded = flow_grpo(ratio="guard", clip_range=1e3).loss(policy, middle)[1]["ratio_distance"]
    assert guarded.max() < 1e-6
    plain = flow_grpo(clip_range=1e3).loss(policy, middle)[1]["policy_loss"] / -batch.advantages
    assert (plain < 0.999).all()


def gaussian_now(policy, batch):
    """Mean and std of the batch's steps under the policy as it is."""
    step = batch
    with torch.no_grad():
        velocity = policy.velocity(step.state, step.sigma, batch.condition.positive)
        taken = sde_step(
            velocity,
            step.state,
            step.sigma,
            step.sigma_next,
            noise_level=step.noise_level,
            sigma_max=step.sigma_max,
        )
    return taken.mean, taken.std


def join(*batches):
    """The items of batches from one rollout in one batch."""

    def column(name):
        values = [getattr(batch, name) for batch in batches]
        return torch.cat(values) if isinstance(values[0], torch.Tensor) and values[0].ndim else values[0]

    condition = Conditioning.cat([batch.condition for batch in batches])
    return TransitionBatch(
        **{name: column(name) for name in vars(batches[0]) if name != "condition"}, condition=condition
    )
