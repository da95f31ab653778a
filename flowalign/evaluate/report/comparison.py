"""A comparison as a markdown leaderboard and as one self-contained page, from the contents of comparison.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.disk.media import image_names
from flowalign.evaluate.held_out import held_out_of
from flowalign.evaluate.intervals import plain_interval
from flowalign.evaluate.report import plots
from flowalign.evaluate.report.html import embedded, parsed, read_metrics, write_page
from flowalign.terminal import markdown

Result = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]
IMAGE_SIDE = 192  # pixels; larger images are shrunk to this
BUDGETS = {"minutes": "training minutes", "forwards": "transformer forwards"}


def leaderboard(result: Result) -> Table:
    """Columns and rows of the table of recipes, the best first, with mean and standard deviation over seeds."""
    columns = ["recipe", "algorithm", "before", "after", "gain", "minutes", "forwards", "steps"]
    if result["target"] is not None:
        columns += [f"{budget} to {result['target']:g}" for budget in BUDGETS]
    rows = []
    for of in result["recipes"]:
        row = [of["name"], of["algorithm"], *_ends(of["rewards"][result["reward"]])]
        row += [_text(of[key], _format(key, result)) for key in ("minutes", "forwards", "steps")]
        if of["to_target"] is not None:
            row += [_price(of["to_target"][budget], _format(budget, result), result) for budget in BUDGETS]
        rows.append(row)
    return columns, rows


def leaderboard_markdown(result: Result) -> str:
    """The command, the table of recipes and how to read it."""
    table = markdown(*leaderboard(result))
    return f"    {result['command']}\n\n{table}\n{legend(result)}\n{_best_of_markdown(result)}"


def best_of_table(result: Result) -> Table:
    """Columns and rows of the untrained model's best-of-n, for n = 1, 2, 4, ... and the largest n."""
    points, reward = result["best_of"]["points"], result["best_of"]["reward"]
    names = [reward, *(name for name in points[0]["rewards"] if name != reward)]
    columns = ["n", "forwards per image", f"{reward} (chooses)", *names[1:]]
    shown = [point for point in points if point["n"].bit_count() == 1 or point is points[-1]]
    rows = [
        [str(point["n"]), f"{point['forwards']:,}", *(_with_error(point["rewards"][name]) for name in names)]
        for point in shown
    ]
    return columns, rows


def matches_table(result: Result) -> Table:
    """Columns and rows of the trained models beside the best-of-n that reaches the same score without training."""
    points, reward = result["best_of"]["points"], result["reward"]
    columns = ["recipe", "after", "gain", "forwards per image", "reached without training by", "its forwards per image"]
    rows = []
    for of in result["recipes"]:
        n = of["matched_by"]
        by = f"best of {n}" if n else f"more than best of {points[-1]['n']}"
        ends = _ends(of["rewards"][reward])[1:]
        forwards = f"{(n or points[-1]['n']) * points[0]['forwards']:,}"
        rows.append([of["name"], *ends, f"{points[0]['forwards']:,}", by, forwards if n else f"more than {forwards}"])
    return columns, rows


def best_of_legend(result: Result) -> str:
    """How to read the tables of best-of-n."""
    yardstick = result["best_of"]
    return (
        f"The untrained model drew {yardstick['points'][-1]['n']} candidates for each of {yardstick['prompts']:,} "
        f"{held_out_of(result).word} prompts; {yardstick['reward']} itself chose the best. The score of an n is the "
        "exact expectation over all subsets of n candidates, ± the standard error over prompts. The forwards leave out "
        "that each of the n candidates is also decoded and scored."
    )


def _best_of_markdown(result: Result) -> str:
    if not result.get("best_of"):
        return ""
    tables = f"{markdown(*best_of_table(result))}\n{markdown(*matches_table(result))}"
    return f"\nBest-of-n without training:\n\n{tables}\n{best_of_legend(result)}\n"


