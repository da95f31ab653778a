"""Steps of the flow: agreement with the published code, with the Gaussian, and with the flow's own marginals.

The marginal tests have data N(mu, C), of which everything is known: x_sigma = (1 - sigma) x0 + sigma eps is Gaussian
with mean m = (1 - sigma) mu and covariance V = (1 - sigma)^2 C + sigma^2 I. The velocity is the expectation of
eps - x0 given x_sigma = x; since Cov(eps - x0, x_sigma) = sigma I - (1 - sigma) C,

    v(x) = -mu + (sigma I - (1 - sigma) C) V^-1 (x - m),

which is linear in x. So every step is affine in x, x' = M x + b + std noise: M and b are read off two calls of
`sde_step` in one dimension (three in two), and a Gaussian goes through it exactly: mean M m + b, covariance
M V M^T + std^2 I. No sampling, no tolerance for chance.

What comes out:

- Every dynamics keeps the mean exactly, at any step size, for x = m makes v = -mu and the score 0.
- flow_sde and dance_sde keep the covariance up to O(1 / N) at every one of N steps, at any fixed noise level, as long
  as they start below sigma = 1.
- flow_sde at sigma = 1 is the exception: s = a sqrt(sigma / (1 - sigma)) is infinite there, and the published
  sigma_max makes the first step's variance (1 - a^2 / 2 - h)^2 + a^2 on a grid of step h. The excess a^4 / 4 does not
  shrink with h; the steps after it forget it, so that at a fixed sigma it fades like N^(-a^2).
- cps does not keep the covariance at a fixed noise level a. With A = (1 - sigma)^2 s^2, V = A + sigma^2 and
  c = cos(a pi / 2), a step that stays at sigma has x0_hat - mu = (1 - sigma) s^2 / V (x - m) and
  eps_hat = sigma / V (x - m), so the variance it leaves is (A + c sigma^2)^2 / V + sigma^2 (1 - c^2): it loses exactly
  A sigma^2 (1 - c)^2 / V. Repeated, the loss comes to rest where a step wins as much as it loses, at the variance
  (1 + c) V^2 / (2 A + (1 + c) sigma^2) < V, which is what the marginals of a cps rollout tend to as N grows.
  They are the flow's own in two cases: s = 0, exactly and at any step size; and a going to 0, where a like
  sqrt(1 / N), the noise of the other two dynamics, makes the error O(1 / N).
"""

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributions import Normal

from flowalign.sampling import DYNAMICS, gaussian_kl, ode_solver, ode_step, sde_step

GAUSSIAN = ("flow_sde", "dance_sde", "linear_sde")
NOISY = (*GAUSSIAN, "cps")  # with a noise level


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def any_step(dynamics, *, noise_level=0.7, dtype=torch.float64, sigma=0.6, sigma_next=0.5, seed=0, **more):
    """A step of 3 rows of shape (2, 5) with random velocities."""
    sample, velocity = numbers(3, 2, 5, seed=seed, dtype=dtype), numbers(3, 2, 5, seed=seed + 1, dtype=dtype)
    level = None if dynamics == "memoryless" else noise_level
    if dynamics == "linear_sde":
        more.setdefault("sigma_max", 0.9)
    return sde_step(velocity, sample, sigma, sigma_next, dynamics=dynamics, noise_level=level, **more)


# Agreement with the published code and with the Gaussian


def test_steps_agree_with_the_published_code(shared):
    tensors = load_file(shared / "golden" / "sde.safetensors")
    for settings_of in json.loads((shared / "golden" / "sde.json").read_text()):
        case = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{settings_of['case']}.")}
        step = sde_step(
            case["velocity"],
            case["sample"],
            case["sigma"],
            case["sigma_next"],
            dynamics=settings_of["dynamics"],
            noise_level=settings_of["noise_level"],
            sigma_max=settings_of.get("sigma_max"),
            next_sample=case["next_sample"],
        )
        torch.testing.assert_close(step.mean, case["mean"], atol=1e-5, rtol=1e-5, msg=str(settings_of))
        torch.testing.assert_close(step.log_prob, case["log_prob"], atol=1e-5, rtol=1e-5, msg=str(settings_of))
        if "std" in case:
            torch.testing.assert_close(step.std.flatten(), case["std"], atol=1e-5, rtol=1e-5, msg=str(settings_of))


