"""How fast each reward scores, in images per second, on the toyworld's images and judges.

    python scripts/bench_rewards.py

OCR is compared with its engine called image by image at default settings, on signs and on pages of text. Each time is
the best of several turns. The turns of all rewards alternate, so that another program disturbs them all alike.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rapidocr import RapidOCR
from rich.console import Console
from rich.table import Table

import rewards
from flowalign.disk.media import save_image, to_uint8
from flowalign.toyworld.grammar import random_example, words
from flowalign.toyworld.render import render
from rewards import Items

CLIP = {"model": "toyworld/judges/clip"}
DETECTOR = "flowalign.toyworld.detector:ExactDetector"


def pictures(count: int, shapes: float) -> Items:
    """Rendered images of signs (shapes=0) or of shapes (shapes=1)."""
    rng = np.random.default_rng(0)
    drawn = [random_example(rng, words(held_out=True), shapes) for _ in range(count)]
    media = torch.stack([torch.from_numpy(render(scene)).permute(2, 0, 1) / 255 for _, scene in drawn])
    metadata = [{"tag": "single_object", "include": [{"class": "circle", "count": 1}]}] * count
    return Items(media, [prompt for prompt, _ in drawn], metadata)


def pages(count: int) -> Items:
    """Images of 512 pixels, the size of photographs, with a line of text."""
    font = ImageFont.load_default(48)
    media = []
    for index in range(count):
        page = Image.new("RGB", (512, 512), (225, 235, 245))
        ImageDraw.Draw(page).text((60, 60 + 40 * (index % 8)), "FRESH BREAD", (40, 60, 20), font)
        media.append(torch.from_numpy(np.array(page)).permute(2, 0, 1) / 255)
    return Items(torch.stack(media), ['a shop with the sign "FRESH BREAD"'] * count, [{}] * count)


def scoring(name: str, items: Items, **options: object) -> Callable[[], None]:
    """A function that scores the items once with a reward."""
    reward = rewards.load(name, **options)

    def turn() -> None:
        rewards.score(reward, *items)

    return turn


def one_by_one(items: Items) -> Callable[[], None]:
    """A function that reads the items once with RapidOCR at its default settings, with one image per call."""
    engine = RapidOCR(params={"Global.log_level": "critical"})
    images = [picture[..., ::-1] for picture in to_uint8(items.media)]

    def turn() -> None:
        for image in images:
            engine(np.ascontiguousarray(image))

    return turn


def main() -> None:
    """Parse the command line, measure the times, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="images per turn; an eighth as many pages")
    parser.add_argument("--turns", type=int, default=3, help="measured turns of each reward")
    options = parser.parse_args()
    signs, shapes, page = pictures(options.images, 0), pictures(options.images, 1), pages(max(options.images // 8, 2))
    with tempfile.TemporaryDirectory() as folder:
        for index, picture in enumerate(to_uint8(shapes.media)):
            save_image(Path(folder) / f"{index:03d}.png", picture)
        turns = {
            "ocr, engine image by image (signs)": (one_by_one(signs), len(signs.media)),
            "ocr, mode lines (signs)": (scoring("ocr", signs, mode="lines"), len(signs.media)),
            "ocr, engine image by image (pages)": (one_by_one(page), len(page.media)),
            "ocr, mode page (pages)": (scoring("ocr", page), len(page.media)),
            "geneval, exact detector": (scoring("geneval", shapes, detector=DETECTOR), len(shapes.media)),
            "compressibility": (scoring("compressibility", shapes), len(shapes.media)),
            "colorfulness": (scoring("colorfulness", shapes), len(shapes.media)),
            "clipscore": (scoring("clipscore", shapes, **CLIP), len(shapes.media)),
            "pickscore": (scoring("pickscore", shapes, **CLIP), len(shapes.media)),
            "aesthetic": (
                scoring("aesthetic", shapes, head="toyworld/judges/aesthetic.safetensors", **CLIP),
                len(shapes.media),
            ),
            "artifact": (
                scoring("artifact", shapes, head="toyworld/judges/artifact.safetensors"),
                len(shapes.media),
            ),
            "adversarial_dino": (
                scoring("adversarial_dino", shapes, model="toyworld/judges/vit", references=folder),
                len(shapes.media),
            ),
        }
        best = dict.fromkeys(turns, float("inf"))
        for _ in range(options.turns + 1):  # the first turn warms up; being the slowest, it does not count
            for name, (turn, _) in turns.items():
                started = time.perf_counter()
                turn()
                best[name] = min(best[name], time.perf_counter() - started)
    table = Table("reward", "images/s", "ms/image")
    for name, (_, count) in turns.items():
        table.add_row(name, f"{count / best[name]:.0f}", f"{1000 * best[name] / count:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
