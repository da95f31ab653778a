"""Every algorithm on a Gaussian whose velocity is known, against the optimum of its own population objective.

The policy's velocity is v_theta(x) = v(x) + unit (bias + gain z), with weights of each noise level or of all together.
v is the exact marginal velocity of data N(mu, Sigma): a state at level sigma has the covariance S = L L',

    S = (1 - sigma)^2 Sigma + sigma^2 I,      v(x) = E[eps - x0 | x] = (sigma I - (1 - sigma) Sigma) S^-1 c - mu,
    c = x - (1 - sigma) mu,                   z = L^-1 c.

It learns through the Trainer, as a user's policy and reward would: rollouts, pixels, scores, advantages, items, noise
levels and updates are the package's. What it should find is computed apart, with numpy and scipy; r is the reward, G
the group size, d the number of dimensions. A reward centred by the mean of its own group is, given the sample, on
average (1 - 1/G) (r - E r), hence that factor everywhere.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, root
from scipy.special import logsumexp, softmax
from scipy.stats import norm, qmc
from torch import nn

from flowalign.advantages import RewardTable
from flowalign.algorithms.base import algorithm_of
from flowalign.algorithms.batches import Turn
from flowalign.config import recipe_from_dict
from flowalign.policies.base import Condition, TextPolicy
from flowalign.policies.request import MediaRequest
from flowalign.rollout.dataset import collect
from flowalign.rollout.generate import rollout
from flowalign.rollout.prompts import Row
from flowalign.rollout.stages import RolloutRequest, Scored
from flowalign.trainer import Trainer
from flowalign.training.display import Display
from rewards import as_reward

pytestmark = pytest.mark.slow  # trainings to their end

RANGE = 32.0  # the pixels 0 and 1 are the latents -16 and 16
ALL_AT_ONCE = 100_000


@dataclass(frozen=True)
class Gaussian:
    """N(mean (d,), cov (d, d))."""

    mean: np.ndarray
    cov: np.ndarray

    @property
    def size(self):
        return len(self.mean)

    def velocity(self, sigma):
        """(K, k) of v(x) = K x + k."""
        own = np.eye(self.size)
        spread = (1 - sigma) ** 2 * self.cov + sigma**2 * own
        matrix = (sigma * own - (1 - sigma) * self.cov) @ np.linalg.inv(spread)
        return matrix, -(1 - sigma) * matrix @ self.mean - self.mean

    def tilted(self, reward, temperature):
        """This times exp(reward / temperature)."""
        cov = np.linalg.inv(np.linalg.inv(self.cov) + reward.curvature / temperature)
        return Gaussian(cov @ (np.linalg.solve(self.cov, self.mean) + reward.slope / temperature), cov)


@dataclass(frozen=True)
class Reward:
    """r(x) = slope x - x curvature x / 2 of latents, read off the pixels."""

    slope: np.ndarray
    curvature: np.ndarray

    def of(self, x):
        return x @ self.slope - np.einsum("...i,ij,...j->...", x, self.curvature, x) / 2

    def __call__(self, media, prompts, metadata):
        return torch.from_numpy(self.of((media[:, 0, 0].cpu().double().numpy() - 0.5) * RANGE))


def reward_of(slope, curvature=None):
    size = len(slope)
    return Reward(np.array(slope), np.zeros((size, size)) if curvature is None else np.array(curvature))


DATA = {
    1: Gaussian(np.array([0.5]), np.array([[0.64]])),
    2: Gaussian(np.array([0.5, -0.3]), np.array([[0.8, 0.35], [0.35, 0.5]])),
}
REWARDS = {
    (1, "linear"): reward_of([1.0]),
    (1, "quadratic"): reward_of([1.2], [[0.8]]),
    (2, "linear"): reward_of([0.8, 0.6]),
    (2, "quadratic"): reward_of([0.9, -0.4], [[0.8, 0.3], [0.3, 0.6]]),
}
every_case = pytest.mark.parametrize(("size", "kind"), REWARDS)


class Velocity(nn.Module):
    """The velocity of the module's docstring; a state takes the weights of the nearest of `levels`."""

    def __init__(self, data, levels, units):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(len(levels), data.size))
        self.gain = nn.Parameter(torch.zeros(len(levels), data.size, data.size))
        for name, value in (("mean", data.mean), ("cov", data.cov), ("levels", levels), ("units", units)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32))

    def forward(self, x, sigma):
        own = torch.eye(len(self.mean), device=x.device)
        data, noise = (1 - sigma)[:, None, None], sigma[:, None, None]
        spread = data**2 * self.cov + noise**2 * own
        centred = (x - data[:, 0] * self.mean)[:, :, None]
        exact = (noise * own - data * self.cov) @ torch.linalg.solve(spread, centred)
        z = torch.linalg.solve_triangular(torch.linalg.cholesky(spread), centred, upper=False)
        place = (sigma[:, None] - self.levels).abs().argmin(1)
        learnt = self.bias[place] + (self.gain[place] @ z)[:, :, 0]
        return exact[:, :, 0] - self.mean + self.units[place][:, None] * learnt


