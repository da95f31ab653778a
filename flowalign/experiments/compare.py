"""Several recipes under one budget: same model, prompts and seeds, and what each has made of it.

The budget is minutes of training. Transformer forwards are counted beside them, since minutes are a machine's own.
Evaluations are in neither.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.config import Recipe, load_recipe
from flowalign.config.base import UserError
from flowalign.config.mistakes import nearest
from flowalign.disk.about import now
from flowalign.disk.files import replace_json, replace_text
from flowalign.disk.starting import refuse_changes
from flowalign.evaluate.held_out import held_out_from
from flowalign.evaluate.report.comparison import leaderboard_markdown, write_comparison_page
from flowalign.evaluate.report.html import parsed, read_evaluations
from flowalign.experiments.best_of import evaluate_best_of
from flowalign.experiments.campaign import is_done, train_unless_done
from flowalign.experiments.scaling import check_judges
from flowalign.policies.loading import load_policy, sizes_of
from flowalign.rollout.prompts import load_prompts
from flowalign.score import learning, load_rewards
from flowalign.terminal import Terminal
from rewards.devices import chosen_device

ENDLESS = 1_000_000  # training steps: time ends a run, however few steps its recipe asks for
_DECIDED = {"run.folder": "--output", "run.seed": "--seeds", "run.max_minutes": "--budget", "train.steps": "--budget"}
_OWN = {  # how a recipe trains and how densely it is measured; the rest of these sections is what is compared on
    "model": {
        *("lora", "dtype", "attention", "compile", "gradient_checkpointing"),
        *("height", "width", "max_sequence_length"),  # `_sizes` compares what they come to
    },
    "evaluation": {"every", "batch", "keep_media", "rewards"},
}


def compare(
    sources: Sequence[str],
    budget: float,
    output: Path,
    *,
    seeds: Sequence[int] = (0,),
    reward: str | None = None,
    target: float | None = None,
    overrides: Sequence[str] = (),
    best_of: int = 0,
    resume: bool = False,
) -> dict[str, Any]:
    """Train every recipe with every seed for `budget` minutes and write comparison.json, .md and .html into `output`.

    `reward`, by default the first of the evaluation, ranks the recipes; `target` is the value of it whose price in
    minutes and forwards is asked for. With `best_of` the untrained model is also given so many candidates of every
    held-out prompt, of which the reward that ranks chooses: what any n of them give stands beside the training. With
    `resume` finished runs stay as they are and all others go on, also under a
    larger budget than before. Returns what comparison.json holds.

    Raises UserError before anything is trained when the recipes cannot be compared or the output is taken, and
    Interrupted after Ctrl-C or SIGTERM.
    """
    recipes = [load_recipe(source, overrides) for source in sources]
    _check(recipes, budget, seeds, overrides, best_of)
    settings = recipes[0].evaluation
    known = held_out_from(recipes[0], load_prompts(settings.prompts or (), settings.count))
    measured = settings.rewards or recipes[0].rewards
    if reward is not None and reward not in measured:
        raise UserError(f"--reward {reward!r} is not measured by the evaluation{nearest(reward, measured)}")
    # Seed by seed, so that what changes on the machine meanwhile falls on all recipes alike.
    runs = [_run_of(recipe, seed, budget, output) for seed in seeds for recipe in recipes]
    _check_output(runs, budget, output, resume)
    yardstick = best_of_base(recipes[0], reward or next(iter(measured)), best_of) if best_of else None
    for number, recipe in enumerate(runs, start=1):
        state = "already finished" if is_done(recipe) else f"time ends it, after {budget:g} minutes of training"
        Terminal().say(f"run {number} of {len(runs)}, {recipe.folder.name}: {state}")
        train_unless_done(recipe)
    about = {
        "command": _command(sources, budget, seeds, output, reward, target, best_of, overrides),
        "made": now(),
        "budget_minutes": budget,
        "seeds": list(seeds),
        "reward": reward or next(iter(measured)),
        "target": target,
        "best_of": yardstick,
        "shared": _settings_shared(recipes[0]) | _sizes(recipes[0]),
        "prompts": known.prompts,
        "trained_prompts": known.trained,
    }
    result = summarise(about, recipes, {(run.name, run.run.seed): run.folder for run in runs})
    replace_json(output / "comparison.json", result)
    replace_text(output / "comparison.md", leaderboard_markdown(result))
    write_comparison_page(output, result)
    return result


def summarise(
    about: Mapping[str, Any], recipes: Sequence[Recipe], folders: Mapping[tuple[str, int], Path]
) -> dict[str, Any]:
    """What comparison.json holds, from the finished runs in `folders` by recipe and seed; the best recipe comes first.

    Raises UserError when the reward that ranks has judged none of the held-out prompts.
    """
    reward, target = about["reward"], about["target"]
    runs = [_outcome(recipe, seed, folder, reward, target) for (recipe, seed), folder in folders.items()]
    info = [parsed(folder / "run.json", json.loads) for folder in folders.values()]
    rows = [_of_recipe(recipe, [run for run in runs if run["recipe"] == recipe.name], target) for recipe in recipes]
    rows.sort(key=lambda row: -row["rewards"][reward]["after"]["mean"])
    if yardstick := about.get("best_of"):
        for row in rows:
            row["matched_by"] = matching_n(yardstick, row["rewards"][reward]["after"]["mean"])
    devices = sorted({of["device"] for of in info})
    return {**about, "devices": devices, "versions": info[0]["versions"], "recipes": rows, "runs": runs}


def best_of_base(recipe: Recipe, reward: str, candidates: int) -> dict[str, Any]:
    """What best-of-n of the recipe's untrained model gives for every n up to `candidates`, on its held-out prompts.

    `reward` chooses; the other rewards of the evaluation are measured on what it chose, but for those that learn or
    compare pictures. Raises UserError when `reward` itself does.
    """
    settings = recipe.evaluation
    assert settings.prompts is not None  # a comparison has seen to it
    device = chosen_device()
    rewards = load_rewards(settings.rewards or recipe.rewards, device)
    check_judges({reward: rewards[reward]})
    judges = {n: one for n, one in rewards.items() if one.scope == "sample" and n not in learning(rewards)}
    rows = load_prompts(settings.prompts, settings.count)
    policy = load_policy(recipe.model, device, recipe.run.seed)
    Terminal().say(f"best of 1 to {candidates} of {recipe.model.path} without training, chosen by {reward}")
    counts = range(1, candidates + 1)
    with Terminal().evaluating(len(rows) * candidates) as progress:
        points = evaluate_best_of(policy, rows, judges, reward, counts, settings, policy.request, progress)
    found = [
        {
            "n": point.candidates,
            "forwards": point.cost.forwards,
            "rewards": {
                name: {"mean": held_out(summary), "standard_error": held_out_error(summary)}
                for name, summary in point.summary.items()
            },
        }
        for point in points
    ]
    return {"reward": reward, "prompts": points[0].summary[reward]["count"], "points": found}


def matching_n(yardstick: Mapping[str, Any], value: float) -> int | None:
    """The least n whose best-of-n reaches a value of the reward that chooses; None where no n does."""
    reward = yardstick["reward"]
    reached = (point["n"] for point in yardstick["points"] if point["rewards"][reward]["mean"] >= value)
    return next(reached, None)


def held_out_error(summary: Mapping[str, Any]) -> float | None:
    """The standard error of `held_out`; None for fewer than two pictures, of a task where there are any."""
    errors = [of["standard_error"] for of in summary.get("tasks", {"": summary}).values()]
    return None if None in errors else math.hypot(*errors) / len(errors)


def held_out(summary: Mapping[str, Any]) -> float:
    """The score of a reward in an evaluation: the unweighted mean of its tasks where it has any, as reports show it."""
    return summary.get("overall", summary["mean"])


def price(curve: Sequence[Mapping[str, Any]], reward: str, target: float) -> dict[str, float] | None:
    """The minutes and forwards at which the held-out reward first reaches the target; None where it never does.

    Between the last evaluation below the target and the first that is not, the reward is taken to rise linearly.
    """
    before = None
    for point in curve:
        value = point["rewards"][reward]
        if value >= target:
            if before is None:
                return {key: float(point[key]) for key in ("minutes", "forwards")}
            share = (target - before["rewards"][reward]) / (value - before["rewards"][reward])
            return {key: before[key] + share * (point[key] - before[key]) for key in ("minutes", "forwards")}
        before = point
    return None


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, standard deviation (with n - 1; None for one value) and count; None without values."""
    if not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "count": len(values)}


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds of `1,2,3`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--seeds {text!r} must be whole numbers with commas between, such as 1,2,3") from None


