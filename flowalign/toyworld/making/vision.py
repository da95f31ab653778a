"""The vision transformer: it learns what covers each patch, what the image shows, and which patches were altered."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from torch.nn import functional as F

from flowalign.toyworld import grammar
from flowalign.toyworld.making.examples import as_images, drawn, examples
from flowalign.toyworld.making.spoiling import altered
from flowalign.toyworld.making.training import DEPTH, HEADS, MEAN, MLP_RATIO, PATCH, STD, WIDTH, Log, seen, train
from flowalign.toyworld.render import PALETTE, SHAPES, SIZE, Scene, letter_boxes, render

# What can cover a patch: nothing, a shape with its colour, or a letter.
CLASSES = ("", *(f"{color} {shape}" for shape in SHAPES for color in PALETTE), *grammar.LETTERS)


def patch_classes(scene: Scene) -> np.ndarray:
    """For each patch, row by row, the index in CLASSES of what covers most of it: (64,)."""
    side = SIZE // PATCH
    things = [(f"{item.color} {item.shape}", item.box) for item in scene.items]
    best, area = np.zeros((side, side), dtype=np.int64), np.full((side, side), 0.2 * PATCH**2)
    starts = np.arange(side) * PATCH
    for name, (left, top, right, bottom) in [*things, *letter_boxes(scene)]:
        across = np.clip(np.minimum(starts + PATCH, right) - np.maximum(starts, left), 0, None)
        down = np.clip(np.minimum(starts + PATCH, bottom) - np.maximum(starts, top), 0, None)
        covered = down[:, None] * across[None, :]
        best[covered > area] = CLASSES.index(name)
        area = np.maximum(area, covered)
    return best.reshape(-1)


def train_vit(seed: int, steps: int, batch: int, log: Log) -> nn.Module:
    """A timm vision transformer, trained to say what covers each patch and what the image shows."""
    torch.manual_seed(seed)
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained_cfg_overlay={"mean": MEAN, "std": STD, "crop_pct": 1.0, "input_size": (3, SIZE, SIZE)},
        num_classes=0,
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=MLP_RATIO,
        pre_norm=True,  # as in CLIP's image tower, which starts from this
    )
    heads = nn.ModuleList([nn.Linear(WIDTH, len(CLASSES)) for _ in range(2)])
    weight = torch.ones(len(CLASSES)).index_fill(0, torch.tensor([0]), 0.1)

    def loss_of(step: int) -> torch.Tensor:
        scenes = [scene for _, scene in examples(seed, 0, step, batch)]
        covers = torch.from_numpy(np.stack([patch_classes(scene) for scene in scenes]))
        present = torch.zeros(batch, len(CLASSES)).scatter_(1, covers, 1.0)
        tokens = vit.forward_features(seen(drawn(scenes), seed, 0, step))
        patches = F.cross_entropy(heads[1](tokens[:, 1:]).flatten(0, 1), covers.flatten(), weight)
        return patches + 5 * F.binary_cross_entropy_with_logits(heads[0](tokens[:, 0]), present)

    train("vit", nn.ModuleList([vit, heads]), loss_of, steps, 1.5e-3, log)
    return vit


def sharpen_vit(vit: Any, seed: int, steps: int, batch: int, log: Log) -> nn.Module:
    """`train_vit`'s transformer, trained further so that its patches also show what was altered.

    To recognise things the transformer need not see damage, and the noisy images of `train_vit` teach it to ignore
    damage. The kinds of damage that the artifact judge is tested on are not used.
    """
    torch.manual_seed(seed + 2)
    vit.requires_grad_(True)
    heads = nn.ModuleList([nn.Linear(WIDTH, len(CLASSES)), nn.Linear(WIDTH, 1)])
    weight = torch.ones(len(CLASSES)).index_fill(0, torch.tensor([0]), 0.1)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 17, step])
        scenes = [scene for _, scene in examples(seed, 4, step, batch)]
        clean = [render(scene) for scene in scenes]
        shown = [altered(one, clean[i - 1], rng) if i % 2 else one for i, one in enumerate(clean)]
        differing = np.abs(np.stack(shown).astype(int) - np.stack(clean)).max(-1) > 16
        side = SIZE // PATCH
        spoilt = torch.from_numpy(differing.reshape(batch, side, PATCH, side, PATCH).sum((2, 4)).reshape(batch, -1) > 2)
        patches = vit.forward_features((as_images(shown) - MEAN[0]) / STD[0])[:, 1:]
        covers = torch.from_numpy(np.stack([patch_classes(scene) for scene in scenes]))
        known = torch.where(spoilt, -100, covers)  # what the damage covers is not asked
        things = F.cross_entropy(heads[0](patches).flatten(0, 1), known.flatten(), weight)
        return things + 5 * F.binary_cross_entropy_with_logits(heads[1](patches).squeeze(-1), spoilt.float())

    train("vit on damage", nn.ModuleList([vit, heads]), loss_of, steps, 1e-3, log)
    return vit


def save_vit(vit: nn.Module, folder: Path) -> None:
    """Writes the vision transformer in half precision as a timm folder."""
    save_for_hf(copy.deepcopy(vit).half(), folder, safe_serialization=True)
