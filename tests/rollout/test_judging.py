"""Rewards in a run: scored while samples are drawn, shaped, combined, trained with the policy, resumed exactly."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rewards
from flowalign.cli.scoring import collect_recipe, evaluate_recipe, score_images
from flowalign.config import Recipe, recipe_from_dict
from flowalign.config.base import UserError
from flowalign.disk.run_folder import RunFolder
from flowalign.score import Scorer
from flowalign.trainer import Trainer
from flowalign.training.display import Display
from rewards import Reward, RewardError, TrainableReward
from rewards.combine import Scores

PROMPTS = ["a photo of two stars", "a photo of a red ring"]


class Level(Reward):
    """The mean of one channel."""

    def __init__(self, channel: int = 0):
        self.channel = channel
        self.threads: set[str] = set()
        self.batches: list[int] = []

    def __call__(
        self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        self.threads.add(threading.current_thread().name)
        self.batches.append(len(media))
        return media[:, self.channel].flatten(1).mean(1)


class Moving(TrainableReward):
    """Scores brightness, by a factor that grows with the images of each update."""

    def __init__(self) -> None:
        self.level = torch.zeros(())
        self.steps: list[int] = []

    def __call__(
        self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        return media.flatten(1).mean(1) * (1 + self.level)

    def update(
        self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], step: int
    ) -> dict[str, float]:
        self.steps.append(step)
        self.level = self.level + media.mean() / (step + 1)
        self.alarm = "level too high" if self.level > 0.6 else None
        return {"level": self.level.item()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"level": self.level}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self.level = state["level"]


@pytest.fixture
def values(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return {
        "name": "judged",
        "model": {"path": str(tiny_model), "height": 64, "width": 64, "dtype": "fp32", "max_sequence_length": 0},
        "prompts": str(tmp_path / "prompts.txt"),
        "rewards": {"first": {"load": "colorfulness"}},
        "algorithm": {"name": "nft", "timesteps": 1},
        "rollout": {"steps": 2, "schedule": "uniform", "batch": 2},
        "train": {"steps": 2, "prompts_per_step": 2, "group_size": 3, "updates_per_step": 1, "micro_batch": 6},
        "evaluation": {"prompts": None},
        "run": {"folder": str(tmp_path / "run"), "checkpoint_every": 1},
    }


def trained(values: dict[str, Any], rewards: Mapping[str, Reward], *, resume: bool = False, **train: Any) -> Trainer:
    named = {name: values["rewards"].get(name, 1.0) for name in rewards}
    recipe = recipe_from_dict({**values, "rewards": named, "train": {**values["train"], **train}})
    trainer = Trainer.from_recipe(recipe, resume=resume, display=Display(quiet=True), rewards=rewards)
    trainer.run()
    return trainer


def lines(values: dict[str, Any]) -> list[dict[str, Any]]:
    text = (Path(values["run"]["folder"]) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_images_are_scored_batch_by_batch_on_a_thread_while_others_are_drawn(values: dict[str, Any]) -> None:
    reward = Level()
    trained(values, {"level": reward}, steps=1)
    assert reward.batches == [2, 2, 2]
    assert threading.current_thread().name not in reward.threads


def test_a_reward_for_groups_gets_the_images_of_a_prompt_together(values: dict[str, Any]) -> None:
    reward = Level()
    reward.scope = "group"
    trained({**values, "rollout": {**values["rollout"], "batch": 4}}, {"level": reward}, steps=1)
    assert reward.batches == [3, 3]


def test_a_reward_that_fails_on_its_thread_ends_the_run_with_its_error(values: dict[str, Any]) -> None:
    def failing(media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
        return [float("nan")] * len(media)

    with pytest.raises(RewardError, match=r"scored item 0 .* as nan"):
        trained(values, {"failing": failing})  # type: ignore[dict-item]


def test_rewards_learn_after_each_step_and_are_resumed_exactly(values: dict[str, Any], tmp_path: Path) -> None:
    whole = trained({**values, "run": {**values["run"], "folder": str(tmp_path / "whole")}}, {"moving": Moving()})
    trained(values, {"moving": Moving()}, steps=1)
    again = Moving()
    rest = trained(values, {"moving": again}, resume=True)
    assert again.steps == [1]
    kept = [trainer.scorer.rewards["moving"].state_dict()["level"] for trainer in (whole, rest)]  # type: ignore[attr-defined]
    assert torch.equal(*kept)
    weights = [trainer.policy.trainable_state() for trainer in (whole, rest)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    saved = load_file(Path(values["run"]["folder"]) / "checkpoints" / "step_000002" / "rewards.safetensors")
    assert torch.equal(saved["moving/level"], kept[0])


def test_the_metrics_and_alarms_of_a_learning_reward_are_logged(values: dict[str, Any]) -> None:
    trained(values, {"moving": Moving()})
    logged = lines(values)
    assert logged[0]["rewards_learnt"]["moving"]["level"] < logged[1]["rewards_learnt"]["moving"]["level"]
    assert [line["alarms"] for line in logged] == [[], ["reward 'moving': level too high"]]


def judging(values: dict[str, Any], **changes: Any) -> Scorer:
    recipe: Recipe = recipe_from_dict({**values, **changes})
    return Scorer(recipe, {name: Level() for name in recipe.rewards}, "cpu")


def both(first: list[float], second: list[float]) -> dict[str, Scores]:
    every = torch.ones(len(first), dtype=torch.bool)
    return {"first": Scores(torch.tensor(first), every), "second": Scores(torch.tensor(second), every)}


TWO = {"first": 1.0, "second": 1.0}


@pytest.mark.parametrize(
    ("combine", "total"),
    [
        ({}, [0.5, 0.5]),
        ({"form": "worst"}, [0.0, 0.5]),
        ({"form": "uncertainty", "penalty": 2.0}, [0.0, 0.5]),
        ({"form": "bonus", "base": "first", "bonus": "second"}, [0.4, 0.5 * 0.7]),
    ],
)
def test_a_recipe_says_how_rewards_are_combined(
    values: dict[str, Any], combine: dict[str, Any], total: list[float]
) -> None:
    scored = judging(values, rewards=TWO, combine=combine).scored(both([1.0, 0.5], [0.0, 0.5]), PROMPTS)
    torch.testing.assert_close(scored.total, torch.tensor(total))


def test_disagreement_weighs_advantages_and_not_rewards(values: dict[str, Any]) -> None:
    scored = judging(values, rewards=TWO, combine={"disagreement": 1.0}).scored(both([1.0, 0.5], [0.0, 0.5]), PROMPTS)
    torch.testing.assert_close(scored.total, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(scored.trust, torch.tensor([0.5, 0.0]).neg().exp())


def test_a_shaped_reward_trains_shaped_and_is_measured_unshaped(values: dict[str, Any]) -> None:
    shaping = {"form": "sigmoid", "scale": 4.0, "reference": [0.5]}
    rewards = {"first": {"load": "colorfulness", "shaping": shaping}}
    scores = {"first": Scores(torch.tensor([0.5, 0.75]), torch.tensor([True, True]))}
    scored = judging(values, rewards=rewards).scored(scores, PROMPTS)
    torch.testing.assert_close(scored.total, torch.tensor([0.0, 1.0]).sigmoid())
    assert scored.measured is not None
    torch.testing.assert_close(scored.measured[0], torch.tensor([0.5, 0.75]))


@pytest.mark.parametrize(
    "shaping",
    [
        {"form": "sigmoid", "scale": 1e308, "reference": [0.5]},  # infinity times 0
        {"form": "log_sigmoid", "reference": [1e300, -1e300]},
    ],
)
def test_a_shaping_that_turns_a_score_into_nan_is_an_error_and_leaves_no_image_out(
    values: dict[str, Any], shaping: dict[str, Any]
) -> None:
    judge = judging(values, rewards={"first": {"load": "colorfulness", "shaping": shaping}})
    scores = {"first": Scores(torch.tensor([0.5, 0.75]), torch.tensor([True, True]))}
    with pytest.raises(UserError, match=r"rewards\.first\.shaping: .* of scores from 0\.5 to 0\.75 is not finite"):
        judge.scored(scores, PROMPTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"combine": {"form": "worst", "floor": 0.5}}, "floor belongs to form bonus, not to worst"),
        ({"combine": {"form": "bonus", "base": "first"}}, "combine.bonus is missing; form bonus needs it"),
        ({"combine": {"form": "bonus", "base": "first", "bonus": "first"}}, "needs two rewards, base and bonus"),
        ({"combine": {"form": "wrst"}}, "combine.form should be 'sum', 'worst', 'uncertainty' or 'bonus', not 'wrst'"),
        ({"combine": {"flor": 0.5}}, "unknown key 'combine.flor'; did you mean 'floor'"),
        ({"rewards": {"first": {"shaping": {"reference": [1]}}}}, "rewards.first.shaping.form is missing"),
        ({"combine": {"form": "bonus", "base": "first", "bonus": "secnd"}}, "no reward 'secnd'.*'second'"),
        ({"combine": {"disagreement": 1.0}, "rewards": {"first": 1.0}}, "needs two rewards or more"),
        ({"combine": {"form": "worst"}, "algorithm": {"name": "marble"}}, "marble takes each reward by itself"),
        (
            {"evaluation": {"rewards": {"first": {"shaping": {"form": "sigmoid", "reference": [1]}}}}},
            "an evaluation measures rewards as they are",
        ),
        (
            {"rewards": {"first": {"shaping": {"form": "sigmoid", "reference": []}}}},
            "rewards.first.shaping.reference",
        ),
        (
            {"rewards": {"first": {"shaping": {"form": "standardise", "reference": [1, 1]}}}},
            "standardise needs references that differ",
        ),
        (
            {"rewards": {"first": {"shaping": {"form": "sigmoid", "quantile": 0.5, "reference": [1]}}}},
            "quantile belongs to form log_sigmoid",
        ),
    ],
)
def test_a_mistake_in_shaping_or_combination_is_one_sentence(
    values: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        recipe_from_dict({**values, "rewards": TWO, **changes})


def serving(port: int) -> subprocess.Popen[str]:
    """`flowalign serve` in its own process; it is ready once its first line is printed."""
    command = [sys.executable, "-m", "flowalign", "serve", "colorfulness", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and "serving colorfulness" in process.stdout.readline()
    return process


@pytest.mark.slow
def test_a_run_waits_for_its_reward_server_and_goes_on(values: dict[str, Any], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    elsewhere = {**values, "run": {**values["run"], "folder": str(tmp_path / "local")}}
    local = trained(elsewhere, {"colorfulness": rewards.load("colorfulness")})
    server = serving(port)
    remote = rewards.load(f"http://127.0.0.1:{port}/colorfulness", patience=60)
    killed: list[subprocess.Popen[str]] = []

    def kill_and_start_again() -> None:
        server.kill()
        server.wait()
        killed.append(serving(port))

    class Interrupting(Reward):
        range = remote.range
        asked = 0

        def __call__(
            self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
        ) -> torch.Tensor:
            self.asked += 1
            if self.asked == 3:  # in the middle of the first step
                threading.Thread(target=kill_and_start_again).start()
                server.wait()
            return remote(media, prompts, metadata)

    try:
        served = trained(values, {"colorfulness": Interrupting()})
    finally:
        for process in (server, *killed):
            process.kill()
    assert len(killed) == 1
    ends = [trainer.policy.trainable_state() for trainer in (local, served)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_is_evaluated_with_the_learnt_state_of_its_rewards(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "moving.py").write_text(
        "import torch\n"
        "from rewards import TrainableReward\n"
        "class Moving(TrainableReward):\n"
        "    level = torch.zeros(())\n"
        "    def __call__(self, media, prompts, metadata):\n"
        "        return self.level + 0.001 * media.flatten(1).mean(1)\n"
        "    def update(self, media, prompts, metadata, step):\n"
        "        self.level = self.level + 1\n"
        "        return {}\n"
        "    def state_dict(self):\n"
        "        return {'level': self.level}\n"
        "    def load_state_dict(self, state):\n"
        "        self.level = state['level']\n"
    )
    settings = {"prompts": values["prompts"], "steps": 2, "every": 0}
    recipe = {
        **values,
        "rewards": {"moving": {"load": f"{tmp_path / 'moving.py'}:Moving"}},
        "evaluation": settings,
        "guard": None,
    }
    Trainer.from_recipe(recipe_from_dict(recipe), display=Display(quiet=True)).run()
    run, _ = RunFolder.open(Path(values["run"]["folder"]))
    _, summary = evaluate_recipe(recipe_from_dict(recipe), run, "cpu")
    assert summary["moving"]["mean"] == pytest.approx(2.0, abs=0.01)  # as after both steps
    with pytest.raises(UserError, match="'moving' learns during training and cannot score before it"):
        evaluate_recipe(recipe_from_dict(recipe), None, "cpu")


LEARNER = (
    "import torch\n"
    "from rewards import TrainableReward\n"
    "class Learner(TrainableReward):\n"
    "    def __call__(self, media, prompts, metadata):\n"
    "        return torch.zeros(len(media))\n"
    "    def update(self, media, prompts, metadata, step):\n"
    "        return {}\n"
    "    def state_dict(self):\n"
    "        return {}\n"
    "    def load_state_dict(self, state):\n"
    "        pass\n"
)


def test_a_learning_reward_without_a_run_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "learner.py").write_text(LEARNER)
    spec, dataset = f"{tmp_path / 'learner.py'}:Learner", str(tmp_path / "store")
    offline = {**values, "algorithm": "gdro", "rewards": {"learner": {"load": spec}}, "dataset": dataset}
    with pytest.raises(UserError, match=r"'learner' learns during training .* a dataset has fixed scores"):
        Scorer(recipe_from_dict(offline), None, "cpu")
    with pytest.raises(UserError, match=r"'learner' learns during training .* collect with other rewards"):
        collect_recipe(recipe_from_dict(offline), "cpu")
    with pytest.raises(UserError, match=r"'learner' learns during training .* name it in a recipe"):
        score_images(spec, [], [], [])


def test_base_and_bonus_must_apply_to_every_prompt(values: dict[str, Any]) -> None:
    class Picky(Level):
        def applies_to(self, row: Mapping[str, Any]) -> bool:
            return "ring" not in row["prompt"]

    recipe = recipe_from_dict(
        {**values, "rewards": TWO, "combine": {"form": "bonus", "base": "first", "bonus": "second"}}
    )
    with pytest.raises(UserError, match="reward 'second' does not apply to 'a photo of a red ring'"):
        Trainer.from_recipe(recipe, display=Display(quiet=True), rewards={"first": Level(), "second": Picky()})
