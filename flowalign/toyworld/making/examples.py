"""Prompts with scenes that fulfil them, for training the judges: random, similar and held-out ones."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein

from flowalign.toyworld import grammar
from flowalign.toyworld.detector import detect
from flowalign.toyworld.render import Scene, render
from flowalign.toyworld.tasks import Metadata
from rewards.geneval import TASKS, judge

SHARE_OF_SHAPES = 0.6
_LOOKED_AT = 64  # random prompts of a task among which the most similar one is chosen

Example = tuple[str, Scene]


@functools.cache
def held_out_prompts() -> frozenset[str]:
    """Every shape prompt and single sign of the world's held-out side."""
    shapes = {row["prompt"] for row in grammar.split_shapes(per_task=2000, held_out=True)}
    return frozenset(shapes) | {grammar.sign_prompt([word]) for word in grammar.words(held_out=True)}


def examples(seed: int, stage: int, step: int, count: int, shapes: float = SHARE_OF_SHAPES) -> list[Example]:
    """`count` different prompts, none of them held out, with scenes; a share `shapes` is of shapes, the rest signs."""
    rng = np.random.default_rng([seed, stage, step])
    pool, held_out = grammar.words(held_out=False), held_out_prompts()
    found: dict[str, Scene] = {}
    while len(found) < count:
        prompt, scene = grammar.random_example(rng, pool, shapes)
        if prompt not in held_out:
            found[prompt] = scene
    return list(found.items())


@functools.cache
def shape_rows() -> dict[str, Metadata]:
    """The metadata rows of all shape prompts, held out or not, by prompt."""
    return {row["prompt"]: row for task in TASKS for row in grammar.task_prompts(task)}


@functools.cache
def _trained_rows(task: str) -> list[Metadata]:
    return [row for row in grammar.task_prompts(task) if row["prompt"] not in held_out_prompts()]


def sibling(prompt: str, scene: Scene, rng: np.random.Generator) -> Example:
    """A similar prompt that is not held out, with a scene; it differs in a word or two, or in one letter of a sign.

    "a star and a ring" and "a ring and a star" mean the same, so neither is the other's sibling.
    """
    if scene.lines:
        return _respelt(scene.lines, rng)
    row = shape_rows()[prompt]
    pool, words = _trained_rows(row["tag"]), prompt.split()
    meanings = [_content(words) if row["tag"] == "two_object" else words]
    near = [pool[i] for i in rng.integers(len(pool), size=_LOOKED_AT)]
    near = [other for other in near if other["prompt"] != prompt and _content(other["prompt"].split()) not in meanings]
    chosen = min(near, key=lambda other: Levenshtein.distance(words, other["prompt"].split()))
    return chosen["prompt"], grammar.shape_scene(chosen, rng)


def _content(words: Sequence[str]) -> list[str]:
    return sorted(word for word in words if word not in ("a", "an"))


def _respelt(lines: Sequence[str], rng: np.random.Generator) -> Example:
    while True:
        changed = list(lines)
        row = int(rng.integers(len(lines)))
        place = int(rng.integers(len(lines[row])))
        letter = str(rng.choice(list(grammar.LETTERS)))
        changed[row] = lines[row][:place] + letter + lines[row][place + 1 :]
        prompt = grammar.sign_prompt(changed)
        if changed != list(lines) and prompt not in held_out_prompts():
            return prompt, grammar.sign_scene(changed, rng)


def alike_examples(seed: int, stage: int, step: int, count: int, shapes: float) -> list[Example]:
    """At most `count` examples with different prompts; nearly every second one is the sibling of the one before it."""
    rng = np.random.default_rng([seed, stage, step, 1])
    found: dict[str, Scene] = {}
    for prompt, scene in examples(seed, stage, step, 5 * count // 8, shapes):  # siblings may be there already
        for text, drawn in ((prompt, scene), sibling(prompt, scene, rng)):
            found.setdefault(text, drawn)
    return list(found.items())[:count]


def held_out_shapes() -> dict[str, Metadata]:
    """The metadata rows of the bundled list of held-out shape prompts, by prompt."""
    return {row["prompt"]: row for row in grammar.split_shapes(per_task=86, held_out=True)}


def held_out_examples(seed: int, count: int) -> tuple[list[str], list[Scene]]:
    """`count` different held-out prompts, half of shapes and half of signs, with scenes that fulfil them."""
    rng = np.random.default_rng([seed, 9])
    shapes = held_out_shapes()
    chosen = [str(prompt) for prompt in rng.permutation(list(shapes))[: count // 2]]
    signs = [str(word) for word in rng.permutation(grammar.words(held_out=True))[: count - count // 2]]
    scenes = [grammar.shape_scene(shapes[prompt], rng) for prompt in chosen]
    scenes += [grammar.sign_scene([word], rng) for word in signs]
    return chosen + [grammar.sign_prompt([word]) for word in signs], scenes


def also_true(prompts: Sequence[str], scenes: Sequence[Scene]) -> torch.Tensor:
    """(B, P) bool: whether scene i fulfils prompt j by the exact judge; a scene of a sign fulfils none here."""
    shapes = shape_rows()
    found = torch.zeros(len(scenes), len(prompts), dtype=torch.bool)
    for i, scene in enumerate(scenes):
        if scene.items:
            seen = detect(render(scene))
            found[i] = torch.tensor([text in shapes and judge(seen, shapes[text]).correct for text in prompts])
    return found


def drawn(scenes: Sequence[Scene]) -> torch.Tensor:
    """The scenes' images (B, 3, 64, 64) in [0, 1]."""
    return as_images([render(scene) for scene in scenes])


def as_images(drawn: Sequence[np.ndarray]) -> torch.Tensor:
    """A tensor (B, 3, H, W) in [0, 1] of B images (H, W, 3), uint8."""
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255
