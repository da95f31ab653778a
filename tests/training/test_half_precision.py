"""Half precision scales losses and skips updates whose gradients overflow; NaN and infinity are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flowalign.config import Recipe, recipe_from_dict
from flowalign.config.base import UserError
from flowalign.policies.loading import load_policy
from flowalign.rollout.generate import rollout
from flowalign.rollout.stages import RolloutRequest
from flowalign.trainer import Trainer
from flowalign.training.display import Display
from rewards import RewardError


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowalign.trainer.write_report", lambda folder: folder / "report.html")


@pytest.fixture
def make(values: dict[str, Any], tmp_path: Path) -> Callable[..., Recipe]:
    """Makes a recipe of two denoising steps without an evaluation."""

    def _make(algorithm: str | dict[str, Any], dtype: str = "fp16", folder: str = "run", **train: Any) -> Recipe:
        brightness = {"load": f"{tmp_path / 'judge.py'}:brightness"}
        rewards = {"one": brightness} if algorithm != "marble" else {"one": brightness, "two": brightness}
        return recipe_from_dict(
            {
                **values,
                "model": {**values["model"], "dtype": dtype},
                "algorithm": algorithm,
                "rewards": rewards,
                "rollout": {"steps": 2, "batch": 8},
                "train": {**values["train"], "steps": 2, "micro_batch": 8, "updates_per_step": 1, **train},
                "evaluation": {"prompts": None},
                "run": {"folder": str(tmp_path / folder), "checkpoint_every": 1},
            }
        )

    return _make


class Said(Display):
    """Keeps what a run says."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, *texts: str) -> None:
        self.said += texts


def lines(recipe: Recipe) -> list[dict[str, Any]]:
    kept = [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("minutes", "seconds")} for line in kept]


def checkpoint(recipe: Recipe, step: int) -> dict[str, torch.Tensor]:
    files = (recipe.folder / "checkpoints" / f"step_{step:06d}").glob("*.safetensors")
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def begun(recipe: Recipe, scale: float, **more: Any) -> Trainer:
    """A trainer whose losses are scaled by `scale` at first."""
    trainer = Trainer.from_recipe(recipe, display=Said(), **more)
    trainer.learner.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


def test_gdro_trains_at_its_default_beta_and_reports_skipped_updates(make: Callable[..., Recipe]) -> None:
    recipe = make("gdro", steps=3)
    trainer = begun(recipe, 2.0**17, resume=False)
    trainer.run()
    found = lines(recipe)
    skipped = [line["skipped_updates"] for line in found]
    assert skipped[0] == 1 and sum(skipped) < 3
    assert found[0]["gradient_scale"] == 2.0**16 and found[0]["grad_norm"] == 0
    assert any(line["grad_norm"] > 0 for line in found)
    assert trainer.learner.update == 3 - sum(skipped)
    assert any(
        "1 of its updates skipped, since the gradient overflowed in half precision" in one
        for one in trainer.display.said
    )
    assert not any("teaches nothing" in one for one in trainer.display.said)
    assert trainer.tested


def test_a_skipped_update_moves_neither_weights_nor_snapshots(make: Callable[..., Recipe]) -> None:
    recipe = make({"name": "nft", "old_decay": {"first": 0.5}}, steps=1, ema_decay=0.5)
    trainer = begun(recipe, 2.0**60)
    before = {name: weight.clone() for name, weight in trainer.policy.trainable_state().items()}
    trainer.policy.snapshots["ema"] = {name: weight + 0.01 for name, weight in before.items()}
    trainer.policy.snapshots["old"] = {name: weight + 0.02 for name, weight in before.items()}
    trainer.policy.weights_changed()
    trainer.run()
    assert lines(recipe)[0]["skipped_updates"] == 1
    assert trainer.learner.update == 0 and not trainer.learner.optimizer.state
    for name, weight in trainer.policy.trainable_state().items():
        assert torch.equal(weight, before[name])
        assert torch.equal(trainer.policy.snapshots["ema"][name], before[name] + 0.01)
        assert torch.equal(trainer.policy.snapshots["old"][name], before[name] + 0.02)


@pytest.mark.parametrize("algorithm", ["gdro", "marble"])
def test_a_run_in_half_precision_goes_on_exactly(make: Callable[..., Recipe], algorithm: str) -> None:
    begun(whole := make(algorithm, folder="whole", steps=3), 2.0**40).run()
    begun(make(algorithm, folder="parts", steps=1), 2.0**40).run()
    Trainer.from_recipe(parts := make(algorithm, folder="parts", steps=3), resume=True, display=Said()).run()
    assert lines(whole) == lines(parts)
    assert lines(whole)[2]["gradient_scale"] < 2.0**40
    a, b = checkpoint(whole, 3), checkpoint(parts, 3)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_the_balance_of_gradients_equals_that_of_single_precision(make: Callable[..., Recipe]) -> None:
    """A common scale of the gradients cancels; a scale that overflows skips the update and keeps the balance."""
    found = {}
    for dtype, scale in (("fp32", 1.0), ("fp16", 2.0**8), ("fp16", 2.0**16), ("fp16", 2.0**60)):
        recipe = make("marble", dtype, f"{dtype}_{scale:g}", steps=1)
        trainer = Trainer.from_recipe(recipe, display=Said())
        if dtype == "fp16":
            trainer.learner.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.run()
        found[scale] = lines(recipe)[0], trainer.algorithm.state_dict()
    norm = found[1.0][0]["grad_norm"]
    assert [found[scale][0]["grad_norm"] for scale in (2.0**8, 2.0**16)] == pytest.approx([norm, norm], rel=2e-2)
    assert found[2.0**60][0]["skipped_updates"] == 1 and found[2.0**60][1] == {}
    assert "skipped_updates" not in found[1.0][0]


