"""The work behind the commands that score: image files, datasets of groups, a model or a run."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rewards as zoo
from flowalign.cli.existing import check_images
from flowalign.config import Recipe
from flowalign.config.base import UserError
from flowalign.config.options import parse_options
from flowalign.disk.files import replace_csv, replace_json_lines, writing
from flowalign.disk.media import FILE_NAME, MANIFEST
from flowalign.disk.run_folder import RunFolder
from flowalign.evaluate.drawing import sampling_words
from flowalign.evaluate.evaluation import evaluate, write_evaluation
from flowalign.evaluate.held_out import held_out_from
from flowalign.policies.conditions import cached_policy
from flowalign.policies.cutting import cut_prompts
from flowalign.rollout.dataset import GroupDataset, collect
from flowalign.rollout.generate import Progress
from flowalign.rollout.manifest import manifest_of, rows_of_files
from flowalign.rollout.prompts import Row, load_prompts
from flowalign.score import check_prompts, learning, load_learnt, load_rewards, refuse_learning, tally, unread
from flowalign.terminal import Terminal
from flowalign.training.checkpoint import load_last_weights
from rewards.media import images_in, read_image

_BATCH = 16


def read_images(folder: Path, prompts: str | None) -> tuple[list[Row], list[Path]]:
    """The rows of a folder's images and the images' paths, in the same order.

    Without `prompts` the rows come from the folder's own MANIFEST. Rows that name files belong to those files; other
    rows belong to the images in natural order. Raises UserError if images and rows do not match.
    """
    check_images(folder)
    paths = images_in(folder)
    manifest = manifest_of(folder)
    if prompts is None:
        if manifest is None:
            raise UserError(f"--images {folder} has no {MANIFEST} with the prompts of its images; give --prompts")
        return rows_of_files(folder, str(manifest), paths)
    rows = load_prompts(prompts)
    if any(FILE_NAME in row.metadata for row in rows):
        return rows_of_files(folder, prompts, paths)
    if len(paths) != len(rows):
        raise UserError(
            f"{folder} holds {len(paths)} images, {prompts} holds {len(rows)} prompts; each image needs one prompt"
        )
    given = {path.name: row.prompt for path, row in zip(paths, rows, strict=True)}
    for row in load_prompts(str(manifest)) if manifest else ():
        name = str(row.metadata.get(FILE_NAME))
        if given.get(name, row.prompt) != row.prompt:
            raise UserError(
                f"{folder / name} has the prompt {row.prompt!r} in {manifest}, but {given[name]!r} in {prompts}; "
                "leave --prompts out, or remove that file"
            )
    return rows, paths


def score_images(reward: str, options: Sequence[str], rows: Sequence[Row], paths: Sequence[Path]) -> list[float | None]:
    """The score of each image; None where the reward leaves the image out. The images may differ in size."""
    judge = _judge(reward, options)
    check_prompts(rows, {judge.name: judge}, "given")
    scores: list[float | None] = [None] * len(paths)
    with _scoring({judge.name: judge}, len(paths)) as progress:
        for places in _batches(judge, rows):
            images = [read_image(paths[place]) for place in places]
            for shape in dict.fromkeys(image.shape for image in images):
                chosen = [i for i, image in enumerate(images) if image.shape == shape]
                if judge.scope == "group" and len(chosen) < len(images):
                    raise UserError(f"the images of {rows[places[0]].prompt!r} must have the same size to be compared")
                part = [rows[places[i]] for i in chosen]
                media = torch.stack([images[i] for i in chosen])
                values = zoo.score(judge, media, [row.prompt for row in part], [row.metadata for row in part])
                for i, value in zip(chosen, values.tolist(), strict=True):
                    scores[places[i]] = None if math.isnan(value) else value
            progress(len(places))
    return scores


@contextmanager
def _scoring(rewards: Mapping[str, zoo.Reward], images: int) -> Iterator[Progress]:
    """A bar while images are drawn or scored; afterwards a sentence for each reward with unreadable answers."""
    display = Terminal()
    with display.evaluating(images) as progress:
        yield progress
    display.say(*unread(tally(rewards)))


def _batches(judge: zoo.Reward, rows: Sequence[Row]) -> list[list[int]]:
    """The row numbers of each batch: _BATCH rows, or all rows of a prompt if the reward compares them."""
    if judge.scope == "group":
        return [[i for i, row in enumerate(rows) if row.prompt == prompt] for prompt in {row.prompt: 0 for row in rows}]
    return [list(range(start, min(start + _BATCH, len(rows)))) for start in range(0, len(rows), _BATCH)]


def collect_recipe(recipe: Recipe, device: str) -> GroupDataset:
    """Fill the recipe's dataset with groups of images that its model draws and its rewards score."""
    if recipe.dataset is None:
        raise UserError("the recipe names no dataset of groups; give dataset=FOLDER")
    rewards = load_rewards(recipe.rewards, device)
    refuse_learning(rewards, "collect with other rewards")
    rows = load_prompts(recipe.prompts, recipe.collect.prompts)
    check_prompts(rows, rewards, recipe.prompts)
    policy = cached_policy(recipe.model, rows, device, recipe.run.seed)
    Terminal().say(*cut_prompts(policy, (row.prompt for row in rows)))
    with _scoring(rewards, len(rows) * recipe.collect.group_size) as progress:
        return collect(recipe, Path(recipe.dataset), rows, rewards, policy, progress)


