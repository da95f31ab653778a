"""Record the numbers that a refactor must not move: `python scripts/refactoring_numbers.py OUTPUT.json [BEFORE.json]`.

Each recipe trains the toyworld model for three steps, once with one process and once with two; GDRO trains from a
dataset of groups. GenEval and OCR judge the model that NFT has trained. OUTPUT.json gets the metrics of each step, the
checksums of the trained weights and the benchmarks' results. With BEFORE.json, written by this script on the same
machine before the refactor, the script names every difference and exits with 1 if there is one.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from flowalign.disk.files import replace_json

RECIPES = ("toyworld_ocr", "toyworld_geneval_nft", "toyworld_ocr_gdro", "toyworld_ocr_crd", "toyworld_marble")
RECIPES += ("toyworld_geneval_prdp",)
SETTINGS = (
    "train.steps=3",
    "train.prompts_per_step=4",
    "train.group_size=4",
    "evaluation.count=4",
    "evaluation.every=3",
)
CLOCKS = {"seconds", "minutes"}  # keys of a line of metrics that hold times


def command(*words: str, processes: int = 1) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), "--cpu"]
    start = [*launcher, "--module", "flowalign"] if processes > 1 else [sys.executable, "-m", "flowalign"]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    done = subprocess.run(
        [*start, *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": threads}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")


def trained(folder: Path, recipe: str, processes: int) -> dict[str, Any]:
    settings = (f"run.folder={folder}", *SETTINGS)
    if recipe.endswith("gdro"):  # trains from groups that one process has collected
        settings += (f"dataset={folder.parent / 'groups'}", "collect.prompts=8", "collect.group_size=4")
        command("collect", recipe, *settings)
    command("train", recipe, *settings, processes=processes)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    weights = sorted((folder / "lora").rglob("*.safetensors"))
    return {
        "metrics": [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines],
        "weights": {path.name: checksum(path) for path in weights},
    }


def checksum(path: Path) -> str:
    """The checksum of a file's tensors alone: safetensors writes its metadata in no fixed order."""
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        found.update(name.encode() + tensor.tobytes())
    return found.hexdigest()


def judged(folder: Path, benchmark: str, run: Path) -> list[dict[str, Any]]:
    words = ("eval", benchmark, str(run), "--count", "32", "--images-per-prompt", "1", "--output", str(folder))
    command(*words)
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line.replace(str(folder), "")) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("before", type=Path, nargs="?")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for recipe in RECIPES:
            for processes in (1, 2):
                key = f"{recipe}, {processes} process{'es' * (processes > 1)}"
                found[key] = trained(Path(place) / recipe / str(processes), recipe, processes)
                print(key, *found[key]["weights"].values(), flush=True)
        run = Path(place) / "toyworld_geneval_nft" / "1"
        for benchmark in ("geneval", "ocr"):
            found[benchmark] = judged(Path(place) / benchmark, benchmark, run)
            print(benchmark, len(found[benchmark]), flush=True)
    replace_json(args.output, found)
    if args.before:
        before = json.loads(args.before.read_text(encoding="utf-8"))
        moved = [key for key in before.keys() | found.keys() if before.get(key) != found.get(key)]
        raise SystemExit(f"moved: {'; '.join(sorted(moved))}" if moved else 0)


if __name__ == "__main__":
    main()