class GaussianPolicy(TextPolicy):
    """Latents of one or two numbers, shown as a row of grey pixels; all prompts are alike."""

    request = MediaRequest(8, 8)

    def __init__(self, data, grid, levels=(0.5,), units=(1.0,)):
        super().__init__()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype, self.data, self.grid = torch.float32, data, grid
        self.transformer = Velocity(data, levels, units).to(self.device)
        self.snapshot("reference")

    def encode_prompts(self, prompts):
        return Condition({"prompt": torch.zeros(len(prompts), 1, device=self.device)})

    def _forward(self, module, x, sigma, condition):
        return module(x, sigma)

    def decode(self, latents):
        return (0.5 + latents / RANGE).clamp(0, 1)[:, None, None].expand(-1, 3, 1, -1)

    def latent_shape(self, request):
        return (self.data.size,)

    def sigmas(self, steps, schedule="model"):
        assert steps == len(self.grid) - 1
        return torch.as_tensor(self.grid, dtype=torch.float32)

    def export(self, folder):
        folder.mkdir()

    def velocities(self):
        """(K, k) of the velocity at each sigma of the grid but the last, as the weights are now."""
        points = torch.cat([torch.zeros(1, self.data.size), torch.eye(self.data.size)]).to(self.device)
        condition, found = self.encode_prompts([""] * len(points)), []
        for sigma in self.grid[:-1]:
            with torch.no_grad():
                values = self.velocity(points, torch.full((len(points),), sigma).to(points), condition)
            values = values.cpu().double().numpy()
            found.append(((values[1:] - values[0]).T, values[0]))
        return found

    def weights(self):
        """The bias and then the gain, in one row."""
        state = self.trainable_state()
        return np.concatenate([state[name].cpu().double().numpy().ravel() for name in ("bias", "gain")])


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """One thread for latents of two numbers, and no report with its curves."""
    torch.set_num_threads(1)
    monkeypatch.setattr("flowalign.trainer.write_report", lambda folder: folder)


def recipe_of(folder, policy, algorithm, prompts, rewards, dynamics="ode", train=None, dataset=None):
    return recipe_from_dict(
        {
            "name": "gaussian",
            "prompts": str(folder / "prompts.txt"),
            "rewards": dict.fromkeys(rewards, 1.0),
            "algorithm": algorithm,
            "dataset": dataset,
            "rollout": {"steps": len(policy.grid) - 1, "batch": ALL_AT_ONCE, "dynamics": dynamics},
            "train": {
                "prompts_per_step": prompts,
                "updates_per_step": 1,
                "micro_batch": ALL_AT_ONCE,
                "weight_decay": 0.0,
                "max_grad_norm": 1e9,
                **(train or {}),
            },
            "collect": {"group_size": 64, "shard_prompts": 256},
            "run": {"folder": str(folder / "run"), "checkpoint_every": ALL_AT_ONCE},
        }
    )


def learn(folder, policy, algorithm, rewards, *, prompts=1, **settings):
    """Train, and leave the weights' average over all updates in the policy; returns the lines of the metrics."""
    (folder / "prompts.txt").write_text("".join(f"prompt {index}\n" for index in range(prompts)))
    recipe = recipe_of(folder, policy, algorithm, prompts, rewards, **settings)
    path = Trainer.from_recipe(recipe, policy=policy, rewards=rewards, display=Display(quiet=True)).run()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    remembered = 1 - recipe.train.ema_decay ** len(lines)  # the rest is the start, where all weights are 0
    policy.load_trainable_state({name: kept / remembered for name, kept in policy.snapshots["ema"].items()})
    return lines


