"""Steps that teach nothing: why, in a sentence, and when to give up."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from flowalign.advantages import RewardTable, has_spread
from flowalign.rollout.stages import Drawn, Generated, Scored, Weighted
from flowalign.training.processes import summed


def score_figures(samples: Scored, weighted: Weighted) -> dict[str, Any]:
    """What a step's line says of the rewards of all processes' samples, and of those that are flat."""
    scored = samples.everyone
    groups = torch.arange(len(scored.total), device=scored.total.device) // samples.group_size
    assert scored.measured is not None
    known = ~scored.total.isnan()
    means, stds = {}, {}
    parts = ("total", *scored.names), (scored.total, *scored.measured), (known, *scored.applies)
    for name, values, applies in zip(*parts, strict=True):
        if applies.sum() > 1:
            means[name], stds[name] = values[applies].mean().item(), values[applies].std().item()
    figures: dict[str, Any] = {"reward": means, "reward_std": stds, "zero_spread": weighted.zero_spread}
    if scored.trust is not None:
        figures["trust"] = scored.trust[known].mean().item()
    if flat := flat_rewards(scored, groups):
        figures["flat"] = flat
    return figures


def flat_rewards(scored: RewardTable, groups: torch.Tensor) -> dict[str, str]:
    """Of each reward that is trained on and tells no two samples of a group apart: what it does, by its name.

    scored: of all samples (N,) of a step; groups: (N,).
    """
    assert scored.measured is not None
    flat = {}
    rows = zip(scored.names, scored.weights.tolist(), scored.measured, scored.values, scored.applies, strict=True)
    for name, weight, measured, shaped, applies in rows:
        if weight == 0 or not applies.any() or has_spread(shaped[applies], groups[applies]).any():
            continue
        seen = measured[applies]
        if seen.min() == seen.max():
            flat[name] = f"is {seen[0]:g} for every picture"
        elif has_spread(seen, groups[applies]).any():
            flat[name] = "is the same for all pictures of a prompt once it is shaped"
        else:
            flat[name] = "is the same for all pictures of a prompt"
    return flat


class Idle:
    """Counts the steps in a row that teach nothing; `reason` says why the last of them did, None if it taught."""

    def __init__(self, limit: int, group_size: int, learns_from_equal: bool, accelerator: Accelerator):
        """limit: how many in a row there may be, 0 for any number."""
        self.limit, self.group_size, self.accelerator = limit, group_size, accelerator
        self.learns_from_equal = learns_from_equal
        self.in_a_row = 0
        self.reason: str | None = None
        self._said: set[str] = set()

    def step(self, number: int, samples: Generated, figures: Mapping[str, Any], tested: bool) -> list[str]:
        """Take the finished step `number` into account; returns the sentences that it calls for.

        All processes call it alike. samples: this process's; tested: whether the self-test is over.
        """
        skipped, before = figures.get("skipped_updates", 0), self.reason
        flat = {} if self.learns_from_equal else figures.get("flat", {})
        told = {name: f"reward {name!r} {does}" for name, does in flat.items()}
        self.reason = None
        if figures["zero_spread"] == 1 and not self.learns_from_equal:
            equal = "what the rewards add up to is equal within every prompt"
            self.reason = "; ".join(told.values()) or (
                equal if "total" in figures["reward"] else "no picture was judged"
            )
            self.reason += ", since all pictures of a prompt are alike" if self._alike(samples) else ""
        elif figures["grad_norm"] == 0 and not skipped:
            self.reason = "the gradient is exactly 0, though rewards differ within prompts"
        self.in_a_row = self.in_a_row + 1 if self.reason else 0
        sentences = []
        if self.reason and self.reason != before:
            waits = "" if tested else "; the self-test waits for one that does"
            sentences.append(f"step {number} teaches nothing: {self.reason}{waits}")
        elif not self.reason:
            new = [sentence for name, sentence in told.items() if name not in self._said]
            self._said |= set(told)
            sentences += [f"step {number}: {sentence}, so it teaches nothing; the other rewards do" for sentence in new]
        if skipped:
            why = f"updates skipped, since their gradients overflowed in half precision: {skipped}"
            sentences.append(f"step {number}: {why}; the losses' scale is now {figures['gradient_scale']:g}")
        return sentences

    def _alike(self, samples: Generated) -> bool:
        seen = samples.media if isinstance(samples, Drawn) else samples.latents  # a dataset's are not drawn again
        groups = seen.unflatten(0, (-1, self.group_size))
        (differing,) = summed(self.accelerator, bool((groups != groups[:, :1]).any()))
        return not differing

    @property
    def over(self) -> bool:
        """Whether there were as many as there may be."""
        return 0 < self.limit <= self.in_a_row
