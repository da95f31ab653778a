"""The training loop on a tiny model: it learns, resumes exactly, and says in one sentence what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flowalign.config import Recipe, recipe_from_dict
from flowalign.config.base import UserError
from flowalign.evaluate.evaluation import evaluate
from flowalign.policies.loading import load_policy
from flowalign.score import load_rewards
from flowalign.trainer import Trainer, train
from flowalign.training.display import Display
from rewards import RewardError


def changed(values: dict[str, Any], **sections: Any) -> Recipe:
    """The recipe with some keys of some sections changed."""
    merged = {**values}
    for name, section in sections.items():
        merged[name] = {**merged[name], **section} if isinstance(section, dict) and name != "rewards" else section
    return recipe_from_dict(merged)


def quiet_train(recipe: Recipe, **more: Any) -> Path:
    return train(recipe, display=Display(quiet=True), **more)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("minutes", "seconds")} for line in lines]


def means(folder: Path) -> list[float]:
    files = sorted((folder / "evaluations").glob("step_*.json"))
    return [json.loads(file.read_text())["summary"]["brightness"]["mean"] for file in files]


@pytest.mark.slow
def test_the_held_out_reward_rises(values: dict[str, Any]) -> None:
    folder = quiet_train(changed(values, train={"steps": 15, "group_size": 8}, evaluation={"every": 0}))
    before, after = means(folder)
    assert after > before + 0.01


def test_a_run_writes_metrics_images_weights_and_report(values: dict[str, Any]) -> None:
    folder = quiet_train(changed(values))
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]
    assert [file.name for file in sorted((folder / "samples").iterdir())] == [f"step_{n:06d}" for n in (0, 2, 4)]
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert "<html" in (folder / "report.html").read_text()
    info = json.loads((folder / "run.json").read_text())
    assert all(check["passed"] for check in info["self_test"])
    assert (
        info["versions"]["torch"] == torch.__version__.split("+")[0] or info["versions"]["torch"] == torch.__version__
    )
    assert not list(folder.rglob(".partial*"))


def test_the_first_ratio_is_one_and_forwards_are_counted(values: dict[str, Any]) -> None:
    recipe = changed(values, train={"updates_per_step": 1, "steps": 1}, algorithm={"kl_weight": 0.1})
    first = metrics(quiet_train(recipe))[0]
    assert first["metrics"]["ratio_distance"] < 1e-6
    assert first["metrics"]["kl"] < 1e-9
    assert first["forwards"] == 8 * 3 + 16 * 2  # a rollout of 3 steps, 16 items with their reference


def test_the_learning_rate_rises_over_the_warm_up(values: dict[str, Any]) -> None:
    train = {"steps": 3, "updates_per_step": 1, "warmup_updates": 4, "learning_rate": 1e-3}
    folder = quiet_train(changed(values, train=train, run={"checkpoint_every": 1, "keep_checkpoints": 3}))
    states = [json.loads(file.read_text()) for file in sorted(folder.glob("checkpoints/*/state.json"))]
    rates = [state["optimizer"][0]["lr"] for state in states]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3])


def test_micro_batches_do_not_change_the_update(values: dict[str, Any]) -> None:
    one = metrics(quiet_train(changed(values, train={"micro_batch": 100, "steps": 2})))
    many = metrics(
        quiet_train(
            changed(values, train={"micro_batch": 3, "steps": 2}, run={"folder": values["run"]["folder"] + "2"})
        )
    )
    for a, b in zip(one, many, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["reward"]["total"] == pytest.approx(b["reward"]["total"], rel=1e-4)


@pytest.mark.parametrize("lora", [{"rank": 4}, None])
def test_three_steps_and_three_resumed_equal_six(values: dict[str, Any], lora: object) -> None:
    base = {"model": {"lora": lora}, "train": {"ema_decay": 0.9, "steps": 6}}
    whole = quiet_train(changed(values, **base))
    place = {"folder": values["run"]["folder"] + "_parts"}
    short = {**base, "train": {**base["train"], "steps": 3}}
    quiet_train(changed(values, **short, run=place))
    parts = quiet_train(changed(values, **base, run=place), resume=True)
    assert metrics(whole) == metrics(parts)
    for name in ("weights", "snapshots", "optimizer"):
        file = Path("checkpoints", "step_000006", f"{name}.safetensors")
        a, b = load_file(whole / file), load_file(parts / file)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_metrics(values: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    values["train"]["steps"] = 8
    whole = quiet_train(changed(values))
    values["run"] = {**values["run"], "folder": str(tmp_path / "killed")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "flowalign", "train", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.exists() and lines.read_text().count("\n") >= 3):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL)
    assert metrics(tmp_path / "killed") == metrics(whole)
    assert means(tmp_path / "killed") == means(whole)


@pytest.mark.slow
def test_ctrl_c_ends_after_the_step_with_a_checkpoint(values: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    values["train"]["steps"] = 1000
    values["run"]["checkpoint_every"] = 1000
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "flowalign", "train", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = tmp_path / "run" / "metrics.jsonl"
    while not lines.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with --resume" in output
    assert "Traceback" not in output
    done = len(lines.read_text().splitlines())
    assert (tmp_path / "run" / "checkpoints" / f"step_{done:06d}").is_dir()


@pytest.mark.slow
def test_two_processes_run_the_same_recipe(values: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    one = metrics(quiet_train(changed(values, train={"steps": 2})))
    values["train"]["steps"] = 2
    values["run"]["folder"] = str(tmp_path / "two")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517"]
    script = Path(__file__).parents[2] / "scripts" / "train.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, str(script), str(tmp_path / "recipe.yaml")], check=True, env=environment, timeout=300)
    two = metrics(tmp_path / "two")
    assert two[0]["reward"]["total"] == pytest.approx(one[0]["reward"]["total"], rel=1e-5)
    assert two[0]["forwards"] == one[0]["forwards"]
    assert means(tmp_path / "two")[0] == pytest.approx(means(Path(values["run"]["folder"]).parent / "run")[0], rel=1e-5)


def test_groups_without_spread_teach_nothing_and_break_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    rewards = {"constant": {"load": f"{tmp_path / 'judge.py'}:constant"}}
    folder = quiet_train(changed(values, rewards=rewards, train={"steps": 2}))
    assert [line["zero_spread"] for line in metrics(folder)] == [1.0, 1.0]
    assert [line["grad_norm"] for line in metrics(folder)] == [0.0, 0.0]


def test_a_zero_spread_group_leaves_the_others_their_update(values: dict[str, Any], tmp_path: Path) -> None:
    half = (
        "def half(media, prompts, metadata):\n"
        "    return [float(m.mean()) if 'two' in p else 0.0 for m, p in zip(media, prompts)]\n"
    )
    (tmp_path / "half.py").write_text(half)
    rewards = {"half": {"load": f"{tmp_path / 'half.py'}:half"}}
    folder = quiet_train(changed(values, rewards=rewards, train={"steps": 2, "prompts_per_step": 4}))
    assert [line["zero_spread"] for line in metrics(folder)] == [0.75, 0.75]
    assert all(line["grad_norm"] > 0 for line in metrics(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "the judge is asleep"),
        ("nan", "not a finite number"),
        ("short", r"shape \(7,\) for 8 items|expected one score"),
        ("words", "returned a str"),
    ],
)
def test_a_broken_reward_is_an_error_that_names_it(
    values: dict[str, Any], tmp_path: Path, name: str, message: str
) -> None:
    rewards = {"broken": {"load": f"{tmp_path / 'judge.py'}:{name}"}}
    with pytest.raises(RewardError, match=message) as caught:
        quiet_train(changed(values, rewards=rewards, evaluation={"prompts": None}))
    assert name in str(caught.value)


def test_a_folder_with_another_run_is_refused(values: dict[str, Any]) -> None:
    recipe = changed(values, train={"steps": 1})
    quiet_train(recipe)
    with pytest.raises(UserError, match="already holds a run"):
        quiet_train(recipe)
    with pytest.raises(UserError, match=r"differing: train\.learning_rate \(0\.003 -> 0\.1\)"):
        quiet_train(changed(values, train={"steps": 1, "learning_rate": 0.1}), resume=True)


def test_a_folder_that_is_not_a_run_folder_is_left_alone(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a run folder"):
        quiet_train(changed(values))
    with pytest.raises(UserError, match="holds no run to resume"):
        quiet_train(changed(values), resume=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_damaged_checkpoint_is_named(values: dict[str, Any]) -> None:
    folder = quiet_train(changed(values, train={"steps": 2}))
    (folder / "checkpoints" / "step_000002" / "weights.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"checkpoint .*step_000002 cannot be used"):
        quiet_train(changed(values, train={"steps": 3}), resume=True)


def test_too_few_prompts_and_unfit_prompts_are_found_before_the_model(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"prompts_per_step \(5\) exceeds the 4 prompts"):
        Trainer.from_recipe(changed(values, train={"prompts_per_step": 5}, model={"path": "/none"}))
    with pytest.raises(UserError, match="cannot be judged by ocr"):
        Trainer.from_recipe(changed(values, rewards={"ocr": 1.0}, model={"path": "/none"}))


def test_a_gradient_that_is_not_finite_stops_the_run(values: dict[str, Any]) -> None:
    trainer = Trainer.from_recipe(changed(values), display=Display(quiet=True))
    trainer.tested = True
    with torch.no_grad():
        next(iter(trainer.policy.trainable_parameters().values())).fill_(float("nan"))
    with pytest.raises((UserError, RewardError), match=r"nan|NaN"):
        trainer.run()


def test_an_evaluation_repeats_itself(values: dict[str, Any]) -> None:
    recipe = changed(values)
    policy = load_policy(recipe.model)
    from flowalign.rollout.prompts import load_prompts

    rows = load_prompts(recipe.prompts)
    rewards = load_rewards(recipe.rewards, "cpu")
    first = evaluate(policy, rows, rewards, recipe.evaluation, policy.request)
    fewer = evaluate(policy, rows[2:], rewards, recipe.evaluation.model_copy(update={"batch": 1}), policy.request)
    a = [scores["brightness"] for scores in first.scores[2:]]
    assert a == pytest.approx([scores["brightness"] for scores in fewer.scores], rel=1e-4)
    assert first.images.shape == (2, 3, 64, 64)


def test_the_loss_trace_of_flow_grpo_is_unchanged(values: dict[str, Any]) -> None:
    """The losses equal those of an earlier version; the trace on disk holds them."""
    recipe = changed(
        values, algorithm={"kl_weight": 0.5}, train={"steps": 3, "inner_epochs": 2}, evaluation={"prompts": None}
    )
    kept = ("loss", "grad_norm")
    trace = [
        {**{key: line[key] for key in kept}, "reward": line["reward"]["total"], **line["metrics"]}
        for line in metrics(quiet_train(recipe))
    ]
    saved = json.loads((Path(__file__).parent / "traces" / "flow_grpo.json").read_text())
    assert len(trace) == len(saved)
    for line, expected in zip(trace, saved, strict=True):
        assert line == pytest.approx(expected, rel=1e-2, abs=1e-6)