def distance(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


# Samplers: with an affine velocity every step is x' = A x + c + std noise.


def coefficients(grid, dynamics, noise_level=0.7):
    """(a, b, std) of each step x' = a x + b v(x) + std noise over `grid`, the last one the ODE's."""
    found = []
    for now, after in pairwise(grid):
        delta = after - now
        if after == 0 or dynamics == "ode":
            found.append((1.0, delta, 0.0))
        elif dynamics == "memoryless":
            kept = (1 - now) * after / ((1 - after) * now)
            a, b = (1 - after) + kept * after, -(1 - after) * now + kept * after * (1 - now)
            found.append((a, b, after * np.sqrt(1 - kept**2)))
        else:
            scale = noise_level * np.sqrt(now / (1 - (grid[1] if now == 1 else now)))
            drift = scale**2 / (2 * now)
            found.append((1 + drift * delta, (1 + drift * (1 - now)) * delta, scale * np.sqrt(-delta)))
    return found


def affine_steps(velocities, grid, dynamics):
    """(A, c, std) of each step."""
    return [
        (a * np.eye(len(k)) + b * matrix, b * k, std)
        for (matrix, k), (a, b, std) in zip(velocities, coefficients(grid, dynamics), strict=True)
    ]


def reference_steps(data, grid, dynamics):
    return affine_steps([data.velocity(sigma) for sigma in grid[:-1]], grid, dynamics)


def final_law(steps):
    """What steps make of standard normal noise."""
    law = Gaussian(np.zeros(len(steps[0][1])), np.eye(len(steps[0][1])))
    for matrix, shift, std in steps:
        law = Gaussian(matrix @ law.mean + shift, matrix @ law.cov @ matrix.T + std**2 * np.eye(law.size))
    return law


def policy_of_all_steps(data, grid, dynamics):
    """A policy that can move the mean of every stochastic step by any affine function, in units of its deviation."""
    units = [std / abs(b) for _, b, std in coefficients(grid, dynamics)]
    return GaussianPolicy(data, grid, grid[:-1], units)


def assert_same_law(found, wanted, start):
    """The mean moved from `start` and the covariance agree within 5 %."""
    assert np.linalg.norm(found.mean - wanted.mean) < 0.05 * np.linalg.norm(wanted.mean - start.mean)
    assert distance(found.cov, wanted.cov) < 0.05


# Flow-GRPO


def moved_steps(steps, reward, kl, *, kl_to_go):
    """`steps` with the means that maximise the value of the next state less kl KL; see the test below."""
    curvature, slope, found = reward.curvature, reward.slope, []
    for matrix, shift, std in reversed(steps):
        rate = std**2 / kl
        pull = np.linalg.inv(np.eye(len(shift)) + rate * curvature)
        mean, mean_shift = pull @ matrix, pull @ (shift + rate * slope)
        found.append((mean, mean_shift, std))
        # With the KL to go, the envelope theorem: the value's gradient at x is A' times that at the moved mean.
        back = matrix if kl_to_go else mean
        slope, curvature = back.T @ (slope - curvature @ mean_shift), back.T @ curvature @ mean
    return found[::-1]


@pytest.mark.parametrize(
    ("size", "kind", "dynamics"),
    [(*case, "memoryless") for case in REWARDS] + [(1, "linear", "flow_sde"), (2, "quadratic", "flow_sde")],
)
def test_flow_grpos_fixed_point_balances_the_pulls_of_reward_and_kl(size, kind, dynamics, tmp_path):
    """Of a stochastic step, mean m(x) = A x + c of the reference and deviation s, the policy moves the mean by u(x).

    With advantages A = r - (group's mean) and ratio 1, the expected gradient of the loss at a state x is, by u(x) and
    but for a common factor (both log-probability and KL are means over dimensions),

        -(1 - 1/G) E[r (x' - m - u) | x] / s^2 + kl u / s^2 = -(1 - 1/G) grad V(m + u) + kl u / s^2,

    by Stein's identity, V(x') = E[r(x0) | x'] smoothed by the step. So u = s^2 / kl' grad V(m + u), with
    kl' = kl / (1 - 1/G). For V = h x' - x' H x' / 2 and t = s^2 / kl':

        m + u = (I + t H)^-1 (m + t h),

    again affine: V at x is quadratic, and the recursion runs from V = r at the end back to the first step. Where r is
    linear H = 0, and each step moves by t Phi' a, Phi the product of the later A: the final mean moves by
    sum Phi s^2 Phi' a / kl', the covariance stays. Memoryless paths forget their first noise, so that this sum is the
    whole final covariance, and the trained sampler draws its reference's own law tilted by exp(r / kl').

    For a curved r this is not the optimum of E r - kl KL(paths): the loss differentiates the KL of a step at the states
    that were visited, not the KL of later steps by the states to which it leads.
    """
    data, reward, kl, group = DATA[size], REWARDS[size, kind], 0.8, 384
    grid = np.linspace(1, 0, 5)
    policy = policy_of_all_steps(data, grid, dynamics)
    metrics = learn(
        tmp_path,
        policy,
        {
            "name": "flow_grpo",
            "kl_weight": kl,
            "advantage_std": "none",
            "advantage_clip": 1e9,
            "clip_range": 1e9,
        },
        {"reward": reward},
        dynamics=dynamics,
        train={"steps": 70, "group_size": group, "learning_rate": 0.1, "ema_decay": 0.97},
    )
    assert max(line["metrics"]["ratio_distance"] for line in metrics) < 1e-6  # each update is the first of its rollout
    reference = reference_steps(data, grid, dynamics)
    start, seen_kl = final_law(reference), kl / (1 - 1 / group)
    wanted = final_law(moved_steps(reference, reward, seen_kl, kl_to_go=False))
    if (kind, dynamics) == ("linear", "memoryless"):
        tilted = start.tilted(reward, seen_kl)
        np.testing.assert_allclose(wanted.mean, tilted.mean)
        np.testing.assert_allclose(wanted.cov, tilted.cov)
    assert_same_law(final_law(affine_steps(policy.velocities(), grid, dynamics)), wanted, start)


@pytest.mark.parametrize(("size", "kind"), REWARDS)
def test_memoryless_optima_tend_to_the_tilted_gaussian_as_steps_grow(size, kind):
    """E r - kl KL(paths) is greatest, over all processes, at the reference's paths weighed by exp(r / kl), and

        N(mu, Sigma) exp((a x - x Q x / 2) / kl) ~ N(mu', Sigma'),    Sigma' = (Sigma^-1 + Q / kl)^-1,
        mu' = Sigma' (Sigma^-1 mu + a / kl) = mu + Sigma a / kl for a linear reward,

    is the final law where the first noise tells nothing of x0 (else that of each first noise is tilted on its own).
    Steps of fixed deviation reach it in the limit. Where the reward is linear the KL of a step is the same at all
    states, and what Flow-GRPO finds (the test above) is that optimum; where it is curved it stays beside it.
    """
    data, reward, kl = DATA[size], REWARDS[size, kind], 0.8
    tilted = data.tilted(reward, kl)

    def error(steps, kl_to_go):
        reference = reference_steps(data, np.linspace(1, 0, steps + 1), "memoryless")
        law = final_law(moved_steps(reference, reward, kl, kl_to_go=kl_to_go))
        moved = np.linalg.norm(law.mean - tilted.mean) / np.linalg.norm(tilted.mean - data.mean)
        return max(moved, distance(law.cov, tilted.cov))

    optimal, found = ([error(steps, to_go) for steps in (16, 64, 256, 1024)] for to_go in (True, False))
    assert optimal == sorted(optimal, reverse=True) and optimal[-1] < 0.01
    if kind == "linear":
        np.testing.assert_allclose(found, optimal)
    else:
        assert found[-1] > 0.05


# PRDP


def residual_variance(steps, moved, reference, reward, beta):
    """Var(log p_moved / p_reference - r / beta) over the paths that `steps` draw; see the test."""
    size, count = len(reward.slope), len(steps)
    path, constant = np.eye(size, count * size), np.zeros(size)  # x = path zeta + constant
    square, slope = np.zeros((count * size, count * size)), np.zeros(count * size)
    terms = []
    for index, (own, other, fixed) in enumerate(zip(steps, moved, reference, strict=True), start=1):
        following, next_constant, std = own[0] @ path, own[0] @ constant + own[1], own[2]
        if std:
            following[:, index * size : (index + 1) * size] += std * np.eye(size)
            for (matrix, shift, _), sign in ((fixed, 1), (other, -1)):
                error = following - matrix @ path, next_constant - matrix @ constant - shift
                terms.append((sign * np.eye(size) / (2 * std**2), *error))
        path, constant = following, next_constant
    terms.append((reward.curvature / (2 * beta), path, constant))
    for weight, matrix, shift in terms:
        square = square + matrix.T @ weight @ matrix
        slope = slope + 2 * matrix.T @ weight @ shift
    slope = slope - path.T @ reward.slope / beta
    return 2 * np.trace(square @ square) + slope @ slope


def consistent_steps(reference, reward, beta):
    """The steps that are least, among all, in the variance over their own paths."""
    size, width = len(reward.slope), 1e-4

    def moved(weights):
        parts = weights.reshape(-1, size, size + 1)
        stochastic = [
            (a + std * part[:, 1:], c + std * part[:, 0], std)
            for (a, c, std), part in zip(reference[:-1], parts, strict=True)
        ]
        return [*stochastic, reference[-1]]

    def gradient(weights):
        def value(other):
            return residual_variance(moved(weights), moved(other), reference, reward, beta)

        ways = width * np.eye(len(weights))
        return np.array([value(weights + way) - value(weights - way) for way in ways]) / (2 * width)

    found = root(gradient, np.zeros((len(reference) - 1) * size * (size + 1)))
    assert found.success
    return moved(found.x)


@every_case
def test_prdps_fixed_point_is_the_tilted_path_distribution_or_that_of_least_variance(size, kind, tmp_path):
    """Over pairs of paths of the policy itself the loss is (but for a factor) Var(R - r / beta), with

        R = log p_theta(path) / p_reference(path) = sum_k (|x' - m_reference(x)|^2 - |x' - m_theta(x)|^2) / (2 s_k^2).

    A path is affine in its noises zeta, so R - r / beta = zeta M zeta + q zeta + const, of variance 2 tr M^2 + |q|^2
    (M symmetric); the paths count as drawn, so the fixed point is where its gradient by m_theta alone vanishes.

    Of a linear reward and memoryless paths it is 0: means moved by s_k^2 Phi' a / beta, Phi the product of the later
    matrices A, give R = sum_k s_k a Phi zeta_k / beta + const = a x0 / beta + const. So the final law is the reference
    sampler's tilted by exp(r / beta), and there is no noise in the gradient there.
    """
    data, reward, beta = DATA[size], REWARDS[size, kind], 0.8
    grid = np.linspace(1, 0, 5)
    policy = policy_of_all_steps(data, grid, "memoryless")
    metrics = learn(
        tmp_path,
        policy,
        {"name": "prdp", "beta": beta, "proximity": 1e9},
        {"reward": reward},
        prompts=4,
        dynamics="memoryless",
        train={"steps": 80, "group_size": 64, "learning_rate": 0.1, "ema_decay": 0.95},
    )
    reference = reference_steps(data, grid, "memoryless")
    start, wanted = final_law(reference), final_law(consistent_steps(reference, reward, beta))
    if kind == "linear":
        tilted = start.tilted(reward, beta)
        np.testing.assert_allclose(wanted.mean, tilted.mean, rtol=1e-4)
        np.testing.assert_allclose(wanted.cov, tilted.cov, rtol=1e-4)
        assert metrics[-1]["loss"] < 0.01 * metrics[0]["loss"]
    assert_same_law(final_law(affine_steps(policy.velocities(), grid, "memoryless")), wanted, start)


# The forward process: finished samples of the reference's ODE, and one velocity correction for all noise levels

GRID = np.linspace(1, 0, 6)
LEVELS = GRID[1:-1]
HELD = {"first": 1 - 1e-7}  # an old policy that stays the reference
FORWARD = {"timesteps": 3, "timestep_sampling": "schedule", "timestep_range": [0.1, 0.9]}
POWER = 17
FORWARD_TRAIN = {"steps": 70, "learning_rate": 0.03, "ema_decay": 0.98}


@dataclass(frozen=True)
class Noising:
    """Samples noised to levels: what the error of a velocity is made of."""

    z: np.ndarray  # (..., d), the learnt part's input
    error: np.ndarray  # (..., d), v(x) - (eps - x0)
    sigma: np.ndarray  # (...)

    @classmethod
    def of(cls, data, x0, noise, sigma):
        """Of x0 and noise (..., d) and sigma (...), which broadcast."""
        level, x0, noise = np.broadcast_arrays(sigma[..., None], x0, noise)
        level, own = level[..., :1], np.eye(data.size)
        spread = (1 - level[..., None]) ** 2 * data.cov + level[..., None] ** 2 * own
        centred = ((1 - level) * (x0 - data.mean) + level * noise)[..., None]
        exact = (level[..., None] * own - (1 - level[..., None]) * data.cov) @ np.linalg.solve(spread, centred)
        z = np.linalg.solve(np.linalg.cholesky(spread), centred)
        return cls(z[..., 0], exact[..., 0] - data.mean - (noise - x0), level[..., 0])

    @property
    def inputs(self):
        """(1, z), (..., 1 + d)."""
        return np.concatenate([np.ones((*self.z.shape[:-1], 1)), self.z], axis=-1)

    def learnt(self, weights):
        """bias + gain z, (..., d)."""
        return self.inputs @ as_matrix(weights, self.z.shape[-1]).T


def as_matrix(weights, size):
    """Weights (d + d d,) as (bias, gain), (d, 1 + d)."""
    return np.concatenate([weights[:size, None], weights[size:].reshape(size, size)], axis=1)


def as_row(matrix):
    return np.concatenate([matrix[:, 0], matrix[:, 1:].ravel()])


def points(law, power, *shape):
    """Sobol points: samples of `law` (2^power, *shape, d), noise (2^power, d) and a uniform number (2^power,)."""
    count = int(np.prod(shape))
    uniform = qmc.Sobol((count + 1) * law.size + 1, seed=0).random_base2(power)
    normal = norm.ppf(uniform[:, :-1].clip(1e-12, 1 - 1e-12)).reshape(len(uniform), count + 1, law.size)
    samples = law.mean + normal[:, :-1] @ np.linalg.cholesky(law.cov).T
    return samples.reshape(len(uniform), *shape, law.size), normal[:, -1], uniform[:, -1]


def reference_samples(data):
    """The law of what the ODE draws from the reference in the few steps of GRID."""
    return final_law(reference_steps(data, GRID, "ode"))


def one_of_levels(uniform):
    return LEVELS[(uniform * len(LEVELS)).astype(int)]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """For each size a dataset of the reference's samples with both rewards."""
    made = {}
    for size, data in DATA.items():
        folder, policy = tmp_path_factory.mktemp(f"size_{size}"), GaussianPolicy(data, GRID)
        rewards = {kind: as_reward(REWARDS[size, kind], kind) for kind in ("linear", "quadratic")}
        recipe = recipe_of(folder, policy, "gdro", 1, rewards)
        rows = [Row(index, f"prompt {index}") for index in range(80)]
        collect(recipe, folder / "store", rows, rewards, policy, lambda count: None)
        made[size] = str(folder / "store")
    return made


@every_case
def test_gdros_fixed_point_is_the_least_listwise_loss_on_stored_samples_of_the_reference(
    size, kind, datasets, tmp_path
):
    """A group's samples x0_1 ... x0_k, in falling order of r, share eps and sigma. With e the reference's error
    v - (eps - x0) and l = bias + gain z what was learnt, s = -beta (mean (e + l)^2 - mean e^2) and the objective is

        E[sum_{i<k} (log sum_{m>=i} exp s_m - sum_{j>=i} softmax_{j>=i}(r_j / temperature) s_j)
          + stabiliser mean (e_1 + l_1)^2],

    an integral over the k + 1 normal vectors and sigma, done with Sobol points and minimised over bias and gain.
    """
    data, reward, count = DATA[size], REWARDS[size, kind], 6
    beta, temperature, stabiliser, low, high = 0.5, 1.0, 0.5, 0.2, 0.8
    policy = GaussianPolicy(data, GRID)
    learn(
        tmp_path,
        policy,
        {
            "name": "gdro",
            "beta": beta,
            "temperature": temperature,
            "stabiliser": stabiliser,
            "timesteps": 1,
            "timestep_range": [low, high],
        },
        {kind: reward},
        prompts=32,
        dataset=datasets[size],
        train={"steps": 100, "group_size": count, "learning_rate": 0.06, "ema_decay": 0.975},
    )
    x0, noise, uniform = points(reference_samples(data), 13, count)
    at = Noising.of(data, x0, noise[:, None], low + (high - low) * uniform[:, None])
    r = reward.of(x0)
    order = np.argsort(-r, axis=1)
    ranked, before = (np.take_along_axis(values, order, 1) for values in (r, (at.error**2).mean(-1)))

    def objective(weights):
        after = np.take_along_axis(((at.error + at.learnt(weights)) ** 2).mean(-1), order, 1)
        s, total = beta * (before - after), stabiliser * after[:, 0]
        for i in range(count - 1):
            wanted = softmax(ranked[:, i:] / temperature, axis=1)
            total = total + logsumexp(s[:, i:], axis=1) - (wanted * s[:, i:]).sum(1)
        return total.mean()

    wanted = minimize(objective, np.zeros(size + size**2)).x
    assert distance(policy.weights(), wanted) < 0.05


@every_case
def test_crds_fixed_point_is_the_least_centred_error(size, kind, tmp_path):
    """With the old policy held at the reference, s = D(e) - D(e + l) of its error e and the learnt part l, while the
    level is q = 1/2 + (r - group's mean) / (2 clip). Within a group, which shares eps and sigma, the mean squared
    centred residual is on average (1 - 1/G) times the variance over x0, half the mean square of the difference of
    two samples. So the objective is

        clip / beta (1 - 1/G) E_{sigma, eps} Var_{x0}(beta s - r / (2 clip)) + kl E[(m + q (1 - m)) mean l^2].

    Here in two dimensions D is the plain mean square. In one D(u) = u^2 / sg|u|: its value is |u|, its gradient twice
    that of |u|. As the centred residuals sum to 0 the centre takes part in no gradient, and the fixed point is the
    minimum with s = |e| - |e + l| and twice the first term.
    """
    data, reward, beta, clip, kl, group = DATA[size], REWARDS[size, kind], 0.1, 5.0, 0.2, 8
    adaptive = size == 1
    policy = GaussianPolicy(data, GRID)
    learn(
        tmp_path,
        policy,
        {
            "name": "crd",
            "beta": beta,
            "kl_weight": kl,
            "advantage_std": "none",
            "advantage_clip": clip,
            "adaptive": adaptive,
            "old_decay": HELD,
            "sampling_decay": HELD,
            **FORWARD,
        },
        {"reward": reward},
        prompts=48,
        train={**FORWARD_TRAIN, "learning_rate": 0.08, "group_size": group},
    )
    x0, noise, uniform = points(reference_samples(data), 14, 2)
    at = Noising.of(data, x0, noise[:, None], one_of_levels(uniform)[:, None])
    r, lowest = reward.of(x0), 1e-4 / kl
    level = 0.5 + (1 - 1 / group) * (r - r.mean()) / (2 * clip)
    scale = (2 if adaptive else 1) * clip / beta * (1 - 1 / group)

    def size_of(error):
        return np.abs(error[..., 0]) if adaptive else (error**2).mean(-1)

    def objective(weights):
        learnt = at.learnt(weights)
        residual = beta * (size_of(at.error) - size_of(at.error + learnt)) - r / (2 * clip)
        pull = (lowest + level * (1 - lowest)) * (learnt**2).mean(-1)
        return scale * (np.diff(residual, axis=1) ** 2).mean() / 2 + kl * pull.mean()

    wanted = minimize(objective, np.zeros(size + size**2)).x
    assert distance(policy.weights(), wanted) < 0.05


def nft_gradient(at, weights, level, beta, clip):
    """Of NFT's policy loss with levels (n,), the errors' own weights taken as constants; see the test."""
    learnt, pull = at.learnt(weights), 0.0
    for sign, share in ((1, level), (-1, 1 - level)):
        error = at.error + sign * beta * learnt
        pull = pull + sign * (share * at.sigma / np.abs(error).mean(1))[:, None] * error
    return mean_gradient(at, 2 * clip / at.z.shape[-1] * pull)


def kl_gradient(at, weights):
    """Of the mean square of the learnt part."""
    return mean_gradient(at, 2 / at.z.shape[-1] * at.learnt(weights))


def mean_gradient(at, by_learnt):
    return as_row(by_learnt.T @ at.inputs / len(at.z))


def vanishing(gradient, size):
    """The weights at which the gradient does; differences are wide, since it is a sum of steps at many points."""
    found = root(gradient, np.zeros(size + size**2), tol=1e-3, options={"eps": 1e-2}).x
    assert np.linalg.norm(gradient(found)) < 5e-3 * np.linalg.norm(gradient(0 * found))
    return found


@every_case
def test_nfts_fixed_point_balances_its_two_weighted_errors(size, kind, tmp_path):
    """An old policy that follows leaves nothing to find, since each step would improve on the last. Held at the
    reference, of error e, the two predictions miss x0 by sigma |e +- beta l|, and with the level
    q = 1/2 + (1 - 1/G) (r - E r) / (2 clip std r), cut to [0, 1], the objective is

        clip / beta E[q sigma mean (e + beta l)^2 / w+ + (1 - q) sigma mean (e - beta l)^2 / w-] + kl E mean l^2,

    where w+- = mean |e +- beta l| takes no gradient. What the trainer finds is then no minimum of a function but the
    root of that gradient, in which the weights move along:

        2 clip / d E[(q sigma (e + beta l) / w+ - (1 - q) sigma (e - beta l) / w-) dl] + 2 kl / d E[l dl] = 0.

    (In one dimension it is the minimum of 2 clip / beta E[q sigma |e + beta l| + (1 - q) sigma |e - beta l|]
    + kl E l^2.)
    """
    data, reward, beta, clip, kl, group = DATA[size], REWARDS[size, kind], 0.2, 2.5, 0.5, 320
    policy = GaussianPolicy(data, GRID)
    learn(
        tmp_path,
        policy,
        {"name": "nft", "beta": beta, "kl_weight": kl, "advantage_clip": clip, "old_decay": HELD, **FORWARD},
        {"reward": reward},
        train={**FORWARD_TRAIN, "group_size": group},
    )
    x0, noise, uniform = points(reference_samples(data), POWER, 1)
    at, r = Noising.of(data, x0[:, 0], noise, one_of_levels(uniform)), reward.of(x0[:, 0])
    level = (0.5 + (1 - 1 / group) * (r - r.mean()) / (2 * clip * r.std())).clip(0, 1)
    wanted = vanishing(lambda w: nft_gradient(at, w, level, beta, clip) + kl * kl_gradient(at, w), size)
    assert distance(policy.weights(), wanted) < 0.05


# MARBLE

PAIRS = {
    (1, "mixed"): (REWARDS[1, "linear"], reward_of([1.5], [[3.0]])),
    (2, "linear"): (reward_of([1.0, 0.0]), reward_of([0.0, 3.0])),
    (2, "quadratic"): (REWARDS[2, "quadratic"], reward_of([0.0, 1.5], [[0.0, 0.0], [0.0, 2.0]])),
}


@pytest.mark.parametrize(("size", "kind"), PAIRS)
def test_marbles_fixed_point_is_where_the_balanced_gradient_and_the_kls_cancel(size, kind, tmp_path):
    """Each reward has NFT's loss of the test above with its own level q_k, of gradient g_k. The shortest combination of
    two unit vectors is their mean, so alpha = (1/2, 1/2), and with a balancing every second update the step is

        1/2 [1/2 (g_1 / |g_1| + g_2 / |g_2|) 1/2 (|g_1| + |g_2|)] + 1/2 [1/2 (g_1 + g_2)] + kl grad E mean l^2

    on average. Without the KL any point between the rewards' own optima would do. Its root lies well off that of NFT on
    the mean reward, where (g_1 + g_2) / 2 and the KL's gradient cancel.
    """
    data, pair, beta, clip, kl, group, every = DATA[size], PAIRS[size, kind], 0.1, 5.0, 1.0, 720, 2
    policy = GaussianPolicy(data, GRID)
    algorithm = {
        "name": "marble",
        "beta": beta,
        "kl_weight": kl,
        "every": every,
        "advantage_std": "none",
        "advantage_clip": clip,
        "old_decay": HELD,
    }
    learn(
        tmp_path,
        policy,
        {**algorithm, **FORWARD},
        {"first": pair[0], "second": pair[1]},
        train={**FORWARD_TRAIN, "steps": 40, "learning_rate": 0.02, "ema_decay": 0.96, "group_size": group},
    )
    x0, noise, uniform = points(reference_samples(data), POWER, 1)
    at = Noising.of(data, x0[:, 0], noise, one_of_levels(uniform))
    rewards = [reward.of(x0[:, 0]) for reward in pair]
    levels = [(0.5 + (1 - 1 / group) * (r - r.mean()) / (2 * clip)).clip(0, 1) for r in rewards]

    def step(weights):
        first, second = found = [nft_gradient(at, weights, level, beta, clip) for level in levels]
        lengths = np.linalg.norm(found, axis=1)
        balanced = (first / lengths[0] + second / lengths[1]) / 2 * lengths.mean()
        return balanced / every + (1 - 1 / every) * (first + second) / 2 + kl * kl_gradient(at, weights)

    def plain_step(weights):
        return nft_gradient(at, weights, sum(levels) / 2, beta, clip) + kl * kl_gradient(at, weights)

    wanted, plain = vanishing(step, size), vanishing(plain_step, size)
    assert distance(plain, wanted) > 0.08
    assert distance(policy.weights(), wanted) < 0.05


# What holds at the start, and between MARBLE's two kinds of step


def first_items(algorithm, values, applies=None, moved=0.0):
    """Policy, algorithm and batches by update of 2 prompts' 4 samples; values (K, 8) of K rewards, where they apply."""
    policy = GaussianPolicy(DATA[2], GRID)
    trajectory = algorithm["name"] in ("flow_grpo", "prdp")
    names = tuple(f"reward {index}" for index in range(len(values)))
    recipe = recipe_of(
        Path(),
        policy,
        algorithm,
        2,
        names,
        dynamics="flow_sde" if trajectory else "ode",
        train={"group_size": 4},
    )
    algorithm_object = algorithm_of(recipe.algorithm)
    algorithm_object.begin(policy)
    rows = [Row(index, f"prompt {index}") for index in range(2)]
    samples = rollout(
        policy, RolloutRequest(rows, 4, recipe.rollout, policy.request, (0, 0, 0), batch=8), keep=algorithm_object.keep
    )
    applies = torch.ones_like(values, dtype=torch.bool) if applies is None else applies
    scored = RewardTable((values * applies).sum(0) / applies.sum(0), values, applies, torch.ones(len(values)), names)
    weighted = algorithm_object.weigh(Scored(samples, scored, scored, 0, 4))
    with torch.no_grad():
        for index, weight in enumerate(policy.trainable_parameters().values()):
            weight += moved * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)).to(weight)
    if moved:
        policy.weights_changed()
    micro_batch, guidance = recipe.train.micro_batch, recipe.rollout.guidance
    turn = Turn(0, 0, 0, 4, micro_batch, guidance, guidance)
    items = algorithm_object.batches(weighted, turn)
    return policy, algorithm_object, lambda update: items.batch(items.units(), update)


