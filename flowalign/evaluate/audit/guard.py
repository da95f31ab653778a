"""The guard of a training run: it audits the evaluations, names the best weights, and says when to stop the run."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowalign.config import Evaluation, Guard, Recipe
from flowalign.config.base import UserError
from flowalign.evaluate.audit.audit import Audit, Auditor, spaced
from flowalign.evaluate.audit.bands import Band
from flowalign.evaluate.audit.divergence import Divergence, reference_divergence
from flowalign.evaluate.evaluation import Evaluated
from flowalign.evaluate.report.html import read_evaluations
from flowalign.policies.base import Policy
from flowalign.rollout.prompts import Row, shared_rows
from flowalign.sampling.noise import EVALUATION
from flowalign.score import Scorer, load_rewards
from rewards import Reward

BEST, BEST_UNHACKED = "best", "best_unhacked"
_PATHS = 1  # the third part of the noise's key; images of evaluations use 0

Draw = Callable[[Sequence[Row], Evaluation], Evaluated]


def evaluation_rewards(recipe: Recipe, scorer: Scorer) -> tuple[dict[str, Reward], dict[str, float]]:
    """The rewards that evaluations measure, and the weights of the training rewards among them, by name.

    The names are those of the evaluation. The training rewards are the run's own objects, so that a reward that learns
    is measured in its present state.
    """
    measured, names = recipe.measured()
    if recipe.evaluation.rewards is None:  # a script may replace the recipe's rewards
        held_out = {name: entry for name, entry in measured.items() if name not in recipe.rewards}
        return {**scorer.rewards, **load_rewards(held_out, scorer.device, scorer.held_out)}, dict(scorer.weights)
    own = {names[name]: reward for name, reward in scorer.rewards.items() if name in names}
    rest = {name: entry for name, entry in measured.items() if name not in own}
    others = load_rewards(rest, scorer.device, scorer.held_out)
    weights = {names[name]: weight for name, weight in scorer.weights.items() if name in names}
    return {name: own[name] if name in own else others[name] for name in measured}, weights


def refuse_shared_prompts(rows: Sequence[Row], training_rows: Sequence[Row]) -> None:
    """Raises UserError for the first evaluation prompt that is trained on."""
    for row in shared_rows(rows, training_rows):
        shared = f"prompt {row.index + 1} ({row.prompt!r}) is trained on, but an audit needs held-out prompts"
        raise UserError(f"evaluation.prompts: {shared}; hold prompts out, or set guard=null")


class Guarding:
    """Audits one run. All processes make the same calls and get the same answers."""

    def __init__(
        self,
        evaluation: Evaluation,
        settings: Guard,
        weights: Mapping[str, float],
        rows: Sequence[Row],
        training_rows: Sequence[Row],
        device: torch.device | str,
    ):
        """The guard of an evaluation's rows.

        weights: of the training rewards, by their names in evaluations. device: where image features are computed.
        Raises UserError for evaluation prompts that are trained on.
        """
        refuse_shared_prompts(rows, training_rows)
        self.evaluation, self.settings, self.rows = evaluation, settings, spaced(rows, settings.count)
        self.auditor = Auditor(settings, weights, evaluation.images_per_prompt, device)
        self.bands: dict[str, Band] = {}
        self.in_a_row = 0
        self.best: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    def learn(self, base: Policy, draw: Draw, first: Evaluated | None = None) -> None:
        """Learn the bands from the base model's evaluations with `guard.seeds` seeds.

        `draw` evaluates rows with the base model; `first` is its evaluation with the first seed, if it exists already.
        """
        done = [] if first is None else [first]
        drawn = [draw(self.rows, self._seeded(seed)) for seed in range(len(done), self.settings.seeds)]
        paths = [self._divergence(base, seed, None) for seed in range(self.settings.seeds)]
        self.bands = self.auditor.bands([self.auditor.measured(one).values for one in (*done, *drawn)], paths)

    def audit(self, policy: Policy, evaluated: Evaluated, base: Policy | None = None) -> Audit:
        """The audit of an evaluation of the policy; by default `base` is the model that the run started from."""
        divergence = self._divergence(policy, 0, base)
        return self.auditor.audit(self.auditor.measured(evaluated), divergence, self.bands, self.peaks)

    def _seeded(self, seed: int) -> Evaluation:
        settings = self.evaluation
        return settings.model_copy(update={"seed": settings.seed + seed, "keep_media": 0})

    def _divergence(self, policy: Policy, seed: int, base: Policy | None) -> Divergence:
        settings = self.evaluation
        return reference_divergence(
            policy,
            spaced(self.rows, self.settings.kl_samples),
            settings,
            policy.request,
            (EVALUATION, settings.seed + seed, _PATHS),
            reference=base,
            batch=settings.batch,
        )

    def conclude(self, contents: Mapping[str, Any]) -> list[str]:
        """Record an audit's contents; returns which of BEST and BEST_UNHACKED the present weights are."""
        self.in_a_row = self.in_a_row + 1 if contents["alarms"] else 0
        for name, measure in contents["measures"].items():
            if measure["kind"] == "quality":
                self.peaks[name] = max(measure["value"], self.peaks.get(name, -math.inf))
        found = {BEST: contents["proxy"], BEST_UNHACKED: -math.inf if contents["alarms"] else contents["panel"]}
        kept = []
        for name, value in found.items():
            if value is not None and value > self.best.get(name, -math.inf):
                self.best[name] = value
                kept.append(name)
        return kept

    @property
    def sustained(self) -> bool:
        """Whether the last `guard.patience` evaluations have all alarmed."""
        return self.in_a_row >= self.settings.patience

    def restore(self, folder: Path) -> None:
        """Continue from the audits that a run folder holds."""
        for evaluation in read_evaluations(folder):
            contents = evaluation.get("audit")
            if contents is None:
                continue
            if not self.bands:
                self.bands = {name: _band(found) for name, found in contents["measures"].items()}
            self.conclude(contents)


def _band(found: Mapping[str, Any]) -> Band:
    bounds = {key: value for key, value in found.items() if key not in ("value", "state")}
    return Band(**{"high": math.inf, **bounds})
