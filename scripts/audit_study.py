"""How well the audit tells honest runs from hacked ones, on the toyworld, whose gold judges are exact.

    python scripts/audit_study.py --seeds 1 2 3 4 5 6 7 8 9 10 --output runs/audit_study

There are three kinds of runs: honest runs, trained on the gold judge of the shapes, and undefended runs on each of the
two proxies of the over-optimisation bench. The study counts the runs that alarm, records the step of the first alarm,
and compares the gold score of the weights in best_unhacked with the best gold score of the run. Finished runs are kept.
Writes audit_study.json and .md again after every run.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.cli.console import quiet_libraries
from flowalign.config.base import UserError
from flowalign.disk.about import command_line, now, versions
from flowalign.disk.files import replace_json, replace_text
from flowalign.evaluate.audit.guard import BEST_UNHACKED
from flowalign.evaluate.report.html import parsed, read_evaluations
from flowalign.experiments.campaign import train_unless_done
from flowalign.experiments.overoptimization import HELD_OUT, HONEST, make_recipe, prepare
from flowalign.experiments.overoptimization_results import GOLD
from flowalign.terminal import markdown
from flowalign.training.interrupt import Interrupted
from rewards import RewardError

ARMS = {  # world, defence, learning rate; an honest run uses the bundled recipe's learning rate
    "honest": ("shapes", HONEST, 7e-4),
    "learned judge": ("shapes", "none", 1.5e-3),
    "OCR with contrast": ("signs", "none", 1.5e-3),
}


def main() -> None:
    """Parse the command line, train the missing runs, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="the kinds of runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="seeds of each kind of run")
    parser.add_argument("--steps", type=int, default=12, help="training steps of a run")
    parser.add_argument("--evaluate-every", type=int, default=3, help="training steps between evaluations")
    parser.add_argument("--prompts", type=int, default=48, help="held-out prompts, with two images each")
    parser.add_argument("--output", type=Path, default=Path("runs/audit_study"), help="folder for runs and results")
    options = parser.parse_args()
    quiet_libraries()
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    try:
        for world in dict.fromkeys(ARMS[arm][0] for arm in options.arms):
            prepare(world, options.output / world, 64)
        for seed in options.seeds:
            for arm in options.arms:
                runs[arm].append({"seed": seed, **outcome(train_unless_done(recipe_of(options, arm, seed)))})
                write(options, runs)
    except (UserError, RewardError, Interrupted) as error:
        sys.exit(f"error: {error}")
    print((options.output / "audit_study.md").read_text(encoding="utf-8"), end="")


def recipe_of(options: argparse.Namespace, arm: str, seed: int) -> Any:
    """The recipe of one run of the study."""
    world, defence, rate = ARMS[arm]
    shared = options.output / world
    return make_recipe(
        world,
        defence,
        seed,
        shared,
        shared / f"{defence}-seed{seed}",
        train={"steps": options.steps, "learning_rate": rate},
        evaluation={
            "every": options.evaluate_every,
            "count": options.prompts,
            "images_per_prompt": 2,
            "keep_media": 12,
        },
        guard={"rewards": HELD_OUT, "seeds": 3, "kl_samples": 16, "features": {"model": "toyworld/judges/vit"}},
    )


def outcome(folder: Path) -> dict[str, Any]:
    """The results of a run's audits and of its gold judge."""
    evaluations = read_evaluations(folder)
    gold = {one["step"]: one["summary"][GOLD]["mean"] for one in evaluations}
    alarms = {one["step"]: one["audit"]["alarms"] for one in evaluations if one["audit"]["alarms"]}
    kept = parsed(folder / BEST_UNHACKED / "evaluation.json", json.loads)["step"]
    best = max(gold.values())
    return {
        "gold": gold,
        "proxy": [one["audit"]["proxy"] for one in evaluations],
        "panel": [one["audit"]["panel"] for one in evaluations],
        "kl": [one["audit"]["kl"] for one in evaluations],
        "alarms": alarms,
        "first_alarm": min(alarms, default=None),
        "unhacked_step": kept,
        "gold_kept": gold[kept] / best,
        "gold_at_end": evaluations[-1]["summary"][GOLD]["mean"] / best,
    }


def write(options: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Write audit_study.json and .md, each as a whole."""
    asked = {key: value for key, value in vars(options).items() if key != "output"}
    about = {"command": command_line(), "made": now(), "versions": versions(), **asked}
    replace_json(options.output / "audit_study.json", {**about, "runs": runs})
    columns = (
        "runs",
        "seeds",
        "alarmed",
        "first alarms at step",
        "what alarmed",
        "gold kept by best_unhacked",
        "at the end",
    )
    rows = [row(arm, of) for arm, of in runs.items() if of]
    replace_text(options.output / "audit_study.md", markdown(columns, rows))


def row(arm: str, runs: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """A row of the table."""
    alarmed = [run for run in runs if run["alarms"]]
    steps = ", ".join(str(run["first_alarm"]) for run in alarmed)
    causes = [alarm.split()[0] for run in alarmed for alarm in run["alarms"][run["first_alarm"]]]
    what = ", ".join(f"{name} {causes.count(name)}" for name in sorted(set(causes), key=causes.count, reverse=True))
    kept, end = ([run[key] for run in runs] for key in ("gold_kept", "gold_at_end"))
    shares = (f"{np.mean(values):.3f} (lowest {min(values):.3f})" for values in (kept, end))
    return (arm, str(len(runs)), str(len(alarmed)), steps or "-", what or "-", *shares)


if __name__ == "__main__":
    main()
