"""The over-optimisation bench: an imperfect reward is optimised, with each defence, while an exact judge watches.

    python scripts/overoptimization.py --output runs/overoptimization

On the embedded world nothing has to be believed of the gold judge: it is exact. Two proxies are optimised. On shapes a
learned judge, fitted to the gold scores of few pictures of the base model, which does not read the prompt. On signs an
OCR reward that takes strong contrast for legibility. The defences: none; CRD's KL; PAR's shaping; the worst case of an
ensemble; the artifact judge added; a discriminator added. Finished runs are kept, so the command can be stopped and
given again. Writes overoptimization.json, .md, .svg and .png of all finished runs in the output folder after every run.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

from flowalign.cli.console import quiet_libraries
from flowalign.config import Recipe
from flowalign.config.base import UserError
from flowalign.disk.about import command_line, now, versions
from flowalign.disk.run_folder import RunFolder
from flowalign.experiments.campaign import train_unless_done
from flowalign.experiments.overoptimization import DEFENCES, WORLDS, make_recipe, prepare
from flowalign.experiments.overoptimization_results import outcome, read_run, write_results
from flowalign.training.interrupt import Interrupted
from rewards import RewardError

TITLES = {"shapes": "shapes: a judge learned from few pictures", "signs": "signs: OCR that likes contrast"}


def main() -> None:
    """Parse the command line, train what is missing, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxies", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--defences", nargs="+", choices=DEFENCES, default=list(DEFENCES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=16, help="training steps of a run")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--prompts", type=int, default=64, help="trained on")
    parser.add_argument("--evaluate-every", type=int, default=4, help="training steps between evaluations")
    parser.add_argument("--evaluation-prompts", type=int, default=128, help="held out")
    parser.add_argument("--output", type=Path, default=Path("runs/overoptimization"))
    options = parser.parse_args()
    quiet_libraries()
    try:
        for world in options.proxies:
            prepare(world, options.output / world, options.prompts)
        # Seed by seed, so that a bench that is stopped has all defences of some seeds.
        for seed in options.seeds:
            for world in options.proxies:
                for defence in options.defences:
                    train_unless_done(recipe_of(options, world, defence, seed))
                    write_results(options.output, about(options), found(options.output))
    except (UserError, RewardError, Interrupted) as error:
        sys.exit(f"error: {error}")
    print((options.output / "overoptimization.md").read_text(encoding="utf-8"), end="")


def recipe_of(options: argparse.Namespace, world: str, defence: str, seed: int) -> Recipe:
    """One run of the bench."""
    shared = options.output / world
    return make_recipe(
        world,
        defence,
        seed,
        shared,
        shared / f"{defence}-seed{seed}",
        train={"steps": options.steps, "learning_rate": options.learning_rate},
        evaluation={"every": options.evaluate_every, "count": options.evaluation_prompts},
    )


def found(output: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What the finished runs in the output folder came to, by proxy and defence."""
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for world, defence in itertools.product(WORLDS, DEFENCES):
        folders = sorted((output / world).glob(f"{defence}-seed*"))
        done = {folder.name: folder for folder in folders if RunFolder(folder).finished}
        runs = [{"run": name, **read_run(folder)} for name, folder in done.items()]
        if runs:
            result.setdefault(TITLES[world], {})[defence] = {"runs": runs, "outcome": outcome(runs)}
    return result


def about(options: argparse.Namespace) -> dict[str, Any]:
    """How the results were made."""
    asked = {key: value for key, value in vars(options).items() if key != "output"}
    return {"command": command_line(), "made": now(), "versions": versions(), **asked}


if __name__ == "__main__":
    main()
