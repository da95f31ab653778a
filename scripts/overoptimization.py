"""The over-optimisation bench: runs optimise an imperfect reward with each defence, and an exact judge measures them.

    python scripts/overoptimization.py --output runs/overoptimization

In the toyworld the gold judge is exact. There are two proxies. For shapes it is a learned judge, fitted to the gold
scores of few images of the base model; it does not read the prompt. For signs it is an OCR reward that takes strong
contrast for legibility. The defences are: none; CRD's KL; PAR's shaping; the worst case of an ensemble; an added
artifact judge; an added discriminator. Finished runs are kept, so the command can be stopped and given again. After
every run it writes overoptimization.json, .md, .svg and .png of all finished runs into the output folder.
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
    """Parse the command line, train the missing runs, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxies", nargs="+", choices=WORLDS, default=list(WORLDS), help="the proxies to optimise")
    parser.add_argument("--defences", nargs="+", choices=DEFENCES, default=list(DEFENCES), help="the defences to try")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="seeds of each proxy and defence")
    parser.add_argument("--steps", type=int, default=16, help="training steps of a run")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="learning rate of all runs")
    parser.add_argument("--prompts", type=int, default=64, help="number of training prompts")
    parser.add_argument("--evaluate-every", type=int, default=4, help="training steps between evaluations")
    parser.add_argument("--evaluation-prompts", type=int, default=128, help="number of held-out prompts")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/overoptimization"), help="folder for runs and results"
    )
    options = parser.parse_args()
    quiet_libraries()
    try:
        for world in options.proxies:
            prepare(world, options.output / world, options.prompts)
        # Seed by seed, so that a stopped bench has all defences of the first seeds.
        for seed in options.seeds:
            for world in options.proxies:
                for defence in options.defences:
                    train_unless_done(recipe_of(options, world, defence, seed))
                    write_results(options.output, about(options), found(options.output))
    except (UserError, RewardError, Interrupted) as error:
        sys.exit(f"error: {error}")
    print((options.output / "overoptimization.md").read_text(encoding="utf-8"), end="")


def recipe_of(options: argparse.Namespace, world: str, defence: str, seed: int) -> Recipe:
    """The recipe of one run of the bench."""
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
    """The finished runs in the output folder with their outcomes, by proxy and defence."""
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for world, defence in itertools.product(WORLDS, DEFENCES):
        folders = sorted((output / world).glob(f"{defence}-seed*"))
        done = {folder.name: folder for folder in folders if RunFolder(folder).finished}
        runs = [{"run": name, **read_run(folder)} for name, folder in done.items()]
        if runs:
            result.setdefault(TITLES[world], {})[defence] = {"runs": runs, "outcome": outcome(runs)}
    return result


def about(options: argparse.Namespace) -> dict[str, Any]:
    """The command, time, versions and options behind the results."""
    asked = {key: value for key, value in vars(options).items() if key != "output"}
    return {"command": command_line(), "made": now(), "versions": versions(), **asked}


if __name__ == "__main__":
    main()
