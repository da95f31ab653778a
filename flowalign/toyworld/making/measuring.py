"""Measures how well a folder's judges judge held-out prompts, through the rewards that use them."""

from pathlib import Path

import torch
from rapidfuzz.distance import Levenshtein

from flowalign.toyworld import grammar
from flowalign.toyworld.making.artifacts import HELD_OUT, KINDS
from flowalign.toyworld.making.examples import (
    also_true,
    as_images,
    drawn,
    held_out_examples,
    held_out_shapes,
)
from flowalign.toyworld.making.preference import Pair, held_out_pairs
from flowalign.toyworld.making.spoiling import quality_examples
from flowalign.toyworld.making.training import Log
from rewards import Reward, load, score
from rewards.backbones.clip import ClipFeatures


def measure(folder: Path, log: Log, rounds: int) -> None:
    """Logs how well the CLIP, the aesthetic head and the preference judge, where the folder has them.

    The CLIP is measured on `rounds` times 64 images, the preference on at most as many pairs.
    """
    if (folder / "clip").is_dir():
        measure_clip(folder, log, rounds)
    if (folder / "aesthetic.safetensors").is_file():
        measure_aesthetic(folder, log)
    if (folder / "preference").is_dir():
        measure_preference(folder, log, rounds)


def measure_clip(folder: Path, log: Log, rounds: int) -> None:
    """Logs how often an image's own prompt is first among 64, over `rounds` times 64 images.

    An image of a star above a ring also fulfils "a star and a ring". The choice among 64 random prompts is therefore
    counted both with and without other prompts that the image fulfils, and that among the 64 prompts of the most
    similar spelling without them.
    """
    clip = ClipFeatures(str(folder / "clip"), "clipscore", batch_size=64, device="cpu")
    known = [*held_out_shapes(), *(grammar.sign_prompt([word]) for word in grammar.words(held_out=True))]
    texts = clip.text_features(known)
    alike = torch.tensor([[Levenshtein.distance(one, other) for other in known] for one in known])
    hits: dict[str, list[torch.Tensor]] = {"at random": [], "at random, one true": [], "most alike, one true": []}
    for number in range(rounds):
        prompts, scenes = held_out_examples(1000 + number, 64)
        own = torch.tensor([known.index(prompt) for prompt in prompts])
        likeness = clip.image_features(drawn(scenes)) @ texts.T
        others = also_true(known, scenes).scatter(1, own[:, None], False)
        distance = alike[own].masked_fill(others, 10**6).scatter(1, own[:, None], -1)
        nearest = distance.argsort(stable=True, dim=1)[:, :64]
        hits["at random"].append(likeness[:, own].argmax(1) == torch.arange(64))
        one = likeness.masked_fill(others, -2)
        hits["at random, one true"].append(one[:, own].argmax(1) == torch.arange(64))
        hits["most alike, one true"].append(one.gather(1, nearest).argmax(1) == 0)
    for kind, parts in hits.items():
        found = torch.stack(parts).float()
        every, shapes, signs = (part.mean().item() for part in (found, found[:, :32], found[:, 32:]))
        log(f"clip: own prompt first of 64 {kind}: {every:.1%} (shapes {shapes:.1%}, signs {signs:.1%})")


def measure_aesthetic(folder: Path, log: Log) -> None:
    """Logs how well the aesthetic head's scores agree with the synthetic rating."""
    taste = load("aesthetic", model=str(folder / "clip"), head=str(folder / "aesthetic.safetensors"), device="cpu")
    images, rating = quality_examples(1000, 0, 512)
    scores = score(taste, images, [""] * len(images))
    better = (scores[rating == 10][:, None] > scores[rating < 10][None]).float().mean().item()
    fit = torch.corrcoef(torch.stack([scores, rating]))[0, 1].item()
    log(f"aesthetic: correlation {fit:.3f} with the rating; a clean image above a spoilt one in {better:.1%} of pairs")


def right_choices(reward: Reward, found: list[Pair]) -> torch.Tensor:
    """(B,) bool: whether the reward scores the preferred image of each pair higher."""
    prompts, better, worse = zip(*found, strict=True)
    scores = [score(reward, as_images(drawn), list(prompts)) for drawn in (better, worse)]
    return scores[0] > scores[1]


def measure_preference(folder: Path, log: Log, rounds: int) -> None:
    """Logs how often PickScore prefers the better of two images, with the preference and with the CLIP it began as."""
    for name in ("preference", "clip"):
        reward = load("pickscore", model=str(folder / name), device="cpu")
        for title, kinds in (("known", KINDS), ("held-out", HELD_OUT)):
            found = [row for r in range(rounds) for row in held_out_pairs(2000 + r, 64, list(kinds.values()))]
            right, damaged = right_choices(reward, [pair for pair, _ in found]), torch.tensor([bad for _, bad in found])
            shares = [right[part].float().mean().item() for part in (damaged, ~damaged)]
            log(
                f"{name}: of {len(found)} pairs {right.float().mean().item():.1%} right; {title} kinds of damage "
                f"{shares[0]:.1%}, images of another prompt {shares[1]:.1%}"
            )
