"""A panel of rewards on a prompt list: a model and, if it is fine-tuned, its base model, with and without guidance.

All models draw from the same noise, so the difference of two models is judged by paired differences over prompts.

    MODEL_guidance_G/...    images and results.jsonl of each combination; see `drawing` and `results`
    panel.csv               one line per prompt: model, guidance, index, prompt, the mean score of each reward
    summary.json            means, differences, intervals
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from flowalign.config.base import UserError
from flowalign.disk.files import replace_csv
from flowalign.evaluate.drawing import Drawing, Sample, draw, listed
from flowalign.evaluate.evaluation import score_rows
from flowalign.evaluate.held_out import said_of
from flowalign.evaluate.intervals import Groups, Interval, difference_interval, mean_interval, mean_of
from flowalign.evaluate.results import (
    EVALUATION,
    RESULTS,
    Line,
    Stopwatch,
    check_folder,
    continued,
    keep_settings,
    write_summary,
)
from flowalign.rollout.generate import Progress
from flowalign.rollout.prompts import Row, load_prompts
from flowalign.score import check_prompts, refuse_learning
from flowalign.terminal import Terminal
from rewards import Reward
from rewards.media import read_image

BASE, TUNED = "base", "tuned"


class Part(NamedTuple):
    """One row of the panel: a model, its guidance and its scores; NaN where a reward does not apply."""

    model: str
    guidance: float
    scores: Mapping[str, np.ndarray]  # (N, images per row) of each reward


def evaluate_panel(
    drawings: Mapping[str, Sequence[Drawing]],
    prompts: str,
    count: int | None,
    rewards: Mapping[str, Reward],
    settings: Mapping[str, Any],
    output: Path | None,
) -> tuple[dict[str, Any], Path]:
    """Draw and score the missing images of every drawing of every model; write panel.csv and the summary.

    Returns the summary and its folder: `output`, or a folder under runs/ for these models and settings.

    `settings` decide the rewards' scores. Raises UserError for prompts that no reward can judge, for a reward that
    learns, and as `draw` does.
    """
    rows = load_prompts(prompts, count)
    check_prompts(rows, rewards, prompts)
    refuse_learning(rewards, "it cannot be in a panel")
    for name, reward in rewards.items():
        if not any(reward.applies_to(row.about) for row in rows):
            raise UserError(
                f"reward {name!r} can judge none of the prompts {prompts}; leave it out or give other prompts"
            )
    last = list(drawings.values())[-1][0]  # the drawing with guidance, of the fine-tuned model if there is one
    output = output or Path("runs/panel") / last.name(rows, settings)
    check_folder(output, EVALUATION, settings, made="*/" + RESULTS)
    stopwatch = Stopwatch(output)
    places = {
        (model, one.sampler.guidance): (output / f"{model}_guidance_{one.sampler.guidance:g}", one)
        for model, several in drawings.items()
        for one in several
    }
    for (model, _), (folder, drawing) in places.items():
        with Terminal().evaluating(len(rows) * drawing.images, f"drawing {model}") as progress:
            draw(folder, drawing, rows, stopwatch, progress)
    keep_settings(output, EVALUATION, settings)
    parts = []
    for (model, guidance), (folder, drawing) in places.items():
        samples = listed(folder, drawing.images, rows)
        with Terminal().evaluating(len(samples), f"judging {model}") as progress:
            lines = _scored(folder / RESULTS, samples, drawing, rewards, stopwatch, progress)
        parts.append(Part(model, guidance, _by_row(lines, drawing.images, list(rewards))))
    for part in parts:
        if mute := [name for name, values in part.scores.items() if np.isnan(values).all()]:
            raise UserError(f"reward {mute[0]!r} left out all images of {part.model} at guidance {part.guidance:g}")
    bounds = {name: reward.range for name, reward in rewards.items()}
    _write_table(output / "panel.csv", parts, rows)
    prompts_of = [row.prompt for row in rows]
    about = {"drawn": last.words, **said_of(last.model.adapter, rows), "prompts": len(set(prompts_of))}
    summary = {"benchmark": "panel", **settings, **summarise(parts, bounds, prompts_of), **about}
    write_summary(output, summary)
    return summary, output


def _scored(
    path: Path,
    samples: Sequence[Sample],
    drawing: Drawing,
    rewards: Mapping[str, Reward],
    stopwatch: Stopwatch,
    progress: Progress,
) -> list[Line]:
    """A line per image; whole prompts are scored together, since a reward may compare the images of a prompt."""

    def judge(places: range) -> list[Line]:
        chosen = [samples[place] for place in places]
        media = torch.stack([read_image(sample.path) for sample in chosen])
        scores = score_rows(rewards, media, [one.row for one in chosen])
        stopwatch.lap("judge")
        return [
            {"filename": one.name, "prompt": one.row.prompt, "scores": own}
            for one, own in zip(chosen, scores, strict=True)
        ]

    stopwatch.start()
    batch = max(1, drawing.batch // drawing.images) * drawing.images
    return continued(path, len(samples), batch, judge, progress)


def _by_row(lines: Sequence[Line], images: int, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The scores of each reward, (N, images); NaN where the reward does not apply to the row."""
    return {name: np.array([line["scores"].get(name, np.nan) for line in lines]).reshape(-1, images) for name in names}


