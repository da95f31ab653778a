"""How optimising an imperfect reward (the proxy) changes the true one (the gold), against the distance from the base.

Source: Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization" (2210.10760); the distance is sqrt(KL).
Gains are in standard deviations of the base model's own scores, so that proxy and gold share an axis.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.config.base import UserError
from flowalign.disk.files import replace_bytes, replace_json, replace_text
from flowalign.evaluate.report.html import parsed, read_evaluations
from flowalign.evaluate.report.plots import Chase, overoptimization_figure
from flowalign.terminal import markdown

PROXY, GOLD = "proxy", "gold"  # the names of both rewards in the runs' evaluations
_COLUMNS = (
    "proxy",
    "defence",
    "proxy gain",
    "gold before",
    "gold, best on the way",
    "gold at the end",
    "end less best",
    "sqrt(KL)",
    "minutes",
)


def read_run(folder: Path) -> dict[str, Any]:
    """A finished run: its minutes, its curve, and the change of the gold with its standard error over prompts.

    A point of the curve has step, distance, the means of proxy and gold, and the gains of both. Raises UserError for a
    run without evaluations, without one of the two rewards in them, or without a guard, which measures the KL.
    """
    evaluations = read_evaluations(folder)
    if not evaluations:
        raise UserError(f"{folder} has no evaluations; train it first")
    scores = {name: np.stack([_scores(folder, one, name) for one in evaluations]) for name in (PROXY, GOLD)}
    curve = []
    for place, evaluation in enumerate(evaluations):
        if "audit" not in evaluation:
            raise UserError(f"{folder}: the evaluation of step {evaluation['step']} has no audit; train with a guard")
        point = {"step": evaluation["step"], "distance": max(evaluation["audit"]["kl"], 0.0) ** 0.5}
        for name, rows in scores.items():
            point[name] = float(rows[place].mean())
            point[f"{name}_gain"] = float((rows[place] - rows[0]).mean() / (rows[0].std(ddof=1) or 1.0))
        curve.append(point)
    change = scores[GOLD][-1] - scores[GOLD][0]
    return {
        "minutes": parsed(folder / "run.json", json.loads).get("minutes"),
        "gold_change": float(change.mean()),
        "gold_change_error": float(change.std(ddof=1) / len(change) ** 0.5),
        "curve": curve,
    }


def _scores(folder: Path, evaluation: Mapping[str, Any], name: str) -> np.ndarray:
    """The scores of all images by one reward, (n,)."""
    try:
        return np.array([row["scores"][name] for row in evaluation["rows"]], dtype=np.float64)
    except KeyError:
        raise UserError(f"{folder}: the evaluation of step {evaluation['step']} has no reward {name!r}") from None


def mean_curve(curves: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """The mean curve of several seeds: the mean of every number, at each step that all seeds have."""
    shared = set.intersection(*({point["step"] for point in curve} for curve in curves))
    at_step = [[point for curve in curves for point in curve if point["step"] == step] for step in sorted(shared)]
    return [{key: float(np.mean([point[key] for point in points])) for key in points[0]} for points in at_step]


def outcome(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The outcome of one defence, from the mean curve over seeds; `gold_lost` is the gold's end minus its best."""
    curve = mean_curve([run["curve"] for run in runs])
    best = max(curve, key=lambda point: point[GOLD])
    return {
        "proxy_gain": curve[-1][f"{PROXY}_gain"],
        "gold_before": curve[0][GOLD],
        "gold_best": best[GOLD],
        "best_distance": best["distance"],
        "gold_end": curve[-1][GOLD],
        "gold_lost": curve[-1][GOLD] - best[GOLD],
        "gold_error": float(np.linalg.norm([run["gold_change_error"] for run in runs]) / len(runs)),
        "distance": curve[-1]["distance"],
        "minutes": float(np.mean([run["minutes"] for run in runs])),
    }


Found = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""By proxy and defence: `runs`, each as `read_run` gives it with its name, and `outcome`."""


def table(found: Found) -> str:
    """The outcomes as Markdown."""
    rows = []
    for proxy, defences in found.items():
        for defence, of in defences.items():
            own = of["outcome"]
            numbers = (
                f"{own['proxy_gain']:+.2f}",
                f"{own['gold_before']:.3f}",
                f"{own['gold_best']:.3f} at {own['best_distance']:.1f}",
                f"{own['gold_end']:.3f} ± {own['gold_error']:.3f}",
                f"{own['gold_lost']:+.3f}",
                f"{own['distance']:.1f}",
                f"{own['minutes']:.1f}",
            )
            rows.append((proxy, defence, *numbers))
    return markdown(_COLUMNS, rows)


def write_results(output: Path, about: Mapping[str, Any], found: Found) -> None:
    """Write overoptimization.json, .md, .svg and .png into `output`, each as a whole."""
    replace_json(output / "overoptimization.json", {**about, "proxies": found})
    replace_text(output / "overoptimization.md", table(found))
    chases = {
        proxy: [_chase(defence, mean_curve([run["curve"] for run in of["runs"]])) for defence, of in defences.items()]
        for proxy, defences in found.items()
    }
    for kind, contents in overoptimization_figure(chases).items():
        replace_bytes(output / f"overoptimization.{kind}", contents)


def _chase(defence: str, curve: Sequence[Mapping[str, float]]) -> Chase:
    columns = ([point[key] for point in curve] for key in ("distance", f"{PROXY}_gain", f"{GOLD}_gain"))
    return Chase(defence, *columns)
