"""Datasets of groups: collected once and exactly, scored again without sampling, trained from, refused when unfit."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from flowalign.cli.app import main
from flowalign.cli.scoring import rescore_dataset
from flowalign.config import Model, Recipe, recipe_from_dict
from flowalign.config.base import UserError
from flowalign.policies.base import Policy
from flowalign.policies.loading import load_policy
from flowalign.policies.request import MediaRequest
from flowalign.rollout import dataset as offline
from flowalign.rollout.dataset import GroupDataset, collect
from flowalign.rollout.prompts import load_prompts
from flowalign.rollout.stages import Recorded, Share
from flowalign.score import load_rewards
from flowalign.trainer import Trainer, train
from flowalign.training.display import Display
from rewards import RewardError
from rewards.media import read_image

JUDGES = """
import torch
from rewards import Reward
def brightness(media, prompts, metadata):
    return media.flatten(1).mean(1)
def darkness(media, prompts, metadata):
    return 1 - media.flatten(1).mean(1)
class Two(Reward):
    def applies_to(self, row):
        return "two" in row["prompt"]
    def __call__(self, media, prompts, metadata):
        assert all("two" in prompt for prompt in prompts)
        return media[:, 0].flatten(1).mean(1)
class Nothing(Two):
    def applies_to(self, row):
        return False
class Whole(Reward):
    scope = "group"
    def __call__(self, media, prompts, metadata):
        assert all(prompts.count(prompt) == 4 for prompt in prompts)
        return media.flatten(1).mean(1)
def asleep(media, prompts, metadata):
    if "four" in prompts[0]:
        raise RuntimeError("the judge is asleep")
    return torch.zeros(len(media))
"""


class Killed(BaseException):
    """An exception that no code catches."""


def nothing(count: int) -> None:
    """Progress that is not shown."""


def stored_values(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe that collects 4 prompts x 4 samples in 2 shards and trains from them."""
    (folder / "judge.py").write_text(JUDGES)
    return {
        **values,
        "algorithm": {"name": "gdro", "beta": 10},
        "dataset": str(folder / "store"),
        "collect": {"group_size": 4, "shard_prompts": 2},
        "rollout": {"steps": 2, "batch": 8},
        "train": {**values["train"], "steps": 2, "micro_batch": 8},
        "evaluation": {},
    }


def changed(values: dict[str, Any], **sections: Any) -> Recipe:
    """The recipe with some keys of some sections changed."""
    merged = {**values}
    for name, section in sections.items():
        merged[name] = {**merged[name], **section} if isinstance(section, dict) and name != "rewards" else section
    return recipe_from_dict(merged)


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    """The tiny model, for tests that do not change it."""
    return load_policy(Model(path=str(tiny_model), height=64, width=64, dtype="fp32", max_sequence_length=0))


def collected(recipe: Recipe, policy: Policy, progress: Callable[[int], None] = nothing) -> GroupDataset:
    rows = load_prompts(recipe.prompts, recipe.collect.prompts)
    assert recipe.dataset
    return collect(recipe, Path(recipe.dataset), rows, load_rewards(recipe.rewards, "cpu"), policy, progress)


