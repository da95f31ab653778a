"""The curves of a run as inline SVG: one small panel per curve, so that a page can lay them out for any width.

Panels hold only numbers and fixed words. Names from a run's files are panel titles, which the page escapes.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

TRAINING, HELD_OUT, OTHER = "#2563a8", "#b4530f", "#4b5563"
GROUPS = ("#2563a8", "#d97706", "#0f8a5f", "#c026a3", "#dc2626", "#0891b2", "#7c4a1e", "#4b5563")
_TITLES = {
    "loss": "Loss",
    "policy_loss": "Policy loss",
    "kl": "KL to the reference",
    "grad_norm": "Gradient norm",
    "clipped": "Share clipped",
    "ratio_distance": "Distance of the ratio from 1",
    "learning_rate": "Learning rate",
    "zero_spread": "Share of groups whose rewards are all equal",
}
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#6b7280",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Plot:
    """A panel: its title, which is not escaped yet and may hold names from files, and its SVG."""

    title: str
    svg: str


@dataclass(frozen=True)
class Curve:
    """Values (points,) against the budget spent (points,), ascending; `group` chooses color and dashes."""

    group: int
    spent: Sequence[float]
    values: Sequence[float]


def group_style(group: int) -> tuple[str, str]:
    """The color and the CSS name of the line style of a group of curves; both differ for the first 24 groups."""
    return GROUPS[group % len(GROUPS)], ("solid", "dashed", "dotted")[group // len(GROUPS) % 3]


def training_plots(metrics: Sequence[dict[str, Any]], prompts_per_step: int | None) -> list[Plot]:
    """The total training reward and each of its parts against training steps.

    The band is the mean ± std / sqrt(prompts of a step), an upper bound of the mean's standard error: the images of one
    prompt are alike, so dividing by the number of images would give too small an error.
    """
    names = list(dict.fromkeys(name for row in metrics for name in row.get("reward", {})))
    if len(names) == 2 and "total" in names and _same(metrics, *names):
        names.remove("total")
    plots = []
    for name in names:
        mean = _series(metrics, "reward", name)
        error = _series(metrics, "reward_std", name) / math.sqrt(prompts_per_step or math.nan)
        plots.append(Plot(name, _curve(metrics, mean, TRAINING, error)))
    return plots


def evaluation_plots(evaluations: Sequence[dict[str, Any]]) -> list[Plot]:
    """The held-out score of each reward, with bars of ± 1 standard error; dashed: the unweighted mean of its tasks."""
    plots = []
    for name in evaluations[-1]["summary"] if evaluations else ():
        rows = [row for row in evaluations if name in row["summary"]]
        summaries = [row["summary"][name] for row in rows]
        steps = [row["step"] for row in rows]
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"held-out {name}"}):
            figure, axes = _panel(rows)
            error = [_number(s["standard_error"]) for s in summaries]
            style: Any = {"color": HELD_OUT, "marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.6}
            axes.errorbar(steps, [s["mean"] for s in summaries], error, label="mean over images", **style)
            if summaries[-1].get("overall") is not None:
                overall = [_number(s.get("overall")) for s in summaries]
                axes.plot(steps, overall, ".--", color=OTHER, label="unweighted mean of the tasks")
                axes.legend(frameon=False, fontsize=8)
            plots.append(Plot(name, _svg(figure)))
    return plots


def hacking_plot(audits: Sequence[dict[str, Any]]) -> Plot:
    """The training reward (left) and the held-out rewards (right) against the distance from the base model.

    Gao et al., "Scaling laws for reward model overoptimization" (2023), fig. 1. Rings mark audits that alarmed.
    """
    distance = [audit["distance"] for audit in audits]
    lines = [("proxy", "training reward", TRAINING, "--"), ("panel", "held-out, seed deviations", HELD_OUT, "-")]
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"hacking {distance}"}):
        figure, axes = _axes()
        axes.set_xlabel("√KL to the base model")
        for key, label, color, dashes in lines:
            if any(audit[key] is None for audit in audits):
                continue
            side = axes if key == "proxy" else axes.twinx()
            values = [audit[key] for audit in audits]
            side.plot(distance, values, color=color, linestyle=dashes, marker=".", linewidth=1.6)
            side.set_ylabel(label, color=color, fontsize=8)
            side.tick_params(axis="y", labelcolor=color)
            side.grid(visible=key == "proxy")
            rings = [place for place, audit in enumerate(audits) if audit["alarms"]]
            chosen = [distance[place] for place in rings], [values[place] for place in rings]
            side.plot(*chosen, "o", fillstyle="none", color="#dc2626", markersize=8)
        return Plot("Over-optimisation", _svg(figure))


def optimisation_plots(metrics: Sequence[dict[str, Any]]) -> list[Plot]:
    """Loss, gradient norm and the algorithm's own metrics against training steps."""
    names = dict.fromkeys(name for row in metrics for name in row.get("metrics", {}))
    series = {name: _series(metrics, "metrics", name) for name in names}
    own = ("loss", "grad_norm", "learning_rate", "zero_spread")
    series |= {name: np.array([_number(row.get(name)) for row in metrics]) for name in own}
    order = sorted(series, key=lambda name: list(_TITLES).index(name) if name in _TITLES else len(_TITLES))
    shown = [name for name in order if np.isfinite(series[name]).any()]
    return [Plot(_TITLES.get(name, name), _curve(metrics, series[name], OTHER)) for name in shown]