def _check(
    recipes: Sequence[Recipe], budget: float, seeds: Sequence[int], overrides: Sequence[str], best_of: int
) -> None:
    """What can be wrong with a comparison, apart from its output."""
    if not 0 < budget < math.inf:
        raise UserError(f"--budget {budget:g} must be minutes above 0")
    for override in overrides:
        key = override.partition("=")[0]
        if key in _DECIDED:
            raise UserError(f"--set {override}: a comparison decides {key} itself, by {_DECIDED[key]}")
    if best_of < 0:
        raise UserError(f"--best-of {best_of} must be at least 1, or 0 for none")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {','.join(map(str, seeds))} names a seed twice")
    names = [recipe.name for recipe in recipes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two of the recipes are named {twice}; give each a name of its own")
    if len(recipes) * len(seeds) < 2:
        raise UserError("a comparison needs two recipes or two --seeds at least")
    for recipe in recipes:
        if recipe.evaluation.prompts is None:
            raise UserError(f"recipe {recipe.name} has no evaluation.prompts, so there is nothing to compare it by")
    for shared in (_settings_shared, _sizes):  # the settings first: sizes are asked of the model, maybe of the hub
        first = shared(recipes[0])
        for recipe in recipes[1:]:
            for key, value in shared(recipe).items():
                if value != first[key]:
                    both = f"{names[0]} ({_shown(first[key])}) and {recipe.name} ({_shown(value)})"
                    raise UserError(f"recipes {both} differ in {key}; a comparison needs the same")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _sizes(recipe: Recipe) -> dict[str, Any]:
    """The media's size and the text's length, which a recipe may leave to its model."""
    request, length = sizes_of(recipe.model)
    return {"model.height": request.height, "model.width": request.width, "model.max_sequence_length": length}


def _settings_shared(recipe: Recipe) -> dict[str, Any]:
    """What all recipes of a comparison must have in common, by key, but for what `_sizes` compares."""

    def listed(prompts: str | tuple[str, ...] | None) -> list[str]:
        return [prompts] if isinstance(prompts, str) else list(prompts or ())

    values = {
        f"{section}.{key}": value
        for section, own in _OWN.items()
        for key, value in getattr(recipe, section).model_dump(mode="json", exclude=own).items()
    }
    rewards = recipe.evaluation.rewards or recipe.rewards
    judges = {name: {"load": of.load or name, "options": of.options} for name, of in rewards.items()}
    prompts = {"prompts": listed(recipe.prompts), "evaluation.prompts": listed(recipe.evaluation.prompts)}
    return {**values, **prompts, "evaluation.rewards": judges}


def _run_of(recipe: Recipe, seed: int, budget: float, output: Path) -> Recipe:
    """The recipe as one run of the comparison."""
    place = {"folder": str(output / f"{recipe.name}-seed{seed}"), "seed": seed, "max_minutes": budget}
    run, train = recipe.run.model_copy(update=place), recipe.train.model_copy(update={"steps": ENDLESS})
    return recipe.model_copy(update={"run": run, "train": train})


def _check_output(runs: Sequence[Recipe], budget: float, output: Path, resume: bool) -> None:
    """That the output is empty or, with `resume`, that its runs are the ones wanted and no longer than that."""
    if not resume:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"--output {output} is not an empty folder; go on with --resume or choose another")
        return
    begun = [recipe for recipe in runs if (recipe.folder / "recipe.yaml").is_file()]
    if not begun:
        raise UserError(f"--output {output} holds none of these runs; leave --resume out and choose an empty folder")
    for recipe in begun:
        saved = load_recipe(recipe.folder / "recipe.yaml")
        if (minutes := saved.run.max_minutes or math.inf) > budget:
            raise UserError(f"{recipe.folder} was given {minutes:g} minutes; on --resume the --budget may only grow")
        refuse_changes(saved, recipe)