@pytest.fixture(scope="module")
def whole(
    tiny_values: Callable[[Path], dict[str, Any]], policy: Policy, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A dataset of 4 prompts, collected without a break; copy it before you change it."""
    folder = tmp_path_factory.mktemp("whole")
    collected(recipe_from_dict(stored_values(tiny_values(folder), folder)), policy)
    return folder / "store"


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plots take longer than the runs; tests/evaluate/test_report.py shows it."""
    monkeypatch.setattr("flowalign.trainer.write_report", lambda folder: folder / "report.html")


@pytest.fixture
def fresh(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe whose dataset is not collected yet."""
    return stored_values(values, tmp_path)


@pytest.fixture
def ready(fresh: dict[str, Any], whole: Path) -> dict[str, Any]:
    """A recipe with a dataset of its own."""
    shutil.copytree(whole, fresh["dataset"])
    return fresh


def quiet_train(recipe: Recipe, **more: Any) -> Path:
    return train(recipe, display=Display(quiet=True), **more)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("minutes", "seconds")} for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder; manifests without the times."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: re.sub(rb'"minutes": [^,]*', b"", data) for name, data in files.items()}


# Collecting


def test_a_dataset_holds_what_was_drawn_and_scored(whole: Path) -> None:
    dataset = GroupDataset.open(whole)
    assert [row.prompt for row in dataset.rows] == [f"a photo of {n} stars" for n in ("two", "three", "four", "a")]
    assert [load_file(path)["latents"].shape for path in sorted(whole.rglob("*.safetensors"))] == [
        (2, 4, 4, 16, 16)
    ] * 2
    assert dataset.rewards["brightness"].shape == (4, 4)
    assert len(np.unique(dataset.rewards["brightness"])) == 16
    image = read_image(whole / "shard_000001" / "media" / "0001_03.png")
    assert image.mean().item() == pytest.approx(dataset.rewards["brightness"][3, 3], abs=1 / 255)


def test_collecting_again_draws_only_what_is_missing(fresh: dict[str, Any], policy: Policy, whole: Path) -> None:
    drawn: list[int] = []
    collected(changed(fresh, collect={"prompts": 2}), policy, drawn.append)
    assert sum(drawn) == 2 * 4
    first = contents(Path(fresh["dataset"]))
    collected(changed(fresh), policy, drawn.append)
    assert sum(drawn) == 4 * 4
    collected(changed(fresh), policy, drawn.append)
    assert sum(drawn) == 4 * 4
    both = contents(Path(fresh["dataset"]))
    assert both == contents(whole)
    assert {name: both[name] for name in first if name != "manifest.json"}.items() <= first.items()


@pytest.mark.parametrize("samples", [0, 8])
def test_a_collection_killed_while_it_draws_ends_with_the_same_files(
    fresh: dict[str, Any], policy: Policy, whole: Path, samples: int
) -> None:
    left = samples

    def kill(count: int) -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= count

    with pytest.raises(Killed):
        collected(changed(fresh), policy, kill)
    assert len(GroupDataset.open(Path(fresh["dataset"]))) == samples // 4
    collected(changed(fresh), policy)
    assert contents(Path(fresh["dataset"])) == contents(whole)


@pytest.mark.parametrize("cut", ["_write_rewards", "_write_manifest"])
def test_a_collection_killed_while_it_writes_ends_with_the_same_files(
    fresh: dict[str, Any], policy: Policy, whole: Path, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill comes before the second shard is whole, or after that but before the manifest lists it."""
    calls, write = 0, getattr(offline, cut)

    def kill(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == (2 if cut == "_write_rewards" else 3):
            raise Killed
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(offline, cut, kill)
        with pytest.raises(Killed):
            collected(changed(fresh), policy)
    assert len(GroupDataset.open(Path(fresh["dataset"]))) == 2
    collected(changed(fresh), policy)
    assert contents(Path(fresh["dataset"])) == contents(whole)


@pytest.mark.slow
def test_a_killed_collection_is_completed_from_the_command_line(
    fresh: dict[str, Any], policy: Policy, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"{n} stars\n" for n in range(40)))
    fresh |= {"collect": {"group_size": 2, "shard_prompts": 1}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fresh))
    arguments = [sys.executable, "-m", "flowalign", "collect", str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "store" / "shard_000002").is_dir():
        assert process.poll() is None, "the collection ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert 2 <= len(GroupDataset.open(tmp_path / "store")) < 40
    command("collect", str(tmp_path / "recipe.yaml"))
    collected(changed(fresh, dataset=str(tmp_path / "unbroken")), policy)
    assert contents(tmp_path / "store") == contents(tmp_path / "unbroken")


def test_a_model_is_recognised_by_its_weights_not_by_its_path(
    fresh: dict[str, Any], policy: Policy, tiny_model: Path
) -> None:
    collected(changed(fresh, collect={"prompts": 2}), policy)
    assert len(collected(changed(fresh, model={"path": f"{tiny_model}/../tiny"}), policy)) == 4


def test_a_reward_may_have_any_name(fresh: dict[str, Any], policy: Policy) -> None:
    rewards = {"bright/../ness": {"load": f"{Path(fresh['dataset']).parent / 'judge.py'}:brightness"}}
    recipe = changed(fresh, rewards=rewards, collect={"prompts": 2})
    assert (
        list(collected(recipe, policy).rewards) == list(GroupDataset.open(Path(fresh["dataset"])).rewards) == [*rewards]
    )


# Training


def test_training_from_a_dataset_gives_the_same_numbers_every_time(ready: dict[str, Any], tmp_path: Path) -> None:
    kept = contents(Path(ready["dataset"]))
    first = metrics(quiet_train(changed(ready)))
    again = metrics(quiet_train(changed(ready, run={"folder": str(tmp_path / "again")})))
    assert first == again
    assert contents(Path(ready["dataset"])) == kept
    assert all(line["grad_norm"] > 0 for line in first)
    drawn, learnt = 16 * 2, 8 * 2 * 2  # 16 samples in 2 steps, once; 8 at 2 levels with the reference, every step
    assert [line["forwards"] for line in first] == [drawn + learnt, drawn + 2 * learnt]
    # 2 steps of 2 prompts go through the 4 prompts once, with all their samples.
    values = GroupDataset.open(Path(ready["dataset"])).rewards["brightness"]
    for name in ("total", "brightness"):
        assert np.mean([line["reward"][name] for line in first]) == pytest.approx(values.mean(), rel=1e-5)
    other = metrics(quiet_train(changed(ready, run={"folder": str(tmp_path / "other"), "seed": 1})))
    assert other[0]["loss"] != first[0]["loss"]


def test_a_run_from_a_dataset_resumes_exactly(ready: dict[str, Any], tmp_path: Path) -> None:
    whole = quiet_train(changed(ready, train={"steps": 3}))
    place = {"folder": str(tmp_path / "parts")}
    quiet_train(changed(ready, train={"steps": 1}, run=place))
    parts = quiet_train(changed(ready, train={"steps": 3}, run=place), resume=True)
    assert metrics(whole) == metrics(parts)
    file = Path("checkpoints", "step_000003", "weights.safetensors")
    a, b = load_file(whole / file), load_file(parts / file)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_full_fine_tuning_trains_from_a_dataset_that_adapters_drew(ready: dict[str, Any]) -> None:
    assert metrics(quiet_train(changed(ready, model={"lora": None}, train={"steps": 1})))[0]["grad_norm"] > 0


def test_groups_are_drawn_by_step_and_divided_whole_among_processes(ready: dict[str, Any], policy: Policy) -> None:
    recipe = changed(ready, train={"prompts_per_step": 4, "group_size": 2})
    dataset = GroupDataset.open(Path(ready["dataset"]))

    def drawn(step: int = 0, rank: int = 0, world: int = 1) -> Recorded:
        share = Share(4, 2, recipe.run.seed, rank, world)
        return dataset.draw(policy, recipe.rewards, policy.sigmas(4), share, step)

    everything = drawn()
    halves = [drawn(rank=rank, world=2) for rank in (0, 1)]
    assert torch.equal(torch.cat([half.latents for half in halves]), everything.latents)
    assert [row for half in halves for row in half.rows] == everything.rows
    assert everything.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted({row.prompt for row in everything.rows}) == sorted(row.prompt for row in dataset.rows)
    for place, (row, member) in enumerate(zip(everything.rows, everything.members, strict=True)):
        score = everything.scores["brightness"].values[place].item()
        assert score == pytest.approx(dataset.rewards["brightness"][row.index, member])
        shard, at = dataset.places[row.index]
        latents = load_file(dataset.path / f"shard_{shard:06d}" / "latents.safetensors")["latents"]
        assert torch.equal(everything.latents[place], latents[at, member])
    pairs = {tuple(drawn(step).members) for step in range(5)}
    assert len(pairs) == 5


def test_groups_whose_rewards_are_equal_teach_nothing_and_break_nothing(ready: dict[str, Any]) -> None:
    for file in Path(ready["dataset"]).rglob("brightness.json"):
        file.write_text(json.dumps([[0.5] * 4] * 2))
    trainer = Trainer.from_recipe(changed(ready), display=Display(quiet=True))
    lines = metrics(trainer.run())
    assert [line["zero_spread"] for line in lines] == [1.0, 1.0]
    assert trainer.idle.reason == "reward 'brightness' is 0.5 for every sample"
    assert [line["grad_norm"] for line in lines] == [0.0, 0.0]


# Scoring again


def test_a_new_reward_is_added_without_sampling_and_trained_with(ready: dict[str, Any], tmp_path: Path) -> None:
    path, judge = Path(ready["dataset"]), f"{tmp_path / 'judge.py'}"
    latents = {name: data for name, data in contents(path).items() if "rewards" not in name}
    added = rescore_dataset(path, f"{judge}:darkness", [], None)
    two = rescore_dataset(path, f"{judge}:Two", [], "reds")
    dataset = GroupDataset.open(path)
    assert set(dataset.rewards) == {"brightness", "darkness", "reds"}
    np.testing.assert_allclose(added, 1 - dataset.rewards["brightness"], atol=1 / 255)  # of 8-bit images
    np.testing.assert_array_equal(dataset.rewards["darkness"], added)
    np.testing.assert_array_equal(dataset.rewards["reds"], two)
    assert np.isfinite(two).tolist() == [[True] * 4, *[[False] * 4] * 3]
    now = contents(path)
    assert all(now[name] == data for name, data in latents.items() if name != "manifest.json")

    rewards = {"darkness": {"load": f"{judge}:darkness"}, "reds": {"load": f"{judge}:Two", "weight": 2.0}}
    line = metrics(quiet_train(changed(ready, rewards=rewards, train={"prompts_per_step": 4, "steps": 1})))[0]
    totals = np.where(np.isfinite(two), (added + 2 * np.nan_to_num(two)) / 3, added)
    assert line["reward"]["total"] == pytest.approx(totals.mean(), rel=1e-5)
    assert line["reward"]["reds"] == pytest.approx(two[0].mean(), rel=1e-5)
    assert line["grad_norm"] > 0


def test_a_dataset_with_a_new_reward_grows_when_the_recipe_has_it_too(
    fresh: dict[str, Any], policy: Policy, tmp_path: Path
) -> None:
    collected(changed(fresh, collect={"prompts": 2}), policy)
    judge = f"{tmp_path / 'judge.py'}:darkness"
    rescore_dataset(Path(fresh["dataset"]), judge, [], None)
    with pytest.raises(UserError, match=r"with rewards \['brightness', 'darkness'\], the recipe has \['brightness'\]"):
        collected(changed(fresh), policy)
    both = collected(changed(fresh, rewards={**fresh["rewards"], "darkness": {"load": judge}}), policy)
    assert both.rewards["darkness"].shape == (4, 4) and np.isfinite(both.rewards["darkness"]).all()


def test_a_reward_that_fails_half_way_leaves_the_dataset_as_it_was(ready: dict[str, Any], tmp_path: Path) -> None:
    path = Path(ready["dataset"])
    before = contents(path)
    with pytest.raises(RewardError, match="the judge is asleep"):
        rescore_dataset(path, f"{tmp_path / 'judge.py'}:asleep", [], None)
    assert contents(path) == before
    with pytest.raises(UserError, match="reward 'nothing' applies to no prompt of dataset"):
        rescore_dataset(path, f"{tmp_path / 'judge.py'}:Nothing", [], None)
    assert contents(path) == before


def test_a_reward_of_groups_sees_whole_groups(fresh: dict[str, Any], policy: Policy, tmp_path: Path) -> None:
    """A shard of 18 groups of 4 does not fit into one call."""
    (tmp_path / "prompts.txt").write_text("".join(f"{n} stars\n" for n in range(18)))
    collected(changed(fresh, collect={"shard_prompts": 18}, rollout={"steps": 1, "batch": 72}), policy)
    assert rescore_dataset(Path(fresh["dataset"]), f"{tmp_path / 'judge.py'}:Whole", [], None).shape == (18, 4)


# The command line


def command(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code in (0, None)


def test_the_command_line_collects_and_scores(
    fresh: dict[str, Any], tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fresh))
    command("collect", str(tmp_path / "recipe.yaml"))
    output = capsys.readouterr().out
    values = GroupDataset.open(whole).rewards["brightness"]
    assert "4 prompts" in output and f"{values.mean():.4f}" in output
    assert contents(tmp_path / "store") == contents(whole)
    command("score", f"{tmp_path / 'judge.py'}:darkness", "--dataset", str(tmp_path / "store"), "--name", "dark")
    output = " ".join(capsys.readouterr().out.split())
    assert "of 16 images; the scores are in" in output
    assert set(GroupDataset.open(tmp_path / "store").rewards) == {"brightness", "dark"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collect", "recipe.yaml", "dataset=null"], "the recipe names no dataset of groups; give dataset=FOLDER"),
        (["collect", "recipe.yaml", "algorithm=flow_grpo"], "flow_grpo learns from its own rollouts"),
        (["collect", "recipe.yaml", "rewards={ocr: 1}"], "cannot be judged by ocr"),
        (["collect", "recipe.yaml", "model.path=/no/model"], "'/no/model' does not exist"),
        (["collect", "recipe.yaml", "collect.group_size=1"], "collect.group_size should be greater than or equal to 2"),
        (["collect", "recipe.yaml", "dataset=judge.py"], "judge.py is not a dataset of groups"),
        (["collect", "recipe.yaml", "dataset=."], " is not a dataset of groups: its manifest.json cannot be read"),
        (["score", "judge.py:brightness", "--dataset", "store"], "has a reward 'brightness' already"),
        (["score", "judge.py:darkness", "--dataset", "."], ". is not a dataset of groups"),
        (["score", "judge.py:darkness", "--dataset", "store", "--images", "."], "leave --images, --prompts"),
        (["score", "judge.py:darkness", "--name", "dark"], "give --images or --dataset"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_loses_nothing(
    arguments: list[str],
    message: str,
    ready: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(ready))
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert error.startswith("error: ") and "\n" not in error
    assert message in error
    after = {name: data for name, data in contents(tmp_path).items() if "__pycache__" not in name}
    assert after == before


# What does not fit


def refused(recipe: Recipe, message: str) -> None:
    """Training is refused in one sentence; no run is begun and no file changes."""
    assert recipe.dataset
    before = contents(Path(recipe.dataset)) if Path(recipe.dataset).is_dir() else {}
    with pytest.raises(UserError, match=message) as caught:
        quiet_train(recipe)
    assert "\n" not in str(caught.value)
    assert not recipe.folder.exists()
    assert before == (contents(Path(recipe.dataset)) if Path(recipe.dataset).is_dir() else {})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"height": 32}}, r"holds images of 64 x 64 pixels, the recipe asks for 32 x 64"),
        ({"rewards": {"ocr": 1}}, r"lacks the reward 'ocr'; it has brightness \(`flowalign score ocr --dataset"),
        ({"train": {"group_size": 5}}, r"train.group_size \(5\) exceeds the 4 samples of each prompt in dataset"),
        ({"train": {"prompts_per_step": 5}}, r"train.prompts_per_step \(5\) exceeds the 4 prompts of dataset"),
        ({"dataset": "/no/store"}, "/no/store is not a dataset of groups: its manifest.json cannot be read"),
    ],
)
def test_a_recipe_that_asks_for_what_the_dataset_lacks_is_refused(
    sections: dict[str, Any], message: str, ready: dict[str, Any]
) -> None:
    refused(changed(ready, **sections), message)