@pytest.mark.parametrize("dynamics", GAUSSIAN)
@given(noise_level=st.floats(0.05, 1.5), sigma=st.floats(0.1, 0.95), fraction=st.floats(0, 0.95))
def test_the_log_probability_is_the_mean_of_the_gaussians(dynamics, noise_level, sigma, fraction):
    step = any_step(dynamics, noise_level=noise_level, sigma=sigma, sigma_next=fraction * sigma)
    expected = Normal(step.mean, step.std).log_prob(step.next_sample).flatten(1).mean(1)
    torch.testing.assert_close(step.log_prob, expected, atol=1e-10, rtol=1e-10)


@given(noise_level=st.floats(0.05, 0.95), sigma=st.floats(0.1, 1), fraction=st.floats(0.1, 0.95))
def test_the_log_probability_of_cps_is_the_published_one_an_affine_function_of_the_gaussians(
    noise_level, sigma, fraction
):
    step = any_step("cps", noise_level=noise_level, sigma=sigma, sigma_next=fraction * sigma)
    published = -((step.next_sample - step.mean) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(step.log_prob, published, atol=1e-12, rtol=1e-12)
    gaussian = Normal(step.mean, step.std).log_prob(step.next_sample).flatten(1).mean(1)
    constants = math.log(step.std) + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(step.log_prob, 2 * step.std**2 * (gaussian + constants), atol=1e-10, rtol=1e-10)


def test_the_divergence_of_two_steps_is_that_of_their_gaussians():
    step, other = any_step("flow_sde"), any_step("flow_sde", seed=5)
    expected = torch.distributions.kl_divergence(Normal(step.mean, step.std), Normal(other.mean, step.std))
    torch.testing.assert_close(gaussian_kl(step.mean, other.mean, step.std), expected.flatten(1).mean(1))


# The marginals


def moments(sigma, mu, covariance):
    """Mean (N, d) and covariance (N, d, d) of the flow at noise levels (N,)."""
    rest, level = 1 - sigma, sigma[:, None, None]
    return rest[:, None] * mu, rest[:, None, None] ** 2 * covariance + level**2 * torch.eye(len(mu), dtype=mu.dtype)


def exact_velocity(x, sigma, mu, covariance):
    """v(x) of data N(mu, covariance), (N, d), in closed form."""
    mean, spread = moments(sigma, mu, covariance)
    crossed = sigma[:, None, None] * torch.eye(len(mu), dtype=mu.dtype) - (1 - sigma)[:, None, None] * covariance
    return -mu + torch.einsum("nij,nj->ni", crossed @ torch.linalg.inv(spread), x - mean)


def affine_steps(dynamics, noise_level, sigmas, mu, covariance):
    """Slopes (N, d, d), intercepts (N, d) and standard deviations (N,) of the steps of a grid (N + 1,)."""
    now, after, (count, width) = sigmas[:-1], sigmas[1:], (len(sigmas) - 1, len(mu))

    def mean_from(x):
        x = x.expand(count, width)
        velocity = exact_velocity(x, now, mu, covariance)
        # The grid's second value, unless the grid starts below 1, where it must not matter.
        step = sde_step(
            velocity, x, now, after, dynamics=dynamics, noise_level=noise_level, sigma_max=sigmas[1], next_sample=x
        )
        return step.mean, step.std.expand(count, 1)[:, 0]

    intercept, std = mean_from(torch.zeros(width, dtype=mu.dtype))
    columns = [mean_from(unit)[0] - intercept for unit in torch.eye(width, dtype=mu.dtype)]
    return torch.stack(columns, dim=-1), intercept, std


def marginal_errors(dynamics, noise_level, sigmas, mu, covariance):
    """What a chain of steps that starts in the flow's marginal has too much of: means (N, d), covariances (N, d, d)."""
    slopes, intercepts, stds = affine_steps(dynamics, noise_level, sigmas, mu, covariance)
    means, spreads = moments(sigmas, mu, covariance)
    mean, spread, identity = means[0], spreads[0], torch.eye(len(mu), dtype=mu.dtype)
    chain = []
    for slope, intercept, std in zip(slopes, intercepts, stds, strict=True):
        mean, spread = slope @ mean + intercept, slope @ spread @ slope.T + std**2 * identity
        chain.append((mean, spread))
    return torch.stack([m for m, _ in chain]) - means[1:], torch.stack([v for _, v in chain]) - spreads[1:]


def grid(start, steps, end=0.0):
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def one_dimension(mu, s):
    return torch.tensor([mu], dtype=torch.float64), torch.tensor([[s**2]], dtype=torch.float64)


means, spreads = st.floats(-3, 3), st.floats(0.4, 2)


@pytest.mark.parametrize("dynamics", GAUSSIAN)
@settings(max_examples=15)
@given(mu=means, s=spreads, noise_level=st.floats(0.05, 1), start=st.floats(0.3, 0.9))
def test_the_error_of_the_marginals_falls_like_one_over_the_number_of_steps(dynamics, mu, s, noise_level, start):
    worst = []
    for steps in (100, 400):
        mean_error, error = marginal_errors(dynamics, noise_level, grid(start, steps), *one_dimension(mu, s))
        assert mean_error.abs().max() < 1e-10
        worst.append(error.abs().max().item())
    assert 3 < worst[0] / worst[1] < 6
    assert worst[1] < 0.01 * max(1, s**2)


@pytest.mark.parametrize("dynamics", GAUSSIAN)
@pytest.mark.parametrize("noise_level", [0.2, 0.7, 1.0])
def test_marginals_of_correlated_data_converge_to_the_flows_too(dynamics, noise_level):
    mu = torch.tensor([1.0, -2.0], dtype=torch.float64)
    covariance = torch.tensor([[1.5, -0.8], [-0.8, 0.7]], dtype=torch.float64)
    worst = []
    for steps in (100, 400):
        mean_error, error = marginal_errors(dynamics, noise_level, grid(0.8, steps), mu, covariance)
        assert mean_error.abs().max() < 1e-10
        worst.append(error.abs().amax(dim=0))
    assert (worst[1] < 0.02).all()
    assert ((worst[0] / worst[1] > 3) & (worst[0] / worst[1] < 6)).all()


def test_dance_sde_keeps_the_marginals_from_pure_noise_on():
    worst = [
        marginal_errors("dance_sde", 0.7, grid(1.0, n), *one_dimension(1.5, 1.2))[1].abs().max() for n in (100, 400)
    ]
    assert 3 < worst[0] / worst[1] < 6


@pytest.mark.parametrize("noise_level", [0.5, 0.7])
def test_flow_sdes_excess_variance_from_pure_noise_fades_with_more_steps(noise_level):
    first, later = [], []
    for steps in (800, 1600):
        _, error = marginal_errors("flow_sde", noise_level, grid(1.0, steps), *one_dimension(1.5, 1.0))
        first.append(error[0].item())
        later.append(error[steps // 2 - 1].item())
    assert first[1] == pytest.approx(noise_level**4 / 4, abs=0.001)
    assert later[0] / later[1] == pytest.approx(2**noise_level**2, rel=0.02)


@given(mu=means, s=st.floats(0, 2), noise_level=st.floats(0, 1), sigma=st.floats(0.05, 0.95))
def test_a_cps_step_with_equal_sigmas_loses_variance_as_in_closed_form(mu, s, noise_level, sigma):
    mean_error, error = marginal_errors("cps", noise_level, grid(sigma, 1, end=sigma), *one_dimension(mu, s))
    a, c = (1 - sigma) ** 2 * s**2, math.cos(noise_level * math.pi / 2)
    assert mean_error.abs().max() < 1e-10
    assert error.item() == pytest.approx(-a * sigma**2 * (1 - c) ** 2 / (a + sigma**2), abs=1e-12)


@given(mu=means, noise_level=st.floats(0, 1), sigmas=st.lists(st.floats(0.01, 1), min_size=2, max_size=8, unique=True))
def test_cps_keeps_the_marginals_of_a_single_image_at_any_step_size(mu, noise_level, sigmas):
    schedule = torch.tensor(sorted(sigmas, reverse=True), dtype=torch.float64)
    mean_error, error = marginal_errors("cps", noise_level, schedule, *one_dimension(mu, 0.0))
    assert mean_error.abs().max() < 1e-10
    assert error.abs().max() < 1e-10


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 0.9])
def test_cps_at_a_fixed_noise_level_converges_to_narrower_marginals(noise_level):
    s, c, gaps = 1.2, math.cos(noise_level * math.pi / 2), []
    for steps in (500, 2000):
        schedule = grid(1.0, steps)
        _, error = marginal_errors("cps", noise_level, schedule, *one_dimension(1.5, s))
        sigma = schedule[steps // 2].item()
        a = (1 - sigma) ** 2 * s**2
        flow = a + sigma**2
        rest = (1 + c) * flow**2 / (2 * a + (1 + c) * sigma**2)
        gaps.append(abs(error[steps // 2 - 1].item() - (rest - flow)))
        assert gaps[-1] < 0.2 * (flow - rest)
    assert 3 < gaps[0] / gaps[1] < 6


def test_cps_keeps_the_marginals_when_its_noise_shrinks_like_the_root_of_the_step():
    worst = []
    for steps in (100, 400):
        _, error = marginal_errors("cps", 4 / math.sqrt(steps), grid(1.0, steps), *one_dimension(1.5, 1.2))
        worst.append(error.abs().max().item())
    assert 3 < worst[0] / worst[1] < 6


# Memoryless dynamics


@given(sigma=st.floats(0.05, 0.99), fraction=st.floats(0.05, 0.95))
def test_a_memoryless_step_is_the_posterior_of_the_noising_process(sigma, fraction):
    """DDPM's q(x' | x, x0), by Bayes' rule: prior x' ~ N((1 - s') x0, s'^2), likelihood x ~ N(r x', s^2 - r^2 s'^2)."""
    x0, x, after = numbers(3, 2, 5, seed=4), numbers(3, 2, 5), fraction * sigma
    step = sde_step((x - x0) / sigma, x, sigma, after, dynamics="memoryless", next_sample=x)
    ratio = (1 - sigma) / (1 - after)
    precision = 1 / after**2 + ratio**2 / (sigma**2 - ratio**2 * after**2)
    mean = ((1 - after) * x0 / after**2 + ratio * x / (sigma**2 - ratio**2 * after**2)) / precision
    torch.testing.assert_close(step.mean, mean, atol=1e-9, rtol=1e-9)
    assert step.std.item() == pytest.approx(precision**-0.5, rel=1e-9)
    expected = Normal(step.mean, step.std).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(step.log_prob, expected)


@pytest.mark.parametrize("start", [1.0, 0.8])
@pytest.mark.parametrize("s", [0.5, 1.2])
def test_memoryless_dynamics_keep_the_marginals_in_the_limit_of_many_steps(start, s):
    worst = []
    for steps in (100, 400):
        mean_error, error = marginal_errors("memoryless", None, grid(start, steps), *one_dimension(1.5, s))
        assert mean_error.abs().max() < 1e-10
        worst.append(error.abs().max().item())
    assert 3 < worst[0] / worst[1] < 6
    assert worst[1] < 0.02


@pytest.mark.parametrize("start", [1.0, 0.9, 0.5])
def test_finished_samples_depend_on_the_first_noise_as_in_the_noising_process(start):
    """Cov(x0, x_sigma) / Var(x_sigma) = (1 - sigma) s^2 / V: nothing at sigma = 1, where Flow-SDE's still do."""
    s, ends = 1.2, {}
    for dynamics, level in (("memoryless", None), ("flow_sde", 0.7)):
        slopes, _, _ = affine_steps(dynamics, level, grid(start, 400), *one_dimension(1.5, s))
        ends[dynamics] = slopes.prod().item()
    left = (1 - start) * s**2
    assert ends["memoryless"] == pytest.approx(left / ((1 - start) * left + start**2), abs=1e-9)
    assert ends["flow_sde"] > ends["memoryless"] + 0.1


def test_memoryless_steps_are_those_of_flow_sde_at_the_root_of_two_to_first_order():
    means, variances = [], []
    for size in (0.01, 0.005):
        ours = any_step("memoryless", sigma=0.6, sigma_next=0.6 - size)
        theirs = any_step("flow_sde", noise_level=math.sqrt(2), sigma=0.6, sigma_next=0.6 - size)
        means.append((ours.mean - theirs.mean).abs().max().item() / size)
        variances.append(abs(ours.std**2 - theirs.std**2).item() / size)
    for first, second in (means, variances):
        assert first / second == pytest.approx(2, rel=0.05) and first < 0.3


def test_memoryless_dynamics_take_no_noise_level():
    with pytest.raises(ValueError, match="memoryless takes no noise_level"):
        sde_step(numbers(1, 2), numbers(1, 2), 0.6, 0.5, dynamics="memoryless", noise_level=0.7)


# Solvers of the ODE


def solved(name, sigmas, mu=1.0, s=1.5):
    """How far a solver's end is from the flow's own, for data N(mu, s^2): x_sigma = m + sqrt(V) z at every sigma."""
    z, place = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], one_dimension(mu, s)
    mean, spread = moments(sigmas[:1].double(), *place)
    state, step_on = mean + spread[0].sqrt() * z, ode_solver(name, sigmas)
    for step, sigma in enumerate(sigmas[:-1].double()):
        velocity = exact_velocity(state, sigma.expand(len(z)), *place)
        state = step_on(velocity, state, step).double()
    return (state - (mu + s * z)).abs().max().item()


@pytest.mark.parametrize(("name", "factor"), [("euler", 2), ("dpm++", 4)])
def test_the_error_of_a_solver_falls_with_its_order(name, factor):
    errors = [solved(name, grid(0.95, steps).float()) for steps in (16, 32, 64)]
    assert errors[0] / errors[1] == pytest.approx(factor, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(factor, rel=0.1)


def test_dpm_solver_needs_fewer_steps_from_pure_noise_than_euler():
    assert solved("dpm++", grid(1.0, 8).float()) < solved("euler", grid(1.0, 40).float())
    assert solved("dpm++", grid(1.0, 5).float()) < 0.6 * solved("euler", grid(1.0, 5).float())


def test_dpm_solvers_first_step_is_ddims_and_its_last_gives_the_predicted_image():
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
    solve = ode_solver("dpm++", sigmas)
    x, v = numbers(3, 2, 5, dtype=torch.float32), numbers(3, 2, 5, seed=1, dtype=torch.float32)
    x0, eps = x - v, x
    state = solve(v, x, 0)
    torch.testing.assert_close(state, 0.3 * x0 + 0.7 * eps)
    state = solve(v, state, 1)
    torch.testing.assert_close(solve(v, state, 2), state - 0.3 * v)


def test_a_solver_of_lower_precision_gives_float32():
    low = numbers(2, 3, dtype=torch.bfloat16)
    for name in ("euler", "dpm++"):
        assert ode_solver(name, grid(1.0, 4).float())(low, low, 0).dtype == torch.float32


# Special steps


@pytest.mark.parametrize("dynamics", NOISY)
def test_without_noise_a_step_is_the_odes_and_has_log_probability_zero(dynamics):
    step = any_step(dynamics, noise_level=0.0)
    expected = ode_step(numbers(3, 2, 5, seed=1), numbers(3, 2, 5), 0.6, 0.5)
    torch.testing.assert_close(step.mean, expected)
    torch.testing.assert_close(step.next_sample, expected)
    assert step.log_prob.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dynamics", NOISY)
def test_a_step_tends_to_the_odes_as_its_noise_goes_to_zero(dynamics):
    expected = ode_step(numbers(3, 2, 5, seed=1), numbers(3, 2, 5), 0.6, 0.5)
    distances = [(any_step(dynamics, noise_level=level).mean - expected).abs().max() for level in (0.1, 0.01)]
    assert distances[0] / distances[1] == pytest.approx(100, rel=0.05)  # drift and noise are of second order


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 9))
def test_ode_steps_are_exact_for_a_constant_velocity(start, end, steps):
    x, velocity = numbers(2, 3), numbers(2, 3, seed=1)
    schedule = grid(start, steps, end=end)
    state = x
    for sigma, sigma_next in pairwise(schedule):
        state = ode_step(velocity, state, sigma, sigma_next)
    torch.testing.assert_close(state, x + (end - start) * velocity, atol=1e-12, rtol=0)


def test_sigma_max_replaces_sigma_one_and_matters_nowhere_else():
    a, sigma_max, sigma_next = 0.7, 0.9, 0.8
    step = any_step(
        "flow_sde",
        noise_level=a,
        sigma=torch.tensor([1.0, 0.95, 0.5]),
        sigma_next=torch.tensor([0.8, 0.8, 0.4]),
        sigma_max=sigma_max,
    )
    assert step.std.flatten()[0].item() == pytest.approx(a * math.sqrt(1 / (1 - sigma_max) * (1 - sigma_next)))
    without = any_step(
        "flow_sde", noise_level=a, sigma=torch.tensor([0.9, 0.95, 0.5]), sigma_next=torch.tensor([0.8, 0.8, 0.4])
    )
    for ours, theirs in zip(step[1:], without[1:], strict=True):
        if ours is not step.log_prob:
            torch.testing.assert_close(ours[1:], theirs[1:], rtol=0, atol=0)


def test_flow_sde_at_sigma_one_needs_sigma_max():
    with pytest.raises(ValueError, match="sigma_max, the schedule's second value"):
        any_step("flow_sde", sigma=torch.tensor([0.5, 1.0, 0.5]), sigma_next=0.4)


@pytest.mark.parametrize("dynamics", ["dance_sde", "cps", "memoryless"])
def test_other_dynamics_start_at_sigma_one_without_sigma_max(dynamics):
    assert all(tensor.isfinite().all() for tensor in any_step(dynamics, sigma=1.0, sigma_next=0.9))


def test_the_last_step_of_flow_sde_is_finite():
    assert all(tensor.isfinite().all() for tensor in any_step("flow_sde", sigma=0.1, sigma_next=0.0))


@pytest.mark.parametrize("dynamics", ["cps", "memoryless"])
def test_a_step_to_sigma_zero_gives_the_predicted_image_without_noise(dynamics):
    step = any_step(dynamics, sigma=0.3, sigma_next=0.0)
    torch.testing.assert_close(step.next_sample, numbers(3, 2, 5) - 0.3 * numbers(3, 2, 5, seed=1))
    assert step.log_prob.tolist() == [0, 0, 0]


def test_unknown_dynamics_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown dynamics 'ddim'; choose one of flow_sde, dance_sde, cps"):
        any_step("ddim")


# Precision, rows and draws


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_float64_stays_and_lower_precision_is_computed_in_float32(dynamics):
    assert {tensor.dtype for tensor in any_step(dynamics)} == {torch.float64}
    assert {tensor.dtype for tensor in any_step(dynamics, dtype=torch.bfloat16)} == {torch.float32}
    assert {tensor.dtype for tensor in any_step(dynamics, dtype=torch.float16)} == {torch.float32}
    low = numbers(2, 3, dtype=torch.bfloat16)
    assert ode_step(low, low, 0.5, 0.4).dtype == torch.float32
    assert ode_step(low.double(), low.double(), 0.5, 0.4).dtype == torch.float64


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_rows_with_different_sigmas_equal_separate_calls(dynamics):
    sigma, sigma_next = torch.tensor([1.0, 0.7, 0.2]), torch.tensor([0.9, 0.4, 0.1])
    noise = numbers(3, 2, 5, seed=9)
    together = any_step(dynamics, sigma=sigma, sigma_next=sigma_next, sigma_max=0.9, noise=noise)
    for row in range(3):
        alone = sde_step(
            numbers(3, 2, 5, seed=1)[row : row + 1],
            numbers(3, 2, 5)[row : row + 1],
            sigma[row].item(),
            sigma_next[row].item(),
            dynamics=dynamics,
            noise_level=None if dynamics == "memoryless" else 0.7,
            sigma_max=0.9,
            noise=noise[row : row + 1],
        )
        # float32 sigmas in the batch, Python's in the single call
        torch.testing.assert_close(together.mean[row], alone.mean[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(together.next_sample[row], alone.next_sample[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(together.log_prob[row], alone.log_prob[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        ode_step(noise, noise, sigma, sigma_next)[1],
        ode_step(noise[1:2], noise[1:2], sigma[1].item(), sigma_next[1].item())[0],
    )


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_scoring_a_drawn_sample_again_gives_its_log_probability(dynamics):
    drawn = any_step(dynamics)
    again = any_step(dynamics, next_sample=drawn.next_sample)
    assert torch.equal(again.log_prob, drawn.log_prob)
    assert torch.equal(again.next_sample, drawn.next_sample)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_a_draw_is_the_mean_and_std_times_the_given_noise(dynamics):
    noise = numbers(3, 2, 5, seed=3)
    step = any_step(dynamics, noise=noise)
    torch.testing.assert_close(step.next_sample, step.mean + step.std * noise)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_a_generator_decides_the_draw(dynamics):
    def draw(seed):
        return any_step(dynamics, generator=torch.Generator().manual_seed(seed)).next_sample

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_the_log_probability_has_a_gradient_for_the_velocity(dynamics):
    """Its gradient is that of the residual: a step drawn above its mean pulls the mean up."""
    velocity = numbers(3, 2, 5, seed=1).requires_grad_()
    drawn = any_step(dynamics)
    level = None if dynamics == "memoryless" else 0.7
    how = {"dynamics": dynamics, "noise_level": level, "sigma_max": 0.9}
    step = sde_step(velocity, numbers(3, 2, 5), 0.6, 0.5, **how, next_sample=drawn.next_sample)
    (grad,) = torch.autograd.grad(step.log_prob.sum(), velocity, retain_graph=True)
    (slope,) = torch.autograd.grad(step.mean.sum(), velocity)
    assert torch.equal(grad.sign(), (slope * (drawn.next_sample - drawn.mean)).sign())
