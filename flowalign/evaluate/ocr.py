"""The OCR benchmark: how much of the text that a prompt quotes can be read in its pictures.

Source: Flow-GRPO (Liu et al. 2025), whose published score is `accuracy` here: a picture that holds the text somewhere
scores 1 whatever else is written. `similarity` is the same without that rule, `exact` asks for the text and no more.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flowalign.config.base import CheckFailed, UserError
from flowalign.evaluate.benchmark import Benchmark
from flowalign.evaluate.drawing import Picture, batches_of_a_size
from flowalign.evaluate.intervals import Groups, mean_interval, mean_of
from flowalign.evaluate.results import RESULTS, Line, by_prompt, write_summary
from rewards.ocr import OCR, quoted_text, text_score

SCORES = ("accuracy", "similarity", "exact")
LENGTHS = (4, 8, 16, 32)  # longest target of each bin but the last, in characters without spaces


def length_bin(target: str) -> str:
    """The bin of a target's length, such as "5-8"."""
    length = len("".join(target.split()))
    for low, high in zip((1, *(bound + 1 for bound in LENGTHS)), LENGTHS, strict=False):
        if length <= high:
            return f"{low}-{high}"
    return f"over {LENGTHS[-1]}"


def readings(reader: OCR, pictures: Sequence[Picture]) -> list[Line]:
    """What is read in each picture, from top to bottom, and its scores."""
    lines: list[Line] = [{}] * len(pictures)
    for places, media in batches_of_a_size(pictures):
        for place, read in zip(places, reader.read(media), strict=True):
            row = pictures[place].row
            similarity = text_score(row.prompt, read, strict=True)
            lines[place] = {
                "filename": pictures[place].name,
                "prompt": row.prompt,
                "target": quoted_text(row.prompt),
                "lines": read,
                "accuracy": text_score(row.prompt, read),
                "similarity": similarity,
                "exact": similarity == 1.0,
            }
    return lines


def summarise(lines: Sequence[Line], images: int) -> dict[str, Any]:
    """Means and 95 % intervals of lines, a picture each, with `images` of every row; by length of the target.

    Rows that are alike are one prompt.
    """
    prompts = by_prompt(lines, lambda line: line["prompt"])
    bins = [length_bin(group[0]["target"]) for group in prompts]
    values = {name: [[float(line[name]) for line in group] for group in prompts] for name in SCORES}
    targets = sorted((group[0]["target"] for group in prompts), key=lambda target: len("".join(target.split())))
    return {
        **{name: _score(values[name]) for name in SCORES},
        "lengths": {
            length: {
                "prompts": bins.count(length),
                **{
                    name: _score([one for one, own in zip(values[name], bins, strict=True) if own == length])
                    for name in SCORES
                },
            }
            for length in dict.fromkeys(length_bin(target) for target in targets)
        },
        "prompts": len(prompts),
        "images": len(lines),
        "images_per_prompt": images,
    }


def _score(groups: Groups) -> dict[str, Any]:
    return {"score": mean_of(groups), "interval": mean_interval(groups, bounds=(0, 1))}


def evaluate_ocr(
    benchmark: Benchmark, mode: str, recogniser: str | None = None, keys: str | None = None
) -> tuple[dict[str, Any], Path]:
    """Draw what is missing, read what is not read yet, and write the summary, which is returned with its folder.

    mode: "page" finds text in photographs, "lines" reads small pictures of nothing but text, as `rewards.ocr.OCR` says.
    recogniser, keys: those of `rewards.ocr.OCR`.

    Raises UserError for prompts, pictures or a folder that do not fit, and where nothing could be read at all.
    """
    rows = benchmark.rows()
    for row in rows:
        if quoted_text(row.prompt) is None:
            raise UserError(f"{benchmark.where(row)}: {row.prompt!r} has no text in quotes to be read")
    reader = OCR(mode, recogniser=recogniser, keys=keys)
    for row in rows:
        reader.applies_to({"prompt": row.prompt})  # refuses letters that it cannot read
    own = {"recogniser": recogniser, "keys": keys}
    about = {"benchmark": "ocr", "mode": mode, **{key: value for key, value in own.items() if value is not None}}
    benchmark = benchmark.placed("ocr", about)
    lines = benchmark.judged(rows, about, partial(readings, reader))
    if not any(line["accuracy"] for line in lines):
        raise CheckFailed(
            f"every score is 0: in none of the {len(lines)} pictures is a letter of its text read; look at them and at "
            f"{benchmark.folder / RESULTS}, and try another --mode"
        )
    summary = {**about, **benchmark.about(rows), **summarise(lines, benchmark.images)}
    write_summary(benchmark.folder, summary)
    return summary, benchmark.folder