def test_a_dataset_of_another_model_is_refused(ready: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = shutil.copytree(tiny_model, tmp_path / "other")
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"] = tensors["proj_out.bias"] + 0.5
    save_file(tensors, weights, {"format": "pt"})
    refused(changed(ready, model={"path": str(other)}), f"was collected with other weights .*{tiny_model.name}")


def write(file: str, text: str) -> Callable[[Path], None]:
    """Damage to a dataset: the file's new text."""
    return lambda dataset: (dataset / file).write_text(text) and None


def truncate(dataset: Path) -> None:
    file = dataset / "shard_000001" / "latents.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def in_manifest(key: str, value: Any) -> Callable[[Path], None]:
    def change(dataset: Path) -> None:
        manifest = json.loads((dataset / "manifest.json").read_text())
        (dataset / "manifest.json").write_text(json.dumps({**manifest, key: value}))

    return change


TABLE = "shard_000001/rewards/brightness.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "shard_000001 is torn or missing; collect again into another folder"),
        (lambda dataset: shutil.rmtree(dataset / "shard_000000"), "shard_000000 is torn or missing"),
        (write("shard_000001/rows.jsonl", '{"index": 2, "pro'), "shard_000001 is torn or missing"),
        (lambda dataset: (dataset / "shard_000001" / "rows.jsonl").unlink(), "shard_000001 is torn or missing"),
        (write(TABLE, "[[0, 0, 0, 0], [0, 0, NaN, 0]]"), "brightness.json: the reward of prompt 1, member 2 is nan"),
        (write(TABLE, "[[0, 0, 0, 0], [0, Infinity, 0, 0]]"), "the reward of prompt 1, member 1 is inf"),
        (write(TABLE, "[[0, 0, 0, 0], [0, 0, 0]]"), "brightness.json holds no table of rewards"),
        (write(TABLE, "[[0, 0, 0, 0]]"), r"brightness.json holds \(1, 4\) rewards; the manifest says \(2, 4\)"),
        (write(TABLE, '[["good", 0, 0, 0], [0, 0, 0, 0]]'), "brightness.json holds no table of rewards"),
        (write(TABLE, "[[0, 0"), "brightness.json holds no table of rewards"),
        (lambda dataset: (dataset / TABLE).unlink(), "shard_000001 lacks the reward 'brightness' of the manifest"),
        (write(TABLE, "[[null, null, null, null], [0, 1, 2, 3]]"), r"no reward .*applies to 'a photo of four stars'"),
        (in_manifest("format", 2), "has format 2; this version reads 1"),
        (write("manifest.json", "[]"), "has format None; this version reads 1"),
        (write("manifest.json", '{"format": '), "is not a dataset of groups: its manifest.json cannot be read"),
        (in_manifest("rewards", ["brightness", "ocr"]), "shard_000000 lacks the reward 'ocr' of the manifest"),
        (in_manifest("shards", []), r"train.prompts_per_step \(2\) exceeds the 0 prompts of dataset"),
    ],
)
def test_a_damaged_dataset_is_refused(damage: Callable[[Path], None], message: str, ready: dict[str, Any]) -> None:
    damage(Path(ready["dataset"]))
    refused(changed(ready), message)


