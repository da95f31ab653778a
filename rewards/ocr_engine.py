"""Two ways to read images with RapidOCR: whole pages, or small pictures that are nothing but lines of text.

Images are uint8 arrays (N, H, W, 3), blue, green, red.
"""

import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import cv2
import numpy as np
from rapidocr import RapidOCR

from rewards.base import RewardError, reason

INK = 45  # levels of 255 in any channel by which ink differs from the background
MARGIN = 3  # pixels of background kept around a line
HEIGHT = 48  # of a line, as the recogniser was trained
# A line is narrowed to 0.6 of its natural width: spaced or tight, it is read as well, in 0.6 of the time.
NARROWING = 0.6
# Widths go up in steps, so that lines share batches while none's width depends on its neighbours in the batch.
WIDTH_STEP, LEAST_WIDTH, MOST_WIDTH = 32, 96, 1280

MOST_ENGINES = 8  # each holds the models once more, about 100 MB

Box = tuple[int, int, int, int]  # top, bottom, left, right in pixels, as of a slice


def _engine(batch_size: int, threads: int | None) -> Any:
    """A RapidOCR; untyped, since it declares its results as a union over its modes."""
    params: dict[str, Any] = {
        "Global.log_level": "error",  # it would warn of every image without text
        "Global.use_cls": False,  # text is upright, as in the published reward
        "Rec.rec_batch_num": batch_size,
        # As PaddleOCR, with which the published reward reads: pictures are never enlarged for the detector. The
        # engine's own default brings the shorter side to 736, at twice the time for 512 pixels.
        "Det.limit_type": "max",
        "Det.limit_side_len": 960,
    }
    if threads is not None:  # RapidOCR ignores a number above the cores there are
        params["EngineConfig.onnxruntime.intra_op_num_threads"] = min(threads, os.cpu_count() or 1)
    return RapidOCR(params=params)


class PageReader:
    """Detector and recogniser, an image for each core at a time; lines under a confidence of 0.5 are left out.

    One core an image reads nearly twice as fast as all cores on one image after the other.
    """

    def __init__(self, batch_size: int, threads: int | None):
        count = min(threads or MOST_ENGINES, os.cpu_count() or 1, MOST_ENGINES)
        self.engines = [_engine(batch_size, 1) for _ in range(count)]
        self.free: SimpleQueue[Any] = SimpleQueue()
        for engine in self.engines:
            self.free.put(engine)
        self.pool = ThreadPoolExecutor(count, "ocr")

    def __call__(self, images: np.ndarray) -> list[list[str]]:
        return list(self.pool.map(self._read, range(len(images)), images))

    def _read(self, index: int, image: np.ndarray) -> list[str]:
        engine = self.free.get()
        try:
            return list(engine(image).txts or ())
        except Exception as error:
            raise _failure(f"image {index}", error) from error
        finally:
            self.free.put(engine)


class LineReader:
    """The recogniser alone, on the lines that `ink_lines` finds, those of all images together in batches."""

    def __init__(self, batch_size: int, threads: int | None):
        engine = _engine(batch_size, threads)
        # One blank line makes the engine load its recogniser, which its call would feed at width 320 at least.
        engine(np.full((HEIGHT, LEAST_WIDTH, 3), 255, np.uint8), use_det=False)
        self.recogniser = engine.text_rec
        self.batch_size = batch_size

    def __call__(self, images: np.ndarray) -> list[list[str]]:
        owners, crops = line_crops(images)
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
        inputs = np.ascontiguousarray(crops.transpose(0, 3, 1, 2), dtype=np.float32) / 127.5 - 1
        best = self.recogniser.session(inputs).argmax(-1)
        # Without the probabilities, whose maximum over 18,710 characters nobody asks for.
        return [text for text, _ in self.recogniser.postprocess_op.decode(best, remove_duplicate=True)[0]]


def line_crops(images: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """Every line of text in images (N, H, W, 3): the image it is from, and its pixels ready for the recogniser.

    An image's background is the median of its outermost pixels; what differs from it is ink.
    """
    edges = [images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]]
    colours = np.median(np.concatenate(edges, axis=1), axis=1).astype(np.uint8)
    backgrounds = colours[:, None, None]
    count, height, width, _ = images.shape
    canvas = np.empty((count, height + 2 * MARGIN, width + 2 * MARGIN, 3), np.uint8)  # room around ink at the edge
    canvas[:] = backgrounds
    canvas[:, MARGIN:-MARGIN, MARGIN:-MARGIN] = images
    contrast = (np.maximum(canvas, backgrounds) - np.minimum(canvas, backgrounds)).max(-1)
    owners, crops = [], []
    for index in range(count):
        for top, bottom, left, right in ink_lines(contrast[index] > INK):
            owners.append(index)
            crops.append(line_crop(canvas[index, top:bottom, left:right], colours[index]))
    return owners, crops


def ink_lines(ink: np.ndarray) -> list[Box]:
    """The boxes of the lines of text in an ink mask (H, W), bool, from top to bottom, with MARGIN where there is room.

    Lines are parted by rows without ink. What is at most a third as tall as the tallest line is no line but the dots
    or accents of the one next to it, within a third of that height; else a speck if under 3 px.
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
    """A line's pixels (h, w, 3) made HEIGHT tall, in the middle of a background of a stepped width."""
    width = min(max(round(NARROWING * HEIGHT * crop.shape[1] / crop.shape[0]), 1), MOST_WIDTH)
    crop = cv2.resize(crop, (width, HEIGHT), interpolation=cv2.INTER_CUBIC)
    spare = max(LEAST_WIDTH, -(-width // WIDTH_STEP) * WIDTH_STEP) - width
    colour = [int(level) for level in background]
    return cv2.copyMakeBorder(crop, 0, 0, spare // 2, spare - spare // 2, cv2.BORDER_CONSTANT, value=colour)


def _failure(where: str, error: Exception) -> RewardError:
    # RapidOCR puts a whole traceback into its message; the exception it came from says what happened.
    return RewardError(f"reward 'ocr': the engine failed on {where}: {reason(error.__cause__ or error)}")


READERS: dict[str, Callable[[int, int | None], Callable[[np.ndarray], list[list[str]]]]] = {
    "page": PageReader,
    "lines": LineReader,
}
