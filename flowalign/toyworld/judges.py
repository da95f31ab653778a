"""Make the embedded world's judges from nothing: a vision transformer, a CLIP on it, a preference and a taste.

The vision transformer learns what covers each patch and what is in the picture; a CLIP's image tower starts from it
and learns, contrastively (Radford et al., 2021, fig. 3), which prompt a picture was drawn from. Prompts that are held
out from training a policy are held out here too. A step's batch depends on (seed, stage, step) alone.
"""

import copy
import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rapidfuzz.distance import Levenshtein
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from flowalign.toyworld import grammar
from flowalign.toyworld.artifacts import KINDS, damaged
from flowalign.toyworld.detector import detect
from flowalign.toyworld.pretraining import MAX_TOKENS, make_tokenizer
from flowalign.toyworld.render import _CELL, _LINE_HEIGHT, PALETTE, SHAPES, SIZE, Scene, render
from rewards import load, score
from rewards.clip import ClipFeatures
from rewards.geneval import judge

WIDTH = 128
DEPTH = 4
HEADS = 4
PATCH = 8
MLP_RATIO = 3
EPSILON = 1e-6  # of layer norms
MEAN = STD = (0.5, 0.5, 0.5)
SHARE_OF_SHAPES = 0.6
PICTURE_NOISE = 0.02  # the judges see a policy's pictures, which are never quite clean
# What can cover a patch: nothing, a shape of a colour, a letter.
CLASSES = ("", *(f"{color} {shape}" for shape in SHAPES for color in PALETTE), *grammar.LETTERS)

Log = Callable[[str], None]


@functools.cache
def held_out_prompts() -> frozenset[str]:
    """Every shape prompt and single sign of the world's held-out side."""
    shapes = {row["prompt"] for row in grammar.split_shapes(per_task=2000, held_out=True)}
    return frozenset(shapes) | {grammar.sign_prompt([word]) for word in grammar.words(held_out=True)}


def examples(seed: int, stage: int, step: int, count: int) -> list[tuple[str, Scene]]:
    """`count` different prompts, none of them held out, and true scenes."""
    rng = np.random.default_rng([seed, stage, step])
    pool, held_out = grammar.words(held_out=False), held_out_prompts()
    found: dict[str, Scene] = {}
    while len(found) < count:
        prompt, scene = grammar.random_example(rng, pool, SHARE_OF_SHAPES)
        if prompt not in held_out:
            found[prompt] = scene
    return list(found.items())


def held_out_shapes() -> dict[str, grammar.Metadata]:
    """The metadata rows of the bundled list of held-out shape prompts, by prompt."""
    return {row["prompt"]: row for row in grammar.split_shapes(per_task=86, held_out=True)}


