"""The time of a step: its floor and its trace."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.config import recipe_from_dict
from flowalign.preflight import step_time as timing
from flowalign.preflight.step_time import Backward, Decoding, Forward, Scoring, play, recorded, time_steps
from flowalign.trainer import Trainer
from flowalign.training.display import Display


def trainer_of(values: dict[str, Any], **changes: Any) -> Trainer:
    return Trainer.from_recipe(recipe_from_dict({**values, **changes}), display=Display(quiet=True))


def test_a_step_is_played_back_pass_by_pass(values: dict[str, Any]) -> None:
    trainer = trainer_of(values)
    trainer.tested = True
    with recorded(trainer) as passes:
        trainer._train_step()
    recipe = trainer.recipe
    forwards = [one for one in passes if isinstance(one, Forward)]
    rows = sum(len(one.keywords["hidden_states"]) for one in forwards)
    assert rows == trainer.policy.forwards
    learnt = sum(len(one.keywords["hidden_states"]) for one in forwards if one.gradient)
    assert learnt == recipe.items_per_step
    assert sum(isinstance(one, Backward) for one in passes) == -(-learnt // recipe.train.micro_batch)
    assert sum(len(one.latents) for one in passes if isinstance(one, Decoding)) == recipe.samples_per_step
    assert sum(len(one.media) for one in passes if isinstance(one, Scoring)) == recipe.samples_per_step

    calls: list[tuple[int, bool]] = []
    gradients: list[float] = []
    hook = trainer.policy.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((len(kwargs["hidden_states"]), torch.is_grad_enabled())), with_kwargs=True
    )
    weight = trainer.learner.parameters[-1]
    weight.register_post_accumulate_grad_hook(lambda w: gradients.append(w.grad.abs().sum().item()))
    before = trainer.policy.trainable_state()
    play(trainer, passes)
    hook.remove()
    assert calls == [(len(one.keywords["hidden_states"]), one.gradient) for one in forwards]
    assert len(gradients) == sum(isinstance(one, Backward) for one in passes) and all(gradients)
    assert weight.grad is None
    assert all(torch.equal(before[name], value) for name, value in trainer.policy.trainable_state().items())


def test_passes_without_adapters_are_played_without_them(values: dict[str, Any]) -> None:
    trainer = trainer_of(values, algorithm={"name": "flow_grpo", "kl_weight": 0.1})
    trainer.tested = True
    with recorded(trainer) as passes:
        trainer._train_step()
    seen: list[bool] = []
    trainer.policy.transformer.register_forward_pre_hook(lambda *_: seen.append(not trainer.policy._adapters_off))
    play(trainer, passes)
    assert seen == [one.adapters for one in passes if isinstance(one, Forward)]
    assert set(seen) == {True, False}


def test_a_recording_leaves_no_hooks_behind(values: dict[str, Any]) -> None:
    trainer = trainer_of(values)
    trainer.tested = True
    with pytest.raises(RuntimeError, match="in the step"), recorded(trainer):
        raise RuntimeError("in the step")
    with recorded(trainer):
        trainer._train_step()
    assert trainer.learner._backward == type(trainer.learner)._backward.__get__(trainer.learner)
    assert not trainer.policy.transformer._forward_pre_hooks
    assert trainer.policy.decode == type(trainer.policy).decode.__get__(trainer.policy)
    assert trainer.scorer.judge == type(trainer.scorer).judge.__get__(trainer.scorer)


def test_a_step_is_compared_with_the_floor_beside_it_and_warm_ups_are_left_out(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Step, floor, decoding and scores of a warm-up and three repeats, on a machine that slows down at the end.
    clock = iter((99, 1, 1, 1, 2, 1, 0.1, 0.2, 3, 2, 0.3, 0.1, 40, 10, 3, 2))

    def scripted(function: Callable[[], Any]) -> float:
        function()
        return next(clock)

    monkeypatch.setattr(timing, "seconds_of", scripted)
    found = time_steps(trainer_of(values), repeats=3)
    assert (found["step"], found["floor"], found["decode"], found["scores"]) == (3, 2, 0.3, 0.2)
    assert found["ratio"] == 2  # the median of 2, 1.5 and 4, not the ratio of the medians
    assert {"rollout", "reward", "train"} < set(found)


@pytest.mark.slow
def test_a_trace_of_the_second_step_is_written(values: dict[str, Any]) -> None:
    values["train"]["steps"] = 3
    recipe = recipe_from_dict(values)
    folder = Trainer.from_recipe(recipe, display=Display(quiet=True), profile=True).run() / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["step_000002.json.gz", "step_000002.txt"]
    events = json.loads(gzip.decompress((folder / "step_000002.json.gz").read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert {"rollout", "reward", "train", "backward"} <= set(names)
    assert names.count("train") == 1
    assert "aten::addmm" in (folder / "step_000002.txt").read_text()


@pytest.mark.slow
def test_the_only_step_of_a_run_is_traced(values: dict[str, Any], tmp_path: Path) -> None:
    values["train"]["steps"] = 1
    folder = Trainer.from_recipe(recipe_from_dict(values), display=Display(quiet=True), profile=True).run() / "profile"
    assert (folder / "step_000001.json.gz").is_file()


@pytest.mark.slow
def test_the_gpu_script_runs_to_its_end_with_a_tiny_model() -> None:
    script = Path(__file__).parents[2] / "scripts" / "bench_gpu.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--check", "--repeats", "1", "--no-compiled", "--backends", "native,xformers,_native_math"]
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    header, _, *rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == ["native", "_native_math"]
    assert {line.count("|") for line in (header, *rows)} == {14}
    assert "xformers: model.attention: xformers cannot run on cpu here" in done.stderr
