"""The page that shows whether a run helped: one self-contained HTML file, written from the run folder alone.

"Before" is the first evaluation, "after" the last. Both score the same prompts drawn from the same noise, so a gain is
judged by paired differences, whose error is smaller than the errors of the two means suggest.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import yaml

from flowalign.config.base import UserError, counted
from flowalign.disk.media import MAP, image_names
from flowalign.evaluate.held_out import HeldOut, held_out_of
from flowalign.evaluate.intervals import FEW, Interval, clustered_error, combined_interval, difference_interval
from flowalign.evaluate.report import plots
from flowalign.evaluate.report.audit_section import hacking_section
from flowalign.evaluate.report.html import embedded, parsed, read_evaluations, read_metrics, write_page
from rewards.base import grouped

Row = dict[str, Any]
PAIR_SIDE, STRIP_SIDE = 512, 192  # pixels; larger images are shrunk to these
STRIP_PROMPTS = 4  # prompts whose images are shown for every evaluation
LARGEST = 5  # rows shown in each list of largest changes


@dataclass(frozen=True)
class Change:
    """A score before and after training over the same rows, drawn from the same noise."""

    before: float
    after: float
    standard_error: float
    """Standard error of the paired differences, over prompts; nan for fewer than two prompts."""
    interval: Interval
    """95 % interval of the gain, from `difference_interval`."""
    count: int
    """Number of images."""
    prompts: int
    """Number of different prompts."""

    @property
    def gain(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def verdict(self) -> str:
        """ "better" or "worse" if the interval excludes 0, otherwise "same"; "unknown" without an interval."""
        if self.interval is None:
            return "same" if self.gain == 0 and self.prompts >= FEW else "unknown"
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "same"

    @property
    def decimals(self) -> int:
        """The number of decimals that shows two digits of the standard error."""
        error = self.standard_error
        return min(max(1 - math.floor(math.log10(error)), 0), 6) if error > 0 else 3

    @property
    def range(self) -> str:
        """The interval in words; empty without one."""
        return "" if self.interval is None else " to ".join(f"{end:+.{self.decimals}f}" for end in self.interval)

    @property
    def words(self) -> str:
        """The gain as a sentence."""
        several = f" of {counted(self.prompts, 'prompt')}" if self.count > self.prompts else ""
        of = f"{counted(self.count, 'image')}{several}, same noise"
        if self.interval is None:
            few_prompts, alike = "too few prompts for an interval", "all prompts changed alike, so no interval is known"
            why = few_prompts if self.prompts < FEW else alike
            return f"changed by {self.gain:+.{self.decimals}f}; {why} ({of})"
        error = f"± {self.standard_error:.{self.decimals}f}"
        few = f", few: under {FEW} prompts" if self.prompts < FEW else ""
        how = f"(paired standard error; 95 %: {self.range}; {of}{few})"
        if self.verdict == "same":
            return f"no significant change: {self.gain:+.{self.decimals}f} {error} {how}"
        return f"{self.verdict} by {abs(self.gain):.{self.decimals}f} {error} {how}"


def paired_change(before: Sequence[Row], after: Sequence[Row], reward: str, tag: str | None = None) -> Change | None:
    """The change of a reward over the rows (with a tag, if given) that have it in both evaluations; None without one.

    Both lists hold the same rows in the same order, drawn from the same noise. Rows with the same prompt are the images
    of that prompt.
    """
    rows = [row for row in _scored(before, after, reward) if tag is None or row["tag"] == tag]
    groups = grouped((row["prompt"], (row["before"], row["after"])) for row in rows)
    if not groups:
        return None
    first, last = ([[pair[end] for pair in pairs] for pairs in groups.values()] for end in (0, 1))
    error = clustered_error([[b - a for a, b in pairs] for pairs in groups.values()])
    start, end = (float(np.mean([score for own in scores for score in own])) for scores in (first, last))
    count = sum(len(own) for own in first)
    error = math.nan if error is None else error
    return Change(start, end, error, difference_interval(first, last), count, len(groups))


def overall_change(tasks: Sequence[Change]) -> Change:
    """The change of the unweighted mean of the tasks, as GenEval reports it: se = sqrt(sum of squared se) / tasks."""
    before, after = (float(np.mean([getattr(task, end) for task in tasks])) for end in ("before", "after"))
    error = math.hypot(*(task.standard_error for task in tasks)) / len(tasks)
    interval = combined_interval([task.gain for task in tasks], [task.interval for task in tasks])
    return Change(
        before, after, error, interval, sum(task.count for task in tasks), sum(task.prompts for task in tasks)
    )


def changes(folder: Path) -> tuple[HeldOut, list[tuple[str, bool, Change]]] | None:
    """How far the prompts are held out, and each reward's name, whether it was trained on, and its change over a run.

    None without two evaluations, or if the first is not that of step 0.
    """
    evaluations = read_evaluations(folder)
    recipe = parsed(folder / "recipe.yaml", yaml.safe_load) or {}
    scores = _scores(evaluations, recipe, folder)
    if not scores:
        return None
    return held_out_of(evaluations[-1]), [(score["name"], score["trained"], score["main"]) for score in scores]


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path; the run may be unfinished.

    Raises UserError if the folder is not a run folder, has nothing to show yet, or holds a file that cannot be used.
    """
    folder = Path(folder)
    path = folder / "report.html"
    write_page(path, _contents(folder))
    return path


