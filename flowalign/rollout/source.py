"""Where the samples of a training step come from: rollouts of the policy, or a dataset of scored groups."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch

from flowalign.config import Rollout
from flowalign.policies.base import Policy
from flowalign.rollout.dataset import GroupDataset
from flowalign.rollout.generate import Progress, Step, rollout
from flowalign.rollout.prompts import Row, step_rows
from flowalign.rollout.stages import Generated, Keep, RolloutRequest, Share
from flowalign.sampling.noise import ROLLOUT


class Judge(Protocol):
    """Whoever scores media while the next ones are drawn."""

    @property
    def whole_groups(self) -> bool:
        """Whether it must see the samples of a prompt together."""

    def judge(self, media: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """Begin to score finished media; returns what is kept of them."""

    def preview(self, index: int, media: torch.Tensor, rows: Sequence[Row]) -> None:
        """Begin to score one-step predictions made at denoising step `index`."""


class Source(ABC):
    """Gives a run its samples, step by step."""

    rows: Sequence[Row]
    """The prompts that are trained on."""

    @abstractmethod
    def next(self, policy: Policy, step: int, progress: Progress | None = None) -> Generated:
        """This process's groups of training step `step`, counted from 0."""

    def spent(self) -> tuple[float, int]:
        """Minutes and forwards that the samples have cost before the run: part of its cost."""
        return 0.0, 0

    def check(self, policy: Policy) -> None:  # noqa: B027
        """Raises UserError for a policy that cannot learn from these samples."""


class Rollouts(Source):
    """Rollouts of the policy, or of its snapshot `behaviour`."""

    def __init__(
        self,
        rows: Sequence[Row],
        sampler: Rollout,
        share: Share,
        judge: Judge,
        keep: frozenset[Keep] = frozenset(),
        behaviour: str | None = None,
    ):
        """UserError for fewer prompts than a step has."""
        self.rows, self.sampler, self.share = rows, sampler, share
        self.judge, self.keep, self.behaviour = judge, keep, behaviour
        step_rows(rows, share.prompts_per_step, 0, 0)

    def next(self, policy: Policy, step: int, progress: Progress | None = None) -> Generated:
        """Draws this process's groups, each with noise of its own, and has them scored on the way."""
        share = self.share
        rows = step_rows(self.rows, share.prompts_per_step, share.seed, step)
        # All of the step's: a text encoder's last digits depend on how many prompts it sees at once.
        condition = policy.encode(rows)
        own = rows[share.own]
        first, _ = self.sampler.window_at(share.seed, step)

        def preview(seen: Step) -> None:
            if seen.index > first:
                shown = [own[place // share.group_size] for place in seen.places]
                self.judge.preview(seen.index, policy.decode(seen.predicted), shown)

        request = RolloutRequest(
            own,
            share.group_size,
            self.sampler,
            policy.request,
            (ROLLOUT, share.seed, step),
            batch=self.sampler.batch,
            training_step=(share.seed, step),
            weights=self.behaviour,
        )
        return rollout(
            policy,
            request,
            condition=condition[share.own],
            keep=self.keep,
            finished=self.judge.judge,
            watch=preview if "previews" in self.keep else None,
            whole_groups=self.judge.whole_groups,
            progress=progress,
        )


class Dataset(Source):
    """Groups that were drawn and scored before."""

    def __init__(self, dataset: GroupDataset, rewards: Sequence[str], sampler: Rollout, share: Share):
        """rewards: the names of those that are learnt from or measured; sampler: whose schedule is trained on."""
        self.dataset, self.rewards, self.sampler, self.share = dataset, rewards, sampler, share
        self.rows = dataset.rows

    def next(self, policy: Policy, step: int, progress: Progress | None = None) -> Generated:
        """Counted groups, and of each so many of its samples."""
        sigmas = policy.sigmas(self.sampler.steps, self.sampler.schedule)
        return self.dataset.draw(policy, self.rewards, sigmas, self.share, step)

    def spent(self) -> tuple[float, int]:
        """What collecting took."""
        return self.dataset.spent()

    def check(self, policy: Policy) -> None:
        """The policy must begin as the one that drew the groups."""
        self.dataset.check_model(policy)
