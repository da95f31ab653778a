"""Two ways to read images with RapidOCR: as whole pages, or as small images that show only lines of text.

Images are uint8 arrays (N, H, W, 3) with the channels blue, green, red.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import cv2
import numpy as np
from rapidocr import ModelType, OCRVersion, RapidOCR
from rapidocr.ch_ppocr_rec.utils import CTCLabelDecode
from rapidocr.utils.model_resolver import list_supported_langs
from rapidocr.utils.typings import TaskType

from rewards.base import RewardError, nearest, reason
from rewards.detectors.quotes import plain
from rewards.detectors.reading_order import reading_order

INK = 45  # a pixel is ink if a channel differs from the background by more than this, of 255 levels
MARGIN = 3  # pixels of background kept around a line
HEIGHT = 48  # pixels of a line's height in the recogniser's training
# A line is narrowed to 0.6 of its natural width: it is read equally well, spaced or tight, in 0.6 of the time.
NARROWING = 0.6
# Widths are rounded up in steps: lines of one width share a batch, and a line's width never depends on the others.
WIDTH_STEP, LEAST_WIDTH, MOST_WIDTH = 32, 96, 1280

# The largest shares of a small image's border, and of all its pixels, that may differ from its background: words on a
# plain background stay far below both, photographs do not.
BUSY_BORDER, BUSY_PICTURE = 0.25, 0.5

MOST_ENGINES = 8  # each engine holds its own models, about 100 MB

Box = tuple[int, int, int, int]  # top, bottom, left, right in pixels; bottom and right are exclusive


class Settings(NamedTuple):
    """The settings of an engine; see `rewards.ocr.OCR`."""

    batch_size: int
    threads: int | None
    recogniser: str | None = None
    keys: str | None = None


def languages() -> dict[str, OCRVersion]:
    """The languages for which RapidOCR has a recogniser, each with the newest version of models that has one."""
    versions = (OCRVersion.PPOCRV4, OCRVersion.PPOCRV5)
    return {name: one for one in versions for name in list_supported_langs(TaskType.REC, one, ModelType.MOBILE)}


def _engine(settings: Settings, threads: int | None) -> Any:
    """A RapidOCR engine with its recogniser loaded; untyped, since RapidOCR's results are a union over its modes."""
    params: dict[str, Any] = {
        "Global.log_level": "error",  # at a lower level RapidOCR warns of every image without text
        "Global.use_cls": False,  # text is upright, as in the published reward
        "Rec.rec_batch_num": settings.batch_size,
        # Images are never enlarged for the detector, as in PaddleOCR, which the published reward uses. RapidOCR's
        # default enlarges the shorter side to 736 pixels, which takes twice the time for images of 512 pixels.
        "Det.limit_type": "max",
        "Det.limit_side_len": 960,
        **_recogniser(settings),
    }
    if threads is not None:  # RapidOCR ignores a number above the number of cores
        params["EngineConfig.onnxruntime.intra_op_num_threads"] = min(threads, os.cpu_count() or 1)
    try:
        engine: Any = RapidOCR(params=params)
        # A blank line makes the engine load its recogniser.
        engine(np.full((HEIGHT, LEAST_WIDTH, 3), 255, np.uint8), use_det=False)
        if settings.keys is not None:
            engine.text_rec.postprocess_op = CTCLabelDecode(character_path=Path(settings.keys).expanduser())
            known, count = len(engine.text_rec.postprocess_op.character), _classes(engine.text_rec)
            if known != count:
                raise RewardError(
                    f"reward 'ocr': keys {settings.keys} has {known - 2} lines, but the recogniser knows {count - 2} "
                    "characters, and each needs a line"
                )
    except RewardError:
        raise
    except Exception as error:
        what = " with keys ".join(filter(None, (settings.recogniser or "as installed", settings.keys)))
        raise RewardError(f"reward 'ocr': recogniser {what} cannot be loaded: {_cause(error)}") from error
    return engine


