"""Compare recipes under one budget, with the same model, prompts and seeds.

The budget is minutes of training. Transformer forwards are counted too, since minutes depend on the machine. Neither
includes evaluations.
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

ENDLESS = 1_000_000  # training steps: the budget's minutes end a run, not its recipe's steps
_DECIDED = {"run.folder": "--output", "run.seed": "--seeds", "run.max_minutes": "--budget", "train.steps": "--budget"}
_OWN = {  # settings in which compared recipes may differ; all others of these sections must be equal
    "model": {
        *("lora", "dtype", "attention", "compile", "gradient_checkpointing"),
        *("height", "width", "max_sequence_length"),  # `_sizes` compares the resulting sizes
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
    """Train every recipe with every seed for `budget` minutes; write comparison.json, .md and .html into `output`.

    reward: ranks the recipes; by default the first reward of the evaluation.
    target: a score of that reward; the comparison shows the minutes and forwards that each recipe needs to reach it.
    best_of: the untrained model also draws this many candidates of every held-out prompt, and the comparison shows its
        best-of-n beside the trained recipes; 0 leaves this out.
    resume: finished runs stay unchanged and all others continue; the budget may be larger than before.

    Returns the contents of comparison.json. Raises UserError before any training if the recipes cannot be compared or
    the output is not empty, and Interrupted after Ctrl-C or SIGTERM.
    """
    recipes = [load_recipe(source, overrides) for source in sources]
    _check(recipes, budget, seeds, overrides, best_of)
    settings = recipes[0].evaluation
    known = held_out_from(recipes[0], load_prompts(settings.prompts or (), settings.count))
    measured = settings.rewards or recipes[0].rewards
    if reward is not None and reward not in measured:
        raise UserError(f"--reward {reward!r} is not measured by the evaluation{nearest(reward, measured)}")
    # Seed by seed, so that slow changes of the machine affect all recipes alike.
    runs = [_run_of(recipe, seed, budget, output) for seed in seeds for recipe in recipes]
    _check_output(runs, budget, output, resume)
    yardstick = best_of_base(recipes[0], reward or next(iter(measured)), best_of) if best_of else None
    for number, recipe in enumerate(runs, start=1):
        state = "already finished" if is_done(recipe) else f"ends after {budget:g} minutes of training"
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
    """The contents of comparison.json, from the finished runs in `folders` by recipe and seed; the best recipe first.

    Raises UserError if the ranking reward has judged none of the held-out prompts.
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
    """Best-of-n of the recipe's untrained model for every n up to `candidates`, on its held-out prompts.

    `reward` chooses. The evaluation's other rewards score the chosen images, except rewards that learn or compare
    images. Raises UserError if `reward` itself learns or compares images.
    """
    settings = recipe.evaluation
    assert settings.prompts is not None  # `_check` has refused recipes without them
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
    """The least n whose best-of-n reaches a value of the choosing reward; None if no n does."""
    reward = yardstick["reward"]
    reached = (point["n"] for point in yardstick["points"] if point["rewards"][reward]["mean"] >= value)
    return next(reached, None)


def held_out_error(summary: Mapping[str, Any]) -> float | None:
    """The standard error of `held_out`; None if the evaluation or one of its tasks has fewer than two prompts."""
    errors = [of["standard_error"] for of in summary.get("tasks", {"": summary}).values()]
    return None if None in errors else math.hypot(*errors) / len(errors)


def held_out(summary: Mapping[str, Any]) -> float:
    """The score of a reward in an evaluation, as reports show it: the unweighted mean of its tasks if it has any."""
    return summary.get("overall", summary["mean"])


