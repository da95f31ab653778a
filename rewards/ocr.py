"""OCR: how much of the text that the prompt quotes can be read in the picture.

Source: Flow-GRPO (Liu et al., 2025), `ocr.py`. What differs: a failed engine is an error and not a score of 0; the
engine is RapidOCR, whose models lie inside its wheel; a video's score is the mean over all frames that are read, also
those that score 0. A prompt that quotes several texts wants all of them, where the published score is the first one's;
quotes are those of `rewards.detectors.quotes`, and what reads alike is alike: full-width forms, curly apostrophes,
ligatures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rapidfuzz.distance import Levenshtein
from rapidfuzz.fuzz import partial_ratio_alignment

from rewards.base import Golden, RewardError, at_least_one
from rewards.detectors.quotes import plain, quoted_texts, unwrapped
from rewards.frames import FrameReward
from rewards.media import as_levels


def quoted_text(prompt: str) -> str | None:
    """All texts that the prompt quotes, a space between them; None if there are none."""
    return " ".join(quoted_texts(prompt)) or None


def _wanted(prompt: str) -> list[str]:
    """The plain texts that a picture of the prompt must show; a prompt that is one quotation wants that."""
    texts = quoted_texts(prompt) or (unwrapped(prompt) or "",)
    if not plain(texts[0]):
        raise RewardError(f"reward 'ocr': no text stands in quotes in the prompt {prompt!r}")
    return [plain(text) for text in texts]


def text_score(prompt: str, recognised_lines: Sequence[str], *, strict: bool = False) -> float:
    """The share in [0, 1] of the quoted text that was read: 1 - edit distance / length, at least 0.

    The lines are joined in their order; spaces and case do not count. Unless `strict`, text that holds the wanted text
    scores 1 whatever stands around it, as published. Of several quoted texts, in any order, those that were read whole
    are taken out, the longest first, and the others are compared with what is left. RewardError for a prompt that
    quotes no text.
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
    if len(missing) > 1:  # in the order in which they seem to stand
        missing.sort(key=lambda text: _place(text, found))
    left = "".join(missing)
    return 1 - min(Levenshtein.distance(found, left), length if strict else len(left)) / length


def _place(text: str, found: str) -> int:
    """Where in what was found a text fits best."""
    alignment = partial_ratio_alignment(text, found)
    return alignment.dest_start if alignment else 0


class OCR(FrameReward):
    """`text_score` of what RapidOCR reads in each image, or the mean of it over a video's frames.

    mode: "page" finds the text first and reads photographs, about 0.3 s each on two cores. "lines" only reads:
        fast, for small pictures that hold nothing but lines of upright text on a plain background, like the embedded
        world's. In photographs it reads rubbish, and says so once.
    strict: text around the wanted text lowers the score.
    batch_size: how many lines of text the recogniser reads at once.
    threads: cores that the engine uses, all of them if None.
    frames: how many of a video's frames are read, the middles of as many equal spans.
    recogniser: another one than RapidOCR's own, which knows Latin, Chinese and Japanese letters: a language
        (see `ocr_engine.languages`, such as "cyrillic" or "korean"), whose model RapidOCR downloads, or the .onnx
        file of a PP-OCR recogniser. keys: the file of its characters, one a line, in place of those in the model.

    A text with letters that the recogniser does not know is an error: its score would be low whatever is drawn.
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
        """A drawn word, and a blank picture."""
        picture = Image.new("RGB", (256, 96), "white")
        blank = np.array(picture)
        ImageDraw.Draw(picture).text((128, 48), "STONE", "black", ImageFont.load_default(48), anchor="mm")
        media = torch.from_numpy(np.stack([np.array(picture), blank])).permute(0, 3, 1, 2) / 255
        return Golden(media, ['the word "STONE"'] * 2, [{}, {}], [1.0, 0.0])

    def applies_to(self, row: Mapping[str, Any]) -> bool:
        """True for prompts that quote a text; RewardError where the text holds letters that cannot be read."""
        if not quoted_texts(row["prompt"]):
            return False
        self._check(row["prompt"])
        return True

    def _check(self, prompt: str) -> None:
        unknown = dict.fromkeys(letter for text in _wanted(prompt) for letter in text if letter not in self.alphabet)
        if unknown:
            raise RewardError(
                f"reward 'ocr': the recogniser has no {' '.join(unknown)} in its dictionary and could not read the "
                f"text in the prompt {prompt!r}, whatever is drawn; leave the prompt out, or set the option recogniser "
                "to a language or model that knows them"
            )

    def read(self, images: torch.Tensor) -> list[list[str]]:
        """The lines of text in each of images (B, 3, H, W) in [0, 1], from top to bottom; [] where there is none.

        RewardError, naming the image, when the engine fails.
        """
        if images.ndim != 4:
            raise RewardError(f"reward 'ocr': `read` takes images (B, 3, H, W), not shape {tuple(images.shape)}")
        levels = as_levels(images)
        # The engine's models were trained on blue, green, red.
        return self.reader(levels.flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def of_pictures(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        """Scores (N,) in [0, 1]; RewardError, before anything is read, for a prompt whose text cannot be."""
        for prompt in dict.fromkeys(prompts):
            self._check(prompt)
        pairs = zip(prompts, self.read(images), strict=True)
        return torch.tensor([text_score(prompt, found, strict=self.strict) for prompt, found in pairs])
