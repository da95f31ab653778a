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
    """Scores media while the next media are drawn."""

    @property
    def whole_groups(self) -> bool:
        """Whether it must see the samples of a prompt together."""

    def judge(self, media: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """Begin to score finished media; returns what the rollout keeps of them."""

    def preview(self, index: int, media: torch.Tensor, rows: Sequence[Row]) -> None:
        """Begin to score the one-step predictions of denoising step `index`."""


class Source(ABC):
    """Gives a run its samples, step by step."""

    rows: Sequence[Row]
    """The training prompts."""

    @abstractmethod
    def next(self, policy: Policy, step: int, progress: Progress | None = None) -> Generated:
        """This process's groups of training step `step`, counted from 0."""

    def spent(self) -> tuple[float, int]:
        """Minutes and forward passes that the samples cost before the run; the run's cost includes them."""
        return 0.0, 0

    def check(self, policy: Policy) -> None:  # noqa: B027
        """Raises UserError for a policy that cannot learn from these samples."""


class Rollouts(Source):
    """Draws rollouts of the policy, or of its snapshot `behaviour`."""

    def __init__(
        self,
        rows: Sequence[Row],
        sampler: Rollout,
        share: Share,
        judge: Judge,
        keep: frozenset[Keep] = frozenset(),
        behaviour: str | None = None,
    ):
        """Raises UserError when there are fewer prompts than a step needs."""
        self.rows, self.sampler, self.share = rows, sampler, share
        self.judge, self.keep, self.behaviour = judge, keep, behaviour
        step_rows(rows, share.prompts_per_step, 0, 0)

    def next(self, policy: Policy, step: int, progress: Progress | None = None) -> Generated:
        """Draw this process's groups, each with its own noise; the judge scores them meanwhile."""
        share = self.share
        rows = step_rows(self.rows, share.prompts_per_step, share.seed, step)
        # Encode all prompts of the step: a text encoder's last digits depend on the number of prompts in its batch.
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
    """Reads groups that were drawn and scored before the run."""

    def __init__(self, dataset: GroupDataset, rewards: Sequence[str], sampler: Rollout, share: Share):
        """rewards: the names of rewards to learn from or to measure; sampler: gives the sigma schedule to train on."""
        self.dataset, self.rewards, self.sampler, self.share = dataset, rewards, sampler, share
        self.rows = dataset.rows

    def next(self, policy: Policy, step: int, progress: Progress | None = None) -> Generated:
        """Counted groups of the dataset, each with `group_size` of its samples."""
        sigmas = policy.sigmas(self.sampler.steps, self.sampler.schedule)
        return self.dataset.draw(policy, self.rewards, sigmas, self.share, step)

    def spent(self) -> tuple[float, int]:
        """The cost of collecting the dataset."""
        return self.dataset.spent()

    def check(self, policy: Policy) -> None:
        """Raises UserError when other weights drew the groups."""
        self.dataset.check_model(policy)
