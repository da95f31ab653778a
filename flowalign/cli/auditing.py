"""The work behind `flowalign audit`: a trained model against its base model, or any model against another."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from flowalign.config import Evaluation, Recipe, load_recipe
from flowalign.config.base import UserError
from flowalign.config.paths import expanded
from flowalign.disk.run_folder import RunFolder
from flowalign.evaluate.audit.audit import Audit, spaced
from flowalign.evaluate.audit.guard import Guarding, evaluation_rewards
from flowalign.evaluate.drawing import sampling_words
from flowalign.evaluate.evaluation import Evaluated, evaluate
from flowalign.policies.base import Policy
from flowalign.policies.conditions import cached_policy
from flowalign.policies.loading import load_policy, model_settings
from flowalign.rollout.prompts import Row, load_prompts
from flowalign.score import Scorer, check_prompts, load_learnt
from flowalign.terminal import Terminal
from flowalign.training.checkpoint import load_last_weights


def audit(
    target: str,
    *,
    against: str | None = None,
    adapter: str | Path | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> tuple[str, Audit]:
    """Audit a run folder, or a model named as `model_settings` takes it; returns a title and the audit.

    A run is audited by its own recipe: its last checkpoint against the model it started from. A model needs `against`,
    its base model, and a `recipe` with the evaluation and guard settings. Raises UserError if one is missing.
    """
    run, target = None, expanded(target)
    if (Path(target) / "recipe.yaml").is_file():
        if recipe or adapter:
            raise UserError(
                f"{target} is a run folder with its own recipe and weights; leave --recipe and --adapter out"
            )
        run, _ = RunFolder.open(Path(target))
        resolved = load_recipe(run.path / "recipe.yaml", overrides)
    elif recipe is None or against is None:
        raise UserError(
            f"{target} is a model: give --against, its base model, and --recipe, whose evaluation and guard say how "
            "to audit"
        )
    else:
        given = load_recipe(recipe, overrides)
        size = {"height": given.model.height, "width": given.model.width}
        model = model_settings(target, adapter).model_copy(update=size)
        resolved = given.model_copy(update={"model": model})
    return _audited(resolved, run, against, device, target)


def _audited(
    recipe: Recipe, run: RunFolder | None, against: str | None, device: torch.device | str, target: str
) -> tuple[str, Audit]:
    settings = recipe.evaluation
    if recipe.guard is None or settings.prompts is None:
        raise UserError("the recipe has no guard or no evaluation.prompts; an audit needs both")
    judging = Scorer(recipe, None, device)
    rewards, weights = evaluation_rewards(recipe, judging)
    rows = spaced(load_prompts(settings.prompts, settings.count), recipe.guard.count)
    check_prompts(rows, rewards, settings.prompts)
    guarding = Guarding(recipe.evaluation, recipe.guard, weights, rows, load_prompts(recipe.prompts), device)
    policy = cached_policy(recipe.model, rows, device, recipe.run.seed)
    title = target
    if run is not None:
        title += f", {load_last_weights(run.checkpoints, policy, partial(load_learnt, judging.trainable))}"
    base = None if against is None else _base(recipe, against, device, policy)

    def draw(policy: Policy, rows: Sequence[Row], asked: Evaluation) -> Evaluated:
        with Terminal().evaluating(len(rows) * asked.images_per_prompt) as progress:
            return evaluate(policy, rows, rewards, asked, policy.request, progress, guarding.auditor.observe)

    with policy.reference() if base is None else nullcontext():
        guarding.learn(base or policy, partial(draw, base or policy))
    evaluated = draw(policy, rows, settings)
    how = sampling_words(settings, policy.request, settings.seed)
    title += f" against {against or 'the model it started from'}, {how}"
    return title, guarding.audit(policy, evaluated, base)


def _base(recipe: Recipe, against: str, device: torch.device | str, policy: Policy) -> Policy:
    model = model_settings(against)
    size = {"height": policy.request.height, "width": policy.request.width}
    base = load_policy(model.model_copy(update=size), device, recipe.run.seed)
    if base.latent_shape(base.request) != policy.latent_shape(policy.request):
        raise UserError(f"--against {against}: its latents differ in shape from those of {recipe.model.path}")
    return base
