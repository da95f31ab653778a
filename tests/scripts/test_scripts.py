"""A policy, rewards and a recipe that a script gives to several Trainers: every run equals a first run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.config import Recipe, recipe_from_dict
from flowalign.config.base import UserError
from flowalign.policies.base import Policy
from flowalign.policies.loading import load_policy
from flowalign.trainer import Trainer
from flowalign.training.display import Display
from rewards import TrainableReward


class Moving(TrainableReward):
    """Brightness times a level that follows the pictures it has seen."""

    def __init__(self) -> None:
        self.level = torch.zeros(())

    def __call__(self, media: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        return media.flatten(1).mean(1) * (1 + self.level)

    def update(self, media: torch.Tensor, prompts: Any, metadata: Any, step: int) -> dict[str, float]:
        self.level = self.level + media.mean() / (step + 1)
        self.alarm = "it has learnt"
        return {"level": self.level.item()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"level": self.level}

    def load_state_dict(self, state: Any) -> None:
        self.level = state["level"]


def brightness(media: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
    return media.flatten(1).mean(1)


@pytest.fixture
def recipe(values: dict[str, Any], tmp_path: Path) -> Callable[..., Recipe]:
    """Makes a recipe of two steps whose run folder bears a name of its own."""
    values["train"] |= {"steps": 2, "updates_per_step": 1, "micro_batch": 8, "group_size": 2}
    values["evaluation"] = {"prompts": None}
    values["rollout"] = {"steps": 2, "batch": 4}

    def make(folder: str, **changes: Any) -> Recipe:
        return recipe_from_dict({**values, "run": {**values["run"], "folder": str(tmp_path / folder)}, **changes})

    return make


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowalign.trainer.write_report", lambda folder: folder / "report.html")


def run(recipe: Recipe, **given: Any) -> list[dict[str, Any]]:
    """Trains it; returns the lines of its metrics without what a clock says."""
    folder = Trainer.from_recipe(recipe, display=Display(quiet=True), **given).run()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("minutes", "seconds")} for line in lines]


def fresh(recipe: Recipe) -> Policy:
    return load_policy(recipe.model, "cpu", recipe.run.seed)


ALGORITHMS: dict[str, dict[str, Any]] = {
    "adapters": {},
    "all weights and an average": {
        "model": {"lora": None},
        "algorithm": {"name": "nft", "kl_weight": 1e-2},
        "train": {"ema_decay": 0.5},
    },
}


@pytest.mark.parametrize("changes", ALGORITHMS.values(), ids=ALGORITHMS)
def test_two_runs_of_one_policy_equal_runs_of_two_fresh_policies(
    values: dict[str, Any], recipe: Callable[..., Recipe], changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    merged = {key: {**values[key], **change} if key != "algorithm" else change for key, change in changes.items()}
    first, second = recipe("first", **merged), recipe("second", **merged)
    other = recipe("third", **{**merged, "train": {**values["train"], "ema_decay": None}})
    policy = fresh(first)
    wanted = run(first, policy=policy)
    assert wanted[1]["grad_norm"] > 0
    assert run(second, policy=policy) == wanted
    Trainer.from_recipe(other, policy=policy)  # which keeps no average, and must not evaluate the last run's
    assert "ema" not in policy.snapshots
    assert "this run begins with the weights from before that run" in capsys.readouterr().out


def test_a_policy_starts_from_the_weights_that_a_script_loads(recipe: Callable[..., Recipe]) -> None:
    policy = fresh(recipe("first"))
    tuned = {name: weight + 0.01 for name, weight in policy.trainable_state().items()}
    policy.load_trainable_state(tuned)
    wanted = run(recipe("first"), policy=policy)
    assert not all(torch.equal(tuned[name], weight) for name, weight in policy.trainable_state().items())
    assert run(recipe("second"), policy=policy) == wanted
    trained = policy.trainable_state()
    policy.load_trainable_state(trained)  # said aloud: go on from here
    Trainer.from_recipe(recipe("third"), policy=policy, display=Display(quiet=True))
    assert all(torch.equal(trained[name], weight) for name, weight in policy.trainable_state().items())


def test_a_recipe_and_rewards_that_learn_start_anew_in_every_run(recipe: Callable[..., Recipe]) -> None:
    marble = {"algorithm": {"name": "marble", "every": 3}, "rewards": {"moving": 1.0, "brightness": 1.0}}
    first = recipe("first", **marble)
    second = first.model_copy(update={"run": recipe("second").run})
    rewards = {"moving": Moving(), "brightness": brightness}
    wanted = run(first, rewards=rewards)
    assert rewards["moving"].level > 0  # type: ignore[union-attr]
    assert run(second, rewards=rewards) == wanted


def test_a_trainer_whose_policy_went_to_another_does_not_run_and_a_recipe_may_serve_several(
    recipe: Callable[..., Recipe],
) -> None:
    policy = fresh(recipe("first"))
    first = Trainer.from_recipe(recipe("first"), policy=policy, display=Display(quiet=True))
    Trainer.from_recipe(recipe("second"), policy=policy, display=Display(quiet=True))
    with pytest.raises(UserError, match="another Trainer was made with the same policy since"):
        first.run()
    shared = recipe("third")
    third = Trainer.from_recipe(shared, display=Display(quiet=True))
    fourth = shared.model_copy(update={"run": recipe("fourth").run})
    Trainer.from_recipe(fourth, display=Display(quiet=True)).run()
    assert third.run() == shared.folder


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            ["brightnes", "redness"],
            "given as 'brightnes', but recipe tiny has no reward of this name; did you mean 'brightness'",
        ),
        (["brightness"], r"trains on 'redness', which is not among the rewards given \(brightness\)"),
        ([], r"trains on 'brightness', which is not among the rewards given \(none\)"),
        (
            ["brightness", "redness", "Looks"],
            "given as 'Looks', but recipe tiny has no reward of this name; did you mean 'looks'",
        ),
    ],
)
def test_rewards_must_have_the_recipes_names(
    recipe: Callable[..., Recipe], given: list[str], sentence: str, tmp_path: Path
) -> None:
    named = recipe("run", rewards={"brightness": 1.0, "redness": 0.5}, guard={"rewards": {"looks": 1.0}})
    with pytest.raises(UserError, match=sentence):
        Trainer.from_recipe(named, rewards=dict.fromkeys(given, brightness))
    assert not (tmp_path / "run").exists()


def test_a_script_gives_measured_rewards_too_and_the_recipe_gives_the_weights(
    values: dict[str, Any], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    (tmp_path / "test.txt").write_text("a photo of nine stars\na photo of ten stars\n")
    named = recipe(
        "run",
        rewards={"first": 1.0, "second": 0.25},
        evaluation={"prompts": str(tmp_path / "test.txt"), "steps": 2, "rewards": {"measured": 1.0}},
        guard={"rewards": {"held_out": 1.0}},
    )
    given = {name: (lambda media, prompts, metadata: media.mean((1, 2, 3))) for name in ("measured", "second", "first")}
    trainer = Trainer.from_recipe(named, rewards={**given, "held_out": brightness}, display=Display(quiet=True))
    assert trainer.scorer.weights == {"first": 1.0, "second": 0.25}
    assert list(trainer.measuring.rewards) == ["measured", "first", "second", "held_out"]
    with pytest.raises(UserError, match=r"given as 'held_out' for guard.rewards is trained on"):
        Trainer.from_recipe(named, rewards={**given, "held_out": given["first"]})


def test_the_header_names_what_is_trained_on(recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]) -> None:
    named = recipe("run", rewards={"one": 1.0, "two": 0.0, "three": 0.5})
    Display().begin(named, named.folder, {"trainable": 1, "all": 2}, 1)
    assert "flow_grpo on one, three (only measured: two), " in capsys.readouterr().out