def _recogniser(settings: Settings) -> dict[str, Any]:
    """RapidOCR's parameters for the recogniser that the settings name; none for RapidOCR's own."""
    name = settings.recogniser
    if name is None:
        return {}
    known = languages()
    if name in known:
        return {"Rec.lang_type": name, "Rec.ocr_version": known[name], "Rec.model_type": ModelType.MOBILE}
    path = Path(name).expanduser()
    if not path.is_file():
        hint = "there is no such file" if path.suffix else f"did you mean {nearest(name, known)!r}?"
        raise RewardError(
            f"reward 'ocr': recogniser {name!r} is neither an .onnx file nor one of RapidOCR's languages; {hint} "
            f"(known: {', '.join(sorted(known))})"
        )
    return {"Rec.model_path": str(path)}


def _classes(recogniser: Any) -> int:
    """The number of characters that a recogniser knows, the blank and the space included."""
    return int(recogniser.session(np.zeros((1, 3, HEIGHT, LEAST_WIDTH), np.float32)).shape[-1])


def alphabet(recogniser: Any) -> frozenset[str]:
    """The plain characters that a recogniser can read."""
    return frozenset("".join(map(plain.__wrapped__, recogniser.postprocess_op.character[1:])))


class PageReader:
    """Detector and recogniser, with one image per core at a time; lines with a confidence under 0.5 are left out.

    One image per core is nearly twice as fast as all cores on one image after another. Lines are put in `reading_order`
    because the engine takes boxes for one row if their upper left corners lie within 10 pixels, at any size and tilt.
    """

    def __init__(self, settings: Settings):
        count = min(settings.threads or MOST_ENGINES, os.cpu_count() or 1, MOST_ENGINES)
        self.pool = ThreadPoolExecutor(count, "ocr")
        first = _engine(settings, 1)  # built before the others, since it may download the model
        self.engines = [first, *self.pool.map(lambda _: _engine(settings, 1), range(count - 1))]
        self.free: SimpleQueue[Any] = SimpleQueue()
        for engine in self.engines:
            self.free.put(engine)
        self.recogniser = first.text_rec

    def __call__(self, images: np.ndarray) -> list[list[str]]:
        return list(self.pool.map(self._read, range(len(images)), images))

    def _read(self, index: int, image: np.ndarray) -> list[str]:
        engine = self.free.get()
        try:
            found = engine(image, use_det=True)
            return [found.txts[place] for place in reading_order(found.boxes)] if found.txts else []
        except Exception as error:
            raise _failure(f"image {index}", error) from error
        finally:
            self.free.put(engine)


class LineReader:
    """The recogniser alone, on the lines that `ink_lines` finds; the lines of all images share batches."""

    def __init__(self, settings: Settings):
        self.recogniser = _engine(settings, settings.threads).text_rec
        self.batch_size = settings.batch_size
        self.warned = False

    def __call__(self, images: np.ndarray) -> list[list[str]]:
        owners, crops, busy = line_crops(images)
        if busy.mean() > 0.5 and not self.warned:
            self.warned = True
            logging.getLogger(__name__).warning(
                "reward 'ocr': mode lines reads only words on a plain background, which %d of %d images do not have; "
                "what it reads in them is chance: use mode page",
                busy.sum(),
                len(busy),
            )
        widths = defaultdict(list)
        for number, crop in enumerate(crops):
            widths[crop.shape[1]].append(number)
        texts = [""] * len(crops)
        for numbers in widths.values():
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                try:
                    read = self._recognise(np.stack([crops[number] for number in batch]))
                except Exception as error:
                    names = ", ".join(str(index) for index in sorted({owners[number] for number in batch}))
                    raise _failure(f"a batch of lines from image {names}", error) from error
                for number, text in zip(batch, read, strict=True):
                    texts[number] = text
        lines: list[list[str]] = [[] for _ in images]
        for owner, text in zip(owners, texts, strict=True):
            if text:
                lines[owner].append(text)
        return lines

    def _recognise(self, crops: np.ndarray) -> list[str]:
        """Texts of N crops (N, HEIGHT, W, 3)."""
        # The session is called itself, since the engine's call would pad to a width of at least 320.
        inputs = np.ascontiguousarray(crops.transpose(0, 3, 1, 2), dtype=np.float32) / 127.5 - 1
        best = self.recogniser.session(inputs).argmax(-1)
        # The probabilities are left out: their maximum over 18,710 characters takes time and is not used.
        return [text for text, _ in self.recogniser.postprocess_op.decode(best, remove_duplicate=True)[0]]


