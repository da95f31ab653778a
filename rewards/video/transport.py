"""Entropic optimal transport in the log domain: of a part of the mass, and with soft marginals.

A plan P (n, m) has the least sum of P cost + epsilon P (log P - 1) under its conditions. It is
exp(f_i + g_j + h - cost_ij / epsilon), and each round sets f, g and h in turn to what the conditions on the rows, the
columns and the sum demand of it; cost / epsilon never leaves the logarithm, so that small costs do not underflow.
"""

from collections.abc import Callable

import torch

Potentials = tuple[torch.Tensor, ...]


def partial_transport(
    a: torch.Tensor, b: torch.Tensor, cost: torch.Tensor, *, mass: float, epsilon: float
) -> torch.Tensor:
    """The plan (n, m), float64, that moves exactly the share `mass` of what can be moved, where that costs least.

    a: (n,), b: (m,): the most that may leave a row and arrive in a column; cost: (n, m). The plan's sum is `mass` times
    the smaller of the sums of a and b. Source: Benamou et al. 2015 (1412.5154, section 5.1). Raises ValueError for a
    mass outside (0, 1] and as in `relaxed_transport`.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass is a share in (0, 1], and is {mass:g}")
    kernel, log_a, log_b = _logarithms(a, b, cost, epsilon)
    moved = (mass * torch.minimum(a.double().sum(), b.double().sum())).log()

    def improved(f: torch.Tensor, g: torch.Tensor, _: torch.Tensor) -> Potentials:
        h = moved - (kernel + f[:, None] + g).flatten().logsumexp(0)
        f = (log_a - (kernel + g + h).logsumexp(1)).clamp(max=0)
        g = (log_b - (kernel + f[:, None] + h).logsumexp(0)).clamp(max=0)
        return f, g, moved - (kernel + f[:, None] + g).flatten().logsumexp(0)

    f, g, h = _converged(improved, (torch.zeros_like(log_a), torch.zeros_like(log_b), torch.zeros_like(moved)))
    return (kernel + f[:, None] + g + h).exp()


def relaxed_transport(
    a: torch.Tensor, b: torch.Tensor, cost: torch.Tensor, *, exponent: float, epsilon: float
) -> torch.Tensor:
    """The plan (n, m), float64, whose marginals are near a (n,) and b (m,): what it lacks or has too much is paid for.

    The price is rho KL(marginal | a), and likewise for b, with rho = epsilon exponent / (1 - exponent); its sum follows
    from that. Source: Chizat et al. 2018 (1607.05816). Raises ValueError for an epsilon of 0 or less, and if epsilon is
    too small to come to an end.
    """
    kernel, log_a, log_b = _logarithms(a, b, cost, epsilon)

    def improved(_: torch.Tensor, g: torch.Tensor) -> Potentials:
        f = exponent * (log_a - (kernel + g).logsumexp(1))
        return f, exponent * (log_b - (kernel + f[:, None]).logsumexp(0))

    f, g = _converged(improved, (torch.zeros_like(log_a), torch.zeros_like(log_b)))
    return (kernel + f[:, None] + g).exp()


def _logarithms(
    a: torch.Tensor, b: torch.Tensor, cost: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if epsilon <= 0:
        raise ValueError(f"epsilon must be above 0, and is {epsilon:g}")
    return -cost.double() / epsilon, a.double().log(), b.double().log()


def _converged(improved: Callable[..., Potentials], potentials: Potentials, rounds: int = 50_000) -> Potentials:
    for _ in range(rounds):
        before, potentials = potentials, improved(*potentials)
        # A row without mass has the potential -inf in every round: no change, though the difference is NaN.
        changes = [(new - old).nan_to_num(0).abs().max() for new, old in zip(potentials, before, strict=True)]
        if max(changes) < 1e-10:
            return potentials
    raise ValueError(f"the transport plan is not found in {rounds} rounds; raise epsilon")
