"""The runs of the over-optimisation bench: every defence against hacking, on each proxy of the toyworld.

`prepare` writes the files that the runs on a proxy share: prompts, reference images, learned judges, and a dataset of
groups of the base model's images with the scores of every judge, which reward shaping uses as its reference.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from flowalign.config import Recipe, RewardSettings, load_recipe, recipe_from_dict
from flowalign.config.base import UserError
from flowalign.disk.assets import asset
from flowalign.disk.files import make_folder, replace_json_lines, replaced_file
from flowalign.disk.media import save_images
from flowalign.experiments.overoptimization_results import GOLD, PROXY
from flowalign.policies.loading import load_policy
from flowalign.rollout.dataset import GroupDataset, collect
from flowalign.rollout.prompts import load_prompts
from flowalign.score import load_rewards
from flowalign.toyworld.grammar import random_example, words
from flowalign.toyworld.proxies import BACKBONE, fit_learned
from flowalign.toyworld.render import render
from rewards.artifact import save_head
from rewards.backbones.weights import whole
from rewards.devices import chosen_device
from rewards.media import read_image

Settings = dict[str, Any]

WORLDS = ("shapes", "signs")
DEFENCES = ("none", "kl", "par", "worst", "artifact", "adversarial")
HONEST = "honest"  # no proxy: the run trains on the gold judge itself
HELD_OUT: Settings = {
    "clipscore": {"options": {"model": "toyworld/judges/clip"}},
    "artifact": {"options": {"head": "toyworld/judges/artifact.safetensors"}},
    "aesthetic": {"options": {"model": "toyworld/judges/clip", "head": "toyworld/judges/aesthetic.safetensors"}},
}
GROUP = 8  # images of each prompt, in a training step and in the dataset
LABELLED = 32  # prompts whose images a learned judge is fitted to
KL_WEIGHT = 0.3
_JUDGES = ("judge_a", "judge_b", "judge_c")  # they differ only in the prompts that they were fitted to
_LISTS = {"shapes": "toyworld/shapes", "signs": "toyworld/words"}
_GOLDS: dict[str, Settings] = {
    "shapes": {"load": "geneval", "options": {"detector": "flowalign.toyworld.detector:ExactDetector"}},
    "signs": {"load": "flowalign.toyworld.gold:SignQuality", "options": {"threads": 1}},
}
_ARTIFACT: Settings = {"options": {"head": "toyworld/judges/artifact.safetensors"}}


def make_recipe(
    world: str,
    defence: str,
    seed: int,
    shared: Path,
    folder: Path,
    *,
    train: Settings,
    evaluation: Settings,
    guard: Settings | None = None,
) -> Recipe:
    """The recipe of one run into `folder`, which uses the files that `prepare` wrote into `shared`.

    `train`, `evaluation` and `guard` are changes to the sections of these names.
    """
    base = load_recipe("toyworld_ocr_crd")
    proxy = _proxy(world, shared)
    sizes = {"prompts_per_step": 6, "group_size": GROUP, "micro_batch": 48}
    measured = {"prompts": f"{_LISTS[world]}_test", "steps": 4, "schedule": "uniform", "keep_media": 24}
    values = {
        "name": f"overoptimization_{world}_{defence}",
        "model": base.model,
        "prompts": str(shared / "prompts.jsonl"),
        "rollout": base.rollout,
        "train": {**sizes, **train},
        "evaluation": {**measured, "rewards": {PROXY: proxy, GOLD: _GOLDS[world]}, **evaluation},
        "guard": {"seeds": 2, "kl_samples": 32, **(guard or {})},
        "run": {"folder": str(folder), "seed": seed},
        **_defended(world, defence, shared),
    }
    return recipe_from_dict(values, f"{world}, {defence}")


def _defended(world: str, defence: str, shared: Path) -> Settings:
    """The sections of the recipe that depend on the defence."""
    proxy = _proxy(world, shared)
    found: Settings = {"algorithm": {"name": "crd", "timesteps": 2, "kl_weight": 0.0}, "rewards": {PROXY: proxy}}
    if defence == HONEST:
        found["rewards"] = {GOLD: _GOLDS[world]}
    elif defence == "kl":
        found["algorithm"] |= {"kl_weight": KL_WEIGHT, "adaptive_kl": False}
    elif defence == "par":
        found["rewards"] = {PROXY: {**proxy, "shaping": {"form": "sigmoid", "reference": str(shared / "store")}}}
    elif defence == "worst":
        members = _ensemble(world, shared)
        found["rewards"] = {name: _standardised(entry, shared) for name, entry in members.items()}
        found["combine"] = {"form": "worst"}
    elif defence == "artifact":
        found["rewards"] = {PROXY: _standardised(proxy, shared), "artifact": _standardised(_ARTIFACT, shared)}
    elif defence == "adversarial":
        learns = {"model": BACKBONE, "references": str(shared / "references"), "updates": 20, "learning_rate": 1e-3}
        found["rewards"] = {PROXY: _standardised(proxy, shared), "adversarial_dino": {"options": learns}}
    return found


def _standardised(entry: Settings, shared: Path) -> Settings:
    return {**entry, "shaping": {"form": "standardise", "reference": str(shared / "store")}}


def _judge(name: str, shared: Path) -> Settings:
    head = str(shared / f"{name}.safetensors")
    return {"load": "flowalign.toyworld.proxies:Learned", "options": {"head": head}}


def _proxy(world: str, shared: Path) -> Settings:
    """The proxy reward: a learned judge for shapes, OCR with contrast for signs."""
    if world == "shapes":
        return _judge(_JUDGES[0], shared)
    return {"load": "flowalign.toyworld.proxies:Legible", "options": {"threads": 1}}


def _ensemble(world: str, shared: Path) -> dict[str, Settings]:
    """The proxy and two learned judges that were fitted to other prompts."""
    return {PROXY: _proxy(world, shared), **{name: _judge(name, shared) for name in _JUDGES[1:]}}


def prepare(world: str, shared: Path, prompts: int) -> None:
    """Write the files that the runs on a proxy share, with `prompts` training prompts; existing files are kept.

    Raises UserError for fewer prompts than a learned judge needs.
    """
    if prompts < LABELLED:
        raise UserError(f"prompts ({prompts}) must be at least {LABELLED}: a judge is fitted to their images")
    listed = make_folder(shared) / "prompts.jsonl"
    if not listed.exists():
        rows = {row.prompt: row.metadata for row in load_prompts(f"{_LISTS[world]}_train")}
        lines = [{"prompt": prompt, **metadata} for prompt, metadata in rows.items()]
        replace_json_lines(listed, lines[:prompts])
    if not (shared / "references").exists():
        save_images(shared / "references", _references(world))
    dataset = _dataset(world, shared)
    for seed, name in enumerate(_JUDGES):
        if not (shared / f"{name}.safetensors").exists():
            _fit(dataset, seed, shared / f"{name}.safetensors")
    for name, entry in {**_ensemble(world, shared), "artifact": _ARTIFACT}.items():
        if name not in dataset.rewards:
            dataset.rescore(name, _reward(name, entry), lambda _: None)


def _reward(name: str, entry: Settings) -> Any:
    return load_rewards({name: RewardSettings.model_validate(entry)}, chosen_device())[name]


def _dataset(world: str, shared: Path) -> GroupDataset:
    """The dataset of the base model's images of all training prompts, with gold scores and scores added later."""
    path, listed = shared / "store", load_prompts(str(shared / "prompts.jsonl"))
    if path.exists() and len(dataset := GroupDataset.open(path)) == len(listed):
        return dataset
    values: Settings = {"name": world, "prompts": str(shared / "prompts.jsonl"), "rewards": {GOLD: _GOLDS[world]}}
    base = load_recipe("toyworld_ocr_crd")
    values |= {"model": base.model, "rollout": base.rollout, "algorithm": "crd", "collect": {"group_size": GROUP}}
    recipe = recipe_from_dict(values)
    policy = load_policy(recipe.model, chosen_device(), recipe.run.seed)
    return collect(recipe, path, listed, {GOLD: _reward(GOLD, _GOLDS[world])}, policy, lambda _: None)


