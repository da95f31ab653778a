"""OCR: how much of the text that the prompt quotes can be read in the image.

Source: Flow-GRPO (Liu et al., 2025), `ocr.py`. What differs: a failed engine is an error and not a score of 0; the
engine is RapidOCR, whose wheel contains its models; a video's score is the mean over all frames that are read, also
those that score 0. A prompt that quotes several texts asks for all of them, while the published score counts the first
text only. `rewards.detectors.quotes` finds the quotes, and spellings that look alike are equal: full-width forms, curly
apostrophes, ligatures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rapidfuzz.distance import Levenshtein
from rapidfuzz.fuzz import partial_ratio_alignment

from rewards.base import Golden, RewardError, Rows, at_least_one
from rewards.detectors.quotes import plain, quoted_texts, unwrapped
from rewards.frames import FrameReward
from rewards.media import as_levels


def quoted_text(prompt: str) -> str | None:
    """All texts that the prompt quotes, joined by spaces; None if there are none."""
    return " ".join(quoted_texts(prompt)) or None


def _wanted(prompt: str) -> list[str]:
    """The plain texts that an image of the prompt must show; a prompt that is one quotation asks for its content."""
    texts = quoted_texts(prompt) or (unwrapped(prompt) or "",)
    if not plain(texts[0]):
        raise RewardError(f"reward 'ocr': the prompt {prompt!r} has no text in quotes")
    return [plain(text) for text in texts]


def text_score(prompt: str, recognised_lines: Sequence[str], *, strict: bool = False) -> float:
    """The share in [0, 1] of the quoted text that was read: 1 - edit distance / length, at least 0.

    The lines are joined in their order; spaces and case do not count. Without `strict`, a reading that contains the
    wanted text scores 1 whatever surrounds it, as published. Several quoted texts may stand in any order: those that
    were read whole are taken out, the longest first, and the others are compared with the rest. Raises RewardError for
    a prompt that quotes no text.
    """
    wanted, found = _wanted(prompt), plain("".join(recognised_lines))
    length = sum(map(len, wanted))
    missing = []
    for text in sorted(wanted, key=len, reverse=True):
        before, hit, after = found.partition(text)
        if hit:
            found = before + after
        else:
            missing.append(text)
    if len(missing) > 1:  # in the order in which they seem to stand in what was read
        missing.sort(key=lambda text: _place(text, found))
    left = "".join(missing)
    return 1 - min(Levenshtein.distance(found, left), length if strict else len(left)) / length


def _place(text: str, found: str) -> int:
    """The place in `found` where `text` fits best."""
    alignment = partial_ratio_alignment(text, found)
    return alignment.dest_start if alignment else 0


class OCR(FrameReward):
    """`text_score` of what RapidOCR reads in each image; a video's score is the mean over its frames.

    mode: "page" detects text before reading it and can read photographs, in about 0.3 s each on two cores. "lines"
        only reads, and is fast: it is for small images that show nothing but lines of upright text on a plain
        background, as the embedded world's do. On photographs it reads rubbish, and warns once.
    strict: True lowers the score for text around the wanted text.
    batch_size: lines of text that the recogniser reads at once.
    threads: cores that the engine uses; None uses all.
    frames: frames of a video that are read, the middles of equal spans.
    recogniser: replaces RapidOCR's own recogniser, which knows Latin, Chinese and Japanese letters. It is a language
        (see `ocr_engine.languages`, such as "cyrillic" or "korean"), whose model RapidOCR downloads, or the .onnx file
        of a PP-OCR recogniser. keys: file of the recogniser's characters, one a line, in place of those in the model.

    A text with letters that the recogniser does not know is an error: its score would be low whatever the image shows.
    """

    range = (0.0, 1.0)
    prompt_sensitive = True

    def __init__(
        self,
        mode: str = "page",
        strict: bool = False,
        batch_size: int = 16,
        threads: int | None = None,
        frames: int = 4,
        recogniser: str | None = None,
        keys: str | None = None,
    ):
        at_least_one(self.name, batch_size=batch_size, threads=threads, frames=frames)
        from rewards.detectors.ocr_engine import READERS, Settings, alphabet  # here, so that text_score needs no engine

        if mode not in READERS:
            raise RewardError(f"reward 'ocr': mode must be one of {', '.join(READERS)}, not {mode!r}")
        self.reader = READERS[mode](Settings(batch_size, threads, recogniser, keys))
        self.alphabet = alphabet(self.reader.recogniser)
        self.strict = strict
        self.frames = frames

    def golden(self) -> Golden:
        """An image of a word, and a blank image."""
        image = Image.new("RGB", (256, 96), "white")
        blank = np.array(image)
        ImageDraw.Draw(image).text((128, 48), "STONE", "black", ImageFont.load_default(48), anchor="mm")
        media = torch.from_numpy(np.stack([np.array(image), blank])).permute(0, 3, 1, 2) / 255
        return Golden(media, ['the word "STONE"'] * 2, [{}, {}], [1.0, 0.0])

    def applies_to(self, row: Mapping[str, Any]) -> bool:
        """True for prompts that quote a text; RewardError if the recogniser does not know a letter of the text."""
        if not quoted_texts(row["prompt"]):
            return False
        self._check(row["prompt"])
        return True

    def _check(self, prompt: str) -> None:
        unknown = dict.fromkeys(letter for text in _wanted(prompt) for letter in text if letter not in self.alphabet)
        if unknown:
            raise RewardError(
                f"reward 'ocr': the recogniser does not know {' '.join(unknown)} and cannot read the text of the "
                f"prompt {prompt!r}; leave the prompt out, or set the option recogniser to a language or model that "
                "knows all its letters"
            )

    def read(self, images: torch.Tensor) -> list[list[str]]:
        """The lines of text in each image of (B, 3, H, W) in [0, 1], from top to bottom; [] where there are none.

        Raises RewardError that names the image when the engine fails.
        """
        if images.ndim != 4:
            raise RewardError(f"reward 'ocr': `read` takes images (B, 3, H, W), not shape {tuple(images.shape)}")
        levels = as_levels(images)
        # The engine's models take the channels as blue, green, red.
        return self.reader(levels.flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def of_images(self, images: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        """Scores (N,) in [0, 1]; RewardError, before any image is read, for a prompt whose text cannot be read."""
        for prompt in dict.fromkeys(prompts):
            self._check(prompt)
        pairs = zip(prompts, self.read(images), strict=True)
        return torch.tensor([text_score(prompt, found, strict=self.strict) for prompt, found in pairs])