def summarise(
    parts: Sequence[Part], bounds: Mapping[str, tuple[float, float]], prompts: Sequence[str]
) -> dict[str, Any]:
    """Means of every part and, if there are both models, the differences tuned - base, with 95 % intervals.

    `bounds` are the lowest and highest score of each reward, `prompts` the prompts of the N rows. Equal rows count as
    one prompt.
    """
    means = [
        {"model": part.model, "guidance": part.guidance, "reward": name, **_mean(values, bounds[name], prompts)}
        for part in parts
        for name, values in part.scores.items()
    ]
    base, tuned = ({p.guidance: p for p in parts if p.model == model} for model in (BASE, TUNED))
    differences = [
        {"guidance": guidance, "reward": name, **_difference(base[guidance].scores[name], values, prompts)}
        for guidance, part in tuned.items()
        for name, values in part.scores.items()
        if not np.isnan(values - base[guidance].scores[name]).all()
    ]
    return {"means": means, "differences": differences}


def _mean(values: np.ndarray, bounds: tuple[float, float], prompts: Sequence[str]) -> dict[str, Any]:
    """The mean over the images that a reward scores; `evaluate_panel` has checked that there is at least one."""
    known = _by_prompt(values, ~np.isnan(values), prompts)
    return _row(mean_of(known), mean_interval(known, bounds), known)


def _difference(base: np.ndarray, tuned: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
    known = ~np.isnan(tuned - base)
    before, after = (_by_prompt(values, known, prompts) for values in (base, tuned))
    return _row(mean_of(after) - mean_of(before), difference_interval(before, after), before)


def _by_prompt(values: np.ndarray, known: np.ndarray, prompts: Sequence[str]) -> Groups:
    """The known scores of (N, images), grouped by prompt."""
    groups: dict[str, list[float]] = {}
    for prompt, own, there in zip(prompts, values, known, strict=True):
        if there.any():
            groups.setdefault(prompt, []).extend(own[there].tolist())
    return list(groups.values())


def _row(mean: float, interval: Interval, groups: Groups) -> dict[str, Any]:
    return {"mean": mean, "interval": interval, "prompts": len(groups)}


def _write_table(path: Path, parts: Sequence[Part], rows: Sequence[Row]) -> None:
    """Write panel.csv; a cell is empty where a reward does not apply."""
    names = list(parts[0].scores)
    lines: list[list[Any]] = []
    for part in parts:
        for place, row in enumerate(rows):
            known = [own[~np.isnan(own)] for own in (part.scores[name][place] for name in names)]
            cells = [repr(float(own.mean())) if len(own) else "" for own in known]
            lines.append([part.model, f"{part.guidance:g}", row.index, row.prompt, *cells])
    replace_csv(path, ["model", "guidance", "index", "prompt", *names], lines)