def budget_plot(title: str, curves: Sequence[Curve], budget: str, target: float | None = None) -> Plot:
    """Curves against a budget: each curve faint, and bold the mean of each group, as far as its shortest curve reaches.

    `target` is a horizontal line.
    """
    salt = f"{title} {budget} {[(curve.group, *curve.values) for curve in curves]}"
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure, axes = _axes()
        axes.set_xlabel(budget)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter("{x:,.10g}")
        if target is not None:
            axes.axhline(target, color=OTHER, linestyle=":", linewidth=1)
        for group in dict.fromkeys(curve.group for curve in curves):
            color, dashes = group_style(group)
            own = [curve for curve in curves if curve.group == group]
            for curve in own:
                axes.plot(curve.spent, curve.values, color=color, linestyle=dashes, linewidth=0.8, alpha=0.35)
            axes.plot(*mean_curve(own), color=color, linestyle=dashes, linewidth=1.8)
        return Plot(title, _svg(figure))


def scaling_plot(title: str, base: Curve, errors: Sequence[float | None], trained: Mapping[int, float]) -> Plot:
    """Best-of-n without training against forwards per image, on a log scale, with a band of ± its errors (points,).

    Each group of `trained` is a horizontal line at its value, with a dot at its cost, the forwards of one image.
    """
    salt = f"best of n {title} {base.values} {trained}"
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure, axes = _axes()
        values, error = np.array(base.values), np.array([_number(one) for one in errors])
        axes.plot(base.spent, values, ".-", color=OTHER, linewidth=1.6)
        axes.fill_between(base.spent, values - error, values + error, color=OTHER, alpha=0.18, linewidth=0)
        for group, value in trained.items():
            color, dashes = group_style(group)
            axes.axhline(value, color=color, linestyle=dashes, linewidth=1.4)
            axes.plot(base.spent[0], value, "o", color=color, markersize=5)
        ticks = [base.spent[0] * 2**power for power in range(int(math.log2(len(values))) + 1)]
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])
        axes.set_xlabel("transformer forwards per image")
        return Plot(title, _svg(figure))


@dataclass(frozen=True)
class Chase:
    """The gains of a run's proxy and gold (points,), in standard deviations of the base model's scores.

    `distances` (points,) are the run's distances from the base model.
    """

    name: str
    distances: Sequence[float]
    proxy: Sequence[float]
    gold: Sequence[float]


