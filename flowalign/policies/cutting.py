"""Prompts that a text encoder cuts: what lies behind its last token is not drawn, and no reward would say why."""

from collections.abc import Iterable

from flowalign.policies.base import Policy

_SHOWN = 100  # letters of the longest prompt


def cut_prompts(policy: Policy, prompts: Iterable[str], what: str = "prompts") -> list[str]:
    """A sentence for each of the policy's text encoders that cuts some of the prompts, beginning with `what` they are.

    None where all are read whole. Prompts count once, and tokens as the encoder counts them, with begin and end.
    """
    texts, sentences = list(dict.fromkeys(prompts)), []
    limits = policy.text_limits() if texts else {}
    longest = max((limit for _, limit in limits.values()), default=0)
    for kind, (tokenizer, limit) in limits.items():
        lengths = [len(tokens) for tokens in tokenizer(texts, verbose=False).input_ids]
        count, most = sum(length > limit for length in lengths), max(lengths)
        if not count:
            continue
        text = texts[lengths.index(most)]
        shown = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
        others = [f"{other} reads up to {size}" for other, (_, size) in limits.items() if limit < size == longest]
        sentences.append(
            f"{what}: {kind} reads {limit} tokens and cuts {count} of {len(texts)}, the longest of {most} tokens"
            f"{''.join(f' ({other})' for other in others)}: {shown!r}"
        )
    return sentences
