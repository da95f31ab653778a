"""From media to the rewards that an algorithm learns from: media are scored, scores are shaped and combined.

Finished media are scored while the next ones are drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

import rewards as zoo
from flowalign.advantages import RewardTable
from flowalign.config import Combine, Recipe, RewardSettings
from flowalign.config.base import UserError
from flowalign.config.mistakes import nearest
from flowalign.config.paths import sought
from flowalign.config.rewards import Shaping
from flowalign.rollout.dataset import GroupDataset
from flowalign.rollout.prompts import Row
from flowalign.rollout.stages import Drawn, Generated, Recorded
from rewards import Reward, TrainableReward, as_reward
from rewards.combine import (
    Scores,
    agreement,
    base_and_bonus,
    centred_log_sigmoid,
    centred_sigmoid,
    score_all,
    standardised,
    uncertainty_weighted,
    weighted_sum,
    worst_case,
)
from rewards.devices import make_current
from rewards.media import as_levels

_SEPARATOR = "/"
FINISHED = -1  # the index of finished media, where a preview has its denoising step


class Scorer:
    """The rewards of a run: the recipe's, or those that a script gives. Rollouts and datasets use it alike."""

    def __init__(
        self, recipe: Recipe, rewards: Mapping[str, Reward | Callable[..., Any]] | None, device: torch.device | str
    ):
        """device: where the recipe's rewards are loaded and where the scoring thread works."""
        self.recipe, self.device = recipe, torch.device(device)
        given = {} if rewards is None else given_rewards(recipe, rewards)
        self.rewards = load_rewards(recipe.rewards, device, given)
        self.held_out = {name: reward for name, reward in given.items() if name not in recipe.rewards}
        self.weights = {name: entry.weight for name, entry in recipe.rewards.items()}
        self.shaping = {name: entry.shaping for name, entry in recipe.rewards.items() if entry.shaping is not None}
        self.references = {
            name: GroupDataset.open(Path(shaping.reference)).references(name)
            for name, shaping in self.shaping.items()
            if isinstance(shaping.reference, str)
        }
        self.trainable = learning(self.rewards)
        self.learners = {f"reward {name!r}": reward for name, reward in self.trainable.items()}
        for reward in self.learners.values():
            reward.begin()
        if recipe.dataset is not None:
            refuse_learning(self.rewards, "a dataset has fixed scores; train this reward with rollouts")
        self._thread = ThreadPoolExecutor(1, "rewards", make_current, (self.device,))
        self._pending: dict[int, list[Future[dict[str, Scores]]]] = {}  # by denoising step

    def check_prompts(self, rows: Sequence[Row]) -> None:
        """Raises UserError for the first prompt whose scores the recipe's shaping or combination cannot use.

        Also raises UserError for a weight without effect: no prompt is judged by its reward and another one.
        """
        self._refuse_unweighed(rows)
        for name in self.recipe.combine.needed.values():
            if name in self.rewards:
                for row in rows:
                    if not self.rewards[name].applies_to(row.about):
                        raise UserError(
                            f"combine: reward {name!r} does not apply to {row.prompt!r}; base and bonus must apply to "
                            "all prompts"
                        )
        for name, known in self.references.items():
            for row in rows:
                asked = self.rewards[name].applies_to(row.about)
                if asked and row.prompt not in known:
                    raise UserError(
                        f"rewards.{name}.shaping: the dataset {self.shaping[name].reference} has no reference scores "
                        f"of {row.prompt!r}; collect it for all prompts"
                    )

    @property
    def trained(self) -> dict[str, Reward]:
        """The rewards that the algorithm learns from; rewards of weight 0 are only scored and logged."""
        return {name: reward for name, reward in self.rewards.items() if self.weights[name] > 0}

    def _refuse_unweighed(self, rows: Sequence[Row]) -> None:
        """Raises UserError for a weight without effect.

        A prompt's total is the weighted mean of the rewards that apply to it. If only one applies, its weight cancels.
        """
        trained = self.trained
        if self.recipe.algorithm.parts_rewards or len({self.weights[name] for name in trained}) < 2:
            return
        met: set[str] = set()
        for row in rows:
            own = [name for name, reward in trained.items() if reward.applies_to(row.about)]
            met.update(own if len(own) > 1 else ())
        for name in trained:
            if name not in met and self.weights[name] != 1:
                raise UserError(
                    f"rewards.{name}.weight {self.weights[name]:g} has no effect: no prompt that this reward judges is "
                    "judged by another one; leave the weight out"
                )

    @property
    def whole_groups(self) -> bool:
        """Whether a reward compares the samples of a prompt and so must see them together."""
        return any(reward.scope == "group" for reward in self.rewards.values())

    def judge(self, media: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """Start to score a rollout's finished media, in their order; returns them as 8-bit levels in main memory."""
        self._begin(FINISHED, media, rows)
        return as_levels(media).cpu()

    def preview(self, index: int, media: torch.Tensor, rows: Sequence[Row]) -> None:
        """Start to score one-step predictions of denoising step `index`, in the order of their samples."""
        self._begin(index, media, rows)

    def _begin(self, index: int, media: torch.Tensor, rows: Sequence[Row]) -> None:
        texts, metadata = [row.prompt for row in rows], [row.metadata for row in rows]
        found = self._thread.submit(score_all, self.rewards, media, texts, metadata)
        self._pending.setdefault(index, []).append(found)

    def score(self, samples: Generated) -> RewardTable:
        """The rewards of samples, as the algorithm gets them.

        Samples of a dataset bring their scores; for others `judge` has started the scoring, and this waits for it.
        """
        if isinstance(samples, Recorded):
            return self.scored(samples.scores, samples.prompts)
        pending, self._pending = self._pending, {}
        try:
            found = {index: _joined([future.result() for future in parts]) for index, parts in pending.items()}
        finally:
            for future in (future for parts in pending.values() for future in parts):
                future.cancel()
        scored = self.scored(found.pop(FINISHED), samples.prompts)
        if not found:
            return scored
        earlier = [self.scored(found[index], samples.prompts).total for index in sorted(found)]
        return scored._replace(previews=torch.stack([*earlier, scored.total], dim=1))

    def learn(self, samples: Generated, step: int, accelerator: Accelerator) -> tuple[dict[str, Any], list[str]]:
        """Let the rewards that learn take their step; returns their metrics and alarms.

        Every process learns from the samples of all processes, so the rewards stay equal everywhere. They see media in
        8 bits, as files hold them: drawn media must not differ from real ones by their rounding.
        """
        metrics: dict[str, Any] = {}
        alarms: list[str] = []
        if not self.trainable or not isinstance(samples, Drawn):
            return metrics, alarms
        media = accelerator.gather(samples.media.to(self.device))
        rows = samples.rows if accelerator.num_processes == 1 else gather_object(samples.rows)
        for name, reward in self.trainable.items():
            asked = [reward.applies_to(row.about) for row in rows]
            chosen = [place for place, yes in enumerate(asked) if yes]
            if chosen:
                part = [rows[place] for place in chosen]
                texts, metadata = [row.prompt for row in part], [deepcopy(row.metadata) for row in part]
                metrics[name] = reward.update(media[chosen].float() / 255, texts, metadata, step)
                if reward.alarm:
                    alarms.append(f"reward {name!r}: {reward.alarm}")
        return metrics, alarms

    def state(self) -> dict[str, torch.Tensor]:
        """The state of the rewards that learn."""
        return {
            f"{name}{_SEPARATOR}{key}": value
            for name, reward in self.trainable.items()
            for key, value in reward.state_dict().items()
        }

    def scored(self, scores: Mapping[str, Scores], prompts: Sequence[str]) -> RewardTable:
        """The rewards of B samples, as the algorithm gets them, from their scores and prompts."""
        shaped = {name: self._shaped(name, score, prompts) for name, score in scores.items()}
        device = next(iter(shaped.values())).values.device
        trust = None
        combine = self.recipe.combine
        if combine.disagreement:
            trust = agreement(shaped, self.weights, combine.disagreement)
        return RewardTable(
            total=total(shaped, self.weights, combine),
            values=torch.stack([score.values for score in shaped.values()]),
            applies=torch.stack([score.applies for score in shaped.values()]),
            weights=torch.tensor([self.weights[name] for name in shaped], device=device),
            names=tuple(shaped),
            measured=torch.stack([score.values for score in scores.values()]),
            trust=trust,
        )

    def _shaped(self, name: str, score: Scores, prompts: Sequence[str]) -> Scores:
        """The shaped scores. Raises UserError for NaN or infinity: NaN would stand for a sample without a score."""
        shaping, asked = self.shaping.get(name), score.applies
        if shaping is None or not asked.any():
            return score
        values = score.values.clone()
        values[asked] = self._bent(name, shaping, values[asked], prompts, asked)
        if not values[asked].isfinite().all():
            seen = score.values[asked]
            raise UserError(
                f"rewards.{name}.shaping: {shaping.form} of scores from {seen.min():g} to {seen.max():g} is not "
                "finite; give references and a scale of the same size as the scores"
            )
        return Scores(values, asked)

    def _bent(
        self, name: str, shaping: Shaping, values: torch.Tensor, prompts: Sequence[str], asked: torch.Tensor
    ) -> torch.Tensor:
        """The shaped scores (A,) of those A of B samples to which the reward applies, given as `asked` (B,) bool."""
        if shaping.form == "standardise":  # over all prompts
            listed = self.references.get(name, {}).values() or [shaping.reference]
            return standardised(values, torch.tensor(list(listed)).to(values))
        if isinstance(shaping.reference, str):
            known = self.references[name]
            own = [known[prompt] for prompt, yes in zip(prompts, asked.tolist(), strict=True) if yes]
        else:
            own = [list(shaping.reference)] * len(values)
        reference = torch.tensor(own).to(values)
        if shaping.form == "sigmoid":
            return centred_sigmoid(values, reference, shaping.scale)
        return centred_log_sigmoid(values, reference, shaping.quantile)


def given_rewards(recipe: Recipe, rewards: Mapping[str, Reward | Callable[..., Any]]) -> dict[str, Reward]:
    """The rewards that a script gives to a run of the recipe, under the recipe's names.

    They must include all training rewards and may include measured ones. Raises UserError for a name that the recipe
    lacks, a training reward that is not given, and a reward that is both trained on and held out.
    """
    held_out = (recipe.guard and recipe.guard.rewards) or {}
    known = recipe.rewards | (recipe.evaluation.rewards or {}) | held_out
    for name in rewards:
        if name not in known:
            raise UserError(
                f"a reward is given as {name!r}, but recipe {recipe.name} has no reward of this name"
                f"{nearest(name, known)}"
            )
    for name in recipe.rewards:
        if name not in rewards:
            raise UserError(
                f"recipe {recipe.name} trains on {name!r}, which is not among the rewards given "
                f"({', '.join(rewards) or 'none'}); give it too, or take it out of the recipe"
            )
    for name in held_out.keys() & rewards.keys():
        if any(rewards[name] is rewards[trained] for trained in recipe.rewards):
            raise UserError(
                f"the reward given as {name!r} for guard.rewards is trained on; an audit needs another reward"
            )
    return {name: as_reward(reward, name) for name, reward in rewards.items()}


def _joined(parts: Sequence[Mapping[str, Scores]]) -> dict[str, Scores]:
    """The scores of batches, joined in order."""
    return {name: Scores(*map(torch.cat, zip(*(part[name] for part in parts), strict=True))) for name in parts[0]}


def tally(rewards: Mapping[str, Reward]) -> dict[str, dict[str, int]]:
    """The counts of each reward of this process since the last call; rewards that count nothing are left out."""
    return {name: counts for name, one in rewards.items() if (counts := one.tally())}


def unread(tallies: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A sentence for each reward that could not read all answers of its judging model."""
    return [
        f"{name} could not read {counts['unparsable']} of {counts['answers']} answers"
        for name, counts in tallies.items()
        if counts.get("unparsable")
    ]


def load_learnt(rewards: Mapping[str, TrainableReward], state: Mapping[str, torch.Tensor]) -> None:
    """Restore rewards from a run's `Scorer.state`; KeyError for a reward that it lacks."""
    for name, reward in rewards.items():
        prefix = f"{name}{_SEPARATOR}"
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if not own:
            raise KeyError(f"nothing of reward {name!r}")
        reward.load_state_dict(own)


def total(scores: Mapping[str, Scores], weights: Mapping[str, float], combine: Combine) -> torch.Tensor:
    """The total (B,): the scores combined as the recipe says."""
    if combine.form == "worst":
        return worst_case(scores, weights)
    if combine.form == "uncertainty":
        return uncertainty_weighted(scores, weights, combine.penalty)
    if combine.form == "bonus":
        return base_and_bonus(scores, combine.base, combine.bonus, combine.floor)
    return weighted_sum(scores, weights)


def learning(rewards: Mapping[str, Reward]) -> dict[str, TrainableReward]:
    """The rewards that learn."""
    return {name: one for name, one in rewards.items() if isinstance(one, TrainableReward) and one.learns}


def refuse_learning(rewards: Mapping[str, Reward], why: str) -> None:
    """Raises UserError for a reward that learns: before training it would give every sample the same score."""
    for name in learning(rewards):
        raise UserError(f"reward {name!r} learns during training and cannot score before it; {why}")


def load_rewards(
    settings: Mapping[str, RewardSettings],
    device: torch.device | str,
    given: Mapping[str, zoo.Reward] = MappingProxyType({}),
) -> dict[str, zoo.Reward]:
    """Load a recipe's rewards on a device, by the recipe's names; the rewards in `given` are used as they are."""
    for name, entry in settings.items():
        file = entry.loads(name).rpartition(":")[0]
        if name not in given and file.endswith(".py") and not Path(file).is_file():
            raise UserError(f"rewards.{name}.load: there is no file {file}{sought(file)}")
    return {
        name: given[name] if name in given else zoo.load_on(device, entry.loads(name), **entry.options)
        for name, entry in settings.items()
    }


def check_prompts(rows: Sequence[Row], rewards: Mapping[str, zoo.Reward], source: object) -> None:
    """Raises UserError for the first prompt that no reward can judge, before a model is loaded."""
    for row in rows:
        if not any(reward.applies_to(row.about) for reward in rewards.values()):
            names = ", ".join(rewards)
            raise UserError(f"prompts {source}: prompt {row.index + 1} ({row.prompt!r}) cannot be judged by {names}")
