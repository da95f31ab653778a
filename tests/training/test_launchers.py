"""Launchers' configurations that are accepted or refused, and processes that shard a model's weights."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flowalign.config import Model, recipe_from_dict
from flowalign.config.base import UserError
from flowalign.policies.loading import load_policy
from flowalign.rollout.prompts import Row
from flowalign.training import processes
from flowalign.training.processes import prepare, refuse_launcher, rows_of_process, shard, sum_gradients

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
VALUES: dict[str, Any] = {
    "name": "asked",
    "prompts": "prompts.txt",
    "rewards": {"ocr": {}},
    "algorithm": {"name": "nft"},
    "evaluation": {"prompts": None},
    "guard": None,
}

REFUSED = {
    "deepspeed; choose FSDP with fsdp_version 2": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "megatron_lm; choose FSDP with fsdp_version 2": {"ACCELERATE_USE_MEGATRON_LM": "true"},
    "parallelism_config; choose FSDP with": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
    "FSDP 1; set fsdp_version: 2": {"ACCELERATE_USE_FSDP": "true"},
    "fsdp_cpu_ram_efficient_loading true": {**SHARDED, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    "fsdp_activation_checkpointing true; set it to false": {**SHARDED, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
    "gradient_accumulation_steps 4; set it to 1": {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    "dynamo_backend inductor; set it to no": {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
    "mixed_precision fp16, but model.dtype fp32": {"ACCELERATE_MIXED_PRECISION": "fp16"},
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_launchers_setting_without_effect_is_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_from_dict({**VALUES, "model": {"dtype": "fp32"}})
    refuse_launcher(recipe)
    for name, value in REFUSED[said].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"accelerate is configured .*{re.escape(said)}") as caught:
        refuse_launcher(recipe)
    assert "\n" not in str(caught.value)


def test_a_model_without_frozen_weights_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SHARDED, "ACCELERATE_MIXED_PRECISION": "bf16"}.items():
        monkeypatch.setenv(name, value)
    refuse_launcher(recipe_from_dict({**VALUES, "model": {"dtype": "bf16"}}))
    with pytest.raises(UserError, match=r"model\.lora null trains all weights, but FSDP shards only frozen weights"):
        refuse_launcher(recipe_from_dict({**VALUES, "model": {"dtype": "bf16", "lora": None}}))
    with pytest.raises(UserError, match="this policy trains all its weights, but FSDP"):
        shard(nn.Linear(2, 2), torch.device("cpu"), 2)


@given(st.integers(0, 9), st.integers(1, 4))
def test_rows_are_scored_once_and_each_process_draws_equally_many(count: int, world: int) -> None:
    rows = [Row(index, f"prompt {index}", {}) for index in range(count)]
    shares = [rows_of_process(rows, rank, world, True) for rank in range(world)]
    assert sorted(row.index for own, _ in shares for row in own) == list(range(count))
    assert len({len(own) + len(spare) for own, spare in shares}) == 1


def test_a_process_without_a_row_of_its_own_draws_a_spare_one_in_lockstep() -> None:
    rows = [Row(index, f"prompt {index}", {}) for index in range(4)]
    shares = [rows_of_process(rows, rank, 3, True) for rank in range(3)]
    assert [([row.index for row in own], [row.index for row in spare]) for own, spare in shares] == [
        ([0, 3], []),
        ([1], [0]),
        ([2], [0]),
    ]
    assert rows_of_process(rows[:1], 2, 3, True) == ([], rows[:1])
    assert not rows_of_process(rows[:1], 2, 3, False)[1]  # out of lockstep it draws nothing


def test_gradients_are_summed_in_messages_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    class Two:
        num_processes, device = 2, torch.device("cpu")

        def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
            sent.append(tensor.numel())
            return 2 * tensor

    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 2), (2,), (9,), (4,), (1,))]
    for number, weight in enumerate(parameters[:-1], 1):
        weight.grad = torch.full_like(weight, number)
    monkeypatch.setattr(processes, "MESSAGE", 8)
    sum_gradients(cast(Accelerator, Two()), parameters)
    assert sent == [5, 8, 9, 4]  # first which parameters have gradients
    assert [weight.grad.unique().tolist() for weight in parameters[:-1] if weight.grad is not None] == [
        [2],
        [4],
        [6],
        [8],
    ]


def test_a_transformer_to_be_sharded_is_not_put_on_the_device_whole(tiny_model: Path) -> None:
    settings = Model(path=str(tiny_model), height=64, width=64, max_sequence_length=0, dtype="fp32")
    policy = load_policy(settings, "meta", whole=False)
    assert {weight.device.type for weight in policy.transformer.parameters()} == {"cpu"}
    assert {weight.device.type for weight in policy.pipeline.text_encoder.parameters()} == {"meta"}
    assert {weight.device.type for weight in policy.pipeline.vae.parameters()} == {"meta"}


def launch(recipe: Path, config: Path) -> subprocess.CompletedProcess[str]:
    """A run of two processes on the CPU, with the launcher's configuration otherwise unchanged."""
    on_cpu = yaml.safe_load(config.read_text()) | {"use_cpu": True, "num_processes": 2}
    (recipe.parent / "accelerate.yaml").write_text(yaml.safe_dump(on_cpu))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(recipe.parent / "accelerate.yaml"), "--main_process_port", "0"]
    command += [str(SCRIPTS / "train.py"), str(recipe)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=600, check=False)


