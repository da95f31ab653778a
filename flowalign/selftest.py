"""What must hold before training is worth its time, checked on the first rollout and said in plain words."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from flowalign.algorithms import Algorithm, Batch

if TYPE_CHECKING:
    from flowalign.policies.base import Policy
    from flowalign.rollout import Samples


class Check(NamedTuple):
    """One check and what was seen."""

    check: str
    passed: bool
    detail: str


def self_test(policy: "Policy", algorithm: Algorithm, batch: Batch, samples: "Samples") -> list[Check]:
    """All checks, on a micro-batch of the first rollout; the weights are left as they were."""
    loss, figures = algorithm.loss(policy, batch)
    checks = [_gradient(policy, loss.sum())]
    if "ratio_distance" in figures:
        checks.insert(0, _ratio(algorithm, figures["ratio_distance"].max().item()))
    if getattr(algorithm, "kl_weight", 0):
        checks.append(_kl_gradient(policy, algorithm, batch))
    checks.append(_distinct_noise(samples))
    with_spread = samples.teaches.float().mean().item()
    checks.append(Check("rewards differ within prompts", with_spread > 0, f"in {with_spread:.0%} of the groups"))
    return checks


def _ratio(algorithm: Algorithm, distance: float) -> Check:
    limit = 0.5 * getattr(algorithm, "clip_range", 1e-4)
    detail = f"largest distance {distance:.1e}, allowed {limit:.1e} (half the clip range)"
    return Check("the first ratio is 1", distance <= limit, detail)


def _gradient(policy: "Policy", loss: torch.Tensor) -> Check:
    """Adapters start with a zero factor, so the other factor's gradient is zero at first: half of all is enough."""
    weights = policy.trainable_parameters()
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    reached = sum(gradient is not None and bool(gradient.any()) for gradient in gradients)
    finite = all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)
    detail = f"{reached} of {len(weights)} weight tensors" + ("" if finite else ", but not all are finite")
    return Check("gradients reach the trainable weights", finite and reached > 0, detail)


def _kl_gradient(policy: "Policy", algorithm: Algorithm, batch: Batch) -> Check:
    """At the reference the KL's gradient is zero by nature, so it is looked at beside it."""
    weights = policy.trainable_parameters()
    kept = policy.trainable_state()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(1e-2 * torch.randn(weight.shape, generator=generator).to(weight.device))
    policy.weights_changed()
    try:
        with_kl, _ = algorithm.loss(policy, batch)
        without, _ = algorithm.model_copy(update={"kl_weight": 0.0}).loss(policy, batch)
        gradients = torch.autograd.grad(with_kl.sum() - without.sum(), list(weights.values()), allow_unused=True)
    finally:
        policy.load_trainable_state(kept, begins=False)
    norm = sum(float(gradient.norm()) ** 2 for gradient in gradients if gradient is not None) ** 0.5
    return Check("the KL has a gradient", norm > 0, f"norm {norm:.1e} beside the reference")


def _distinct_noise(samples: "Samples") -> Check:
    distinct = len(torch.unique(samples.latents.flatten(1), dim=0))
    return Check("every sample has noise of its own", distinct == len(samples), f"{distinct} of {len(samples)}")