def legend(result: Result) -> str:
    """How to read the table."""
    seeds = ", ".join(str(seed) for seed in result["seeds"])
    over = f"mean ± standard deviation over seeds {seeds}" if len(result["seeds"]) > 1 else f"seed {seeds}"
    known = held_out_of(result)
    kind, on = known.word.capitalize(), f" ({known.words})" if known.trained else ""
    text = (
        f"{kind} {result['reward']} of {', '.join(result['shared']['evaluation.prompts'])}{on}, {over}; "
        f"{result['budget_minutes']:g} minutes of training per run on {' and '.join(result['devices'])}. "
        "Forwards are the rows that the transformer saw in rollouts and losses. Neither minutes nor forwards include "
        "evaluations."
    )
    if result["target"] is not None:
        text += f" The cost of reaching {result['target']:g} is interpolated linearly between evaluations."
    return text


def write_comparison_page(output: Path, result: Result) -> Path:
    """Write comparison.html beside the run folders that it shows, and return its path."""
    path = output / "comparison.html"
    groups = {of["name"]: group for group, of in enumerate(result["recipes"])}
    metrics = [read_metrics(output / run["folder"]) for run in result["runs"]]
    others = [name for name in result["recipes"][0]["rewards"] if name != result["reward"]]
    contents = {
        "result": result,
        "held_out": held_out_of(result),
        "lead": _lead(result),
        "legend": legend(result),
        "leaderboard": leaderboard(result),
        "others": [[name, of["name"], *_ends(of["rewards"][name])] for name in others for of in result["recipes"]],
        "styles": {name: plots.group_style(group) for name, group in groups.items()},
        "held_out_plots": _plots(result, groups, [run["curve"] for run in result["runs"]], "rewards"),
        "training_plots": _plots(result, groups, metrics, "reward"),
        "images": _images(output, result),
        "best_of": _best_of(result, groups) if result.get("best_of") else None,
        "runs": [_run_row(run, result) for run in result["runs"]],
        "budgets": BUDGETS,
    }
    write_page(path, contents)
    return path


def rewrite_comparison_page(output: Path) -> Path:
    """Write comparison.html again from comparison.json and the run folders beside it, and return its path."""
    return write_comparison_page(output, parsed(output / "comparison.json", json.loads))


def _lead(result: Result) -> str:
    """A sentence: which recipe ends highest and by how much, with an interval if there are several seeds."""
    reward, (best, *others) = result["reward"], result["recipes"]
    kind, seeds = held_out_of(result).word, len(result["seeds"])
    if not others:
        gains = [run["rewards"][reward]["gain"] for run in result["runs"]]
        return f"{best['name']}: {kind} {reward} {np.mean(gains):+.3f}{_over_seeds(gains)}"
    ends = f"{best['name']} ends highest: {kind} {reward} {_text(best['rewards'][reward]['after'], '.3f')}"
    after = {(run["recipe"], run["seed"]): run["rewards"][reward]["after"] for run in result["runs"]}
    leads = [after[best["name"], seed] - after[others[0]["name"], seed] for seed in result["seeds"]]
    above = f"{ends}, {np.mean(leads):.3f} above {others[0]['name']}"
    if seeds == 1:
        return f"{above}; with one seed it is unknown how much of that is chance"
    return f"{above}{_over_seeds(leads)}"


def _over_seeds(values: Sequence[float]) -> str:
    """The interval of a mean of paired differences, one per seed."""
    found = plain_interval(values)
    if found is None:
        return f"; its {len(values)} seeds give the same value, so no interval is known"
    return f" (95 %: {found[0]:+.3f} to {found[1]:+.3f}, paired over {len(values)} seeds)"