def overoptimization_figure(panels: Mapping[str, Sequence[Chase]]) -> dict[str, bytes]:
    """A panel for each proxy as in Gao et al. (2210.10760, fig. 1): the contents of an svg and of a png file.

    Proxy (dashed) and gold (solid) against sqrt(KL).
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "overoptimization"}):
        figure = Figure(figsize=(5.2 * len(panels), 4.3), layout="constrained")
        names = list(dict.fromkeys(chase.name for chases in panels.values() for chase in chases))
        lines: dict[str, Any] = {}
        of_proxy: Any = {"linestyle": (0, (4, 2)), "linewidth": 1.1}
        of_gold: Any = {"linewidth": 2, "marker": "o", "markersize": 3}
        columns = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, chases) in zip(columns, panels.items(), strict=True):
            axes.set_title(title)
            axes.set_xlabel("distance from the base model, sqrt(KL)")
            axes.set_ylabel("gain, in deviations of the base model's scores")
            axes.axhline(0, color=OTHER, linewidth=0.8)
            for chase in chases:
                color, _ = group_style(names.index(chase.name))
                axes.plot(chase.distances, chase.proxy, color=color, alpha=0.7, **of_proxy)
                (lines[chase.name],) = axes.plot(chase.distances, chase.gold, color=color, **of_gold)
        lines["proxy"] = Line2D([], [], color=OTHER, **of_proxy)
        lines["gold"] = Line2D([], [], color=OTHER, **of_gold)
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, frameon=False)
        found = {}
        for kind, undated in (("svg", {"Date": None}), ("png", {})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=160, metadata=undated)
            found[kind] = buffer.getvalue()
        return found


def mean_curve(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """The budget spent and the mean of the curves, interpolated linearly, where all curves have values."""
    first, last = max(curve.spent[0] for curve in curves), min(curve.spent[-1] for curve in curves)
    spent = np.unique([value for curve in curves for value in (*curve.spent, first, last) if first <= value <= last])
    return spent, np.mean([np.interp(spent, curve.spent, curve.values) for curve in curves], axis=0)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _series(metrics: Sequence[dict[str, Any]], key: str, name: str) -> np.ndarray:
    """One value per training step (steps,), nan where a step has none."""
    return np.array([_number(row.get(key, {}).get(name)) for row in metrics])


def _same(metrics: Sequence[dict[str, Any]], first: str, second: str) -> bool:
    return np.array_equal(_series(metrics, "reward", first), _series(metrics, "reward", second), equal_nan=True)


def _curve(rows: Sequence[dict[str, Any]], values: np.ndarray, color: str, error: np.ndarray | None = None) -> str:
    """A line over training steps, with a light band of ± error where the error is known."""
    steps = [row["step"] for row in rows]
    salt = f"{color} {values.tobytes().hex()}"  # gives ids that are unique on the page and always the same
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure, axes = _panel(rows)
        axes.plot(steps, values, color=color, linewidth=1.6, marker="o" if len(steps) == 1 else None)
        if error is not None and np.isfinite(error).any():
            axes.fill_between(steps, values - error, values + error, color=color, alpha=0.18, linewidth=0)
        return _svg(figure)


def _panel(rows: Sequence[dict[str, Any]]) -> tuple[Figure, Axes]:
    """Empty axes from step 0 to the last row's step, with the training minutes along the top."""
    figure, axes = _axes()
    steps, minutes = [0, *(row["step"] for row in rows)], [0.0, *(row["minutes"] for row in rows)]
    margin = 0.03 * steps[-1] or 0.5
    axes.set_xlim(-margin, steps[-1] + margin)
    ticks = [tick for tick in MaxNLocator(5, integer=True).tick_values(0, steps[-1]) if 0 <= tick <= steps[-1]]
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.set_xlabel("training steps")
    top = axes.secondary_xaxis("top")
    top.set_xticks(ticks, [f"{m:.{0 if minutes[-1] >= 10 else 1}f}" for m in np.interp(ticks, steps, minutes)])
    top.set_xlabel("training minutes", fontsize=8, color="#6b7280", labelpad=6)
    top.tick_params(labelsize=8, labelcolor="#6b7280", color="#9ca3af")
    return figure, axes


def _axes() -> tuple[Figure, Axes]:
    """Empty axes of a panel."""
    figure = Figure(figsize=(4.4, 2.7), layout="constrained")
    axes = figure.subplots()
    axes.yaxis.set_major_formatter("{x:.4g}")
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure as an SVG element inside HTML, without declarations, metadata, size and unused ids."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    tag, rest = text[text.index("<svg") :].split(">", 1)
    used = set(re.findall(r"#([\w-]+)", rest))
    rest = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", rest)
    return re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", tag) + ">" + rest
