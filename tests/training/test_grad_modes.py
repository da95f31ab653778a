"""Loading, evaluating and training under torch.no_grad() or torch.inference_mode()."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import rewards
from flowalign.config import recipe_from_dict
from flowalign.config.base import UserError
from flowalign.evaluate.evaluation import evaluate
from flowalign.policies.base import Policy
from flowalign.policies.loading import load_policy
from flowalign.rollout.generate import rollout
from flowalign.rollout.prompts import load_prompts
from flowalign.rollout.stages import RolloutRequest
from flowalign.score import load_rewards
from flowalign.trainer import Trainer
from flowalign.training.display import Display

Mode = Callable[[], AbstractContextManager[None]]
modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowalign.trainer.write_report", lambda folder: folder / "report.html")


@pytest.fixture
def short(values: dict[str, Any]) -> dict[str, Any]:
    values["rollout"] |= {"steps": 2, "window": None, "guidance": 2.0}
    values["train"] |= {"steps": 1, "updates_per_step": 1, "micro_batch": 16}
    values["evaluation"] |= {"steps": 2, "every": 0, "count": 1}
    return values


@modes
def test_a_policy_loads_evaluates_and_is_trained_afterwards(short: dict[str, Any], mode: Mode) -> None:
    recipe = recipe_from_dict(short)
    rows = load_prompts(recipe.prompts)
    with mode():
        policy = load_policy(recipe.model)
        judges = load_rewards(recipe.rewards, "cpu")
        before = evaluate(policy, rows[:1], judges, recipe.evaluation, policy.request)
        samples = rollout(policy, RolloutRequest(rows[:1], 2, recipe.rollout, policy.request, (0, 0), batch=2))
    assert not samples.latents.is_inference()
    assert any(weight.requires_grad for weight in policy.transformer.parameters())
    kept = policy.trainable_state()
    trainer = Trainer.from_recipe(recipe, policy=policy, display=Display(quiet=True))
    trainer.run()
    assert any(not torch.equal(kept[name], weight) for name, weight in policy.trainable_parameters().items())
    again = evaluate(load_policy(recipe.model), rows[:1], judges, recipe.evaluation, policy.request)
    assert before.scores == again.scores


@modes
def test_a_run_inside_the_mode_equals_one_outside(short: dict[str, Any], mode: Mode) -> None:
    def trained(folder: str) -> Policy:
        place = {**short["run"], "folder": short["run"]["folder"] + folder}
        trainer = Trainer.from_recipe(recipe_from_dict({**short, "run": place}), display=Display(quiet=True))
        trainer.run()
        return trainer.policy

    outside = trained("outside").trainable_state()
    with mode():
        inside = trained("inside").trainable_state()
    assert all(torch.equal(outside[name], inside[name]) for name in outside)


@modes
def test_a_learning_reward_loads_with_trainable_weights(mode: Mode, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "clean.png")
    with mode():
        reward: Any = rewards.load("adversarial_dino", model="toyworld/judges/vit", references=str(tmp_path))
    assert all(weight.requires_grad and not weight.is_inference() for weight in reward.head.parameters())


def test_weights_that_a_script_made_in_inference_mode_are_refused(short: dict[str, Any]) -> None:
    recipe = recipe_from_dict(short)
    policy = load_policy(recipe.model)
    name, weight = next(iter(policy.trainable_parameters().items()))
    module, _, last = name.rpartition(".")
    with torch.inference_mode():
        setattr(policy.transformer.get_submodule(module), last, torch.nn.Parameter(weight.clone()))
    with pytest.raises(UserError, match=r"was made under torch\.inference_mode\(\).*; make the policy outside of it"):
        Trainer.from_recipe(recipe, policy=policy, display=Display(quiet=True))
