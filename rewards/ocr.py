"""OCR: how much of the text that the prompt quotes can be read in the picture.

Source: Flow-GRPO (Liu et al., 2025), `ocr.py`. What differs: a failed engine is an error and not a score of 0; the
engine is RapidOCR, whose models lie inside its wheel; a video's score is the mean over all frames that are read, also
those that score 0; full-width forms count as their ASCII twins, since the engine's dictionary holds both.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rapidfuzz.distance import Levenshtein

from rewards.base import Golden, Reward, RewardError, at_least_one
from rewards.frames import chosen_frames, mean_of_frames

TO_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


def quoted_text(prompt: str) -> str | None:
    """The text in the prompt's first pair of straight double quotes; None if there is none or it is blank."""
    found = re.search(r'"([^"]*)"', prompt)
    return found[1] if found and found[1].strip(" ") else None


def _wanted(prompt: str) -> str:
    text = quoted_text(prompt)
    if text is None:
        raise RewardError(f"reward 'ocr': no text stands in straight double quotes in the prompt {prompt!r}")
    return _plain(text)


def text_score(prompt: str, recognised_lines: Sequence[str], *, strict: bool = False) -> float:
    """The share in [0, 1] of the quoted text that was read: 1 - edit distance / length, at least 0.

    The lines are joined in their order; spaces and case do not count. Unless `strict`, text that holds the wanted text
    scores 1 whatever stands around it, as published. RewardError for a prompt that quotes no text.
    """
    wanted, found = _wanted(prompt), _plain("".join(recognised_lines))
    if wanted in found and not strict:
        return 1.0
    return 1 - min(Levenshtein.distance(found, wanted), len(wanted)) / len(wanted)


def _plain(text: str) -> str:
    return text.translate(TO_ASCII).replace(" ", "").lower()


class OCR(Reward):
    """`text_score` of what RapidOCR reads in each image, or the mean of it over a video's frames.

    mode: "page" finds the text first and reads photographs, about 0.3 s each on two cores. "lines" only reads:
        fast, for small pictures that hold nothing but lines of text on a plain background, like the embedded world's.
    strict: text around the wanted text lowers the score.
    batch_size: how many lines of text the recogniser reads at once.
    threads: cores that the engine uses, all of them if None.
    frames: how many of a video's frames are read, the middles of as many equal spans.
    """

    name = "ocr"
    range = (0.0, 1.0)
    prompt_sensitive = True

    def __init__(
        self,
        mode: str = "page",
        strict: bool = False,
        batch_size: int = 16,
        threads: int | None = None,
        frames: int = 4,
    ):
        at_least_one(self.name, batch_size=batch_size, threads=threads, frames=frames)
        from rewards.ocr_engine import READERS  # here, so that text_score needs no engine

        if mode not in READERS:
            raise RewardError(f"reward 'ocr': mode must be one of {', '.join(READERS)}, not {mode!r}")
        self.reader = READERS[mode](batch_size, threads)
        self.strict = strict
        self.frames = frames

    def golden(self) -> Golden:
        """A drawn word, and a blank picture."""
        picture = Image.new("RGB", (256, 96), "white")
        blank = np.array(picture)
        ImageDraw.Draw(picture).text((128, 48), "STONE", "black", ImageFont.load_default(48), anchor="mm")
        media = torch.from_numpy(np.stack([np.array(picture), blank])).permute(0, 3, 1, 2) / 255
        return Golden(media, ['the word "STONE"'] * 2, [{}, {}], [1.0, 0.0])

    def applies_to(self, row: Mapping[str, Any]) -> bool:
        """True for prompts that quote a text."""
        return quoted_text(row["prompt"]) is not None

    def read(self, images: torch.Tensor) -> list[list[str]]:
        """The lines of text in each of images (B, 3, H, W) in [0, 1], from top to bottom; [] where there is none.

        RewardError, naming the image, when the engine fails.
        """
        if images.ndim != 4:
            raise RewardError(f"reward 'ocr': `read` takes images (B, 3, H, W), not shape {tuple(images.shape)}")
        levels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
        # The engine's models were trained on blue, green, red.
        return self.reader(levels.flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def __call__(
        self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        """Scores (B,) in [0, 1]; RewardError for a prompt that quotes no text, before anything is read."""
        for prompt in prompts:
            _wanted(prompt)
        frames, count = chosen_frames(media, self.frames)
        lines = self.read(frames)
        scores = [text_score(prompts[i // count], found, strict=self.strict) for i, found in enumerate(lines)]
        return mean_of_frames(torch.tensor(scores), count)