def line_crops(images: np.ndarray) -> tuple[list[int], list[np.ndarray], np.ndarray]:
    """All lines of text in images (N, H, W, 3): for each line, its image's index and its pixels for the recogniser.

    An image's background is the median of its outermost pixels; pixels that differ from it are ink. The third result,
    (N,), bool, is True for images that are not text on a plain background.
    """
    edges = [images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]]
    colours = np.median(np.concatenate(edges, axis=1), axis=1).astype(np.uint8)
    backgrounds = colours[:, None, None]
    count, height, width, _ = images.shape
    canvas = np.empty((count, height + 2 * MARGIN, width + 2 * MARGIN, 3), np.uint8)  # room around ink at the edge
    canvas[:] = backgrounds
    canvas[:, MARGIN:-MARGIN, MARGIN:-MARGIN] = images
    contrast = (np.maximum(canvas, backgrounds) - np.minimum(canvas, backgrounds)).max(-1)
    ink = contrast > INK
    inside = ink[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
    border = np.concatenate([inside[:, 0], inside[:, -1], inside[:, 1:-1, 0], inside[:, 1:-1, -1]], axis=1)
    busy = (border.mean(1) > BUSY_BORDER) | (inside.mean((1, 2)) > BUSY_PICTURE)
    owners, crops = [], []
    for index in range(count):
        for top, bottom, left, right in ink_lines(ink[index]):
            owners.append(index)
            crops.append(line_crop(canvas[index, top:bottom, left:right], colours[index]))
    return owners, crops, busy


def ink_lines(ink: np.ndarray) -> list[Box]:
    """The boxes of the lines of text in an ink mask (H, W), bool, from top to bottom, with MARGIN where there is room.

    Rows without ink separate bands. A band at most a third as tall as the tallest is taken for dots or accents, and
    joins a neighbour within a third of the tallest band's height. A band under 3 pixels that is left is a speck.
    """
    edges = np.flatnonzero(np.diff(ink.any(1).astype(np.int8), prepend=0, append=0))
    bands = [(int(top), int(bottom)) for top, bottom in edges.reshape(-1, 2)]
    tallest = max((bottom - top for top, bottom in bands), default=0)
    while len(bands) > 1:
        gaps = [
            (lower[0] - upper[1], index)
            for index, (upper, lower) in enumerate(pairwise(bands))
            if 3 * min(upper[1] - upper[0], lower[1] - lower[0]) <= tallest
        ]
        gap, index = min(gaps, default=(tallest, 0))
        if 3 * gap > tallest:
            break
        bands[index : index + 2] = [(bands[index][0], bands[index + 1][1])]
    boxes = []
    for index, (top, bottom) in enumerate(bands):
        if bottom - top >= 3:
            columns = np.flatnonzero(ink[top:bottom].any(0))
            left, right = max(int(columns[0]) - MARGIN, 0), min(int(columns[-1]) + 1 + MARGIN, ink.shape[1])
            above = bands[index - 1][1] if index else 0
            below = bands[index + 1][0] if index + 1 < len(bands) else len(ink)
            boxes.append((max(top - MARGIN, above), min(bottom + MARGIN, below), left, right))
    return boxes


def line_crop(crop: np.ndarray, background: np.ndarray) -> np.ndarray:
    """A line's pixels (h, w, 3), resized to HEIGHT and centred on a background; its width is a multiple of the step."""
    width = min(max(round(NARROWING * HEIGHT * crop.shape[1] / crop.shape[0]), 1), MOST_WIDTH)
    crop = cv2.resize(crop, (width, HEIGHT), interpolation=cv2.INTER_CUBIC)
    spare = max(LEAST_WIDTH, -(-width // WIDTH_STEP) * WIDTH_STEP) - width
    colour = [int(level) for level in background]
    return cv2.copyMakeBorder(crop, 0, 0, spare // 2, spare - spare // 2, cv2.BORDER_CONSTANT, value=colour)


def _failure(where: str, error: Exception) -> RewardError:
    return RewardError(f"reward 'ocr': the engine failed on {where}: {_cause(error)}")


def _cause(error: Exception) -> str:
    # RapidOCR's message is a whole traceback; the exception that caused it says what happened.
    return reason(error.__cause__ or error)


READERS: dict[str, Callable[[Settings], PageReader | LineReader]] = {"page": PageReader, "lines": LineReader}