def _outcome(recipe: str, seed: int, folder: Path, reward: str, target: float | None) -> dict[str, Any]:
    """One run: where every held-out reward began and ended, at which cost, and all evaluations."""
    curve = [
        {key: of[key] for key in ("step", "minutes", "forwards")}
        | {"rewards": {name: held_out(summary) for name, summary in of["summary"].items()}}
        for of in read_evaluations(folder)
    ]
    if not curve or curve[0]["step"] != 0:
        raise UserError(f"{folder} has no evaluation of step 0, so that its gain is unknown; train that run anew")
    first, last = curve[0]["rewards"], curve[-1]["rewards"]
    if reward not in last:
        raise UserError(f"{reward} judges none of the evaluation prompts; rank by --reward {' or '.join(last)}")
    ends = {n: {"before": first[n], "after": last[n], "gain": last[n] - first[n]} for n in last}
    cost = {"minutes": curve[-1]["minutes"], "forwards": curve[-1]["forwards"], "steps": curve[-1]["step"]}
    reached = None if target is None else price(curve, reward, target)
    about = {"recipe": recipe, "seed": seed, "folder": folder.name}
    return {**about, **cost, "rewards": ends, "to_target": reached, "curve": curve}


def _of_recipe(recipe: Recipe, runs: Sequence[Mapping[str, Any]], target: float | None) -> dict[str, Any]:
    """The runs of a recipe as means and standard deviations over seeds; to the target, over those that met it."""
    rewards = {
        name: {end: spread([run["rewards"][name][end] for run in runs]) for end in ends}
        for name, ends in runs[0]["rewards"].items()
    }
    cost = {key: spread([run[key] for run in runs]) for key in ("minutes", "forwards", "steps")}
    met = [run["to_target"] for run in runs if run["to_target"] is not None]
    to_target = None if target is None else {key: spread([of[key] for of in met]) for key in ("minutes", "forwards")}
    return {"name": recipe.name, "algorithm": recipe.algorithm.name, **cost, "rewards": rewards, "to_target": to_target}


def _command(
    sources: Sequence[str],
    budget: float,
    seeds: Sequence[int],
    output: Path,
    reward: str | None,
    target: float | None,
    best_of: int,
    overrides: Sequence[str],
) -> str:
    """What a person types to have the whole comparison made."""
    words = ["flowalign", "compare", *sources, "--budget", f"{budget:g}", "--seeds", ",".join(map(str, seeds))]
    words += [] if target is None else ["--target", f"{target:g}"]
    words += [] if reward is None else ["--reward", reward]
    words += ["--best-of", str(best_of)] if best_of else []
    words += [word for override in overrides for word in ("--set", override)]
    return shlex.join([*words, "--output", str(output)])
