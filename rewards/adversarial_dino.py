"""A discriminator on frozen DINO features, trained during the run, scores how much an image looks like the references.

Source: Adv-GRPO, "The Image as Its Own Reward" (2511.20256), and its released code. A head h, shared by the class token
and the patches of a vision transformer, is trained with the hinge loss

    L = l(class) + 0.3 l(patches),    l = 1/2 (mean max(0, 1 - h(reference)) + mean max(0, 1 + h(generated)))

and the reward is 0.7 h(class) + 0.3 mean h(patches). What differs from the code:

- The head sees features of length 1 in training and in scoring; the code normalises them in scoring only.
- All patches are scored, not 64 random ones, so that equal images score the same.
- Every rollout trains the policy. The head takes `updates` steps on the images of this step and of earlier steps; the
  code draws new rollouts for each of nine head steps and trains no policy on them.
- An image that is not square is seen whole, in square tiles. Each tile is an image to learn from, and the image's
  reward is the mean of its tiles.

An untrained head scores 0, so the policy learns nothing before the head has learnt something.
"""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from rewards.backbones.vit import VisionBackbone
from rewards.base import RewardError, Rows, TrainableReward, at_least_one
from rewards.frames import chosen_frames, mean_of_frames
from rewards.learning import Head, counted, descend, load_training_state, training_state
from rewards.media import folder_images

PATCH_WEIGHT = 0.3
SATURATED_LOSS = 0.02  # an untrained head has 1.3; here nearly every image lies beyond its margin
COLLAPSED_SPREAD = 1e-3  # the head is trained to put rewards 2 apart
PATIENCE = 3  # bad training steps in a row before the alarm is set

Features = tuple[torch.Tensor, torch.Tensor]  # class (B, D), patches (B, P, D)


