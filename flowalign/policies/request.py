"""What is asked of a model: the rows that it is to draw, and what media."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Row:
    """A prompt and what rewards and models need to know of it; `index`, its place in the list, counts its noise."""

    index: int
    prompt: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def about(self) -> dict[str, Any]:
        """The metadata with the prompt itself, as rewards and manifests have them."""
        return {**self.metadata, "prompt": self.prompt}


@dataclass(frozen=True)
class MediaRequest:
    """What media are made: images of height x width pixels, or so many frames of them at `fps` a second."""

    height: int
    width: int
    frames: int | None = None  # None: images
    fps: float | None = None


class Sizes(NamedTuple):
    """What a model's settings come to, with the model's own values where they say none."""

    request: MediaRequest
    max_sequence_length: int  # tokens of the T5 encoder
