"""PRDP at the size of Stable Diffusion 3.5's latents, where sums of logarithms are long and a prompt's paths large."""

import pytest
import torch
from torch import nn

from flowalign.advantages import RewardTable
from flowalign.algorithms.base import algorithm_of
from flowalign.algorithms.batches import Turn
from flowalign.config import recipe_from_dict
from flowalign.policies.base import Condition, TextPolicy
from flowalign.policies.request import MediaRequest
from flowalign.preflight.forwards import step_forwards
from flowalign.rollout.generate import rollout
from flowalign.rollout.prompts import Row
from flowalign.rollout.stages import RolloutRequest, Scored
from flowalign.sampling import sde_step

LATENT = (16, 64, 64)


class Channels(nn.Module):
    """v = W x of every pixel's channels, and a constant of the prompt."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def forward(self, x, prompt):
        return self.mix(x.movedim(1, -1)).movedim(-1, 1) + prompt[:, :, None, None]


class Wide(TextPolicy):
    """A policy of large latents and few weights."""

    request = MediaRequest(8, 8)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.device, self.dtype, self.transformer = torch.device("cpu"), torch.float32, Channels()
        self.largest_pass = 0
        self.snapshot("reference")

    def encode_prompts(self, prompts):
        return Condition({"prompt": torch.tensor([[0.1 * len(prompt)] for prompt in prompts])})

    def _forward(self, module, x, sigma, condition):
        self.largest_pass = max(self.largest_pass, len(x) if torch.is_grad_enabled() else 0)
        return module(x, condition.tensors["prompt"])

    def decode(self, latents):
        return latents[:, :3, :1, :1].sigmoid()

    def latent_shape(self, request):
        return LATENT

    def sigmas(self, steps, schedule="model"):
        return torch.linspace(1, 0, steps + 1)

    def export(self, folder):
        raise NotImplementedError


def recipe_of(name, micro_batch=1000, **more):
    return recipe_from_dict(
        {
            "name": "demo",
            "prompts": "a.txt",
            "rewards": {"ocr": 1},
            "algorithm": {"name": name, **more},
            "rollout": {"steps": 4},
            "train": {"steps": 1, "prompts_per_step": 2, "group_size": 3, "micro_batch": micro_batch},
        }
    )


def drawn(policy, recipe):
    """The algorithm, and its batches of the samples of two prompts with rewards."""
    rows = [Row(0, "a cat"), Row(1, "a house")]
    algorithm = algorithm_of(recipe.algorithm)
    algorithm.begin(policy)
    samples = rollout(
        policy, RolloutRequest(rows, 3, recipe.rollout, policy.request, (0, 0, 0), batch=3), keep=algorithm.keep
    )
    values = torch.tensor([[0.1, 0.9, 0.4, 0.3, 0.2, 0.8]])
    applies = torch.ones_like(values, dtype=torch.bool)
    table = RewardTable(values[0], values, applies, torch.ones(1), ("ocr",))
    weighted = algorithm.weigh(Scored(samples, table, table, 0, 3))
    turn = Turn(
        seed=0,
        step=0,
        turn=0,
        group_size=3,
        micro_batch=recipe.train.micro_batch,
        guidance=1.0,
        reference_guidance=1.0,
    )
    return algorithm, algorithm.batches(weighted, turn)


def moved(policy):
    with torch.no_grad():
        for weight in policy.transformer.parameters():
            weight += 1e-4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    policy.weights_changed()


def test_log_ratios_are_those_of_float64_at_the_size_of_a_latent():
    """sum (m - m_ref) (2 x' - m - m_ref) / (2 std^2), with means in float64: no mean of logarithms is multiplied."""
    policy, recipe = Wide(), recipe_of("prdp")
    algorithm, items = drawn(policy, recipe)
    batch = items.batch(items.units()[:1], 0)
    _, figures = algorithm.loss(policy, batch)
    assert figures["ratio_distance"].max() < 1e-9 and figures["log_ratio"].abs().max() < 1e-9
    moved(policy)
    loss, figures = algorithm.loss(policy, batch)
    step = batch

    @torch.no_grad()
    def mean():
        velocity = policy.guided_velocity(step.state, step.sigma, batch.condition, 1.0)
        settings = {"noise_level": step.noise_level, "sigma_max": step.sigma_max, "next_sample": step.next_state}
        return sde_step(velocity, step.state.double(), step.sigma, step.sigma_next, **settings)

    own = mean()
    with policy.reference():
        reference = mean()
    products = (own.mean - reference.mean) * (2 * step.next_state - own.mean - reference.mean) / (2 * own.std**2)
    expected = products.flatten(1).sum(1)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(figures["log_ratio"].double(), expected, atol=1e-7, rtol=0)
    assert torch.equal(figures["clipped"], (expected.abs() > algorithm.settings.proximity).float())
    assert loss.dtype == torch.float64


@pytest.mark.parametrize(("name", "unit"), [("prdp", 9), ("crd", 3), ("gdro", 3)])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_unit_larger_than_a_micro_batch_is_split_into_passes_with_the_same_gradient(name, unit, micro_batch):
    found = []
    for size in (1000, micro_batch):
        policy, recipe = Wide(), recipe_of(name, size)
        algorithm, items = drawn(policy, recipe)
        moved(policy)
        policy.forwards = 0
        loss, _ = algorithm.loss(policy, items.batch(items.units()[:1], 0))
        gradients = torch.autograd.grad(loss, list(policy.transformer.parameters()))
        found.append((loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
        assert policy.largest_pass == min(size, unit)
        fixed = 2 if name == "crd" else 1
        assert policy.forwards == unit * (fixed + (1 if size == 1000 else 2))
    (whole, gradient), (parts, in_parts) = found
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    assert (in_parts - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize(("micro_batch", "passes"), [(9, 1), (8, 2)])
def test_a_plan_counts_the_second_forward_pass_of_a_split_unit(micro_batch, passes):
    recipe = recipe_of("prdp", micro_batch)
    (first,) = step_forwards(recipe)
    assert (first.rollout, first.trained, first.fixed) == (6 * 4, 18, 18 * passes)
    shown = dict(recipe.arithmetic())["micro-batches per update"]
    assert shown == (
        "9 / 1 process(es) / 9 = 1"
        if passes == 1
        else "9 / 1 process(es) / 9 x 2 parts = 2, each with a second forward pass"
    )
