"""A phase that runs out of memory is named with its setting; an 8-bit optimizer's state is kept."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowalign.config import recipe_from_dict
from flowalign.config.base import UserError
from flowalign.trainer import Trainer
from flowalign.training.checkpoint import _optimizer_tensors, _restore_optimizer
from flowalign.training.display import Display
from flowalign.training.learner import optimizer_class


def exhausted(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def failing(values: dict[str, Any], part: str, name: str) -> str:
    """The error of a run in which a method of one part runs out of memory."""
    trainer = Trainer.from_recipe(recipe_from_dict(values), display=Display(quiet=True))
    setattr(getattr(trainer, part), name, exhausted)
    with pytest.raises(UserError) as caught:
        trainer.run()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    return str(caught.value)


def test_out_of_memory_names_the_phase_and_the_setting_to_lower(values: dict[str, Any]) -> None:
    assert "out of memory in the evaluation phase with evaluation.batch 64; lower it" in failing(
        values, "policy", "decode"
    )
    values["evaluation"]["prompts"] = None
    values["run"]["folder"] += "_rollout"
    assert "in the rollout phase with rollout.batch 8; lower it" in failing(values, "policy", "decode")
    values["run"]["folder"] += "_train"
    assert "in the train phase with train.micro_batch 3; lower it" in failing(values, "learner", "learn")
    values["train"]["micro_batch"] = 1
    values["run"]["folder"] += "_least"
    assert "the least; set model.gradient_checkpointing=true" in failing(values, "learner", "learn")


def test_a_run_that_ran_out_of_memory_goes_on_with_smaller_batches(values: dict[str, Any], tmp_path: Path) -> None:
    values["train"]["steps"] = 1
    Trainer.from_recipe(recipe_from_dict(values), display=Display(quiet=True)).run()
    values["train"] |= {"steps": 2, "micro_batch": 1}
    values["rollout"]["batch"] = values["evaluation"]["batch"] = 2
    values["model"] |= {"gradient_checkpointing": True, "cache_conditions": str(tmp_path / "conditions")}
    folder = Trainer.from_recipe(recipe_from_dict(values), resume=True, display=Display(quiet=True)).run()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is here")
def test_an_optimizer_that_is_not_installed_is_reported_before_the_model_loads(values: dict[str, Any]) -> None:
    values["train"]["optimizer"] = "adamw8bit"
    values["model"]["path"] = "/none"
    with pytest.raises(UserError, match=r"needs bitsandbytes; install it with pip install 'flowalign\[bitsandbytes\]'"):
        Trainer.from_recipe(recipe_from_dict(values))
    assert optimizer_class("adamw") is torch.optim.AdamW


class Quantised(torch.optim.SGD):
    """Keeps state as bitsandbytes does: bytes, a table that all weights share, a plain number, and nested parts."""

    table = torch.linspace(-1, 1, 256)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                state["step"] = state.get("step", 0) + 1
                state["qmap1"] = self.table
                state["state1"] = torch.full(weight.shape, state["step"], dtype=torch.uint8)

    def state_dict(self) -> dict[str, Any]:
        contents = super().state_dict()
        nested = {
            index: {"step": state["step"], "inner": {key: state[key] for key in ("qmap1", "state1")}}
            for index, state in contents["state"].items()
        }
        return {**contents, "state": nested}


def test_the_state_of_an_8_bit_optimizer_survives_a_checkpoint(tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    optimizer = Quantised(weights, lr=0.1)
    for _ in range(3):
        optimizer.step()
    tensors, groups = _optimizer_tensors(optimizer)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    restored = Quantised(weights, lr=0.5)
    _restore_optimizer(restored, load_file(tmp_path / "optimizer.safetensors"), groups)
    for weight in weights:
        state = restored.state[weight]
        assert state["step"] == 3 and isinstance(state["step"], int)
        assert torch.equal(state["qmap1"], Quantised.table)
        assert torch.equal(state["state1"].to(torch.uint8), optimizer.state[weight]["state1"])
    assert restored.param_groups[0]["lr"] == 0.1
