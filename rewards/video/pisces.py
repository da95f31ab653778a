"""PISCES' prior: a transport plan between a caption's words and a video's patches, laid over a judge's cross-attention.

Source: PISCES (2602.01624, eq. 3) and its code. As in the code, but not the paper, the cost's two distances are brought
to [0, 1], and so is their sum; and the plan has soft marginals: what it calls a mass of 0.9 is an exponent, and the
plan's mass is .74 to .99 (`partial_transport` moves exactly a mass). What differs from the code: the plan is iterated
to its end, not to a change of 1e-3.

Q text tokens, M = 1 + frames x patches video tokens (a class token first), H attention heads.
"""

import math

import torch
from torch.nn import functional as F

from rewards.video.transport import relaxed_transport


def token_places(frames: int, patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The frame (M,) and the place (M, 2), in [0, 1], of each video token; the class token's are -1.

    patches: of a frame, a square number. Raises ValueError for another.
    """
    side = math.isqrt(patches)
    if side**2 != patches or not patches:
        raise ValueError(f"{patches} patches do not fill a square")
    axis = torch.linspace(0, 1, side)
    frame = torch.arange(frames).repeat_interleave(patches)
    place = torch.cartesian_prod(axis, axis).repeat(frames, 1)
    return F.pad(frame, (1, 0), value=-1), F.pad(place, (0, 0, 1, 0), value=-1.0)


def transport_cost(
    words: torch.Tensor,
    video: torch.Tensor,
    attention: torch.Tensor,
    frame: torch.Tensor,
    place: torch.Tensor,
    *,
    temporal: float = 0.2,
    spatial: float = 0.2,
) -> torch.Tensor:
    """The cost (N, M) in [0, 1] between words and video tokens: their meaning, and where the attention expects a word.

    words: (N, D), video: (M, D); attention: (N, M), of one head; frame and place as in `token_places`.
    """
    attention = attention / attention.sum(-1, keepdim=True)
    meaning = 1 - F.normalize(words, dim=-1) @ F.normalize(video, dim=-1).T
    when = frame.to(attention.dtype)
    apart = ((attention @ when)[:, None] - when).abs() / (when.max() - when.min()).clamp(min=1)
    away = (((attention @ place)[:, None] - place) ** 2).sum(-1).sqrt() / math.sqrt(2)
    cost = meaning + temporal * apart + spatial * away
    return (cost - cost.min()) / (cost.max() - cost.min()).clamp(min=1e-6)


@torch.no_grad()
def transport_prior(
    query: torch.Tensor,
    key: torch.Tensor,
    attention: torch.Tensor,
    valid: torch.Tensor,
    *,
    patches: int,
    exponent: float = 0.9,
    epsilon: float = 0.05,
) -> torch.Tensor:
    """For each head and word, how the word's mass is spread over the video, (H, N, M); each row sums to 1.

    query: (Q, D), of the text; key: (H, M, D / H); attention: (H, Q, M); valid: (N,), the places of the words among the
    text tokens.
    """
    frame, place = (part.to(query.device) for part in token_places((key.shape[1] - 1) // patches, patches))
    video = key.transpose(0, 1).flatten(1)
    costs = [transport_cost(query[valid], video, own, frame, place) for own in attention[:, valid]]
    a, b = (query.new_full((size,), 1 / size) for size in costs[0].shape)
    plans = torch.stack([relaxed_transport(a, b, cost, exponent=exponent, epsilon=epsilon) for cost in costs])
    return (plans / plans.sum(-1, keepdim=True)).to(query.dtype)


def fused_attention(attention: torch.Tensor, prior: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Attention (H, Q, M) whose rows `valid` (N,) are multiplied by the prior (H, N, M), and sum to 1 again.

    Gradients flow through the attention alone; neither factor counts as less than 1e-6.
    """
    logarithms = attention[:, valid].clamp(min=1e-6).log() + prior.detach().clamp(min=1e-6).log()
    return attention.index_copy(1, valid, logarithms.softmax(-1))