def hinge_loss(real: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """1/2 (mean max(0, 1 - real) + mean max(0, 1 + generated)), a scalar."""
    return (F.relu(1 - real).mean() + F.relu(1 + generated).mean()) / 2


class AdversarialDINO(TrainableReward):
    """The reward 0.7 h(class) + 0.3 mean h(patches), with a head h that learns (see the module).

    references: folder of images that the policy should look like; 200 are enough (the paper's ablation).
    model: timm vision transformer, as `rewards.backbones.vit.load_vit` takes it. hidden: width of the head.
    every: training steps between two trainings of the head. updates: head steps in one training; lower it when the
        alarm says saturated, raise it when it says collapsed. learning_rate: of the head.
    batch: generated images, and as many references, in one head step. buffer: how many of the latest generated images
        the head learns from. patches: random patches of each image that the head learns from. A tile of an image that
        is not square counts as an image in `batch` and `buffer`.
    batch_size: images that the model takes at once. frames: frames of a video that are judged, the middles of equal
        spans; the score is their mean. device: where the model runs (default: the accelerator, if there is one).
    seed: draws the head's first weights and its batches.
    """

    name = "adversarial_dino"

    def __init__(
        self,
        references: str,
        model: str = "vit_base_patch14_dinov2.lvd142m",
        hidden: int = 512,
        updates: int = 9,
        every: int = 1,
        batch: int = 64,
        buffer: int = 1024,
        patches: int = 64,
        learning_rate: float = 1e-4,
        batch_size: int = 64,
        frames: int = 4,
        device: str | None = None,
        seed: int = 0,
    ):
        at_least_one(self.name, hidden=hidden, updates=updates, every=every, batch=batch, buffer=buffer)
        at_least_one(self.name, patches=patches, frames=frames)
        if not learning_rate > 0:
            raise RewardError(f"reward {self.name!r}: learning_rate must be above 0, not {learning_rate}")
        files = folder_images(references, self.name, "references")
        self.backbone = VisionBackbone(model, device, batch_size, self.name)
        self.updates, self.every, self.batch, self.buffer = updates, every, batch, buffer
        self.patches, self.frames, self.seed = patches, frames, seed
        self.head = Head(self.backbone.dim, hidden, seed).to(self.backbone.device)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=learning_rate, betas=(0.5, 0.999))
        own, parts = zip(*self.backbone.tiles_of_files(files), strict=True)
        self.real = self._some_patches((torch.cat(own), torch.cat(parts)), 0)
        self.generated: Features | None = None
        self.taken = 0  # head steps so far
        self.bad = 0  # saturated or collapsed training steps in a row

    @torch.no_grad()
    def __call__(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        """Rewards (B,): logits without bounds."""
        frames, count = chosen_frames(media, self.frames)
        features, tiles = self._tiles(frames)
        return mean_of_frames(self._reward(features), count * tiles)

    def _tiles(self, frames: torch.Tensor) -> tuple[Features, int]:
        """The features of all tiles of all frames, and the number of tiles of one frame."""
        own, patches = self.backbone.tiles(frames)
        return (own.flatten(0, 1), patches.flatten(0, 1)), own.shape[1]

    def _reward(self, features: Features) -> torch.Tensor:
        own, patches = features
        return (1 - PATCH_WEIGHT) * self.head(own) + PATCH_WEIGHT * self.head(patches).mean(1)

    def update(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows, step: int) -> dict[str, float]:
        """Adds the images to the buffer and, every `every` steps, trains the head; returns the last batch's metrics."""
        frames, _ = chosen_frames(media, self.frames)
        new = self._some_patches(self._tiles(frames)[0], 1, step)
        old = self.generated
        self.generated = new if old is None else (torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]]))
        self.generated = (self.generated[0][-self.buffer :], self.generated[1][-self.buffer :])
        if step % self.every:
            return {}
        loss = torch.zeros(())
        for _ in range(self.updates):
            real, generated = self._drawn(self.real, 2), self._drawn(self.generated, 3)
            loss = hinge_loss(self.head(real[0]), self.head(generated[0])) + PATCH_WEIGHT * hinge_loss(
                self.head(real[1]), self.head(generated[1])
            )
            descend(self.optimizer, loss)
            self.taken += 1
        with torch.no_grad():
            rewards, wanted = self._reward(new), self._reward(self.real)
        metrics = {
            "loss": loss.item(),
            "generated": rewards.mean().item(),
            "reference": wanted.mean().item(),
            "accuracy": ((wanted > 0).float().mean() + (rewards < 0).float().mean()).item() / 2,
        }
        self._watch(metrics["loss"], rewards)
        return metrics

    def _watch(self, loss: float, rewards: torch.Tensor) -> None:
        spread = rewards.std().item() if len(rewards) > 1 else float("inf")
        saturated, collapsed = loss < SATURATED_LOSS, spread < COLLAPSED_SPREAD
        self.bad = self.bad + 1 if saturated or collapsed else 0
        self.alarm = None
        if self.bad >= PATIENCE:
            self.alarm = (
                f"saturated: it tells generated images from references with a loss of {loss:.2g}, so it learns no more "
                "and its score is no measure of likeness; use fewer updates or a smaller learning_rate"
                if saturated
                else f"collapsed: its rewards of a step's images differ by {spread:.2g} only, which teaches the policy "
                "nothing; use more updates or more references"
            )

    def _some_patches(self, features: Features, *key: int) -> Features:
        """The features with `patches` of each image's patches, drawn with a counted seed."""
        own, patches = features
        order = torch.rand(patches.shape[:2], generator=counted(self.seed, *key)).argsort(1)[:, : self.patches]
        chosen = order.to(patches.device)[..., None].expand(-1, -1, patches.shape[-1])
        return own, patches.gather(1, chosen)

    def _drawn(self, features: Features, kind: int) -> Features:
        order = torch.randperm(len(features[0]), generator=counted(self.seed, kind, self.taken))[: self.batch]
        rows = order.to(features[0].device)
        return features[0][rows], features[1][rows]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The head with its optimizer, the buffer and the counters."""
        state = training_state(self.head, self.optimizer)
        if self.generated is not None:
            state |= {"buffer.class": self.generated[0], "buffer.patches": self.generated[1]}
        return {**state, "counters": torch.tensor([self.taken, self.bad])}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores the state that `state_dict` returned."""
        load_training_state(state, self.head, self.optimizer)
        self.generated = None
        if "buffer.class" in state:
            device = self.backbone.device
            self.generated = (state["buffer.class"].to(device), state["buffer.patches"].to(device))
        self.taken, self.bad = (int(value) for value in state["counters"])
