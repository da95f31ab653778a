"""Steps that teach nothing are reported and end a run; the self-test waits for a step that teaches."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.config import Recipe, recipe_from_dict
from flowalign.config.base import UserError
from flowalign.trainer import Trainer
from flowalign.training.display import Display

JUDGES = """
import torch
from rewards import Reward
def brightness(media, prompts, metadata):
    return media.flatten(1).mean(1)
def constant(media, prompts, metadata):
    return torch.full((len(media),), 0.25)
def by_prompt(media, prompts, metadata):
    return [float(len(prompt)) for prompt in prompts]
def opposite(media, prompts, metadata):
    return -media.flatten(1).mean(1)
def two(media, prompts, metadata):
    return [float(m.mean()) if "two" in p else 1.0 for m, p in zip(media, prompts)]
class Late(Reward):
    def __init__(self, after):
        self.after, self.seen = after, 0
    def __call__(self, media, prompts, metadata):
        self.seen += len(media)
        return media.flatten(1).mean(1) * (self.seen > self.after)
"""


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowalign.trainer.write_report", lambda folder: folder / "report.html")


@pytest.fixture
def make(values: dict[str, Any], tmp_path: Path) -> Callable[..., Recipe]:
    """Makes a recipe on rewards of JUDGES, by name."""
    (tmp_path / "judges.py").write_text(JUDGES)

    def _make(*rewards: str, **sections: Any) -> Recipe:
        algorithm = sections.pop("algorithm", values["algorithm"])
        short = {"train": {"steps": 2}, "rollout": {"steps": 2, "window": None}, "evaluation": {"prompts": None}}
        merged = {key: {**values.get(key, {}), **short.get(key, {}), **sections.get(key, {})} for key in short}
        judged = {name: {"load": f"{tmp_path / 'judges.py'}:{name}"} for name in rewards}
        for name, more in sections.get("rewards", {}).items():
            judged[name] |= more
        return recipe_from_dict({**values, **merged, "algorithm": algorithm, "rewards": judged})

    return _make


class Saved:
    """A tensor that a graph keeps."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