def rescore_dataset(path: Path, reward: str, options: Sequence[str], name: str | None) -> np.ndarray:
    """Add a reward's scores to a dataset of groups; returns them as (N, G), NaN where the reward does not apply."""
    dataset = GroupDataset.open(path)
    judge = _judge(reward, options)
    with _scoring({judge.name: judge}, len(dataset) * dataset.manifest["group_size"]) as progress:
        return dataset.rescore(name or judge.name, judge, progress)


def check_reward(reward: str, options: Sequence[str], images: Path | None, prompts: str | None) -> list[zoo.Finding]:
    """The findings of `rewards.check` on a folder's images, or without a folder on images that the check draws."""
    judge = zoo.load(reward, **parse_options([reward], options)[reward])
    if images is None:
        return zoo.check(judge)
    rows, paths = read_images(images, prompts)
    media = [read_image(path) for path in paths]
    if len({image.shape for image in media}) > 1:
        raise UserError(f"--images {images}: the images must have the same size to be checked together")
    items = zoo.Items(torch.stack(media), [row.prompt for row in rows], [row.metadata for row in rows])
    return zoo.check(judge, items)


def _judge(reward: str, options: Sequence[str]) -> zoo.Reward:
    """Load a reward; raises UserError if it must learn before it can score."""
    judge = zoo.load(reward, **parse_options([reward], options)[reward])
    refuse_learning({judge.name: judge}, "name it in a recipe")
    return judge


def write_scores(path: Path, images: Sequence[Path], rows: Sequence[Row], scores: Sequence[float | None]) -> None:
    """Write a .csv or .jsonl file with one line per image."""
    columns = ("image", "prompt", "score")
    table = [(image.name, row.prompt, value) for image, row, value in zip(images, rows, scores, strict=True)]
    with writing(path):
        if path.suffix == ".jsonl":
            replace_json_lines(path, [dict(zip(columns, line, strict=True)) for line in table])
        else:
            replace_csv(path, columns, table)


def evaluate_recipe(recipe: Recipe, run: RunFolder | None, device: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """Evaluate the recipe's model, or the last checkpoint of `run`; returns a title and the summary.

    The result of a run is also written to the run's evaluations.
    """
    settings = recipe.evaluation
    if settings.prompts is None:
        raise UserError("the recipe has no evaluation.prompts; name a prompt list, such as evaluation.prompts=my.txt")
    rewards = load_rewards(settings.rewards or recipe.rewards, device)
    rows = load_prompts(settings.prompts, settings.count)
    check_prompts(rows, rewards, settings.prompts)
    known = held_out_from(recipe, rows)
    if run is None:
        refuse_learning(rewards, "evaluate a run, or give evaluation.rewards")
    policy = cached_policy(recipe.model, rows, device, recipe.run.seed)
    Terminal().say(*cut_prompts(policy, (row.prompt for row in rows)))
    title, weights = f"{recipe.model.path}, untrained", None
    if run is not None:
        weights = load_last_weights(run.checkpoints, policy, partial(load_learnt, learning(rewards)))
        title = f"{run.path}, {weights}"
    with _scoring(rewards, len(rows) * settings.images_per_prompt) as progress:
        evaluated = evaluate(policy, rows, rewards, settings, policy.request, progress)
    if run is not None:
        about = {"guidance": settings.guidance, "sampler_steps": settings.steps, "checkpoint": weights}
        known_prompts = {"prompts": known.prompts, "trained_prompts": known.trained}
        write_evaluation(run, "eval", evaluated, {**about, **known_prompts})
    return f"{title}, {sampling_words(settings, policy.request, settings.seed)}, {known.words}", evaluated.summary(
        intervals=True
    )