def test_a_scale_that_collapses_ends_the_run(make: Callable[..., Recipe]) -> None:
    trainer = begun(make("nft", steps=9), 2.0**-9)
    velocity = trainer.policy.velocity

    def overflowing(*given: Any) -> torch.Tensor:
        result = velocity(*given)
        if result.requires_grad:
            result.register_hook(lambda gradient: gradient * torch.inf)
        return result

    trainer.policy.velocity = overflowing  # type: ignore[method-assign]
    message = r"^step 2: the gradient overflows in half precision .* lower train\.learning_rate \(0\.003\).*bf16$"
    with pytest.raises(UserError, match=message):
        trainer.run()


# What is not finite


def test_a_diverged_policy_is_named_and_no_reward_is_blamed(make: Callable[..., Recipe]) -> None:
    recipe = make({"name": "flow_grpo", "clip_range": 1e-2}, "fp32", learning_rate=1e30)
    message = (
        r"^the policy has diverged: its samples are NaN \(8 of 8, first for 'a photo of .*'\) from step 2 on, and no "
        r"reward is at fault; lower train\.learning_rate \(1e\+30\) or train\.max_grad_norm \(1\) or "
        r"algorithm\.clip_range \(0\.01\)"
    )
    with pytest.raises(UserError, match=message):
        Trainer.from_recipe(recipe, display=Said()).run()


def test_an_evaluation_says_that_the_policy_diverged(make: Callable[..., Recipe], values: dict[str, Any]) -> None:
    recipe = make("nft", "fp32", learning_rate=1e30)
    measured = recipe.evaluation.model_copy(update={"prompts": values["prompts"], "steps": 2, "every": 1})
    with pytest.raises(UserError, match=r"the policy has diverged: its samples are NaN .* from step 1 on"):
        Trainer.from_recipe(recipe.model_copy(update={"evaluation": measured}), display=Said()).run()


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_latents_that_are_not_finite_are_refused_even_if_their_images_are_finite(
    make: Callable[..., Recipe], value: float, kind: str
) -> None:
    trainer = Trainer.from_recipe(make("nft", "fp32"), display=Said())
    trainer.policy.velocity = lambda x, *_: torch.full_like(x, value)  # type: ignore[method-assign]
    trainer.policy.decode = lambda latents: latents.new_ones(len(latents), 3, 8, 8)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=rf"the model's samples are {kind} \(8 of 8.* before any training"):
        trainer.run()


def test_the_model_is_named_in_a_rollout_outside_a_run(tiny_model: Path, make: Callable[..., Recipe]) -> None:
    recipe = make("nft", "fp32")
    policy = load_policy(recipe.model)
    policy.velocity = lambda x, *_: torch.full_like(x, torch.nan)  # type: ignore[method-assign]
    from flowalign.rollout.prompts import load_prompts

    rows = load_prompts(recipe.prompts)
    with pytest.raises(UserError, match=r"^the model's samples are NaN \(4 of 4, first for 'a photo of two stars'\)"):
        rollout(policy, RolloutRequest(rows, 1, recipe.rollout, policy.request, (0, 0), batch=4))


@pytest.mark.parametrize("algorithm", ["flow_grpo", "marble"])
@pytest.mark.parametrize(
    ("what", "message"), [("loss", "the loss is not finite, though"), ("gradient", "the gradient is nan")]
)
def test_a_loss_or_gradient_that_is_not_finite_is_named(
    make: Callable[..., Recipe], algorithm: str, what: str, message: str
) -> None:
    trainer = Trainer.from_recipe(make(algorithm, "fp32"), display=Said())
    velocity = trainer.policy.velocity

    def broken(*given: Any) -> torch.Tensor:
        result = velocity(*given)
        if result.requires_grad and what == "loss":
            return result * torch.nan
        if result.requires_grad:
            result.register_hook(lambda gradient: gradient * torch.nan)
        return result

    trainer.policy.velocity = broken  # type: ignore[method-assign]
    with pytest.raises(UserError, match=rf"^step 1: {message}.*; lower train\.learning_rate"):
        trainer.run()


def test_a_reward_that_scores_nan_on_finite_images_is_named(make: Callable[..., Recipe], tmp_path: Path) -> None:
    entry = make("nft", "fp32").rewards["one"].model_copy(update={"load": f"{tmp_path / 'judge.py'}:nan"})
    with pytest.raises(RewardError, match="reward 'nan' scored"):
        Trainer.from_recipe(make("nft", "fp32").model_copy(update={"rewards": {"bad": entry}}), display=Said()).run()