def _fit(dataset: GroupDataset, seed: int, path: Path) -> None:
    """Fit a judge to the gold scores of some prompts' images and write it."""
    files = sorted(dataset.path.glob("shard_*/media/*.png"))
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:LABELLED].tolist()
    images = torch.stack([read_image(files[row * GROUP + member]) for row in chosen for member in range(GROUP)])
    scores = torch.from_numpy(dataset.rewards[GOLD][chosen]).float().flatten()
    with replaced_file(path) as partial:
        save_head(fit_learned(images, scores, seed=seed), BACKBONE, partial)


@torch.no_grad()
def _references(world: str, count: int = 300) -> torch.Tensor:
    """(N, 3, 64, 64): rendered images, encoded and decoded by the toyworld model's autoencoder."""
    rng, pool = np.random.default_rng(0), words(held_out=False)
    drawn = [render(random_example(rng, pool, float(world == "shapes"))[1]) for _ in range(count)]
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1
    load = AutoencoderKL.from_pretrained
    autoencoder = whole(load, asset("toyworld/model"), subfolder="vae", dtype=torch.float32)
    parts = [autoencoder.decode(autoencoder.encode(part).latent_dist.mean).sample for part in pixels.split(50)]
    return ((torch.cat(parts) + 1) / 2).clamp(0, 1)
