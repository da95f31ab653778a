"""Heads of video judges: from the hidden states of a vision-language model to rewards.

The parameters have the names of the published code (SoliReward's InternVL3RewardModel, HPSv3's rm_head), so that its
weights load as they are. hidden: (B, T, D); mask: (B, T), true or 1 for a token, 0 for padding on either side.
"""

from collections.abc import Sequence

import torch
from torch import nn

# VideoAlign's rewards (2501.13918): mean and standard deviation over its training videos, from the checkpoint's file.
VIDEOALIGN = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}


def at_tokens(hidden: torch.Tensor, ids: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """The hidden states (B, N, D) at N special tokens, each found by its id, in whatever order they stand.

    ids: (B, T). Raises ValueError unless each of the tokens stands once in each row. (VideoAlign's code takes special
    tokens in the order in which they appear, whichever they are.)
    """
    found = ids[:, None] == torch.tensor(tokens, device=ids.device)[:, None]
    counts = found.sum(-1)
    if bool((counts != 1).any()):
        row, place = (int(number) for number in (counts != 1).nonzero()[0])
        raise ValueError(
            f"token {tokens[place]} must stand once in row {row}, and stands {int(counts[row, place])} times"
        )
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], found.int().argmax(-1)]


def last_token(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The hidden state (B, D) of the last token that is no padding."""
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), places, -1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def mean_of_tokens(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean hidden state (B, D) of all tokens; VideoAlign's and HPSv3's code leaves out the last one."""
    counted = mask.bool()[..., None]
    return torch.where(counted, hidden, 0.0).sum(1) / counted.sum(1)


def videoalign_rewards(
    hidden: torch.Tensor, ids: torch.Tensor, head: torch.Tensor, tokens: Sequence[int]
) -> torch.Tensor:
    """VideoAlign's raw rewards VQ, MQ and TA, (B, 3): row k of the head (3, D) reads the k-th of their three tokens."""
    return torch.einsum("bnd,nd->bn", at_tokens(hidden, ids, tokens), head)


def videoalign_scores(rewards: torch.Tensor) -> torch.Tensor:
    """The rewards (..., 3) in standard deviations from their means; VideoAlign's overall score is their sum."""
    mean, std = rewards.new_tensor(list(VIDEOALIGN.values())).T
    return (rewards - mean) / std


class LearnedQuery(nn.Module):
    """A learned query that attends to tokens: the first step of SoliReward's heads."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.query = nn.Embedding(1, width)
        self.attention = nn.ModuleList([nn.MultiheadAttention(width, heads, batch_first=True)])

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query = self.query.weight.expand(len(hidden), 1, -1)
        return attended(self.attention[0], query, hidden, mask)


def attended(layer: nn.Module, query: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What queries (B, 1, D) read from the tokens, (B, 1, D)."""
    found: torch.Tensor = layer(query, hidden, hidden, key_padding_mask=~mask.bool(), need_weights=False)[0]
    return found


def scoring_head(width: int, dropout: float = 0.0) -> nn.Sequential:
    """SoliReward's last layers, from (..., D) to (..., 1)."""
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, 1, bias=False))


class AttentionHead(nn.Module):
    """SoliReward's simpler head: a learned query reads the last layer; rewards (B,)."""

    def __init__(self, width: int, *, heads: int = 8, dropout: float = 0.0):
        super().__init__()
        self.attention_query = LearnedQuery(width, heads)
        self.reward_head = scoring_head(width, dropout)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.reward_head(self.attention_query(hidden, mask))
        return scores.flatten()


class HPQAHead(nn.Module):
    """SoliReward's hierarchical progressive query attention (2512.22170).

    A query reads the first of several layers, what it found reads the next, and so on to the last of them; a second
    query reads the model's last layer alone, and the sum of the two is scored.

    width: D, a multiple of `heads`. layers: how many layers the first query walks through.
    """

    def __init__(self, width: int, layers: int, *, heads: int = 8, dropout: float = 0.0):
        super().__init__()
        self.attention_query_first_layer = LearnedQuery(width, heads)
        self.attention_query_other_layers = nn.ModuleList(
            nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(layers - 1)
        )
        self.attention_query_final_layer = LearnedQuery(width, heads)
        self.reward_head = scoring_head(width, dropout)

    def forward(self, layers: Sequence[torch.Tensor], last: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Rewards (B,) of hidden states: those of the chosen layers from below, and of the last one, each (B, T, D)."""
        query = self.attention_query_first_layer(layers[0], mask)
        for layer, hidden in zip(self.attention_query_other_layers, layers[1:], strict=True):
            query = attended(layer, query, hidden, mask)
        scores: torch.Tensor = self.reward_head(query + self.attention_query_final_layer(last, mask))
        return scores.flatten()


class HPSv3Head(nn.Module):
    """HPSv3's head (2508.03789): the mean of a reward and the logarithm of its standard deviation, (B, 2)."""

    def __init__(self, width: int):
        super().__init__()
        self.rm_head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, token: int) -> torch.Tensor:
        """Reads the hidden states (B, T, D) at the reward token of each row of ids (B, T)."""
        outputs: torch.Tensor = self.rm_head(at_tokens(hidden, ids, [token])[:, 0])
        return outputs
