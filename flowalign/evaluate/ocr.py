"""The OCR benchmark: how much of the text that a prompt quotes can be read in its images.

Source: Flow-GRPO (Liu et al. 2025). Its published score is called `accuracy` here: an image that holds the text
anywhere scores 1, whatever else it shows. `similarity` is the same score without that rule. `exact` is true for an
image that holds exactly the text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowalign.config.base import CheckFailed, UserError
from flowalign.evaluate.benchmark import Benchmark
from flowalign.evaluate.drawing import Sample
from flowalign.evaluate.intervals import Groups, mean_interval, mean_of
from flowalign.evaluate.results import RESULTS, Line, by_prompt, write_summary
from rewards.ocr import OCR, quoted_text, text_score

SCORES = ("accuracy", "similarity", "exact")
LENGTHS = (4, 8, 16, 32)  # the longest target of each bin except the last, in characters without spaces


def length_bin(target: str) -> str:
    """The bin of a target's length, such as "5-8"."""
    length = len("".join(target.split()))
    for low, high in zip((1, *(bound + 1 for bound in LENGTHS)), LENGTHS, strict=False):
        if length <= high:
            return f"{low}-{high}"
    return f"over {LENGTHS[-1]}"


def line_of(sample: Sample, read: Sequence[str]) -> Line:
    """The line for an image: the text that is read, from top to bottom, and the scores."""
    prompt = sample.row.prompt
    similarity = text_score(prompt, read, strict=True)
    return {
        "filename": sample.name,
        "prompt": prompt,
        "target": quoted_text(prompt),
        "lines": read,
        "accuracy": text_score(prompt, read),
        "similarity": similarity,
        "exact": similarity == 1.0,
    }


def summarise(lines: Sequence[Line], images: int) -> dict[str, Any]:
    """Means and 95 % intervals over lines, one per image, in all and by length of the target.

    `images` is the number of images per row. Equal rows count as one prompt.
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
    """Draw the missing images, read those not read yet, and write the summary; returns the summary and its folder.

    mode: "page" finds text in photographs, "lines" reads small images of text alone; see `rewards.ocr.OCR`.
    recogniser, keys: as in `rewards.ocr.OCR`.

    Raises UserError for unsuitable prompts, images or folders, and CheckFailed if no letter of any text is read.
    """
    rows = benchmark.rows()
    for row in rows:
        if quoted_text(row.prompt) is None:
            raise UserError(f"{benchmark.where(row)}: {row.prompt!r} has no text in quotes to read")
    reader = OCR(mode, recogniser=recogniser, keys=keys)
    for row in rows:
        reader.applies_to({"prompt": row.prompt})  # raises for letters that the recogniser does not know
    own = {"recogniser": recogniser, "keys": keys}
    about = {"benchmark": "ocr", "mode": mode, **{key: value for key, value in own.items() if value is not None}}
    benchmark = benchmark.placed("ocr", about)
    lines = benchmark.judged(rows, about, reader.read, line_of)
    if not any(line["accuracy"] for line in lines):
        raise CheckFailed(
            f"every score is 0: no letter of the text was read in any of the {len(lines)} images; look at them and at "
            f"{benchmark.folder / RESULTS}, and try another --mode"
        )
    summary = {**about, **benchmark.about(rows), **summarise(lines, benchmark.images)}
    write_summary(benchmark.folder, summary)
    return summary, benchmark.folder
