"""The self-test: checks, at the first step that can teach, that training can work at all.

It inspects the gradients of that step's first updates before the optimizer uses them, so that only the check of the KL
needs passes of its own. A check covers the units of all processes; a process without units takes part as well.
"""

import math
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import Accelerator

from flowalign.algorithms import Algorithm, Batch

if TYPE_CHECKING:
    from flowalign.policies.base import Policy
    from flowalign.rollout.stages import Weighted

LOWEST_SCALE = 2.0**-10  # the lowest loss scale in half precision; gradients vanish below it


class Check(NamedTuple):
    """One check and its result."""

    check: str
    passed: bool
    detail: str


class SelfTest:
    """The checks of one training step. The learner calls its methods during the step, in every process."""

    def __init__(
        self,
        policy: "Policy",
        algorithm: Algorithm,
        weighted: "Weighted",
        accelerator: Accelerator,
        conclude: Callable[[list[Check]], None],
    ):
        """conclude: called once with the checks, or never if no update held a unit whose group's rewards differ."""
        self.policy, self.algorithm, self.weighted, self.accelerator = policy, algorithm, weighted, accelerator
        self.conclude = conclude
        self.done = False
        self._checks: list[Check] = []
        self._distances: list[float] = []  # the ratios' distances from 1, before the first update moves the weights
        self._moved = self._teaching = self._taught = False

    def begin(self, batch: Batch, scale: float) -> None:
        """Called before the first update, with its first micro-batch; scale: the loss scale in half precision."""
        if self.algorithm.settings.kl_weight:
            norm = self._kl_gradient(batch, scale)
            while not math.isfinite(norm) and scale > LOWEST_SCALE and self.policy.dtype == torch.float16:
                scale /= 16
                norm = self._kl_gradient(batch, scale)
            self._checks.append(Check("the KL has a gradient", norm > 0, f"norm {norm:.1e} next to the reference"))
        distinct = self._over_all(len(torch.unique(self.weighted.generated.latents.flatten(1), dim=0))).sum().item()
        count = self._over_all(len(self.weighted.generated)).sum().item()
        share = self._over_all(self.weighted.differs.float().mean().item()).mean().item()
        noise = Check("every sample has its own noise", distinct == count, f"{distinct:.0f} of {count:.0f}")
        spread = share > 0 or self.algorithm.learns_from_equal
        self._checks += [noise, Check("rewards differ within prompts", spread, f"in {share:.0%} of the groups")]

    def saw(self, units: torch.Tensor, counted: int, metrics: dict[str, torch.Tensor]) -> None:
        """Called for each micro-batch with its units (u, m, 2), the number that counts, and the loss's metrics."""
        if self.done:
            return
        differs = self.algorithm.learns_from_equal or self.weighted.differs[units[..., 0].flatten()].any()
        self._teaching |= counted > 0 and bool(differs)
        if not self._moved and "ratio_distance" in metrics:
            self._distances.append(metrics["ratio_distance"].max().item())

    def before_step(self) -> None:
        """Called before an optimizer step, when the gradients are summed over the processes."""
        if self.done:
            return
        teaching, self._teaching, self._moved = bool(self._over_all(self._teaching).any()), False, True
        self._taught |= teaching
        reached = sum(p.grad is not None and bool(p.grad.any()) for p in self.policy.trainable_parameters().values())
        if teaching and reached:  # an update whose samples all have advantage 0 reaches no weight
            self._end(reached)

    def end(self) -> None:
        """Called after the step's last update."""
        if self._taught and not self.done:
            self._end(0)

    def _end(self, reached: int) -> None:
        """Conclude with the number of weight tensors that a gradient reached.

        Adapters start with one factor at zero, so the other factor's gradient is zero at first: one tensor is enough.
        """
        self.done = True
        detail = f"{reached} of {len(self.policy.trainable_parameters())} weight tensors"
        checks = [Check("gradients reach the trainable weights", reached > 0, detail)]
        if self._distances:
            distance, limit = self._over_all(max(self._distances)).max().item(), self._allowed()
            detail = f"largest distance {distance:.1e}, allowed {limit:.1e} (half the clip range)"
            checks.insert(0, Check("the first ratio is 1", distance <= limit, detail))
        self.conclude(checks + self._checks)

    def _allowed(self) -> float:
        return 0.5 * float(getattr(self.algorithm.settings, "clip_range", 1e-4))

    def _over_all(self, value: float) -> torch.Tensor:
        """The values of all processes, (processes,)."""
        own = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        found: torch.Tensor = self.accelerator.gather(own)
        return found

    def _kl_gradient(self, batch: Batch, scale: float) -> float:
        """The norm of the KL's gradient, the largest of all processes.

        The gradient is zero at the reference itself, so it is taken at weights next to it: the gradient with the KL
        minus the gradient without it. The two passes run one after the other and add their gradients in place, and the
        weights are kept in host memory, so that the device holds no more than in an update.
        """
        weights, forwards = self.policy.trainable_parameters(), self.policy.forwards
        kept = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in weights.values():
                weight.add_(1e-2 * torch.randn(weight.shape, generator=generator).to(weight.device))
        self.policy.weights_changed()
        try:
            without = copy(self.algorithm)
            without.settings = without.settings.model_copy(update={"kl_weight": 0.0})
            for factor, algorithm in ((scale, self.algorithm), (-scale, without)):
                loss, _ = algorithm.loss(self.policy, batch)
                (factor * loss.sum()).backward()
            norms = [float(weight.grad.norm()) for weight in weights.values() if weight.grad is not None]
        finally:
            for weight in weights.values():
                weight.grad = None
            self.policy.load_trainable_state(kept, begins=False)
            self.policy.forwards = forwards
        return self._over_all(math.hypot(*norms) / scale).max().item()