def _plots(result: Result, groups: Mapping[str, int], series: Sequence[Any], key: str) -> dict[str, list[plots.Plot]]:
    """By budget, a plot of each reward under `key` in the runs' `series`."""
    names = dict.fromkeys(name for points in series for point in points for name in point[key])
    if key == "reward":
        names.pop("total", None)  # a sum with different weights in each recipe
    panels: dict[str, list[plots.Plot]] = {budget: [] for budget in BUDGETS}
    for name in names:
        target = result["target"] if key == "rewards" and name == result["reward"] else None
        for budget, label in BUDGETS.items():
            curves = []
            for run, points in zip(result["runs"], series, strict=True):
                if known := [(point[budget], point[key][name]) for point in points if name in point[key]]:
                    spent, values = zip(*known, strict=True)
                    curves.append(plots.Curve(groups[run["recipe"]], spent, values))
            panels[budget].append(plots.budget_plot(name, curves, label, target))
    return panels


def _best_of(result: Result, groups: Mapping[str, int]) -> dict[str, Any]:
    """The page's part on best-of-n: its tables, how to read them, and its curve with a line for each recipe."""
    points, reward = result["best_of"]["points"], result["reward"]
    curve = plots.Curve(0, [p["forwards"] for p in points], [p["rewards"][reward]["mean"] for p in points])
    errors = [point["rewards"][reward]["standard_error"] for point in points]
    ends = {groups[of["name"]]: of["rewards"][reward]["after"]["mean"] for of in result["recipes"]}
    return {
        "table": best_of_table(result),
        "matches": matches_table(result),
        "legend": best_of_legend(result),
        "plots": [plots.scaling_plot(reward, curve, errors, ends)],
    }


def _images(output: Path, result: Result) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Fixed prompts with their image before training and after training with each recipe, all of the first seed."""
    first = {run["recipe"]: output / run["folder"] for run in result["runs"] if run["seed"] == result["seeds"][0]}
    shown: list[tuple[str, Path]] = []
    for of in result["recipes"]:
        steps = sorted(path.parent for path in first[of["name"]].glob("samples/step_*/prompts.json"))
        if not steps:
            return []
        shown += [("before", steps[0])] * (not shown) + [(of["name"], steps[-1])]
    prompts = min((parsed(step / "prompts.json", json.loads) for _, step in shown), key=len)
    return [
        (prompt, [(label, embedded(step / name, IMAGE_SIDE)) for label, step in shown])
        for prompt, name in zip(prompts, image_names(len(prompts)), strict=True)
    ]


def _run_row(run: Result, result: Result) -> dict[str, Any]:
    """A run as cells of text, with the path of its own report."""
    ends = run["rewards"][result["reward"]]
    cells = [f"{ends['before']:.3f}", f"{ends['after']:.3f}", f"{ends['gain']:+.3f}"]
    cells += [f"{run[key]:{_format(key, result)}}" for key in ("minutes", "forwards", "steps")]
    if result["target"] is not None:
        met = run["to_target"]
        cells += [f"{met[key]:{_format(key, result)}}" if met else "not reached" for key in BUDGETS]
    return {"recipe": run["recipe"], "seed": run["seed"], "report": f"{run['folder']}/report.html", "cells": cells}


def _ends(ends: Result) -> list[str]:
    return [_text(ends["before"], ".3f"), _text(ends["after"], ".3f"), _text(ends["gain"], "+.3f")]


def _format(key: str, result: Result) -> str:
    """The number format of a cost; minutes get two decimals if the budget is short."""
    return (".1f" if result["budget_minutes"] >= 10 else ".2f") if key == "minutes" else ",.0f"


def _text(of: Result, style: str) -> str:
    """Mean ± standard deviation; without the latter if it is zero or there is none."""
    return f"{of['mean']:{style}}" + (f" ± {of['std']:{style.lstrip('+')}}" if of["std"] else "")


def _with_error(of: Result) -> str:
    return f"{of['mean']:.3f}" + ("" if of["standard_error"] is None else f" ± {of['standard_error']:.3f}")


def _price(of: Result | None, style: str, result: Result) -> str:
    """The cost of reaching the target, and the number of seeds that reached it if not all did."""
    if of is None:
        return "not reached"
    seeds = len(result["seeds"])
    return _text(of, style) + (f" ({of['count']} of {seeds} seeds)" if of["count"] < seeds else "")
