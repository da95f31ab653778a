"""Kill a run with SIGKILL at random moments and resume it until it ends: nothing may be lost or changed.

    python scripts/kill_test.py RECIPE [KEY=VALUE ...] --kills 50 --folder kills

The recipe runs once without a break in FOLDER/whole, then again and again in FOLDER/killed until it was killed often
enough. Each life of a run is forked from this process, which has imported everything, and is killed at a random moment
within the duration of the unbroken run. Runs write no report. The script prints one line per kill. It exits with 1 at
the first run that does not resume, that lost more than run.checkpoint_every steps, or whose metrics, evaluations or
weights differ from those of the unbroken run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from flowalign import trainer as training
from flowalign.cli.console import quiet_libraries
from flowalign.config import Recipe, load_recipe
from flowalign.disk.run_folder import RunFolder
from flowalign.training.checkpoint import checkpoints
from flowalign.training.display import Display

CLOCK = ("minutes", "seconds")


def start(recipe: Recipe, folder: Path) -> int:
    """Start or resume the run in `folder` in a forked process; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        training.write_report = lambda folder: (
            folder
        )  # the report only reads files, and its plots take longer than a tiny run
        there = recipe.model_copy(update={"run": recipe.run.model_copy(update={"folder": str(folder)})})
        training.Trainer.from_recipe(there, resume=(folder / "recipe.yaml").exists(), display=Display(quiet=True)).run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def live(recipe: Recipe, folder: Path, seconds: float | None) -> bool:
    """One life of the run, killed after `seconds`; returns whether the run ended by itself. SystemExit if it failed."""
    child, until = start(recipe, folder), None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, 0 if until is None else os.WNOHANG)
        if ended:
            break
        if until is not None and time.monotonic() >= until:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        sys.exit(f"the run in {folder} did not continue")
    return True


def last_steps(folder: Path) -> tuple[int, int]:
    """The last step in the metrics and in the checkpoints, 0 for none."""
    run = RunFolder(folder)
    found = checkpoints(run.checkpoints)
    text = run.metrics.read_text(encoding="utf-8") if run.metrics.exists() else ""
    lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]  # the last line may be cut short
    logged = json.loads(lines[-1])["step"] if lines else 0
    return logged, int(found[-1].name.removeprefix("step_")) if found else 0


def contents(folder: Path) -> dict[str, Any]:
    """The metrics, evaluations and tensors of a finished run, without times."""
    found: dict[str, Any] = {}
    for number, line in enumerate((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        found[f"metrics, line {number + 1}"] = json.loads(line)
    for file in sorted(folder.glob("evaluations/*.json")):
        found[file.name] = json.loads(file.read_text(encoding="utf-8"))
    values: dict[str, Any] = {
        name: {key: value for key, value in about.items() if key not in CLOCK} for name, about in found.items()
    }
    places = [*checkpoints(folder / "checkpoints"), folder / "lora", folder / "best", folder / "best_unhacked"]
    for file in sorted(file for place in places for file in place.glob("*.safetensors")):
        values |= {f"{file.relative_to(folder)}: {name}": tensor for name, tensor in load_file(file).items()}
    return values


def difference(whole: dict[str, Any], killed: dict[str, Any]) -> str | None:
    """The first difference of two runs, or None."""
    if whole.keys() != killed.keys():
        return f"only one of the runs has {sorted(whole.keys() ^ killed.keys())[0]}"
    for name, value in whole.items():
        other = killed[name]
        if not (torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other):
            return f"{name} differs"
    return None


def kill_test(recipe: Recipe, folder: Path, kills: int, seed: int) -> str:
    """Kill the run `kills` times; returns a summary. SystemExit at the first fault."""
    draw, ends = random.Random(seed), 0
    lost: list[int] = []
    began = time.monotonic()
    live(recipe, folder / "whole", None)
    lasted = time.monotonic() - began
    whole = contents(folder / "whole")
    killed = folder / "killed"
    while len(lost) < kills or ends == 0:
        wait = None if len(lost) >= kills else draw.uniform(0, lasted)
        if live(recipe, killed, wait):
            ends += 1
            if found := difference(whole, contents(killed)):
                sys.exit(f"after {len(lost)} kills: {found}")
            shutil.rmtree(killed)
            continue
        logged, saved = last_steps(killed)
        lost.append(logged - saved)
        print(f"kill {len(lost)}: at step {logged}, the last checkpoint is that of step {saved}", flush=True)
        if lost[-1] > recipe.run.checkpoint_every:
            sys.exit(f"{lost[-1]} steps were lost, more than {recipe.run.checkpoint_every}")
    return f"{len(lost)} kills, at most {max(lost)} steps lost, {ends} runs ended like the unbroken one"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a bundled recipe's name or a YAML file")
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, KEY=VALUE")
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--folder", type=Path, default=Path("kills"), help="folder for the runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    given = parser.parse_intermixed_args()
    quiet_libraries()
    print(kill_test(load_recipe(given.recipe, given.overrides), given.folder, given.kills, given.seed))
