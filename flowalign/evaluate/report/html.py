"""Parts that the HTML pages share: templates, a run's files with one-sentence errors, and images as data URIs."""

import base64
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from PIL import Image

from flowalign.config.base import UserError
from flowalign.disk.files import replace_text

SMALL = 128  # pixels; smaller images are embedded unchanged and scaled up without smoothing


def write_page(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a page as a whole, from the template with its name, such as report.html.j2."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template(f"{path.name}.j2").render(contents)
    replace_text(path, page.encode("ascii", "xmlcharrefreplace").decode())


def parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    """The parsed contents of a file, or an empty mapping if it does not exist; UserError if it cannot be parsed."""
    try:
        return parse(path.read_text("utf-8")) if path.is_file() else {}
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics of every training step, without an incomplete last line, which a killed or running run leaves."""
    steps = parsed(folder / "metrics.jsonl", lambda text: [json.loads(line) for line in text.split("\n")[:-1]]) or []
    return [{"metrics": step.get("figures", {}), **step} for step in steps]  # their name in earlier runs


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run in the order of their steps."""
    return [parsed(path, json.loads) for path in sorted(folder.glob("evaluations/step_*.json"), key=_by_step)]


def _by_step(path: Path) -> tuple[int, str]:
    return len(path.name), path.name  # names have six digits below a million steps


def embedded(path: Path, side: int) -> dict[str, Any]:
    """An image in samples/step_N/ as a data URI: a small one byte for byte, others as JPEG of at most `side` pixels."""
    try:
        with Image.open(path) as image:
            data, kind = path.read_bytes(), "png"
            if max(image.size) >= SMALL:
                image.thumbnail((side, side))
                image.convert("RGB").save(buffer := io.BytesIO(), "JPEG", quality=90)
                data, kind = buffer.getvalue(), "jpeg"
    except OSError as error:
        raise UserError(f"{path} is not a readable image: {error}") from error
    step = next(int(part.removeprefix("step_")) for part in reversed(path.parts) if part.startswith("step_"))
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"step": step, "uri": uri, "width": image.width, "height": image.height, "small": kind == "png"}
