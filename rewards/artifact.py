"""How free of artifacts an image is, by a light head on frozen features, trained on images with and without artifacts.

It is the cheap form of ArtifactReward (2601.03468), whose published form (`artifact_vlm`) asks a vision-language model.
Every patch p of a vision transformer gets a logit a_p. The image's logit a is their smooth maximum, so that one bad
spot counts:

    a = (1 / 4) log mean_p exp(4 a_p),        reward = 1 - sigmoid(a)

The probabilities of the patches are a map of where the artifacts are.

An image that is not square is seen whole, in tiles. All patches count the same, so those in overlaps count twice. A
head trained on whole square images may take what a tile's edge cuts, such as half a letter, for an artifact; train it
on images of the shape that it will judge.

The policy's images may move away from those that the head was trained on. `refresh` goes on training the head on the
labelled images and on the policy's images. The latter are unlabelled, and a known share of them is taken to be clean:
the non-negative risk of positive-unlabelled learning (Kiryo et al. 2017, eq. 6).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from rewards.backbones.vit import VisionBackbone
from rewards.backbones.weights import located
from rewards.base import RewardError, Rows, TrainableReward, grouped, reason
from rewards.frames import FrameReward, chosen_frames
from rewards.learning import Head, counted, descend, load_training_state, training_state
from rewards.media import folder_images

SHARPNESS = 4.0  # the factor 4 in the smooth maximum


def image_logits(patch_logits: torch.Tensor) -> torch.Tensor:
    """The image logits (B,): the smooth maximum of the patch logits (B, P)."""
    count = torch.tensor(float(patch_logits.shape[1]), device=patch_logits.device)
    return ((SHARPNESS * patch_logits).logsumexp(1) - count.log()) / SHARPNESS


def head_logits(head: Head, images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Image logits (B,) from each image's patches (P, D), grouped by the images' number of patches."""
    alike = grouped((len(patches), patches) for patches in images).values()
    return torch.cat([image_logits(head(torch.stack(some))) for some in alike])


def labelled_loss(clean: torch.Tensor, artifacts: torch.Tensor) -> torch.Tensor:
    """Cross entropy, a scalar, of the image logits (N,) and (M,); both kinds count the same."""
    return (F.softplus(clean).mean() + F.softplus(-artifacts).mean()) / 2


def unlabelled_loss(clean: torch.Tensor, unlabelled: torch.Tensor, clean_share: float) -> torch.Tensor:
    """Kiryo et al.'s non-negative risk, a scalar, of image logits (N,) and (M,); clean is the positive class."""
    rest = F.softplus(-unlabelled).mean() - clean_share * F.softplus(-clean).mean()
    return clean_share * F.softplus(clean).mean() + F.relu(rest)