def test_a_shard_whose_bytes_changed_is_not_learnt_from(ready: dict[str, Any]) -> None:
    file = Path(ready["dataset"]) / "shard_000001" / "latents.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    recipe = changed(ready, train={"prompts_per_step": 4})
    with pytest.raises(UserError, match="shard_000001 was changed since it was collected") as caught:
        quiet_train(recipe)
    assert "\n" not in str(caught.value)
    assert not (recipe.folder / "metrics.jsonl").exists() and not list((recipe.folder).rglob("step_*"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"collect": {"group_size": 3}}, "with group_size 4, the recipe has 3; choose another folder"),
        ({"rollout": {"steps": 3}}, "with sampler .*'steps': 2.*the recipe has .*'steps': 3"),
        (
            {"rollout": {"guidance": 2.0}, "train": {"guidance": 1.0}},
            "with sampler .*'guidance': 1.0.*the recipe has .*'guidance': 2.0",
        ),
        ({"run": {"seed": 5}}, "with seed 0, the recipe has 5"),
        ({"rewards": {"compressibility": 1}}, r"with rewards \['brightness'\], the recipe has \['compressibility'\]"),
    ],
)
def test_a_dataset_does_not_mix_with_samples_of_other_settings(
    sections: dict[str, Any], message: str, ready: dict[str, Any], policy: Policy
) -> None:
    before = contents(Path(ready["dataset"]))
    with pytest.raises(UserError, match=message):
        collected(changed(ready, **sections), policy)
    assert contents(Path(ready["dataset"])) == before


def test_a_dataset_does_not_mix_with_images_of_another_size(
    ready: dict[str, Any], policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(Path(ready["dataset"]))
    monkeypatch.setattr(policy, "request", MediaRequest(64, 32))
    with pytest.raises(UserError, match=r"with size \[64, 64\], the recipe has \[64, 32\]"):
        collected(changed(ready), policy)
    assert contents(Path(ready["dataset"])) == before


def test_a_dataset_does_not_mix_with_other_prompts_or_another_models_samples(
    ready: dict[str, Any], policy: Policy, tmp_path: Path
) -> None:
    before = contents(Path(ready["dataset"]))
    (tmp_path / "prompts.txt").write_text("a photo of two stars\na photo of five stars\n")
    with pytest.raises(UserError, match=r"another prompt 2 .'a photo of three stars', now 'a photo of five stars'"):
        collected(changed(ready), policy)
    weight = next(weight for name, weight in policy.transformer.named_parameters() if "lora" not in name)
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(0.5)
        with pytest.raises(UserError, match="was collected with other weights"):
            collected(changed(ready), policy)
    finally:
        weight.data.copy_(kept)
    assert contents(Path(ready["dataset"])) == before