class Said(Display):
    """Keeps what a run says."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, *texts: str) -> None:
        self.said += texts


def trained(recipe: Recipe, **more: Any) -> tuple[Trainer, list[str]]:
    display = Said()
    trainer = Trainer.from_recipe(recipe, display=display, **more)
    trainer.run()
    return trainer, [line for line in display.said if "teaches nothing" in line]


def lines(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("algorithm", ["flow_grpo", "nft", "crd", "gdro"])
def test_a_constant_reward_is_named_after_the_first_step_and_ends_the_run(
    make: Callable[..., Recipe], algorithm: str
) -> None:
    recipe = make("constant", algorithm=algorithm, train={"steps": 9, "idle_steps": 2, "micro_batch": 8})
    display = Said()
    trainer = Trainer.from_recipe(recipe, display=display)
    why = "reward 'constant' is 0.25 for every sample"
    with pytest.raises(UserError, match=rf"^stopped after step 2, .* taught nothing: {why}; train\.idle_steps=0"):
        trainer.run()
    assert [line["zero_spread"] for line in lines(recipe)] == [1, 1]
    said = [line for line in display.said if "teaches nothing" in line]
    assert said == [f"step 1 teaches nothing: {why}; the self-test waits for a step that teaches"]
    assert (recipe.folder / "checkpoints" / "step_000002").is_dir()


def test_a_resumed_run_counts_earlier_idle_steps_and_may_lift_the_limit(make: Callable[..., Recipe]) -> None:
    trained(make("constant", train={"steps": 2, "idle_steps": 3}))
    trainer = Trainer.from_recipe(make("constant", train={"steps": 4, "idle_steps": 3}), resume=True, display=Said())
    with pytest.raises(UserError, match="stopped after step 3, the last 3 steps taught nothing"):
        trainer.run()
    recipe = make("constant", train={"steps": 4, "idle_steps": 0})
    trained(recipe, resume=True)
    assert len(lines(recipe)) == 4


def test_without_a_limit_a_run_goes_on_to_its_end(make: Callable[..., Recipe]) -> None:
    recipe = make("constant", train={"steps": 3, "idle_steps": 0})
    trained(recipe)
    assert len(lines(recipe)) == 3


@pytest.mark.parametrize(
    ("rewards", "algorithm", "why"),
    [
        (["by_prompt"], "nft", "reward 'by_prompt' is the same for all samples of a prompt"),
        (["brightness", "opposite"], "flow_grpo", "the total reward is the same for all samples of a prompt"),
        (["constant", "by_prompt"], "marble", "reward 'constant' is 0.25 for every sample; reward 'by_prompt' is"),
    ],
)
def test_the_reason_is_named_when_rewards_are_not_constant(
    make: Callable[..., Recipe], rewards: list[str], algorithm: str, why: str
) -> None:
    (said,) = trained(make(*rewards, algorithm=algorithm, train={"steps": 2, "micro_batch": 8}))[1]
    assert said.startswith(f"step 1 teaches nothing: {why}")


def test_identical_samples_are_named_as_the_reason(make: Callable[..., Recipe]) -> None:
    recipe = make("brightness")
    display = Said()
    trainer = Trainer.from_recipe(recipe, display=display)
    trainer.policy.decode = lambda latents: latents.new_ones(len(latents), 3, 8, 8)  # type: ignore[method-assign]
    trainer.run()
    (said,) = [line for line in display.said if "teaches nothing" in line]
    assert "reward 'brightness' is 1 for every sample, since all samples of a prompt are identical" in said


def test_one_constant_reward_of_several_is_named_once(make: Callable[..., Recipe]) -> None:
    trainer, said = trained(make("brightness", "constant"))
    assert said == ["step 1: reward 'constant' is 0.25 for every sample, so it teaches nothing; the other rewards do"]
    assert trainer.tested
    assert lines(trainer.recipe)[1]["flat"] == {"constant": "is 0.25 for every sample"}


def test_a_gradient_that_is_exactly_zero_fails_the_self_test(make: Callable[..., Recipe]) -> None:
    trainer = Trainer.from_recipe(make("brightness"), display=Said())
    velocity = trainer.policy.velocity
    trainer.policy.velocity = lambda *given: 0 * velocity(*given)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"self-test failed: gradients reach the trainable weights: 0 of \d+"):
        trainer.run()


def test_a_gradient_that_becomes_zero_is_reported_and_ends_the_run(make: Callable[..., Recipe]) -> None:
    display = Said()
    trainer = Trainer.from_recipe(make("brightness", train={"steps": 9, "idle_steps": 2}), display=display)
    trainer.tested = True
    velocity = trainer.policy.velocity
    trainer.policy.velocity = lambda *given: 0 * velocity(*given)  # type: ignore[method-assign]
    why = "the gradient is exactly 0, though rewards differ within prompts"
    with pytest.raises(UserError, match=f"stopped after step 2, the last 2 steps taught nothing: {why}"):
        trainer.run()


def test_a_step_that_teaches_restarts_the_count_and_runs_the_self_test(make: Callable[..., Recipe]) -> None:
    """Two steps score 16 samples; the third step teaches."""
    recipe = make("Late", train={"steps": 4, "idle_steps": 3}, rewards={"Late": {"options": {"after": 16}}})
    trainer, said = trained(recipe)
    assert [line["zero_spread"] for line in lines(recipe)] == [1, 1, 0, 0]
    assert len(said) == 1 and trainer.tested and trainer.idle.in_a_row == 0


def test_dense_values_with_an_absolute_term_learn_from_equal_groups(make: Callable[..., Recipe]) -> None:
    algorithm = {"name": "flow_grpo", "values": "dense", "absolute": 0.1}
    recipe = make("constant", algorithm=algorithm, train={"idle_steps": 1}, rollout={"steps": 3})
    trainer, said = trained(recipe)
    assert said == [] and trainer.tested
    assert [line["zero_spread"] for line in lines(recipe)] == [1, 1]
    assert all(line["grad_norm"] > 0 for line in lines(recipe))


# The self-test


@pytest.mark.parametrize("algorithm", ["crd", "nft", "flow_grpo", "gdro", "prdp"])
def test_healthy_runs_pass_whichever_groups_come_first(make: Callable[..., Recipe], algorithm: str) -> None:
    """Three of four groups are flat and kept, so many first micro-batches and updates hold only flat groups."""
    settings = {"name": algorithm, "equal_groups": "keep"}
    train = {"steps": 1, "prompts_per_step": 4, "updates_per_step": 4, "micro_batch": 8}
    for seed in range(2):
        recipe = make("two", algorithm=settings, train=train)
        run = recipe.run.model_copy(update={"folder": f"{recipe.folder}_{seed}", "seed": seed})
        recipe = recipe.model_copy(update={"run": run})
        trainer, said = trained(recipe)
        assert trainer.tested and said == []
        tested = json.loads((recipe.folder / "run.json").read_text())["self_test"]
        assert tested[-1] == {
            "check": "rewards differ within prompts",
            "passed": True,
            "detail": "in 25% of the groups",
        }


def test_the_self_test_passes_with_samples_of_average_reward(make: Callable[..., Recipe], tmp_path: Path) -> None:
    """Rewards 0, 1/2, 1, 1/2: every other item has no advantage, and an update holds one item."""
    middle = (
        "def middle(media, prompts, metadata):\n    return [(0.5, 0.0, 0.5, 1.0)[i % 4] for i in range(len(media))]\n"
    )
    (tmp_path / "middle.py").write_text(middle)
    recipe = make("brightness", train={"steps": 1, "updates_per_step": 8, "micro_batch": 1})
    entry = recipe.rewards["brightness"].model_copy(update={"load": f"{tmp_path / 'middle.py'}:middle"})
    trainer, _ = trained(recipe.model_copy(update={"rewards": {"middle": entry}}))
    assert trainer.tested


def test_the_self_test_keeps_one_graph_at_a_time(make: Callable[..., Recipe]) -> None:
    """A forward pass's saved tensors are freed before the next pass, as `flowalign plan` assumes."""
    recipe = make("brightness", algorithm={"name": "flow_grpo", "kl_weight": 0.1}, train={"steps": 1})
    trainer = Trainer.from_recipe(recipe, display=Said())
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    left: list[int] = []
    forward = trainer.policy._forward

    def pack(tensor: torch.Tensor) -> Saved:
        alive.add(saved := Saved(tensor))
        return saved

    def watched(*given: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            left.append(len(alive))
        return forward(*given)

    trainer.policy._forward = watched  # type: ignore[method-assign]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        trainer.run()
    assert trainer.tested
    assert left == [0] * (2 + 2 * 2)  # the KL's two, and two micro-batches in each of two updates
