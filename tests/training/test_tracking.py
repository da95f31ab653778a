"""The values that reach Accelerate's trackers, seen by a tracker of the test."""

import json
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker

from flowalign.config import recipe_from_dict
from flowalign.config.base import UserError
from flowalign.trainer import Trainer
from flowalign.training.display import Display
from flowalign.training.tracking import check_trackers


class Notebook(GeneralTracker):
    """Keeps the values that it is given."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> Any:
        return self.told

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.told.append((step, values))


def test_rewards_loss_metrics_and_evaluations_arrive(values: dict[str, Any]) -> None:
    values["train"]["steps"] = 2
    trainer = Trainer.from_recipe(recipe_from_dict(values), display=Display(quiet=True))
    notebook = Notebook()
    trainer.accelerator.trackers = [notebook]
    folder = trainer.run()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(step, told) for step, told in notebook.told if "loss" in told]
    assert [step for step, _ in steps] == [1, 2]
    for (_, told), line in zip(steps, lines, strict=True):
        assert told["loss"] == line["loss"]
        assert told["learning_rate"] == line["learning_rate"]
        assert told["reward/brightness"] == line["reward"]["brightness"]
        assert told["metrics/ratio_distance"] == line["metrics"]["ratio_distance"]
        assert told["seconds/rollout"] == line["seconds"]["rollout"]
        assert all(isinstance(value, float) for value in told.values())
    measured = {step: told["evaluation/brightness"] for step, told in notebook.told if "evaluation/brightness" in told}
    written = {step: json.loads((folder / f"evaluations/step_{step:06d}.json").read_text()) for step in (0, 2)}
    assert measured == {step: found["summary"]["brightness"]["mean"] for step, found in written.items()}


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed; install it with pip install 'flowalign\[wandb\]'"):
        check_trackers(["wandb"])
