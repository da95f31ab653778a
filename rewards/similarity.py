"""Similarity: how similar an image is to its prompt's reference images, as the cosine of their features.

Source: Adv-GRPO (2511.20256) uses it beside rule rewards, on CLIP or DINOv2. What differs from its code: a score is the
mean over the prompt's references, not the largest; the features of each reference file are computed once.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rewards.backbones.features import unit_features
from rewards.base import Reward, RewardError, Rows, at_least_one, reason, shown
from rewards.frames import chosen_frames, mean_of_frames
from rewards.media import read_image


class Similarity(Reward):
    """Mean cosine similarity in (-1, 1) to the references of the item's prompt.

    references: a folder, whose files an item's metadata names under "reference" (one path or a list of paths); or a
        .jsonl file of rows {"prompt": ..., "reference": ...}, with paths relative to that file.
    backbone: "timm" or "clip". model: for "timm" a timm vision transformer, whose class token is compared; for "clip" a
        CLIP model, as the reward `clipscore` takes it.
    batch_size: images that the model takes at once. frames: frames of a video that are judged, the middles of equal
        spans; the score is their mean. device: where the model runs (default: the accelerator, if there is one).
    """

    range = (-1.0, 1.0)
    prompt_sensitive = True

    def __init__(
        self,
        references: str,
        model: str = "vit_base_patch14_dinov2.lvd142m",
        backbone: str = "timm",
        batch_size: int = 64,
        frames: int = 4,
        device: str | None = None,
    ):
        at_least_one(self.name, frames=frames)
        place = Path(references).expanduser()
        if not place.exists():
            raise RewardError(f"reward 'similarity': there is no folder or .jsonl file {references}")
        self.folder = place if place.is_dir() else place.parent
        self.by_prompt = None if place.is_dir() else _read_rows(place)
        self.frames = frames
        self.known: dict[str, torch.Tensor] = {}
        self.features = unit_features(model, backbone, batch_size, device, self.name)
        for names in (self.by_prompt or {}).values():
            for name in names:
                self._reference(name)

    def applies_to(self, row: Mapping[str, Any]) -> bool:
        """True for items that have a reference."""
        return bool(self._names(row["prompt"], row))

    def _names(self, prompt: str, row: Mapping[str, Any]) -> list[str]:
        if self.by_prompt is not None:
            return self.by_prompt.get(prompt, [])
        found = row.get("reference", [])
        return [found] if isinstance(found, str) else list(found)

    def _reference(self, name: str) -> torch.Tensor:
        """The features (D,), of length 1, of one reference file."""
        if name not in self.known:
            self.known[name] = self.features(read_image(self.folder / name)[None])[0]
        return self.known[name]

    def __call__(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        """Scores (B,); RewardError for an item without a reference, and for a reference that cannot be read."""
        means = []
        for index, (prompt, row) in enumerate(zip(prompts, metadata, strict=True)):
            names = self._names(prompt, row)
            if not names:
                raise RewardError(f"reward 'similarity': {shown(index, prompts)} has no reference")
            means.append(torch.stack([self._reference(name) for name in names]).mean(0))
        frames, count = chosen_frames(media, self.frames)
        # The mean of the cosines equals the product with the mean of the unit features.
        scores = (self.features(frames) * torch.stack(means).repeat_interleave(count, 0)).sum(-1)
        return mean_of_frames(scores.clamp(-1, 1), count)


def _read_rows(file: Path) -> dict[str, list[str]]:
    """The references of each prompt in a .jsonl file; a prompt may have several rows."""
    found: dict[str, list[str]] = {}
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"reward 'similarity': references {file} cannot be read: {reason(error)}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, reference = row["prompt"], row["reference"]
        except (ValueError, KeyError, TypeError) as error:
            wanted = '{"prompt": ..., "reference": ...}'
            raise RewardError(f"reward 'similarity': {file} line {number} is not {wanted}: {reason(error)}") from error
        found.setdefault(prompt, []).extend([reference] if isinstance(reference, str) else reference)
    return found