def gradients(policy, losses):
    """(L, P), of losses (L,) or one."""
    weights = list(policy.trainable_parameters().values())
    rows = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses.reshape(-1)]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


KEPT = {"equal_groups": "keep"}


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "flow_grpo", "kl_weight": 0.1, **KEPT},
        {"name": "flow_grpo", "ratio": "guard", "advantage_std": "group", **KEPT},
        {"name": "nft", "kl_weight": 0.1, **FORWARD},
        {"name": "crd", **FORWARD},
        {"name": "crd", "kind": "bce", "weight_temperature": 0.5, "adaptive": False, **FORWARD},
        {"name": "gdro", "stabiliser": 0.0, **KEPT},
        {"name": "gdro", "stabiliser": 0.0, "temperature": 0.0, **KEPT},
        {"name": "marble", "kl_weight": 0.1, **FORWARD},
        {"name": "marble", "balance": "fixed", "every": 2, **FORWARD},
        {"name": "prdp", **KEPT},
    ],
    ids=lambda algorithm: "-".join(str(value) for value in algorithm.values() if isinstance(value, str)),
)
@pytest.mark.parametrize("update", [0, 1])
def test_at_the_start_a_group_with_equal_rewards_has_no_gradient(algorithm, update):
    """The policy is the old one and the reference: each loss is then stationary in the velocity where nothing is better
    than anything else, and so is the KL. GDRO's stabiliser is left out: it follows the first sample of a group.
    """

    def norm_of(values):
        policy, made, batch = first_items(algorithm, values)
        return gradients(policy, made.loss(policy, batch(update))[0]).norm().item()

    equal = torch.tensor([[2.0] * 4 + [-1.0] * 4, [0.5] * 8])
    assert norm_of(equal) < 1e-5 * norm_of(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)))