def price(curve: Sequence[Mapping[str, Any]], reward: str, target: float) -> dict[str, float] | None:
    """The minutes and forwards at which the held-out reward first reaches the target; None if it never does.

    The reward is assumed to rise linearly from the last evaluation below the target to the first one at or above it.
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
    """Mean, standard deviation (divided by n - 1; None for one value) and count; None without values."""
    if not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "count": len(values)}


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds from a text such as `1,2,3`; UserError for another text."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--seeds {text!r} must be whole numbers separated by commas, such as 1,2,3") from None


def _check(
    recipes: Sequence[Recipe], budget: float, seeds: Sequence[int], overrides: Sequence[str], best_of: int
) -> None:
    """Raises UserError for anything wrong with a comparison, except with its output folder."""
    if not 0 < budget < math.inf:
        raise UserError(f"--budget {budget:g} must be a number of minutes above 0")
    for override in overrides:
        key = override.partition("=")[0]
        if key in _DECIDED:
            raise UserError(f"--set {override}: a comparison sets {key} itself; use {_DECIDED[key]}")
    if best_of < 0:
        raise UserError(f"--best-of {best_of} must be at least 1, or 0 for none")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {','.join(map(str, seeds))} names a seed twice")
    names = [recipe.name for recipe in recipes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two of the recipes are named {twice}; give each its own name")
    if len(recipes) * len(seeds) < 2:
        raise UserError("a comparison needs at least two recipes or two --seeds")
    for recipe in recipes:
        if recipe.evaluation.prompts is None:
            raise UserError(f"recipe {recipe.name} has no evaluation.prompts, so it cannot be compared")
    for shared in (_settings_shared, _sizes):  # settings first: the sizes may need a download of the model's files
        first = shared(recipes[0])
        for recipe in recipes[1:]:
            for key, value in shared(recipe).items():
                if value != first[key]:
                    both = f"{names[0]} ({_shown(first[key])}) and {recipe.name} ({_shown(value)})"
                    raise UserError(f"recipes {both} differ in {key}; a comparison needs equal values")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _sizes(recipe: Recipe) -> dict[str, Any]:
    """The size of the media and the length of the text, which a recipe may leave to its model."""
    request, length = sizes_of(recipe.model)
    return {"model.height": request.height, "model.width": request.width, "model.max_sequence_length": length}


def _settings_shared(recipe: Recipe) -> dict[str, Any]:
    """The settings that all recipes of a comparison must share, by key, except those that `_sizes` compares."""

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
    """Raises UserError unless the output is empty or, with `resume`, holds runs of these recipes within the budget."""
    if not resume:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"--output {output} is not an empty folder; continue with --resume or choose another")
        return
    begun = [recipe for recipe in runs if (recipe.folder / "recipe.yaml").is_file()]
    if not begun:
        raise UserError(f"--output {output} holds none of these runs; leave --resume out and choose an empty folder")
    for recipe in begun:
        saved = load_recipe(recipe.folder / "recipe.yaml")
        if (minutes := saved.run.max_minutes or math.inf) > budget:
            raise UserError(f"{recipe.folder} had {minutes:g} minutes; with --resume the --budget may only grow")
        refuse_changes(saved, recipe)


def _outcome(recipe: str, seed: int, folder: Path, reward: str, target: float | None) -> dict[str, Any]:
    """One run: each held-out reward before and after, the run's cost, and the curve of its evaluations."""
    curve = [
        {key: of[key] for key in ("step", "minutes", "forwards")}
        | {"rewards": {name: held_out(summary) for name, summary in of["summary"].items()}}
        for of in read_evaluations(folder)
    ]
    if not curve or curve[0]["step"] != 0:
        raise UserError(f"{folder} has no evaluation of step 0, so its gain is unknown; train that run again")
    first, last = curve[0]["rewards"], curve[-1]["rewards"]
    if reward not in last:
        raise UserError(f"{reward} judges none of the evaluation prompts; rank by --reward {' or '.join(last)}")
    ends = {n: {"before": first[n], "after": last[n], "gain": last[n] - first[n]} for n in last}
    cost = {"minutes": curve[-1]["minutes"], "forwards": curve[-1]["forwards"], "steps": curve[-1]["step"]}
    reached = None if target is None else price(curve, reward, target)
    about = {"recipe": recipe, "seed": seed, "folder": folder.name}
    return {**about, **cost, "rewards": ends, "to_target": reached, "curve": curve}


def _of_recipe(recipe: Recipe, runs: Sequence[Mapping[str, Any]], target: float | None) -> dict[str, Any]:
    """The runs of a recipe as means and standard deviations over seeds.

    The cost of the target is taken over the seeds that reached it.
    """
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
    """The command line that repeats the whole comparison."""
    words = ["flowalign", "compare", *sources, "--budget", f"{budget:g}", "--seeds", ",".join(map(str, seeds))]
    words += [] if target is None else ["--target", f"{target:g}"]
    words += [] if reward is None else ["--reward", reward]
    words += ["--best-of", str(best_of)] if best_of else []
    words += [word for override in overrides for word in ("--set", override)]
    return shlex.join([*words, "--output", str(output)])
