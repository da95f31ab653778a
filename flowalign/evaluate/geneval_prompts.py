"""Training prompts in GenEval's six tasks and metadata format, without the prompts of a given test list.

Source: the benchmark's format (Ghosh et al., "GenEval", 2023, its prompts file) and the mix of tasks that Flow-GRPO
(2505.05470) trained on. Flow-GRPO's 50,000 rows hold 33,199 different prompts; here a prompt is repeated only after
its task has used all others.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.config.base import UserError
from flowalign.disk.assets import asset
from flowalign.disk.files import replace_json_lines, writing
from flowalign.rollout.prompts import Row, load_prompts
from flowalign.toyworld.tasks import Metadata, grammar
from rewards.base import nearest
from rewards.detectors.base import COLORS
from rewards.geneval import TASKS

PUBLISHED_MIX: Mapping[str, float] = {
    "position": 0.7,
    "color_attr": 0.3,
    "colors": 0.1,
    "counting": 0.5,
    "two_object": 0.1,
    "single_object": 0.0,
}


def object_names() -> tuple[str, ...]:
    """The names of GenEval's 80 object classes."""
    return tuple(asset("geneval/object_names.txt").read_text(encoding="utf-8").splitlines())


def training_prompts(
    count: int,
    seed: int,
    exclude: Iterable[Row] = (),
    mix: Mapping[str, float] = PUBLISHED_MIX,
    classes: Sequence[str] | None = None,
) -> list[Metadata]:
    """`count` rows of GenEval's metadata with their `prompt`, with the tasks in mixed order.

    A task's rows differ until it has used all of them; then it repeats them in another order.

    exclude: rows of a test list. A prompt is left out if it has the text of one of them, ignoring case, or its clauses,
        ignoring their order in tasks where the order has no meaning.
    mix: the share of each task, in any unit; a task without a share gets no rows.
    classes: the object names; by default GenEval's.

    Raises UserError for a count below 1, an invalid mix, and a task whose prompts are all excluded.
    """
    if count < 1:
        raise UserError(f"count must be at least 1 prompt, not {count}")
    counts = task_counts(count, mix)
    names = tuple(classes) if classes is not None else object_names()
    taken = {key for row in exclude for key in _keys(row.prompt, row.metadata)}
    rows: list[Metadata] = []
    for index, task in enumerate(TASKS):
        if counts[task]:
            rng = np.random.default_rng([seed, index])
            rows += itertools.islice(_draws(task, names, taken, rng), counts[task])
    return [rows[i] for i in np.random.default_rng([seed, len(TASKS)]).permutation(count)]


def write_training_prompts(
    path: Path, count: int, seed: int, exclude: Path | None = None, mix: Mapping[str, float] = PUBLISHED_MIX
) -> None:
    """Write `training_prompts` to a .jsonl file, without the prompts of `exclude` (a file or a bundled name).

    Raises UserError as `training_prompts` does, for another ending of `path`, and for a file that cannot be read or
    written.
    """
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: prompts with metadata need a .jsonl file")
    rows = training_prompts(count, seed, load_prompts(str(exclude)) if exclude is not None else (), mix)
    with writing(path):
        replace_json_lines(path, rows)


def task_counts(count: int, mix: Mapping[str, float]) -> dict[str, int]:
    """How many of `count` rows each task gets: its share rounded down; the largest remainders get one row more.

    Raises UserError for an unknown task, a weight below 0 or above 1e9, and a mix of zeros.
    """
    for task, weight in mix.items():
        if task not in TASKS:
            raise UserError(
                f"mix: there is no task {task!r}; did you mean {nearest(task, TASKS)!r}? (tasks: {', '.join(TASKS)})"
            )
        if not 0 <= weight <= 1e9:
            raise UserError(f"mix: the weight of {task} must be a number from 0 to 1e9, not {weight:g}")
    total = sum(mix.values())
    if total == 0:
        raise UserError("mix: at least one task needs a weight above 0")
    shares = {task: count * mix.get(task, 0) / total for task in TASKS}
    counts = {task: math.floor(share) for task, share in shares.items()}
    by_remainder = sorted(TASKS, key=lambda task: counts[task] - shares[task])
    for task in by_remainder[: count - sum(counts.values())]:
        counts[task] += 1
    return counts


def _draws(task: str, names: Sequence[str], taken: set[Any], rng: np.random.Generator) -> Iterator[Metadata]:
    """An endless iterator over the task's rows in random order; a row is repeated only after all others."""
    axes, make = grammar(task, names, COLORS)
    sizes = tuple(len(axis) for axis in axes)
    while True:
        empty = True
        order = np.unravel_index(rng.permutation(math.prod(sizes)), sizes)
        for choice in zip(*order, strict=True):
            row = make(*(axis[i] for axis, i in zip(axes, choice, strict=True)))
            if taken.isdisjoint(_keys(row["prompt"], row)):
                empty = False
                yield row
        if empty:
            raise UserError(f"{task}: all prompts of this task are excluded; give it weight 0 or exclude fewer")


def _keys(prompt: str, metadata: Mapping[str, Any]) -> Iterator[Any]:
    """The keys of a row: its text and, if any, its clauses. Two rows with a common key are the same prompt."""
    yield " ".join(prompt.split()).casefold()
    clauses = [json.dumps(clause, sort_keys=True) for clause in metadata.get("include", ())]
    if clauses:
        ordered = clauses if metadata.get("tag") == "position" else sorted(clauses)
        yield (metadata.get("tag"), *ordered)