def fit(
    head: Head,
    clean: Sequence[torch.Tensor],
    artifacts: Sequence[torch.Tensor],
    *,
    steps: int,
    batch: int = 64,
    learning_rate: float = 1e-3,
) -> list[float]:
    """Trains a head on images without and with artifacts, given as patches (P, D) per image; returns each step's loss.

    The batches depend on the step alone.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    losses = []
    for step in range(steps):
        parts = [_batch(kind, batch, step, place) for place, kind in enumerate((clean, artifacts))]
        loss = labelled_loss(*(head_logits(head, part) for part in parts))
        descend(optimizer, loss)
        schedule.step()
        losses.append(loss.item())
    return losses


def _batch(images: Sequence[torch.Tensor], size: int, *key: int) -> list[torch.Tensor]:
    return [images[place] for place in torch.randperm(len(images), generator=counted(*key))[:size].tolist()]


def image_patches(backbone: VisionBackbone, files: Sequence[Path]) -> list[torch.Tensor]:
    """The patches (P, D) of each image file; the files may have any sizes."""
    return [patches.flatten(0, 1) for _, patches in backbone.tiles_of_files(files)]


def save_head(head: Head, model: str, path: Path) -> None:
    """Writes a head, with the name of the model that gives its features."""
    save_file(head.state_dict(), path, metadata={"model": model})


def load_head(path: str, reward: str = "artifact") -> tuple[Head, str]:
    """A head and the name of its model; RewardError for a file that holds no head."""
    try:
        state = load_file(located(path))
        with safe_open(located(path), "pt") as file:
            model = (file.metadata() or {})["model"]
        head = Head(state["inner.weight"].shape[1], state["inner.weight"].shape[0])
        head.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise RewardError(
            f"reward {reward!r}: head {path} was not written by scripts/train_artifact_reward.py ({reason(error)})"
        ) from error
    return head, model


class Artifact(FrameReward, TrainableReward):
    """P(no artifact) in [0, 1]; see the module.

    head: file written by scripts/train_artifact_reward.py; "toyworld/judges/artifact.safetensors" is the embedded
        world's.
    refresh: training steps from one refresh of the head to the next; 0 never refreshes. Set it where the policy's
        images move away from those that the head was trained on. It needs `clean` and `artifacts`, folders of labelled
        images.
    clean_share: the share of the policy's images that is taken to be clean. updates: head steps in one refresh.
    learning_rate: of the head in a refresh.
    batch_size: images that the model takes at once. frames: frames of a video that are judged, the middles of equal
        spans; the score is their mean. device: where the model runs (default: the accelerator, if there is one).
    """

    range = (0.0, 1.0)

    def __init__(
        self,
        head: str,
        refresh: int = 0,
        clean: str | None = None,
        artifacts: str | None = None,
        clean_share: float = 0.5,
        updates: int = 20,
        learning_rate: float = 1e-4,
        batch_size: int = 64,
        frames: int = 4,
        device: str | None = None,
    ):
        if refresh < 0 or updates < 1 or frames < 1 or not learning_rate > 0 or not 0 < clean_share < 1:
            raise RewardError(
                f"reward {self.name!r}: refresh must be at least 0, updates and frames at least 1, learning_rate above "
                "0 and clean_share between 0 and 1"
            )
        loaded, model = load_head(head, self.name)
        self.backbone = VisionBackbone(model, device, batch_size, self.name)
        if self.backbone.dim != loaded.inner.in_features:
            raise RewardError(
                f"reward {self.name!r}: head {head} takes features of width {loaded.inner.in_features}, but its model "
                f"{model} gives {self.backbone.dim}"
            )
        self.head = loaded.to(self.backbone.device)
        self.frames = frames
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=learning_rate)
        self.every, self.updates, self.clean_share = refresh, updates, clean_share
        self.learns = refresh > 0
        self.known: list[list[torch.Tensor]] = []  # patches (P, D) of each image that is clean, or has artifacts
        if refresh:
            if clean is None or artifacts is None:
                raise RewardError(f"reward {self.name!r}: refresh needs the folders `clean` and `artifacts`")
            kinds = {"clean": clean, "artifacts": artifacts}
            files = [folder_images(folder, self.name, option) for option, folder in kinds.items()]
            self.known = [image_patches(self.backbone, paths) for paths in files]
        elif clean is not None or artifacts is not None:
            raise RewardError(
                f"reward {self.name!r}: `clean` and `artifacts` are for `refresh`; set `refresh` or leave them out"
            )

    @torch.no_grad()
    def of_images(self, images: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        return (-image_logits(self.head(self._patches(images)))).sigmoid()

    def _patches(self, frames: torch.Tensor) -> torch.Tensor:
        """The patches (B, P, D) of all tiles of each image."""
        return self.backbone.tiles(frames)[1].flatten(1, 2)

    @torch.no_grad()
    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """The probability of an artifact (B, H, W) in images (B, 3, H, W), at the resolution of the patches."""
        return self.backbone.maps(self.head(self.backbone.tiles(images)[1]).sigmoid(), *images.shape[-2:])

    def update(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows, step: int) -> dict[str, float]:
        """Every `refresh` steps, trains the head on the images too; metrics: both losses of the last head step."""
        if not self.learns or (step + 1) % self.every:
            return {}
        unlabelled = list(self._patches(chosen_frames(media, self.frames)[0]))
        labelled, free = torch.zeros(()), torch.zeros(())
        for turn in range(self.updates):
            parts = [_batch(kind, 64, step, turn, place) for place, kind in enumerate([*self.known, unlabelled])]
            good, bad, new = (head_logits(self.head, part) for part in parts)
            labelled, free = labelled_loss(good, bad), unlabelled_loss(good, new, self.clean_share)
            descend(self.optimizer, labelled + free)
        return {"labelled_loss": labelled.item(), "unlabelled_loss": free.item()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The head with its optimizer."""
        return training_state(self.head, self.optimizer)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores the state that `state_dict` returned."""
        load_training_state(state, self.head, self.optimizer)
