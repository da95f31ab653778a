"""The page that shows whether a run helped: one self-contained HTML file, made from the run folder alone.

Before is the first evaluation, after the last. Both score the same prompts drawn from the same noise, so a gain is
judged by its paired differences, whose standard error is smaller than the two means would suggest.
"""

import base64
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from PIL import Image

from flowalign.evaluate import plots
from flowalign.runs import replace_text
from flowalign.settings import UserError

Row = dict[str, Any]
SMALL = 128  # pixels; pictures under this side are embedded as they are and scaled up without smoothing
PAIR_SIDE, STRIP_SIDE = 512, 192  # pixels; larger pictures are shrunk to these
STRIP_PROMPTS = 4  # shown at every evaluation
LARGEST = 5  # rows shown of those that fell and of those that rose


@dataclass(frozen=True)
class Change:
    """A score before and after training over the same rows; the standard error is that of the paired differences."""

    before: float
    after: float
    standard_error: float
    """nan for fewer than two rows."""
    count: int

    @property
    def gain(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def verdict(self) -> str:
        """better or worse from two standard errors on, else same; unknown without a standard error."""
        if math.isnan(self.standard_error):
            return "unknown"
        if self.gain == 0 or abs(self.gain) < 2 * self.standard_error:
            return "same"
        return "better" if self.gain > 0 else "worse"

    @property
    def decimals(self) -> int:
        """So many that two digits of the standard error show."""
        error = self.standard_error
        return min(max(1 - math.floor(math.log10(error)), 0), 6) if error > 0 else 3

    @property
    def words(self) -> str:
        """The gain as a person would say it."""
        if self.verdict == "unknown":
            return f"changed by {self.gain:+.3f}; too few pictures for a standard error"
        error = f"± {self.standard_error:.{self.decimals}f}"
        how = f"(paired standard error; {self.count:,} pictures, same noise)"
        if self.verdict == "same":
            return f"no significant change: {self.gain:+.{self.decimals}f} {error} {how}"
        return f"{self.verdict} by {abs(self.gain):.{self.decimals}f} {error} {how}"


def paired_change(before: Sequence[Row], after: Sequence[Row], reward: str, tag: str | None = None) -> Change | None:
    """The change of a reward over the rows (of one tag) that have it in both evaluations; None without such a row.

    The rows are in the same order, drawn from the same noise: se = std(after - before) / sqrt(n), with n - 1 in std.
    """
    rows = [row for row in _scored(before, after, reward) if tag is None or row["tag"] == tag]
    if not rows:
        return None
    scores = np.array([(row["before"], row["after"]) for row in rows], dtype=np.float64)
    error = (scores[:, 1] - scores[:, 0]).std(ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    return Change(float(scores[:, 0].mean()), float(scores[:, 1].mean()), float(error), len(rows))


def overall_change(tasks: Sequence[Change]) -> Change:
    """The unweighted mean of the tasks, as GenEval reports it: se = sqrt(sum of squared se) / tasks."""
    before, after = (float(np.mean([getattr(task, end) for task in tasks])) for end in ("before", "after"))
    error = math.hypot(*(task.standard_error for task in tasks)) / len(tasks)
    return Change(before, after, error, sum(task.count for task in tasks))


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path; the run may be unfinished.

    Raises UserError when the folder is no run, has nothing to show yet, or holds a file that cannot be used.
    """
    folder = Path(folder)
    contents = _contents(folder)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.j2").render(contents)
    path = folder / "report.html"
    replace_text(path, page.encode("ascii", "xmlcharrefreplace").decode())
    return path


def _contents(folder: Path) -> Row:
    """What the template shows."""
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is no run: it has no recipe.yaml; give a folder that `flowalign train` wrote")
    metrics = _metrics(folder / "metrics.jsonl")
    evaluations = sorted(map(_json, folder.glob("evaluations/step_*.json")), key=lambda evaluation: evaluation["step"])
    if not metrics and not evaluations:
        raise UserError(f"{folder} has neither metrics nor evaluations yet, so there is nothing to report")
    recipe = _recipe(folder / "recipe.yaml")
    scores = _scores(evaluations, recipe, folder)
    return {
        "recipe": recipe,
        "recipe_text": (folder / "recipe.yaml").read_text("utf-8"),
        "run": _json(folder / "run.json") if (folder / "run.json").is_file() else {},
        "metrics": metrics,
        "evaluations": evaluations,
        "scores": scores,
        "verdict": _verdict(scores, len(evaluations)),
        "samples": _samples(folder / "samples"),
        "phases": _phases(metrics),
        "training_plots": plots.training_plots(metrics, recipe.get("train", {}).get("prompts_per_step")),
        "evaluation_plots": plots.evaluation_plots(evaluations),
        "optimisation_plots": plots.optimisation_plots(metrics),
    }


def _json(path: Path, text: str | None = None, line: int | None = None) -> Any:
    try:
        return json.loads(path.read_text("utf-8") if text is None else text)
    except ValueError as error:
        raise UserError(f"{path}{f', line {line}' if line else ''} is not JSON: {error}") from error


def _recipe(path: Path) -> Row:
    """The recipe as plain values, so that a run of an older version, with other keys, still has its report."""
    try:
        recipe = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is no recipe: it must map keys to values")
    return recipe


def _metrics(path: Path) -> list[Row]:
    """One row per training step: of steps that a resumed run repeated the last, and no line that a kill cut short."""
    lines = path.read_text("utf-8").split("\n")[:-1] if path.is_file() else []
    rows = [_json(path, line, number) for number, line in enumerate(lines, start=1) if line.strip()]
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def _scored(before: Sequence[Row], after: Sequence[Row], reward: str) -> Iterator[Row]:
    """The rows that have a reward in both evaluations."""
    for first, last in zip(before, after, strict=True):
        if reward in first["scores"] and reward in last["scores"]:
            scores = {"before": first["scores"][reward], "after": last["scores"][reward]}
            yield {"prompt": first["prompt"], "tag": first.get("tag"), **scores}


def _scores(evaluations: Sequence[Row], recipe: Row, folder: Path) -> list[Row]:
    """Every measured reward: its change over all rows, by task and overall, and the rows that moved most."""
    if len(evaluations) < 2:
        return []
    first, last = evaluations[0], evaluations[-1]
    before, after, scores = first["rows"], last["rows"], []
    settings = [(e["guidance"], e["sampler_steps"], [row["prompt"] for row in e["rows"]]) for e in (first, last)]
    if settings[0] != settings[1]:
        which = f"the evaluations of steps {first['step']} and {last['step']}"
        raise UserError(f"{folder}: {which} differ in prompts, guidance or sampler steps and cannot be compared")
    for name, summary in last["summary"].items():
        tags = summary.get("tasks") or ()
        tasks = {tag: task for tag in tags if (task := paired_change(before, after, name, tag))}
        if change := paired_change(before, after, name):
            about = {"name": name, "trained": name in recipe.get("rewards", {}), "pictures": change, "tasks": tasks}
            overall = overall_change(list(tasks.values())) if tasks else None
            scores.append({**about, "overall": overall, **_moved(_scored(before, after, name))})
    return scores


def _moved(rows: Iterator[Row]) -> Row:
    """The rows whose score fell and rose most, and how many fell and rose at all."""
    order = sorted(rows, key=lambda row: row["after"] - row["before"])
    fell = [row for row in order if row["after"] < row["before"]]
    rose = [row for row in reversed(order) if row["after"] > row["before"]]
    return {"fell": fell[:LARGEST], "fell_count": len(fell), "rose": rose[:LARGEST], "rose_count": len(rose)}


def _verdict(scores: Sequence[Row], evaluations: int) -> tuple[str, str]:
    """The answer in a word for its colour and a sentence; a reward with tasks is judged by their unweighted mean."""
    if evaluations < 2:
        seen = "No evaluation is there yet" if not evaluations else "Only the first evaluation is there"
        return "unknown", f"{seen}, so this page cannot say yet whether training helped."
    found: dict[str, list[str]] = {"better": [], "worse": [], "same": [], "unknown": []}
    for score in scores:
        found[(score["overall"] or score["pictures"]).verdict].append(score["name"])
    better, worse = " and ".join(found["better"]), " and ".join(found["worse"])
    if better and worse:
        return "mixed", f"Mixed: {better} rose, but {worse} fell. Look at the pictures for cheating."
    if worse:
        return "worse", f"Training did harm: {worse} fell."
    if better:
        return "better", f"Training helped: {better} rose and nothing measured fell significantly."
    return "same", "No significant change: nothing measured moved by two standard errors."


def _samples(folder: Path) -> Row:
    """The fixed prompts with their pictures before and after, and those of the first few at every evaluation."""
    steps = sorted(path.parent for path in folder.glob("step_*/prompts.json"))
    prompts = _json(steps[0] / "prompts.json") if steps else []
    names = [f"{index:02d}.png" for index in range(len(prompts))]
    strips = range(min(STRIP_PROMPTS, len(names)) if len(steps) > 2 else 0)
    return {
        "pairs": [(prompts[i], [_picture(step / name, PAIR_SIDE) for step in {steps[0]: 0, steps[-1]: 0}]) for i, name in enumerate(names)],
        "strips": [(prompts[i], [_picture(step / names[i], STRIP_SIDE) for step in steps]) for i in strips],
    }


def _picture(path: Path, side: int) -> Row:
    """A picture as a data URI: small ones byte for byte, others as JPEG of at most `side` pixels."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            data, kind = path.read_bytes(), "png"
            if max(width, height) >= SMALL:
                image.thumbnail((side, side))
                image.convert("RGB").save(buffer := io.BytesIO(), "JPEG", quality=90)
                data, kind = buffer.getvalue(), "jpeg"
    except OSError as error:
        raise UserError(f"{path} is not a readable picture: {error}") from error
    step = int(path.parent.name.removeprefix("step_"))
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"step": step, "uri": uri, "width": width, "height": height, "small": kind == "png"}


def _phases(metrics: Sequence[Row]) -> list[Row]:
    """Seconds of every phase per training step, averaged over all steps, and its share."""
    names = dict.fromkeys(name for row in metrics for name in row.get("seconds", {}))
    mean = {name: sum(row["seconds"].get(name, 0.0) for row in metrics) / len(metrics) for name in names}
    total = sum(mean.values()) or 1.0
    return [{"name": name, "seconds": seconds, "share": seconds / total} for name, seconds in mean.items()]
