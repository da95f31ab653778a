"""VBench's scores of one video that need no network beside the features or flows they are given.

Source: Huang et al., "VBench" (2023, arXiv 2311.17982) and its code. What differs from the code:

- A video with too few frames is a ValueError; there it is a division by zero or NaN for a whole set of videos.
- Interpolated frames are rounded to 8 bits, not truncated.
- A flow field is cut to the video's size before its largest motions are taken; there the padding counts too.
- A video of two frames is dynamic if its one pair moves; there it always is.

Of the scores here flickering, smoothness and consistency are highest for a still video, so a reward that uses one needs
a term for motion.
"""

from itertools import pairwise

import torch
from torch.nn import functional as F


def consistency(features: torch.Tensor) -> torch.Tensor:
    """How alike the frames of a video are, (T - 1,) in [0, 1], one number for each frame after the first.

    features: (T, D), of the frames; of DINO for VBench's subject consistency, of CLIP for that of the background. A
    number is the mean cosine to the frame before and to the first one, where a negative cosine counts as 0. The score
    of a set of videos is the mean over the frames of all of them.
    """
    _check_count("consistency", len(features), 2)
    unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    before = (unit[1:] * unit[:-1]).sum(-1)
    first = unit[1:] @ unit[0]
    return (before.clamp(min=0) + first.clamp(min=0)) / 2


def flickering(frames: torch.Tensor) -> float:
    """1 - the mean change of a pixel from a frame to the next, in [0, 1]; frames: (T, H, W, 3) uint8."""
    _check_count("flickering", len(frames), 2)
    changes = [_change(*pair) for pair in pairwise(frames)]
    return 1 - sum(changes) / len(changes)


def smoothness(frames: torch.Tensor, interpolated: torch.Tensor) -> float:
    """1 - the mean distance of every second frame from what an interpolation of its neighbours gives, in [0, 1].

    frames: (T, H, W, 3) uint8; interpolated: one frame between the frames 0 and 2, one between 2 and 4, ..., as uint8
    or as floats in [0, 1]. The last frame of an even number of frames is not scored.
    """
    _check_count("smoothness", len(frames), 3)
    wanted = (len(frames) - 1) // 2
    if len(interpolated) != wanted:
        raise ValueError(f"{len(frames)} frames need {wanted} interpolated frames, not {len(interpolated)}")
    if interpolated.is_floating_point():
        interpolated = (interpolated * 255).round().clamp(0, 255).to(torch.uint8)
    changes = [_change(frame, guess) for frame, guess in zip(frames[1::2], interpolated, strict=False)]
    return 1 - sum(changes) / len(changes)


def kept_frames(frames: int, fps: float) -> range:
    """The frames of a video between which motion is measured: about 8 for each second."""
    return range(0, frames, max(1, round(fps / 8)))


def largest_motion(flows: torch.Tensor, share: float, *, height: int, width: int) -> torch.Tensor:
    """The mean length, in pixels, of the largest `share` of a flow field's vectors, (P,) for flows (P, 2, H, W).

    A field that is larger than height x width was padded on all sides alike, as for RAFT; the padding is cut off.
    """
    top, left = ((padded - size) // 2 for padded, size in zip(flows.shape[-2:], (height, width), strict=True))
    lengths = flows[..., top : top + height, left : left + width].float().norm(dim=1).flatten(1)
    return lengths.topk(max(1, int(height * width * share))).values.mean(1)


def is_dynamic(flows: torch.Tensor, *, fps: float, frames: int, height: int, width: int) -> bool:
    """Whether a video moves: a quarter of the pairs of kept frames have a large motion.

    flows: (P, 2, H, W) in pixels, between each two of the `kept_frames` of a video of so many frames. Large is a mean
    above 6 / 256 of the shorter side for the largest 5 % of the vectors. A single kept frame does not move.
    """
    _check_count("is_dynamic", frames, 1)
    kept = len(kept_frames(frames, fps))
    if len(flows) != kept - 1:
        raise ValueError(f"{kept} of {frames} frames at {fps:g} fps are kept, with {kept - 1} flows, not {len(flows)}")
    moves = largest_motion(flows, 0.05, height=height, width=width) > 6 * min(height, width) / 256
    return int(moves.sum()) >= max(1, round(4 * kept / 16))


def is_static(flows: torch.Tensor, *, height: int, width: int) -> bool:
    """Whether a video stands still, as the videos must of which VBench reports the flickering.

    flows: (T + 1, 2, H, W) in pixels: from each of T frames to the next, from the first to the last, from the last to
    the first. The first T - 1 may have a large motion, above 3 / 256 of the shorter side for the largest 2 % of the
    vectors, in an eighth of the pairs; the last two may have one as large as that share of pairs allows.
    """
    frames = len(flows) - 1
    _check_count("is_static", frames, 2)
    motion = largest_motion(flows, 0.02, height=height, width=width)
    limit, allowed = 3 * min(height, width) / 256, round(2 * frames / 16)
    within = int((motion[:-2] > limit).sum()) <= allowed
    return within and not bool((motion[-2:] > 2 * limit * max(1, allowed)).any())


def aesthetic_scores(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """LAION's linear aesthetic rating / 10 of each frame, (T,), of CLIP features (T, D); weight (1, D), bias (1,)."""
    return F.linear(F.normalize(features, dim=-1), weight, bias)[:, 0] / 10


def gray(frames: torch.Tensor) -> torch.Tensor:
    """Frames (..., 3) uint8 without their colours, as the judge of motion quality sees them; levels are rounded."""
    levels = frames.double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device=frames.device)
    return levels.round().to(torch.uint8)[..., None].expand_as(frames)


def mean_of_best(scores: torch.Tensor, share: float = 0.3) -> torch.Tensor:
    """The mean of the best `share` of each video's frames, of one at least, (B,) for scores (B, F); as in GenRL."""
    return scores.topk(max(1, int(scores.shape[1] * share)), dim=1).values.mean(1)


def _change(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean difference of two uint8 frames, in [0, 1]; ValueError for another type."""
    if one.dtype != torch.uint8 or other.dtype != torch.uint8:
        raise ValueError(f"frames must be uint8 levels, not {one.dtype} and {other.dtype}")
    return ((one.short() - other.short()).abs().double().mean() / 255).item()


def _check_count(name: str, frames: int, needed: int) -> None:
    if frames < needed:
        raise ValueError(f"{name} needs {needed} frames or more, and the video has {frames}")
