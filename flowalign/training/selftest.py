"""What must hold before training is worth its time, checked at the first step that can teach and said in plain words.

It looks at that step's first updates before the optimizer takes them, so it needs no passes and no memory of its own
but for the KL's. What is checked must hold over the units of all processes: one without any takes part all the same.
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

LOWEST_SCALE = 2.0**-10  # of losses in half precision; below it their gradients vanish


class Check(NamedTuple):
    """One check and what was seen."""

    check: str
    passed: bool
    detail: str


class SelfTest:
    """The checks of one training step, which a learner takes through them; all processes call it alike."""

    def __init__(
        self,
        policy: "Policy",
        algorithm: Algorithm,
        weighted: "Weighted",
        accelerator: Accelerator,
        conclude: Callable[[list[Check]], None],
    ):
        """`conclude` is given the checks, once; not at all where no update held a unit whose group's rewards differ."""
        self.policy, self.algorithm, self.weighted, self.accelerator = policy, algorithm, weighted, accelerator
        self.conclude = conclude
        self.done = False
        self._checks: list[Check] = []
        self._distances: list[float] = []  # of ratios from 1, while the weights are those of the rollout
        self._moved = self._teaching = self._taught = False

    def begin(self, batch: Batch, scale: float) -> None:
        """Before the first update, with its first micro-batch; losses are multiplied by `scale` in half precision."""
        if self.algorithm.settings.kl_weight:
            norm = self._kl_gradient(batch, scale)
            while not math.isfinite(norm) and scale > LOWEST_SCALE and self.policy.dtype == torch.float16:
                scale /= 16
                norm = self._kl_gradient(batch, scale)
            self._checks.append(Check("the KL has a gradient", norm > 0, f"norm {norm:.1e} beside the reference"))
        distinct = self._over_all(len(torch.unique(self.weighted.generated.latents.flatten(1), dim=0))).sum().item()
        count = self._over_all(len(self.weighted.generated)).sum().item()
        share = self._over_all(self.weighted.differs.float().mean().item()).mean().item()
        noise = Check("every sample has noise of its own", distinct == count, f"{distinct:.0f} of {count:.0f}")
        spread = share > 0 or self.algorithm.learns_from_equal
        self._checks += [noise, Check("rewards differ within prompts", spread, f"in {share:.0%} of the groups")]

    def saw(self, units: torch.Tensor, counted: int, figures: dict[str, torch.Tensor]) -> None:
        """A micro-batch's units (u, m, 2), how many of them count, and what its loss showed."""
        if self.done:
            return
        differs = self.algorithm.learns_from_equal or self.weighted.differs[units[..., 0].flatten()].any()
        self._teaching |= counted > 0 and bool(differs)
        if not self._moved and "ratio_distance" in figures:
            self._distances.append(figures["ratio_distance"].max().item())

    def before_step(self) -> None:
        """Before an optimizer step, with the gradients of all processes in place."""
        if self.done:
            return
        teaching, self._teaching, self._moved = bool(self._over_all(self._teaching).any()), False, True
        self._taught |= teaching
        reached = sum(p.grad is not None and bool(p.grad.any()) for p in self.policy.trainable_parameters().values())
        if teaching and reached:  # none is reached by an update of samples whose advantage happens to be 0
            self._end(reached)

    def end(self) -> None:
        """After the step's last update."""
        if self._taught and not self.done:
            self._end(0)

    def _end(self, reached: int) -> None:
        """Adapters start with a zero factor, so the other factor's gradient is zero at first: half of all is enough."""
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
        """The value of each process (W,)."""
        own = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        found: torch.Tensor = self.accelerator.gather(own)
        return found

    def _kl_gradient(self, batch: Batch, scale: float) -> float:
        """At the reference the KL's gradient is zero by nature, so it is looked at beside it: one pass after another.

        Their gradients are added up in place, and the weights are kept beside the device: it holds no more than in an
        update. Returns the norm over all processes.
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
