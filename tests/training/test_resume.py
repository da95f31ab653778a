"""Checkpoints: every run resumes exactly, whatever ended it; a damaged checkpoint is named, the older one is good."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flowalign.config import recipe_from_dict
from flowalign.config.base import UserError
from flowalign.disk.run_folder import RunFolder
from flowalign.trainer import Trainer
from flowalign.training.checkpoint import checkpoints
from flowalign.training.display import Display
from rewards import TrainableReward

JUDGES = """
def brightness(media, prompts, metadata):
    return media.flatten(1).mean(1)
def redness(media, prompts, metadata):
    return media[:, 0].flatten(1).mean(1)
"""


class Moving(TrainableReward):
    """Scores brightness, by a factor that grows with the images of each update."""

    def __init__(self) -> None:
        self.level = torch.zeros(())

    def __call__(self, media: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        return media.flatten(1).mean(1) * (1 + self.level)

    def update(self, media: torch.Tensor, prompts: Any, metadata: Any, step: int) -> dict[str, float]:
        self.level = self.level + media.mean() / (step + 1)
        return {"level": self.level.item()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"level": self.level}

    def load_state_dict(self, state: Any) -> None:
        self.level = state["level"]


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plots take longer than the runs."""
    monkeypatch.setattr("flowalign.trainer.write_report", lambda folder: folder / "report.html")


@pytest.fixture
def small(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe with two rewards that trains for a second and keeps all checkpoints."""
    (tmp_path / "judge.py").write_text(JUDGES)
    (tmp_path / "test.txt").write_text("a photo of two moons\na photo of five moons\n")
    rewards = {name: {"load": f"{tmp_path / 'judge.py'}:{name}"} for name in ("brightness", "redness")}
    train = {"steps": 4, "prompts_per_step": 2, "group_size": 2, "updates_per_step": 2, "micro_batch": 4}
    return {
        **values,
        "rewards": rewards,
        "rollout": {"steps": 2, "batch": 4},
        "train": {**train, "learning_rate": 3e-3, "warmup_updates": 3},
        "collect": {"group_size": 2, "shard_prompts": 4},
        "evaluation": {"prompts": None},
        "run": {**values["run"], "checkpoint_every": 2, "keep_checkpoints": 9},
    }


def trainer_of(values: dict[str, Any], *, resume: bool = False, moving: bool = False, **run: Any) -> Trainer:
    recipe = recipe_from_dict({**values, "run": {**values["run"], **run}})
    rewards = {"brightness": Moving(), "redness": Moving()} if moving else None
    return Trainer.from_recipe(recipe, resume=resume, display=Display(quiet=True), rewards=rewards)


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of the metrics without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("minutes", "seconds")} for line in lines]


def evaluations(folder: Path) -> dict[str, Any]:
    found = {file.name: json.loads(file.read_text()) for file in folder.glob("evaluations/*.json")}
    return {
        name: {key: value for key, value in contents.items() if key not in ("minutes", "seconds")}
        for name, contents in found.items()
    }


def kept(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint and of the exported weights, by file and name."""
    files = [*checkpoints(folder / "checkpoints")[-1].glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    files += folder.glob("lora/transformer/*.safetensors")
    return {f"{file.relative_to(folder)}: {name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(whole: Path, parts: Path) -> None:
    assert logged(parts) == logged(whole)
    assert evaluations(parts) == evaluations(whole)
    one, other = kept(whole), kept(parts)
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)
    state = [
        json.loads((checkpoints(folder / "checkpoints")[-1] / "state.json").read_text()) for folder in (whole, parts)
    ]
    for one_state in state:
        one_state["counters"].pop("minutes")
    assert state[0] == state[1]


def stopped_after(whole: Path, steps: int, place: Path) -> Path:
    """A copy of a run folder whose last checkpoint is that of `steps`, as after a kill at a later step."""
    shutil.copytree(whole, place, ignore=shutil.ignore_patterns("lora"))
    for path in checkpoints(place / "checkpoints"):
        if int(path.name.removeprefix("step_")) > steps:
            shutil.rmtree(path)
    return place


GUARD = {"seeds": 2, "kl_samples": 2, "false_alarm": 0.2}
SETTINGS: dict[str, dict[str, Any]] = {
    "flow_grpo": {"algorithm": {"name": "flow_grpo", "clip_range": 1e-2, "kl_weight": 0.1}},
    "nft": {"algorithm": {"name": "nft", "kl_weight": 1e-2, "old_decay": {"slope": 0.1, "last": 0.5}}},
    "crd": {"algorithm": {"name": "crd", "kl_weight": 1e-2}},
    "prdp": {"algorithm": {"name": "prdp", "beta": 0.1}},
    "marble": {"algorithm": {"name": "marble", "every": 3}},
    "gdro": {"algorithm": {"name": "gdro", "beta": 10, "timesteps": 1}},
    "all weights, an average": {"model": {"lora": None}, "algorithm": {"name": "nft"}, "train": {"ema_decay": 0.9}},
    "rewards that learn": {"algorithm": {"name": "nft"}},
    "a guard": {"algorithm": {"name": "nft"}, "guard": GUARD},
}


ELSEWHERE_TOO = (
    "gdro",
    "all weights, an average",
    "rewards that learn",
    "a guard",
)  # other files have faster tests of these


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ELSEWHERE_TOO else ()) for name in SETTINGS]
)
def test_four_steps_are_two_and_two_resumed(small: dict[str, Any], name: str, tmp_path: Path) -> None:
    values = small | {key: {**(small.get(key) or {}), **value} for key, value in SETTINGS[name].items()}
    values["algorithm"] = SETTINGS[name]["algorithm"]
    if name == "gdro":
        values["dataset"] = str(tmp_path / "store")
        collected(values)
    if name == "a guard":
        values["evaluation"] = {"prompts": str(tmp_path / "test.txt"), "steps": 2, "every": 1, "images_per_prompt": 2}
    moving = name == "rewards that learn"
    whole = trainer_of(values, moving=moving).run()
    place = stopped_after(whole, 2, tmp_path / "parts")
    second = trainer_of(values, resume=True, moving=moving, folder=str(place))
    assert second.step == 2
    if second.guarding:
        assert second.guarding.bands and second.guarding.best
    assert_same(whole, second.run())


