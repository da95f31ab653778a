"""Datasets of scored groups on disk: collected once, trained from many times.

    manifest.json           model, sampler, sizes; for each shard the number of its prompts and its latents' checksum
    shard_000000/           appears whole or not at all
      latents.safetensors   (P, G, ...) float32, finished samples of P prompts
      rows.jsonl            prompt, metadata, index in the prompt list
      rewards/NAME.json     (P, G) values, null where the reward does not apply
      media/0000_00.png     the scored images

A sample's noise is counted by (the dataset's seed, prompt index, member), so a shard that a kill lost is drawn again
with the same samples.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from safetensors.torch import load_file

from flowalign.config import Recipe
from flowalign.config.base import UserError
from flowalign.config.paths import sought
from flowalign.config.renamed import with_names_of_today
from flowalign.disk.files import checksum, make_folder, replace_json, replace_json_lines, replaced_folder
from flowalign.disk.media import save_image, to_uint8
from flowalign.disk.tensors import save_tensors
from flowalign.policies.base import Policy
from flowalign.rollout.generate import Progress, rollout
from flowalign.rollout.prompts import Row, step_rows
from flowalign.rollout.stages import Drawn, Recorded, RolloutRequest, Share
from flowalign.sampling import counted_generator
from flowalign.sampling.noise import DATASET
from rewards import Reward
from rewards.combine import Scores, score_all
from rewards.media import read_image

FORMAT = 1


class GroupDataset:
    """An opened dataset of groups. It holds the rewards in memory and reads latents when a step draws them."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        self.rows: list[Row] = []
        self.places: list[tuple[int, int]] = []  # for each row: its shard, and its index there
        self.rewards: dict[str, np.ndarray] = {}  # (N, G), NaN where a reward does not apply
        self._latents: dict[int, torch.Tensor] = {}

    @classmethod
    def open(cls, path: Path) -> "GroupDataset":
        """Open a dataset and check its files against the manifest.

        Raises UserError for a folder that is not a dataset, a missing or torn shard, and rewards that are not numbers.
        """
        manifest = _read_manifest(path)
        dataset = cls(path, manifest)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in manifest["rewards"]}
        for index, about in enumerate(manifest["shards"]):
            folder = _shard(path, index)
            latents = folder / "latents.safetensors"
            rows = _read_rows(folder / "rows.jsonl")
            if not latents.is_file() or latents.stat().st_size != about["bytes"] or len(rows) != about["prompts"]:
                raise UserError(f"dataset {path}: {folder.name} is torn or missing; collect again into another folder")
            dataset.rows += rows
            dataset.places += [(index, place) for place in range(len(rows))]
            for name, values in parts.items():
                values.append(_read_rewards(folder, name, (about["prompts"], manifest["group_size"])))
        dataset.rewards = {name: np.concatenate(values) for name, values in parts.items() if values}
        return dataset

    def __len__(self) -> int:
        return len(self.rows)

    def spent(self) -> tuple[float, int]:
        """Minutes and forward passes that collecting took; the cost of every run on the dataset includes them."""
        shards = self.manifest["shards"]
        return sum(shard["minutes"] for shard in shards), sum(shard["forwards"] for shard in shards)

    def check(self, recipe: Recipe) -> None:
        """Raises UserError when the recipe cannot train from the dataset."""
        train = recipe.train
        if train.group_size > self.manifest["group_size"]:
            raise UserError(
                f"train.group_size ({train.group_size}) exceeds the {self.manifest['group_size']} samples "
                f"of each prompt in dataset {self.path}"
            )
        if train.prompts_per_step > len(self):
            raise UserError(
                f"train.prompts_per_step ({train.prompts_per_step}) exceeds the {len(self)} prompts "
                f"of dataset {self.path}"
            )
        for name in recipe.rewards:
            if name not in self.rewards:
                raise UserError(
                    f"dataset {self.path} lacks the reward {name!r}; it has {', '.join(self.rewards)} "
                    f"(`flowalign score {name} --dataset {self.path}` adds it)"
                )
        taught = list(recipe.trained_rewards)
        judged = np.any([np.isfinite(self.rewards[name]).any(1) for name in taught] or [[False]], axis=0)
        if not judged.all():
            row = self.rows[int(np.argwhere(~judged)[0][0])]
            raise UserError(
                f"dataset {self.path}: no reward of positive weight ({', '.join(taught)}) applies to {row.prompt!r}"
            )

    def check_model(self, policy: Policy) -> None:
        """Raises UserError when other weights drew the dataset, or the policy draws images of another size."""
        asked, drawn = [policy.request.height, policy.request.width], self.manifest["size"]
        if asked != drawn:
            sizes = f"holds images of {drawn[0]} x {drawn[1]} pixels, the recipe asks for {asked[0]} x {asked[1]}"
            raise UserError(f"dataset {self.path} {sizes}")
        if fingerprint(policy) != self.manifest["model"]["fingerprint"]:
            raise UserError(
                f"dataset {self.path} was collected with other weights ({self.manifest['model']['path']}); "
                "train that model, or collect anew"
            )

    def lacks(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that the dataset does not hold yet. Raises UserError for another prompt at a row's index."""
        done = {row.index: row.prompt for row in self.rows}
        for row in rows:
            if done.get(row.index, row.prompt) != row.prompt:
                raise UserError(
                    f"dataset {self.path} was collected with another prompt {row.index + 1} "
                    f"({done[row.index]!r}, now {row.prompt!r}); choose another folder"
                )
        return [row for row in rows if row.index not in done]

    def draw(self, policy: Policy, rewards: Iterable[str], sigmas: torch.Tensor, share: Share, step: int) -> Recorded:
        """This process's groups of training step `step`, with `share.group_size` samples each; the choice is counted.

        rewards: the names of the rewards whose scores to return; sigmas: the schedule (steps + 1,) to train on.
        """
        size = self.manifest["group_size"]
        numbered = [Row(place, row.prompt, row.metadata) for place, row in enumerate(self.rows)]
        together = step_rows(numbered, share.prompts_per_step, share.seed, step)
        rows = together[share.own]
        latents, members = [], []
        for row in rows:
            generator = counted_generator(DATASET, share.seed, step, row.index)
            chosen = torch.randperm(size, generator=generator)[: share.group_size]
            shard, place = self.places[row.index]
            latents.append(self._shard_latents(shard)[place, chosen])
            members += chosen.tolist()
        drawn = [row for row in rows for _ in range(share.group_size)]
        where = [row.index for row in drawn]
        return Recorded(
            rows=drawn,
            groups=torch.arange(len(rows)).repeat_interleave(share.group_size).to(policy.device),
            condition=policy.encode(together)[share.own],  # as one process encodes them
            latents=torch.cat(latents).to(policy.device),
            sigmas=sigmas,
            members=members,
            scores=self._scores(rewards, where, members, policy.device),
        )

    def _scores(
        self, names: Iterable[str], rows: list[int], members: list[int], device: torch.device
    ) -> dict[str, Scores]:
        scores = {}
        for name in names:
            values = torch.from_numpy(self.rewards[name][rows, members]).float().to(device)
            # A reward judges all samples of a prompt or none of them: one NaN among numbers is a sample left out.
            judges = torch.from_numpy(np.isfinite(self.rewards[name][rows]).any(1)).to(device)
            scores[name] = Scores(values.where(judges | ~values.isnan(), 0.0), ~values.isnan())
        return scores

    def references(self, name: str) -> dict[str, list[float]]:
        """A reward's scores for each prompt that it applies to. Raises UserError for a reward that is not there."""
        if name not in self.rewards:
            raise UserError(f"dataset {self.path} lacks the reward {name!r}; it has {', '.join(self.rewards)}")
        listed = zip(self.rows, self.rewards[name], strict=True)
        return {row.prompt: values.tolist() for row, values in listed if np.isfinite(values).all()}

    def _shard_latents(self, index: int) -> torch.Tensor:
        if index not in self._latents:
            file = _shard(self.path, index) / "latents.safetensors"
            if checksum(file) != self.manifest["shards"][index]["checksum"]:
                raise UserError(f"dataset {self.path}: {file.parent.name} was changed since it was collected")
            self._latents[index] = load_file(file)["latents"]
        return self._latents[index]

    def rescore(self, name: str, reward: Reward, progress: Callable[[int], None]) -> np.ndarray:
        """Score all images of the dataset with one more reward, without sampling.

        Returns (N, G) scores, NaN where the reward does not apply. A killed call leaves the dataset as it was. Raises
        UserError for a name that the dataset has already, and for a reward that applies to none of its prompts.
        """
        if name in self.rewards:
            raise UserError(
                f"dataset {self.path} has a reward {name!r} already; give this one another name with --name"
            )
        parts: list[np.ndarray] = []
        whole = self._size * max(1, 64 // self._size)  # samples of whole groups, which some rewards compare
        for index, about in enumerate(self.manifest["shards"]):
            folder = _shard(self.path, index)
            first = self.places.index((index, 0))
            rows = [row for row in self.rows[first : first + about["prompts"]] for _ in range(self._size)]
            applies = [reward.applies_to(row.about) for row in rows]
            values = np.full(len(rows), np.nan)
            asked = [place for place, yes in enumerate(applies) if yes]
            for start in range(0, len(asked), whole):
                chosen = asked[start : start + whole]
                media = torch.stack([read_image(folder / "media" / _file_name(place, self._size)) for place in chosen])
                texts, metadata = [rows[i].prompt for i in chosen], [rows[i].metadata for i in chosen]
                values[chosen] = score_all({name: reward}, media, texts, metadata)[name].values.numpy()
                progress(len(chosen))
            parts.append(values.reshape(-1, self._size))
        if not np.isfinite(np.concatenate(parts)).any():
            raise UserError(f"reward {name!r} applies to no prompt of dataset {self.path}")
        for index, values in enumerate(parts):
            _write_rewards(_shard(self.path, index), name, values)
        self.manifest["rewards"] = sorted({*self.manifest["rewards"], name})
        _write_manifest(self.path, self.manifest)
        scores: np.ndarray = np.concatenate(parts)
        self.rewards[name] = scores
        return scores

    @property
    def _size(self) -> int:
        return int(self.manifest["group_size"])


def collect(
    recipe: Recipe,
    path: Path,
    rows: Sequence[Row],
    rewards: Mapping[str, Reward],
    policy: Policy,
    progress: Progress,
) -> GroupDataset:
    """Draw and score `collect.group_size` samples of every row that the dataset at `path` does not hold yet.

    Raises UserError when `path` holds a dataset of another model, sampler or group size, or something else.
    """
    settings = recipe.collect
    wanted = {
        "format": FORMAT,
        "model": {"path": recipe.model.path, "fingerprint": fingerprint(policy)},
        "size": [policy.request.height, policy.request.width],
        "sampler": recipe.rollout.model_dump(mode="json", exclude={"batch"}),
        "seed": recipe.run.seed,
        "group_size": settings.group_size,
        "rewards": sorted(rewards),
    }
    dataset = _begun(path, wanted, policy)
    manifest, left = dataset.manifest, dataset.lacks(rows)
    policy.forwards = 0
    for start in range(0, len(left), settings.shard_prompts):
        part = left[start : start + settings.shard_prompts]
        began, forwards = time.perf_counter(), policy.forwards
        samples = rollout(
            policy,
            RolloutRequest(
                part,
                settings.group_size,
                recipe.rollout,
                policy.request,
                (DATASET, recipe.run.seed, 0),
                batch=recipe.rollout.batch,
            ),
            progress=progress,
        )
        scores = score_all(rewards, samples.media, samples.prompts, samples.metadata)
        about = _write_shard(path, len(manifest["shards"]), part, samples, scores)
        spent = {"minutes": (time.perf_counter() - began) / 60, "forwards": policy.forwards - forwards}
        manifest["shards"].append({**about, **spent})
        _write_manifest(path, manifest)
    return GroupDataset.open(path)


def _begun(path: Path, wanted: Mapping[str, Any], policy: Policy) -> GroupDataset:
    """The dataset at `path`, or a new one. Raises UserError unless it was begun with the settings `wanted`."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        make_folder(path)
        _write_manifest(path, {**wanted, "shards": []})
        return GroupDataset.open(path)
    manifest = _read_manifest(path)
    for key, value in wanted.items():
        if key != "model" and manifest[key] != value:
            raise UserError(
                f"dataset {path} was collected with {key} {manifest[key]}, the recipe has {value}; "
                "choose another folder"
            )
    dataset = GroupDataset.open(path)
    dataset.check_model(policy)
    return dataset


def fingerprint(policy: Policy) -> str:
    """A checksum of the model's weights before training; it does not depend on the precision they are loaded in."""
    digest = hashlib.sha256()
    with policy.reference():
        weights = {name.replace(".base_layer", ""): value for name, value in policy.named_weights().items()}
        for name in sorted(name for name in weights if "lora_" not in name):
            value = weights[name].detach().to(torch.bfloat16).cpu().contiguous()
            digest.update(name.encode())
            digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _shard(path: Path, index: int) -> Path:
    return path / f"shard_{index:06d}"


def _reward_file(folder: Path, name: str) -> Path:
    return folder / "rewards" / f"{quote(name, safe='')}.json"  # a reward's name may be any text


def _file_name(place: int, group_size: int) -> str:
    prompt, member = divmod(place, group_size)
    return f"{prompt:04d}_{member:02d}.png"


def _write_shard(
    path: Path, index: int, rows: Sequence[Row], samples: Drawn, scores: Mapping[str, Scores]
) -> dict[str, Any]:
    """Write a shard whole; returns its entry of the manifest."""
    size = len(samples) // len(rows)
    latents = samples.latents.cpu().view(len(rows), size, *samples.latents.shape[1:])
    with replaced_folder(_shard(path, index)) as partial:  # an old one is there if a kill came before the manifest
        file = partial / "latents.safetensors"
        save_tensors(file, {"latents": latents})
        lines = [{"index": row.index, "prompt": row.prompt, "metadata": row.metadata} for row in rows]
        replace_json_lines(partial / "rows.jsonl", lines)
        make_folder(partial / "media")
        for place, pixels in enumerate(to_uint8(samples.media)):
            save_image(partial / "media" / _file_name(place, size), pixels)
        for name, score in scores.items():
            values = torch.where(score.applies, score.values, torch.nan).cpu().numpy()
            _write_rewards(partial, name, values.reshape(len(rows), size))
        return {"prompts": len(rows), "bytes": file.stat().st_size, "checksum": checksum(file)}


def _write_rewards(folder: Path, name: str, values: np.ndarray) -> None:
    make_folder(folder / "rewards")
    listed = [[None if np.isnan(value) else float(value) for value in row] for row in values]
    replace_json(_reward_file(folder, name), listed, indent=None)


def _read_rows(file: Path) -> list[Row]:
    """The rows of a shard; an empty list for a missing or torn file."""
    try:
        return [Row(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError):
        return []


def _read_rewards(folder: Path, name: str, shape: tuple[int, int]) -> np.ndarray:
    """Scores (P, G), NaN where the reward does not apply. Raises UserError for a value that is not a number."""
    file = _reward_file(folder, name)
    if not file.is_file():
        raise UserError(f"dataset {folder.parent}: {folder.name} lacks the reward {name!r} of the manifest")
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
        missing = np.array([[value is None for value in row] for row in listed])
        values = np.array([[np.nan if value is None else value for value in row] for row in listed], dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} holds no table of rewards: {error}") from error
    if values.shape != shape:
        raise UserError(f"{file} holds {values.shape} rewards; the manifest says {shape}")
    bad = ~np.isfinite(values) & ~missing
    if bad.any():
        prompt, member = np.argwhere(bad)[0]
        raise UserError(f"{file}: the reward of prompt {prompt}, member {member} is {values[prompt, member]}")
    return values


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        where = "" if path.exists() else sought(str(path))
        raise UserError(
            f"{path} is not a dataset of groups{where}: its manifest.json cannot be read ({error})"
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(f"dataset {path} has format {found}; this version reads {FORMAT}")
    manifest["sampler"] = with_names_of_today(manifest["sampler"], ("rollout",))
    return manifest


def _write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    replace_json(path / "manifest.json", manifest)