PARTLY = torch.tensor([[True] * 8, [True] * 4 + [False] * 4, [False] * 4 + [True] * 4])


@pytest.mark.parametrize("applies", [None, PARTLY], ids=["everywhere", "partly"])
@pytest.mark.parametrize("clip", [5.0, 1.0])
def test_marbles_single_backward_pass_gives_the_balanced_step_of_the_same_weights(applies, clip):
    """Levels q_k are affine in A_k where no advantage is clipped, so that with c_k = share_k w_k of an item

        sum_k c_k (q_k l+ + (1 - q_k) l-) = c (q l+ + (1 - q) l-),  c = sum_k c_k, q the level of sum_k c_k A_k / c.

    With a clip inside of the advantages the two part.
    """
    values = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    algorithm = {"name": "marble", "kl_weight": 0.3, "advantage_clip": clip, **FORWARD}
    policy, made, batch = first_items(algorithm, values, applies, moved=0.3)
    weights = torch.tensor([0.5, 0.3, 0.2])
    made.state["weights"] = weights
    parts = gradients(policy, made.loss(policy, batch(0))[0])
    full = torch.cat([weights, torch.ones(1)]).to(parts) @ parts
    (amortised,) = gradients(policy, made.loss(policy, batch(1))[0])
    if clip == 5.0:
        torch.testing.assert_close(amortised, full, rtol=1e-4, atol=1e-6)
    else:
        assert (amortised - full).norm() > 1e-2 * full.norm()