def collected(values: dict[str, Any]) -> None:
    from flowalign.policies.loading import load_policy
    from flowalign.rollout.dataset import collect
    from flowalign.rollout.prompts import load_prompts
    from flowalign.score import load_rewards

    recipe = recipe_from_dict(values)
    policy = load_policy(recipe.model)
    rows = load_prompts(recipe.prompts)
    collect(recipe, Path(values["dataset"]), rows, load_rewards(recipe.rewards, "cpu"), policy, lambda count: None)


@pytest.fixture
def two_steps(small: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose run has written two checkpoints into its folder."""
    small["train"] |= {"steps": 2, "updates_per_step": 1}
    small["run"] |= {"checkpoint_every": 1}
    trainer_of(small).run()
    return small


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit(file: Path) -> None:
    """Flip a bit near the end: in a safetensors file that is data, which the header does not check."""
    contents = bytearray(file.read_bytes())
    contents[-2] ^= 1
    file.write_bytes(contents)


def test_a_damaged_checkpoint_is_named_and_the_older_one_is_good(two_steps: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(two_steps["run"]["folder"])
    trainer = trainer_of(two_steps, resume=True)  # the model loads once for all damages
    last = checkpoints(folder / "checkpoints")[-1]
    good = shutil.copytree(last, tmp_path / "good")
    names = [path.name for path in last.iterdir()]
    assert len(names) == 7  # weights, snapshots, optimizer, algorithm, rewards, counters, checksums
    for damage in (truncate, Path.unlink, empty, flip_a_bit):
        for name in names:
            damage(last / name)
            with pytest.raises(UserError, match=rf"checkpoint {last} cannot be used .*remove that folder") as caught:
                trainer._resume()
            assert "\n" not in str(caught.value)
            assert re.search(rf"\b{name}\b", str(caught.value))
            shutil.copytree(good, last, dirs_exist_ok=True)
    shutil.rmtree(last)
    trainer._resume()
    assert trainer.step == 1


def test_the_last_checkpoints_and_the_best_weights_are_kept(small: dict[str, Any], tmp_path: Path) -> None:
    small["train"] |= {"steps": 3, "updates_per_step": 1}
    small["run"] |= {"checkpoint_every": 1, "keep_checkpoints": 2}
    small["guard"] = GUARD
    small["evaluation"] = {"prompts": str(tmp_path / "test.txt"), "steps": 2, "every": 1, "images_per_prompt": 2}
    folder = trainer_of(small).run()
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step_000002", "step_000003"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    proxies = {found["step"]: found["audit"]["proxy"] for found in evaluations(folder).values()}
    best = json.loads((folder / "best" / "evaluation.json").read_text())
    assert best["step"] == max(proxies, key=lambda step: proxies[step])
    assert (folder / "best" / "pytorch_lora_weights.safetensors").is_file()
    # A run killed after its last evaluation does not repeat the evaluation, nor count its alarms twice.
    times = {file: file.stat().st_mtime_ns for file in folder.glob("evaluations/*.json")}
    shutil.rmtree(folder / "lora")
    trainer = trainer_of(small, resume=True)
    assert trainer.guarding
    alarms_in_a_row = trainer.guarding.in_a_row
    trainer.run()
    assert {file: file.stat().st_mtime_ns for file in folder.glob("evaluations/*.json")} == times
    assert trainer.guarding.in_a_row == alarms_in_a_row
    assert (folder / "lora").is_dir()


# The disk


def test_a_full_disk_is_reported_and_the_older_checkpoint_is_good(small: dict[str, Any]) -> None:
    small["run"] |= {"checkpoint_every": 1}
    trainer = trainer_of(small)
    folder = trainer.run_folder.checkpoints
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint = trainer._checkpoint

    def full_from_the_second() -> None:
        if trainer.step > 1:
            weights = folder / "step_000001" / "optimizer.safetensors"
            resource.setrlimit(resource.RLIMIT_FSIZE, (weights.stat().st_size // 2, before[1]))
        checkpoint()

    trainer._checkpoint = full_from_the_second  # type: ignore[method-assign]
    try:
        with pytest.raises(
            UserError, match=r"cannot write a checkpoint to .*the last good one is step_000001"
        ) as caught:
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["step_000001"]
    again = trainer_of(small, resume=True)
    assert again.step == 1
    again.run()
    assert len(logged(folder.parent)) == 4


def test_a_full_disk_is_reported_for_files_other_than_checkpoints(small: dict[str, Any], monkeypatch: Any) -> None:
    def full(run: RunFolder, values: Any) -> None:
        raise OSError(28, "No space left on device", str(run.metrics))

    monkeypatch.setattr(RunFolder, "log_step", full)
    with pytest.raises(UserError, match=r"cannot write to .*metrics.jsonl: No space left on device; make room"):
        trainer_of(small).run()


def test_a_place_that_cannot_hold_a_folder_is_reported(small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to run folder .*Not a directory"):
        trainer_of(small, folder=str(tmp_path / "file" / "run"))
    trainer = trainer_of(small)
    trainer.run_folder.checkpoints.write_text("")
    with pytest.raises(UserError, match=r"cannot write a checkpoint to .*there is none yet"):
        trainer.run()


def test_files_that_a_kill_left_half_written_do_not_block_a_run(small: dict[str, Any]) -> None:
    folder = Path(small["run"]["folder"])
    folder.mkdir()
    (folder / ".partial_recipe.yaml").write_text("name: ti")
    small["train"] |= {"steps": 1}
    (folder / "checkpoints" / ".partial_step_000009").mkdir(parents=True)
    with pytest.raises(UserError, match="exists and is not a run folder"):
        trainer_of(small)
    shutil.rmtree(folder / "checkpoints")
    trainer = trainer_of(small)
    (folder / "checkpoints" / ".partial_step_000009").mkdir(parents=True)
    trainer.run()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000001"]


# Kills


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_like_the_unbroken_run(small: dict[str, Any], tmp_path: Path) -> None:
    small["guard"] = GUARD
    small["evaluation"] = {"prompts": str(tmp_path / "test.txt"), "steps": 2, "every": 2, "images_per_prompt": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small))
    script = Path(__file__).parents[2] / "scripts" / "kill_test.py"
    command = [sys.executable, str(script), str(tmp_path / "recipe.yaml"), "--kills", "6"]
    found = subprocess.run(
        [*command, "--folder", str(tmp_path / "kills")], capture_output=True, text=True, check=False, timeout=900
    )
    assert found.returncode == 0, found.stdout + found.stderr
    said = found.stdout.splitlines()[-1]
    assert re.fullmatch(r"6 kills, at most [012] steps lost, \d+ runs ended like the unbroken one", said)