def _contents(folder: Path) -> Row:
    """The values that the template shows."""
    if not (folder / "recipe.yaml").is_file():
        raise UserError(
            f"{folder} is not a run folder: it has no recipe.yaml; give a folder that `flowalign train` wrote"
        )
    metrics, evaluations = read_metrics(folder), read_evaluations(folder)
    if not metrics and not evaluations:
        raise UserError(f"{folder} has neither metrics nor evaluations yet, so there is nothing to report")
    recipe = (
        parsed(folder / "recipe.yaml", yaml.safe_load) or {}
    )  # unvalidated, so that runs of older versions keep their report
    return {
        "recipe": recipe,
        "recipe_text": (folder / "recipe.yaml").read_text("utf-8"),
        "run": parsed(folder / "run.json", json.loads),
        "metrics": metrics,
        "alarms": [(line["step"], alarm) for line in metrics for alarm in line.get("alarms", ())],
        "evaluations": evaluations,
        "held_out": held_out_of(evaluations[-1] if evaluations else {}),
        "scores": _scores(evaluations, recipe, folder),
        "samples": _samples(folder / "samples"),
        "hacking": hacking_section(evaluations, folder),
        "phases": _phases(metrics, evaluations),
        "training_plots": plots.training_plots(metrics, recipe.get("train", {}).get("prompts_per_step")),
        "evaluation_plots": plots.evaluation_plots(evaluations),
        "optimisation_plots": plots.optimisation_plots(metrics),
    }


def _scored(before: Sequence[Row], after: Sequence[Row], reward: str) -> Iterator[Row]:
    """The rows that have a reward in both evaluations."""
    for first, last in zip(before, after, strict=True):
        if reward in first["scores"] and reward in last["scores"]:
            scores = {"before": first["scores"][reward], "after": last["scores"][reward]}
            yield {"prompt": first["prompt"], "tag": first.get("tag"), **scores}


def _scores(evaluations: Sequence[Row], recipe: Row, folder: Path) -> list[Row]:
    """Each measured reward: its change over all rows, by task and overall, and the rows that changed most."""
    if len(evaluations) < 2 or evaluations[0]["step"] != 0:  # without the evaluation of step 0 no gain is known
        return []
    first, last = evaluations[0], evaluations[-1]
    before, after, scores = first["rows"], last["rows"], []
    settings = [(e["guidance"], e["sampler_steps"], [row["prompt"] for row in e["rows"]]) for e in (first, last)]
    if settings[0] != settings[1]:
        which = f"the evaluations of steps {first['step']} and {last['step']}"
        raise UserError(f"{folder}: {which} differ in prompts, guidance or sampler steps and cannot be compared")
    trained = last.get("trained_rewards", list(recipe.get("rewards", {})))  # older versions did not write this key
    for name, summary in last["summary"].items():
        tags = summary.get("tasks") or ()
        tasks = {tag: task for tag in tags if (task := paired_change(before, after, name, tag))}
        if change := paired_change(before, after, name):
            main = overall_change(list(tasks.values())) if tasks else change
            about = {"name": name, "trained": name in trained, "main": main, "images": change}
            scores.append({**about, "tasks": tasks, **_moved(_scored(before, after, name))})
    return scores


def _moved(rows: Iterator[Row]) -> Row:
    """The rows whose scores fell most and rose most, and how many rows fell and rose at all."""
    order = sorted(rows, key=lambda row: row["after"] - row["before"])
    fell = [row for row in order if row["after"] < row["before"]]
    rose = [row for row in reversed(order) if row["after"] > row["before"]]
    return {"fell": fell[:LARGEST], "fell_count": len(fell), "rose": rose[:LARGEST], "rose_count": len(rose)}


def _samples(folder: Path) -> Row:
    """The fixed prompts with their images before and after, and the first few prompts with those of all evaluations."""
    steps = sorted(path.parent for path in folder.glob("step_*/prompts.json"))
    prompts = parsed(steps[0] / "prompts.json", json.loads) if steps else []
    ends = dict.fromkeys([*steps[:1], *steps[-1:]])
    named = list(zip(prompts, image_names(len(prompts)), strict=True))
    return {
        "pairs": [(prompt, [embedded(step / name, PAIR_SIDE) for step in ends]) for prompt, name in named],
        "strips": [
            (prompt, [embedded(step / name, STRIP_SIDE) for step in steps])
            for prompt, name in named[: STRIP_PROMPTS if len(steps) > 2 else 0]
        ],
        "maps": {
            unquote(place.name.removeprefix(MAP)): [
                (prompt, embedded(place / name, PAIR_SIDE)) for prompt, name in named
            ]
            for place in (sorted(steps[-1].glob(f"{MAP}*")) if steps else ())
        },
    }


def _phases(metrics: Sequence[Row], evaluations: Sequence[Row]) -> list[Row]:
    """The phases of training and the evaluations: total minutes, seconds per training step, share of the time."""
    measured = [{"evaluate": row["seconds"]} for row in evaluations if "seconds" in row]
    timed = [*(row["seconds"] for row in metrics), *measured]
    names = dict.fromkeys(name for seconds in timed for name in seconds)
    spent = {name: sum(seconds.get(name, 0.0) for seconds in timed) for name in names}
    total, steps = sum(spent.values()) or 1.0, len(metrics) or math.nan
    return [{"name": n, "minutes": t / 60, "per_step": t / steps, "share": t / total} for n, t in spent.items()]