@pytest.mark.slow
def test_the_launcher_shards_a_model_with_the_configuration_in_scripts(values: dict[str, Any], tmp_path: Path) -> None:
    values["train"] |= {"steps": 2}
    values["evaluation"] |= {"count": 3}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    ended = launch(recipe, SCRIPTS / "accelerate" / "fsdp2.yaml")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (about["processes"], about["sharded"]) == (2, True)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_processes_that_begin_with_different_weights_are_refused(tiny_model: Path) -> None:
    class Other:
        """Sees a second process whose first weight differs in its last bit."""

        num_processes, process_index, device = 2, 0, torch.device("cpu")
        changed = 0

        def gather(self, own: torch.Tensor) -> torch.Tensor:
            other = own.clone()
            other[0, 0] += self.changed
            return torch.cat([own, other])

    engine = Other()
    policy = load_policy(Model(path=str(tiny_model), max_sequence_length=0, dtype="fp32"))
    prepare(cast(Accelerator, engine), policy)
    engine.changed = 1
    with pytest.raises(UserError, match="process 0 began with other weights than process 1; give every node the same"):
        prepare(cast(Accelerator, engine), policy)


def test_the_checksum_sees_a_weights_last_bit_and_ignores_the_order_of_addition() -> None:
    weight = nn.Parameter(torch.randn(7, 5))
    turned = nn.Parameter(weight.detach().flip(0))
    moved = nn.Parameter(weight.detach().clone())
    with torch.no_grad():
        moved[-1, -1] = torch.nextafter(moved[-1, -1], torch.tensor(9.0))
    assert torch.equal(processes._checksum(weight), processes._checksum(turned))
    assert not torch.equal(processes._checksum(weight), processes._checksum(moved))


ALL_SHARDED = """
import os, sys
import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from flowalign.algorithms.forward import squared_error
from flowalign.training.processes import prepare
from flowalign.config.base import UserError
from process_worker import SIDE, SmallPolicy

rank = 0 if os.fork() else 1
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
accelerator = Accelerator(cpu=True)
policy = SmallPolicy(torch.float32)
x, sigma, condition = torch.ones(2, 1, SIDE, SIDE), torch.full((2,), 0.5), policy.encode_prompts(["one", "two"])
whole = policy.velocity(x, sigma, condition).detach()
mesh = init_device_mesh("cpu", (2,))
for layer in policy.transformer.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(policy.transformer, mesh=mesh)
assert all(isinstance(weight, DTensor) for weight in policy.trainable_parameters().values())
policy.snapshot("reference")
with torch.no_grad():
    for weight in policy.trainable_parameters().values():
        weight.mul_(1.5)
policy.weights_changed()


def gradient(beside):
    own = policy.velocity(x, sigma, condition)
    with torch.no_grad():
        fixed = whole
        if beside:
            with policy.reference():
                fixed = policy.velocity(x, sigma, condition)
    torch.testing.assert_close(fixed, whole)
    kl = squared_error(own, fixed).mean()
    kl.backward()
    found = [weight.grad.full_tensor() for weight in policy.trainable_parameters().values()]
    policy.transformer.zero_grad()
    return kl.item(), found


kl, plain = gradient(False)
again, beside = gradient(True)
assert kl > 1e-3 and abs(kl - again) < 1e-6 * kl, (kl, again)
for one, other in zip(plain, beside):
    torch.testing.assert_close(one, other)
try:
    prepare(accelerator, policy)
except UserError as error:
    assert "is sharded among the processes already" in str(error)
else:
    raise AssertionError("sharded trained weights were accepted")
torch.distributed.destroy_process_group()
if rank:
    os._exit(0)
_, status = os.wait()
sys.exit(status != 0)
"""


@pytest.mark.slow
def test_snapshots_of_sharded_weights_take_effect() -> None:
    """Two processes shard all weights: FSDP gathers from its own buffers and ignores weights put in their place."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parents[1]}", "OMP_NUM_THREADS": "1"}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", ALL_SHARDED], check=True, timeout=300, env=environment)
