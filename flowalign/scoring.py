"""Score files, collect and rescore stores, evaluate a model or a run: what the command line does."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import rewards as zoo
from flowalign.checkpoint import checkpoints, load_weights
from flowalign.config import Recipe
from flowalign.data import Row, load_prompts
from flowalign.display import Display
from flowalign.evaluate.evaluation import check_prompts, evaluate, load_rewards
from flowalign.offline import GroupStore, collect
from flowalign.policies.loading import load_policy
from flowalign.runs import RunFolder, read_picture, replace_text
from flowalign.settings import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_BATCH = 16


def read_images(folder: Path, prompts: Path) -> tuple[list[Row], list[Path]]:
    """The prompts and the images that belong to them; UserError when their numbers differ."""
    if not folder.is_dir():
        raise UserError(f"--images {folder} is no folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    rows = load_prompts(str(prompts))
    if len(paths) != len(rows):
        raise UserError(f"{folder} holds {len(paths)} images, {prompts} {len(rows)} prompts; each image needs its own")
    return rows, paths


def score_images(reward: str, options: Sequence[str], rows: Sequence[Row], paths: Sequence[Path]) -> list[float]:
    """The score of each image; sizes may differ from image to image."""
    judge = zoo.load(reward, **dict(_option(text) for text in options))
    check_prompts(rows, {judge.name: judge}, "given")
    scores: list[float] = []
    start = 0
    with Display().evaluating(len(paths)) as progress:
        while start < len(paths):
            batch = [read_picture(paths[start])]
            while start + len(batch) < len(paths) and len(batch) < _BATCH:
                following = read_picture(paths[start + len(batch)])
                if following.shape != batch[0].shape:
                    break
                batch.append(following)
            part = rows[start : start + len(batch)]
            values = zoo.score(judge, torch.stack(batch), [r.prompt for r in part], [r.metadata for r in part])
            scores += values.tolist()
            start += len(batch)
            progress(len(batch))
    return scores


def collect_recipe(recipe: Recipe, device: str) -> GroupStore:
    """Fill the recipe's store with groups of its model's pictures."""
    if recipe.store is None:
        raise UserError("the recipe names no store; give store=FOLDER")
    rewards = load_rewards(recipe.rewards)
    rows = load_prompts(recipe.prompts, recipe.collect.prompts)
    check_prompts(rows, rewards, recipe.prompts)
    policy = load_policy(recipe.model, device, recipe.run.seed)
    with Display().evaluating(len(rows) * recipe.collect.group_size) as progress:
        return collect(recipe, Path(recipe.store), rows, rewards, policy, progress)


def rescore_store(path: Path, reward: str, options: Sequence[str], name: str | None) -> np.ndarray:
    """Add a reward to a store; (N, G), NaN where it does not apply."""
    store = GroupStore.open(path)
    judge = zoo.load(reward, **dict(_option(text) for text in options))
    with Display().evaluating(len(store) * store.manifest["group_size"]) as progress:
        return store.rescore(name or judge.name, judge, progress)


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--option {text!r} must be written KEY=VALUE")
    return key, yaml.safe_load(value)


def write_scores(path: Path, images: Sequence[Path], rows: Sequence[Row], scores: Sequence[float]) -> None:
    """A .csv or .jsonl file with a line for each image."""
    table = [
        {"image": image.name, "prompt": row.prompt, "score": value}
        for image, row, value in zip(images, rows, scores, strict=True)
    ]
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(line) + "\n" for line in table)
    else:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=["image", "prompt", "score"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        text = buffer.getvalue()
    try:
        replace_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def evaluate_recipe(recipe: Recipe, run: RunFolder | None, device: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """Evaluate the recipe's model, or with a run the weights of its last checkpoint; returns a title and the summary.

    With a run the result is written to its evaluations as well.
    """
    settings = recipe.evaluation
    if settings.prompts is None:
        raise UserError("the recipe has no evaluation.prompts; name a prompt list, such as evaluation.prompts=my.txt")
    rewards = load_rewards(settings.rewards or recipe.rewards)
    rows = load_prompts(settings.prompts, settings.count)
    check_prompts(rows, rewards, settings.prompts)
    policy = load_policy(recipe.model, device, recipe.run.seed)
    title, weights = f"{recipe.model.path} as it is", None
    if run is not None:
        found = checkpoints(run.checkpoints)
        if not found:
            raise UserError(f"{run.path} has no checkpoint yet")
        title = f"{run.path}, {found[-1].name}"
        weights = load_weights(found[-1], policy)
    with Display().evaluating(len(rows) * settings.images_per_prompt) as progress:
        evaluated = evaluate(policy, rows, rewards, settings, (recipe.model.height, recipe.model.width), progress)
    if run is not None:
        about = {"guidance": settings.guidance, "sampler_steps": settings.steps, "checkpoint": weights}
        run.write_evaluation("eval", evaluated, about)
    return f"{title}, guidance {settings.guidance:g}, {settings.steps} steps", evaluated.summary()
