"""Image rewards on videos: some frames of a video are judged, and its score is their mean."""

from abc import abstractmethod
from collections.abc import Sequence

import torch

from rewards.base import Reward, Rows


def chosen_frames(media: torch.Tensor, count: int | None = None) -> tuple[torch.Tensor, int]:
    """Frames (B * F, 3, H, W) of media (B, 3, H, W) or (B, N, 3, H, W), and F, the number of frames of each item.

    An image is one frame. A video of N frames is divided into F = min(count, N) equal spans, whose middle frames are
    taken; with `count` None all frames are taken.
    """
    if media.ndim == 4:
        return media, 1
    total = media.shape[1]
    chosen = total if count is None else min(count, total)
    return media[:, [(2 * i + 1) * total // (2 * chosen) for i in range(chosen)]].flatten(0, 1), chosen


def mean_of_frames(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Scores (B,) of items from the scores (B * count,) of their frames."""
    return scores.view(-1, count).mean(1)


class FrameReward(Reward):
    """An image reward; the score of a video is the mean over `frames` of its frames, or over all where that is None."""

    frames: int | None = None

    def __call__(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        """Scores (B,) of images (B, 3, H, W) or videos (B, F, 3, H, W)."""
        images, count = chosen_frames(media, self.frames)
        items = [item for item in range(len(prompts)) for _ in range(count)]
        scores = self.of_images(images, [prompts[item] for item in items], [metadata[item] for item in items])
        return mean_of_frames(scores, count)

    @abstractmethod
    def of_images(self, images: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        """Scores (N,) of images (N, 3, H, W), each with its prompt and its metadata row."""
