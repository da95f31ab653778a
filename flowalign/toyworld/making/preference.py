"""A preference: the embedded world's CLIP tuned on choices between two pictures for one prompt.

Source: PickScore (Kirstain et al., 2023), section 4: cross-entropy between the choice and softmax of the two pictures'
scaled cosines with the prompt. Nobody chose here: a true, clean picture is preferred to a damaged one and to a clean
one that is not true. Where both are true or neither is clean there is no choice to learn from; such pairs are left out.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from flowalign.toyworld import grammar
from flowalign.toyworld.detector import detect
from flowalign.toyworld.making.artifacts import KINDS, Damage, damaged
from flowalign.toyworld.making.examples import (
    Example,
    as_pictures,
    examples,
    held_out_examples,
    shape_rows,
    sibling,
)
from flowalign.toyworld.making.pretraining import make_tokenizer
from flowalign.toyworld.making.training import Log, seen, train
from flowalign.toyworld.render import Scene, render
from rewards.geneval import judge

SHARE_OF_SHAPES = 0.7
Pair = tuple[str, np.ndarray, np.ndarray]  # a prompt, the preferred picture and the other one, (64, 64, 3), uint8


def _true(prompt: str, picture: np.ndarray) -> bool:
    rows = shape_rows()
    return prompt in rows and judge(detect(picture), rows[prompt]).correct


def another(prompt: str, scene: Scene, rng: np.random.Generator) -> Scene:
    """A new scene that is true to the prompt of `scene`."""
    if scene.lines:
        return grammar.sign_scene(scene.lines, rng)
    return grammar.shape_scene(shape_rows()[prompt], rng)


def pairs(found: Sequence[Example], kinds: Sequence[Damage], rng: np.random.Generator) -> Iterator[tuple[Pair, bool]]:
    """A pair for each prompt, and whether the other picture is damaged; else it is a clean one of a like prompt.

    Half of the others are damaged, every second one of those a new picture of the prompt. A clean other that is true to
    the prompt as well is left out.
    """
    for number, (prompt, scene) in enumerate(found):
        better = render(scene)
        if number % 2:
            base = better if number % 4 == 1 else render(another(prompt, scene, rng))
            yield (prompt, better, damaged(base, kinds[int(rng.integers(len(kinds)))], rng)), True
        else:
            worse = render(sibling(prompt, scene, rng)[1])
            if not _true(prompt, worse):
                yield (prompt, better, worse), False


def held_out_pairs(seed: int, count: int, kinds: Sequence[Damage]) -> list[tuple[Pair, bool]]:
    """At most `count` pairs of held-out prompts, half of shapes and half signs, in an order of no meaning."""
    found = list(zip(*held_out_examples(seed, count), strict=True))
    rng = np.random.default_rng([seed, 10])
    return list(pairs([found[i] for i in rng.permutation(len(found))], kinds, rng))


def train_preference(clip: CLIPModel, seed: int, steps: int, batch: int, log: Log) -> CLIPModel:
    """`clip` tuned on `batch` pairs a step; its scale is kept, so that scores stay comparable with the CLIP's."""
    tokenizer, kinds = make_tokenizer(), list(KINDS.values())
    clip.requires_grad_(True)
    clip.logit_scale.requires_grad_(False)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 19, step])
        found = [pair for pair, _ in pairs(examples(seed, 5, step, batch, SHARE_OF_SHAPES), kinds, rng)]
        prompts, better, worse = zip(*found, strict=True)
        ids = tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids
        texts = F.normalize(clip.get_text_features(ids).pooler_output, dim=-1)
        pixels = seen(as_pictures([*better, *worse]), seed, 5, step)
        images = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        scores = clip.logit_scale.exp() * (images.unflatten(0, (2, -1)) * texts).sum(-1)
        return -F.logsigmoid(scores[0] - scores[1]).mean()

    train("preference", clip, loss_of, steps, 5e-4, log)
    return clip