def held_out_examples(seed: int, count: int) -> tuple[list[str], list[Scene]]:
    """`count` different held-out prompts, half of them of shapes and half signs, and true scenes."""
    rng = np.random.default_rng([seed, 9])
    shapes = held_out_shapes()
    chosen = [str(prompt) for prompt in rng.permutation(list(shapes))[: count // 2]]
    signs = [str(word) for word in rng.permutation(grammar.words(held_out=True))[: count - count // 2]]
    scenes = [grammar.shape_scene(shapes[prompt], rng) for prompt in chosen]
    scenes += [grammar.sign_scene([word], rng) for word in signs]
    return chosen + [grammar.sign_prompt([word]) for word in signs], scenes


def also_true(prompts: Sequence[str], scenes: Sequence[Scene]) -> torch.Tensor:
    """Whether scene i, drawn from some prompt of shapes or a sign, is true to prompt j by the exact judge: (B, P)."""
    shapes = held_out_shapes()
    found = torch.zeros(len(scenes), len(prompts), dtype=torch.bool)
    for i, scene in enumerate(scenes):
        if scene.items:
            seen = detect(render(scene))
            found[i] = torch.tensor([text in shapes and judge(seen, shapes[text]).correct for text in prompts])
    return found


def pictures(scenes: Sequence[Scene]) -> torch.Tensor:
    """(B, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2).float() / 255


def _letters(scene: Scene) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Each letter of a sign with its box in pixels."""
    top = (SIZE - _LINE_HEIGHT * len(scene.lines)) // 2 + scene.offset[1]
    for row, line in enumerate(scene.lines):
        left = (SIZE - _CELL * len(line)) // 2 + scene.offset[0]
        for column, letter in enumerate(line):
            x, y = left + column * _CELL, top + row * _LINE_HEIGHT
            yield letter, (x, y, x + _CELL, y + _LINE_HEIGHT)


def patch_classes(scene: Scene) -> np.ndarray:
    """Index in CLASSES of what covers most of each patch, (64,), row by row."""
    side = SIZE // PATCH
    things = [(f"{item.color} {item.shape}", item.box) for item in scene.items]
    best, area = np.zeros((side, side), dtype=np.int64), np.full((side, side), 0.2 * PATCH**2)
    starts = np.arange(side) * PATCH
    for name, (left, top, right, bottom) in [*things, *_letters(scene)]:
        across = np.clip(np.minimum(starts + PATCH, right) - np.maximum(starts, left), 0, None)
        down = np.clip(np.minimum(starts + PATCH, bottom) - np.maximum(starts, top), 0, None)
        covered = down[:, None] * across[None, :]
        best[covered > area] = CLASSES.index(name)
        area = np.maximum(area, covered)
    return best.reshape(-1)


def _rate(step: int, steps: int) -> float:
    """Warm-up over 50 steps, then half a cosine to zero."""
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * step / steps))


def _train(
    name: str, module: nn.Module, loss_of: Callable[[int], torch.Tensor], steps: int, rate: float, log: Log
) -> None:
    """AdamW on `loss_of(step)`, with the gradient's norm held to 1."""
    learnt = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    started, total = time.process_time(), 0.0
    module.train()
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.param_groups[0]["lr"] = rate * _rate(step, steps)
        optimizer.step()
        total += loss.item()
        if (step + 1) % 25 == 0:
            log(f"{name} {step + 1}/{steps} loss {total / 25:.4f} {time.process_time() - started:.0f} s of a core")
            total = 0.0
    module.eval()


def _seen(clean: torch.Tensor, seed: int, stage: int, step: int) -> torch.Tensor:
    """Pictures with a little noise, as both image towers get them: (B, 3, 64, 64) in [-1, 1]."""
    generator = torch.Generator().manual_seed(1_000_003 * (10 * seed + stage + 5) + step)
    noisy = (clean + PICTURE_NOISE * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
    return (noisy - MEAN[0]) / STD[0]


def train_vit(seed: int, steps: int, batch: int, log: Log) -> nn.Module:
    """A timm vision transformer that tells of every patch what covers it, and of the picture what is in it."""
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
        tokens = vit.forward_features(_seen(pictures(scenes), seed, 0, step))
        patches = F.cross_entropy(heads[1](tokens[:, 1:]).flatten(0, 1), covers.flatten(), weight)
        return patches + 5 * F.binary_cross_entropy_with_logits(heads[0](tokens[:, 0]), present)

    _train("vit", nn.ModuleList([vit, heads]), loss_of, steps, 1.5e-3, log)
    return vit


def clip_tower_state(vit: nn.Module) -> dict[str, torch.Tensor]:
    """A pre-norm timm vision transformer's weights under the names of transformers' CLIP."""
    names = {
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm_pre": "pre_layrnorm",
        "norm": "post_layernorm",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    state = {}
    for key, value in vit.state_dict().items():
        if key == "cls_token":
            state["embeddings.class_embedding"] = value.flatten()
        elif key == "pos_embed":
            state["embeddings.position_embedding.weight"] = value[0]
        else:
            found = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", key)
            assert found is not None
            block, part, kind = found.groups()
            place = f"encoder.layers.{block}." if block else ""
            if part == "attn.qkv":
                for name, third in zip("qkv", value.chunk(3), strict=True):
                    state[f"{place}self_attn.{name}_proj.{kind}"] = third
            else:
                state[f"{place}{names[part]}.{kind}"] = value
    return state


def train_clip(vit: nn.Module, seed: int, steps: int, batch: int, log: Log) -> CLIPModel:
    """A CLIPModel whose image tower starts as `vit` and keeps the first half of it.

    A quarter of the pictures are spoilt, and a linear layer must tell how much, so that embeddings show it.
    """
    torch.manual_seed(seed + 1)
    tokenizer = make_tokenizer()
    size: dict[str, object] = {
        "hidden_size": WIDTH,
        "intermediate_size": MLP_RATIO * WIDTH,
        "num_attention_heads": HEADS,
    }
    size |= {"projection_dim": WIDTH, "hidden_act": "gelu"}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, "num_hidden_layers": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": SIZE, "patch_size": PATCH, "num_hidden_layers": DEPTH, "layer_norm_eps": EPSILON}
    pad = tokenizer.pad_token_id
    config = CLIPConfig(
        text_config={**size, **text, **ends, "pad_token_id": pad},
        vision_config={**size, **vision},
        projection_dim=WIDTH,
        **ends,
    )
    clip = CLIPModel(config)
    clip.vision_model.load_state_dict(clip_tower_state(vit))
    for part in (clip.vision_model.embeddings, clip.vision_model.encoder.layers[: DEPTH // 2]):
        part.requires_grad_(False)  # what covers a patch is known; what it means together is learnt

    taste = nn.Linear(WIDTH, 1)

    def loss_of(step: int) -> torch.Tensor:
        prompts, scenes = zip(*examples(seed, 1, step, batch), strict=True)
        ids = tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids
        images, rating = _rated(pictures(scenes), seed, 1, step, spoilt=batch // 4)
        found = clip(input_ids=ids, pixel_values=_seen(images, seed, 1, step), return_loss=True)
        guess = 10 * taste(found.image_embeds).squeeze(-1)
        return found.loss + F.mse_loss(guess, (rating - 8) / 3)

    _train("clip", nn.ModuleList([clip, taste]), loss_of, steps, 1.5e-3, log)
    with torch.no_grad():
        clip.logit_scale.clamp_(max=np.log(100))
    return clip


def spoil(images: torch.Tensor, amount: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images (B, 3, H, W) made worse by `amount` (B,) in [0, 1]: in turn noise, blur, blotches, or washed out."""
    spoilt = []
    for index, (image, much) in enumerate(zip(images, amount.tolist(), strict=True)):
        kind = index % 4
        if kind == 0:
            image = image + 0.3 * much * torch.randn(image.shape, generator=generator)
        elif kind == 1:
            blurred = F.avg_pool2d(F.pad(image[None], (3, 3, 3, 3), mode="replicate"), 7, 1)[0]
            image = torch.lerp(image, blurred, much)
        elif kind == 2:
            coarse = torch.rand(1, 3, 8, 8, generator=generator)
            image = torch.lerp(image, F.interpolate(coarse, image.shape[-2:], mode="bicubic")[0], 0.6 * much)
        else:
            image = torch.lerp(image, torch.full_like(image, 0.8), 0.8 * much)
        spoilt.append(image.clamp(0, 1))
    return torch.stack(spoilt)


def _rated(images: torch.Tensor, seed: int, stage: int, step: int, spoilt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The images, the first `spoilt` of them spoilt, and a made-up rating (B,): 10 for a clean one, down to 1."""
    generator = torch.Generator().manual_seed(1_000_003 * (10 * seed + stage) + step)
    amount = torch.rand(len(images), generator=generator).where(torch.arange(len(images)) < spoilt, 0.0)
    return torch.cat([spoil(images[:spoilt], amount[:spoilt], generator), images[spoilt:]]), 10 - 9 * amount


def quality_examples(seed: int, step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures, the first half of them spoilt, and their rating."""
    images = pictures([scene for _, scene in examples(seed, 2, step, count)])
    return _rated(images, seed, 2, step, spoilt=count // 2)


@torch.no_grad()
def image_features(clip: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, D) of length 1 of images (B, 3, 64, 64) in [0, 1]."""
    pixels = (images - MEAN[0]) / STD[0]
    return F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


def fit_aesthetic(clip: CLIPModel, seed: int, batches: int, log: Log) -> dict[str, torch.Tensor]:
    """Ridge regression of the rating on the embedding, in the layout of the published head, one layer."""
    found = [
        (image_features(clip, images), rating)
        for images, rating in (quality_examples(seed, i, 256) for i in range(batches))
    ]
    features, ratings = torch.cat([x for x, _ in found]).double(), torch.cat([y for _, y in found]).double()
    inputs = F.pad(features, (0, 1), value=1.0)
    solution = torch.linalg.solve(inputs.T @ inputs + 1e-3 * torch.eye(WIDTH + 1).double(), inputs.T @ ratings)
    error = (inputs @ solution - ratings).square().mean().sqrt().item()
    log(f"aesthetic: {len(ratings)} pictures, error {error:.2f} of a spread of {ratings.std().item():.2f}")
    return {"layers.0.weight": solution[None, :-1].float().contiguous(), "layers.0.bias": solution[-1:].float()}


def save_vit(vit: nn.Module, folder: Path) -> None:
    """Write the vision transformer in half precision as a timm folder."""
    save_for_hf(copy.deepcopy(vit).half(), folder, safe_serialization=True)


def save_clip(clip: CLIPModel, folder: Path) -> None:
    """Write the CLIP in half precision with its tokenizer and image processor as a transformers folder."""
    copy.deepcopy(clip).half().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    size = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    CLIPImageProcessor(**size, image_mean=list(MEAN), image_std=list(STD)).save_pretrained(folder)


def save_aesthetic(head: dict[str, torch.Tensor], file: Path) -> None:
    """Write the head as safetensors."""
    save_file(head, file)


def measure(folder: Path, log: Log, rounds: int = 16) -> None:
    """Log how well the judges of a folder judge held-out prompts, through the rewards that use them.

    A picture of a star above a ring is also one "of a star and a ring": the choice among 64 prompts at random is
    counted with and without the others that are true, that among the 64 most alike in spelling without them.
    """
    clip = ClipFeatures(str(folder / "clip"), "clipscore", batch_size=64, device="cpu")
    known = [*held_out_shapes(), *(grammar.sign_prompt([word]) for word in grammar.words(held_out=True))]
    texts = clip.text_features(known)
    alike = torch.tensor([[Levenshtein.distance(one, other) for other in known] for one in known])
    hits: dict[str, list[torch.Tensor]] = {"at random": [], "at random, one true": [], "most alike, one true": []}
    for number in range(rounds):
        prompts, scenes = held_out_examples(1000 + number, 64)
        own = torch.tensor([known.index(prompt) for prompt in prompts])
        likeness = clip.image_features(pictures(scenes)) @ texts.T
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
    taste = load("aesthetic", model=str(folder / "clip"), head=str(folder / "aesthetic.safetensors"), device="cpu")
    images, rating = quality_examples(1000, 0, 512)
    scores = score(taste, images, [""] * len(images))
    better = (scores[rating == 10][:, None] > scores[rating < 10][None]).float().mean().item()
    fit = torch.corrcoef(torch.stack([scores, rating]))[0, 1].item()
    log(
        f"aesthetic: correlation {fit:.3f} with the rating; a clean picture above a spoilt one in {better:.1%} of pairs"
    )


def _altered(picture: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy of a picture (64, 64, 3), uint8, with a box that does not belong: damage, or a piece of another one."""
    kind = int(rng.integers(len(KINDS) + 3))
    if kind < len(KINDS):
        return damaged(picture, list(KINDS.values())[kind], rng)
    copy = picture.copy()
    height, width = rng.integers(8, 28, 2)
    top, left = int(rng.integers(0, SIZE - height)), int(rng.integers(0, SIZE - width))
    box = copy[top : top + height, left : left + width]
    if kind == len(KINDS):
        box[:] = other[top : top + height, left : left + width]
    elif kind == len(KINDS) + 1:
        box[:] = rng.permutation(box.reshape(-1, 3)).reshape(box.shape)
    else:
        box[:] = (box * rng.uniform(0.5, 1.1, 3) + rng.uniform(-40, 40, 3)).clip(0, 255)
    return copy


def sharpen_vit(vit: Any, seed: int, steps: int, batch: int, log: Log) -> nn.Module:
    """Go on with `train_vit`'s transformer so that its patches also tell what has been altered.

    Telling things apart needs no eye for damage, and the pictures with noise of `train_vit` teach to overlook it. No
    kind of damage that the artifact judge is tested on is used.
    """
    vit.requires_grad_(True)
    heads = nn.ModuleList([nn.Linear(WIDTH, len(CLASSES)), nn.Linear(WIDTH, 1)])
    weight = torch.ones(len(CLASSES)).index_fill(0, torch.tensor([0]), 0.1)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 17, step])
        scenes = [scene for _, scene in examples(seed, 4, step, batch)]
        clean = [render(scene) for scene in scenes]
        shown = [_altered(one, clean[i - 1], rng) if i % 2 else one for i, one in enumerate(clean)]
        differing = np.abs(np.stack(shown).astype(int) - np.stack(clean)).max(-1) > 16
        side = SIZE // PATCH
        altered = differing.reshape(batch, side, PATCH, side, PATCH).sum((2, 4)).reshape(batch, -1) > 2
        pixels = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).float() / 255
        patches = vit.forward_features((pixels - MEAN[0]) / STD[0])[:, 1:]
        covers = torch.from_numpy(np.stack([patch_classes(scene) for scene in scenes]))
        known = torch.where(torch.from_numpy(altered), -100, covers)  # what is under the damage is not asked
        things = F.cross_entropy(heads[0](patches).flatten(0, 1), known.flatten(), weight)
        wanted = torch.from_numpy(altered).float()
        return things + 5 * F.binary_cross_entropy_with_logits(heads[1](patches).squeeze(-1), wanted)

    _train("vit's eye for damage", nn.ModuleList([vit, heads]), loss_of, steps, 1e-3, log)
    return vit
