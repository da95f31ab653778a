"""Steps that teach nothing: the reason in one sentence, and the end of a run with too many of them."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from flowalign.advantages import RewardTable, has_spread
from flowalign.rollout.stages import Drawn, Generated, Scored, Weighted
from flowalign.training.processes import summed


def score_metrics(samples: Scored, weighted: Weighted) -> dict[str, Any]:
    """The reward metrics of a step over the samples of all processes, with the rewards that are flat."""
    scored = samples.everyone
    groups = torch.arange(len(scored.total), device=scored.total.device) // samples.group_size
    assert scored.measured is not None
    known = ~scored.total.isnan()
    means, stds = {}, {}
    parts = ("total", *scored.names), (scored.total, *scored.measured), (known, *scored.applies)
    for name, values, applies in zip(*parts, strict=True):
        if applies.sum() > 1:
            means[name], stds[name] = values[applies].mean().item(), values[applies].std().item()
    metrics: dict[str, Any] = {"reward": means, "reward_std": stds, "zero_spread": weighted.zero_spread}
    if scored.trust is not None:
        metrics["trust"] = scored.trust[known].mean().item()
    if flat := flat_rewards(scored, groups):
        metrics["flat"] = flat
    return metrics


def flat_rewards(scored: RewardTable, groups: torch.Tensor) -> dict[str, str]:
    """The trained rewards that score all samples of every group alike, each with a phrase about its values.

    scored: the rewards of all N samples of a step; groups: (N,), the group of each sample.
    """
    assert scored.measured is not None
    flat = {}
    rows = zip(scored.names, scored.weights.tolist(), scored.measured, scored.values, scored.applies, strict=True)
    for name, weight, measured, shaped, applies in rows:
        if weight == 0 or not applies.any() or has_spread(shaped[applies], groups[applies]).any():
            continue
        seen = measured[applies]
        if seen.min() == seen.max():
            flat[name] = f"is {seen[0]:g} for every sample"
        elif has_spread(seen, groups[applies]).any():
            flat[name] = "is the same for all samples of a prompt once it is shaped"
        else:
            flat[name] = "is the same for all samples of a prompt"
    return flat


class Idle:
    """Counts the steps in a row that teach nothing. `reason` says why the last step taught nothing, else it is None."""

    def __init__(self, limit: int, group_size: int, learns_from_equal: bool, accelerator: Accelerator):
        """limit: the number of such steps in a row that ends a run; 0 sets no limit."""
        self.limit, self.group_size, self.accelerator = limit, group_size, accelerator
        self.learns_from_equal = learns_from_equal
        self.in_a_row = 0
        self.reason: str | None = None
        self._said: set[str] = set()

    def step(self, number: int, samples: Generated, metrics: Mapping[str, Any], tested: bool) -> list[str]:
        """Count the finished step `number`; returns the sentences to print about it. Every process calls it.

        samples: those of this process; metrics: those of the step; tested: whether the self-test is over.
        """
        skipped, before = metrics.get("skipped_updates", 0), self.reason
        flat = {} if self.learns_from_equal else metrics.get("flat", {})
        told = {name: f"reward {name!r} {does}" for name, does in flat.items()}
        self.reason = None
        if metrics["zero_spread"] == 1 and not self.learns_from_equal:
            equal = "the total reward is the same for all samples of a prompt"
            self.reason = "; ".join(told.values()) or (
                equal if "total" in metrics["reward"] else "no sample was judged"
            )
            self.reason += ", since all samples of a prompt are identical" if self._alike(samples) else ""
        elif metrics["grad_norm"] == 0 and not skipped:
            self.reason = "the gradient is exactly 0, though rewards differ within prompts"
        self.in_a_row = self.in_a_row + 1 if self.reason else 0
        sentences = []
        if self.reason and self.reason != before:
            waits = "" if tested else "; the self-test waits for a step that teaches"
            sentences.append(f"step {number} teaches nothing: {self.reason}{waits}")
        elif not self.reason:
            new = [sentence for name, sentence in told.items() if name not in self._said]
            self._said |= set(told)
            sentences += [f"step {number}: {sentence}, so it teaches nothing; the other rewards do" for sentence in new]
        if skipped:
            why = f"{skipped} of its updates skipped, since the gradient overflowed in half precision"
            sentences.append(f"step {number}: {why}; the loss scale is now {metrics['gradient_scale']:g}")
        return sentences

    def _alike(self, samples: Generated) -> bool:
        seen = samples.media if isinstance(samples, Drawn) else samples.latents  # a dataset's media are not read
        groups = seen.unflatten(0, (-1, self.group_size))
        (differing,) = summed(self.accelerator, bool((groups != groups[:, :1]).any()))
        return not differing

    @property
    def over(self) -> bool:
        """Whether the limit is reached."""
        return 0 < self.limit <= self.in_a_row
