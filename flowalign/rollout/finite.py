"""Samples that are not finite: an error that names the first prompt."""

from collections.abc import Sequence

import torch

from flowalign.config.base import UserError


class NotFinite(UserError):
    """A model's samples are NaN or infinite; `what` is the sentence without "the model's"."""

    def __init__(self, what: str):
        super().__init__(f"the model's {what}; its weights are not finite, or its precision is too small for it")
        self.what = what


def refuse_not_finite(prompts: Sequence[str], *drawn: torch.Tensor) -> None:
    """Raises NotFinite when latents or media (B, ...) of B prompts hold NaN or infinity."""
    finite = torch.stack([part.flatten(1).isfinite().all(1) for part in drawn]).all(0)
    if finite.all():
        return
    kind = "NaN" if any(part.isnan().any() for part in drawn) else "infinite"
    bad = (~finite).nonzero().flatten().tolist()
    raise NotFinite(f"samples are {kind} ({len(bad)} of {len(finite)}, first for {prompts[bad[0]]!r})")
