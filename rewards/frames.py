"""Images and videos alike as a batch of frames, for rewards that judge one picture at a time."""

import torch


def chosen_frames(media: torch.Tensor, count: int | None = None) -> tuple[torch.Tensor, int]:
    """Frames (B * F, 3, H, W) of media (B, 3, H, W) or (B, N, 3, H, W), and F, how many each item has.

    An image is one frame. Of a video's N frames F = min(count, N) are taken, the middles of as many equal spans; all of
    them if `count` is None.
    """
    if media.ndim == 4:
        return media, 1
    total = media.shape[1]
    chosen = total if count is None else min(count, total)
    return media[:, [(2 * i + 1) * total // (2 * chosen) for i in range(chosen)]].flatten(0, 1), chosen


def mean_of_frames(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Scores (B,) of items from the scores (B * count,) of their frames."""
    return scores.view(-1, count).mean(1)
