"""The preference judge: the embedded world's CLIP, tuned on choices between two images for one prompt.

Source: PickScore (Kirstain et al., 2023), section 4: cross entropy between the choice and the softmax of the two
images' scaled cosines with the prompt. The choices follow a rule: a clean image that fulfils the prompt is preferred to
a damaged image, and to a clean one that does not fulfil it. Pairs that the rule does not decide are left out.
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
    as_images,
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
Pair = tuple[str, np.ndarray, np.ndarray]  # a prompt, the preferred image and the other image, (64, 64, 3), uint8


def _true(prompt: str, image: np.ndarray) -> bool:
    rows = shape_rows()
    return prompt in rows and judge(detect(image), rows[prompt]).correct


def another(prompt: str, scene: Scene, rng: np.random.Generator) -> Scene:
    """Another random scene that fulfils the prompt of `scene`."""
    if scene.lines:
        return grammar.sign_scene(scene.lines, rng)
    return grammar.shape_scene(shape_rows()[prompt], rng)


def pairs(found: Sequence[Example], kinds: Sequence[Damage], rng: np.random.Generator) -> Iterator[tuple[Pair, bool]]:
    """A pair for each prompt, and whether its second image is damaged; otherwise that is a clean one of a similar
    prompt.

    Half of the second images are damaged, and every second one of these shows a new scene of the prompt. A pair whose
    second image is clean and fulfils the prompt too is left out.
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
    """At most `count` pairs of held-out prompts, half of shapes and half of signs, in random order."""
    found = list(zip(*held_out_examples(seed, count), strict=True))
    rng = np.random.default_rng([seed, 10])
    return list(pairs([found[i] for i in rng.permutation(len(found))], kinds, rng))


def train_preference(clip: CLIPModel, seed: int, steps: int, batch: int, log: Log) -> CLIPModel:
    """`clip`, tuned on `batch` pairs in each step; its logit scale is kept, so that scores compare with the CLIP's."""
    tokenizer, kinds = make_tokenizer(), list(KINDS.values())
    clip.requires_grad_(True)
    clip.logit_scale.requires_grad_(False)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 19, step])
        found = [pair for pair, _ in pairs(examples(seed, 5, step, batch, SHARE_OF_SHAPES), kinds, rng)]
        prompts, better, worse = zip(*found, strict=True)
        ids = tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids
        texts = F.normalize(clip.get_text_features(ids).pooler_output, dim=-1)
        pixels = seen(as_images([*better, *worse]), seed, 5, step)
        images = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        scores = clip.logit_scale.exp() * (images.unflatten(0, (2, -1)) * texts).sum(-1)
        return -F.logsigmoid(scores[0] - scores[1]).mean()

    train("preference", clip, loss_of, steps, 5e-4, log)
    return clip
