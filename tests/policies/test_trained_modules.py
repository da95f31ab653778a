"""A policy of several trained modules: two experts, one for each side of a noise level."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, WanPipeline, WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from flowalign.config import Lora, Model, recipe_from_dict
from flowalign.policies import loading
from flowalign.policies.adapters import export_lora
from flowalign.policies.base import Policy
from flowalign.policies.loading import load_policy
from flowalign.policies.sd3 import SD3Policy
from flowalign.preflight.check_model import check_model
from flowalign.preflight.model_size import meta_policy, whole_at_once
from flowalign.preflight.plan import Costs
from flowalign.rollout.dataset import fingerprint
from flowalign.sampling import counted_generator
from flowalign.trainer import Trainer
from flowalign.training.display import Display
from flowalign.training.processes import sum_gradients

BOUNDARY = 0.7
PROMPTS = ["a star", "two rings", "a sign", "three moons", "a red star"]
SIGMAS = torch.tensor([0.9, 0.2, 0.71, 0.69, 1.0])
HIGH, LOW = [0, 2, 4], [1, 3]


class TwoExperts(SD3Policy):
    """The second expert has the low noise levels."""

    trained = ("transformer", "transformer_2")

    def __init__(self, pipeline: Any, *more: Any, **options: Any):
        pipeline.transformer_2 = copy.deepcopy(pipeline.transformer)
        moved(pipeline.transformer_2.named_parameters(), 0.02)
        super().__init__(pipeline, *more, **options)

    def module_at(self, sigma: float) -> str:
        return "transformer" if sigma >= BOUNDARY else "transformer_2"


def moved(weights: Any, scale: float = 0.05) -> None:
    with torch.no_grad():
        for name, weight in weights:
            weight.add_(scale * torch.randn(weight.shape, generator=counted_generator(*name.encode())).to(weight))


def settings(folder: Path, **changes: Any) -> Model:
    changes = {"lora": Lora(rank=4, targets=("attention",))} | changes
    return Model(path=str(folder), height=64, width=64, dtype="fp32", max_sequence_length=0, **changes)


def two(folder: Path, whole: bool = True, **changes: Any) -> TwoExperts:
    policy = TwoExperts.load(folder, settings(folder, **changes), torch.device("cpu"), 0, whole=whole)
    assert isinstance(policy, TwoExperts)
    return policy


def velocity(policy: Policy, rows: list[int] | None = None) -> torch.Tensor:
    rows = [*range(len(SIGMAS))] if rows is None else rows
    x = torch.randn(len(SIGMAS), 4, 16, 16, generator=counted_generator(5))
    return policy.velocity(x[rows], SIGMAS[rows], policy.encode_prompts([PROMPTS[row] for row in rows]))


def test_each_row_is_predicted_by_the_module_of_its_noise_level(tiny_model: Path) -> None:
    policy = two(tiny_model)
    moved(policy.trainable_parameters().items())
    with torch.no_grad():
        mixed = velocity(policy)
        for rows, name in ((HIGH, "transformer"), (LOW, "transformer_2")):
            alone = load_policy(settings(tiny_model, lora=None))
            alone.transformer = policy.modules[name]  # through the only module of another policy
            alone.pipeline.transformer = alone.transformer
            torch.testing.assert_close(mixed[rows], velocity(alone, rows))
    assert policy.forwards == len(SIGMAS)


def test_a_gradient_reaches_the_module_of_its_row_alone(tiny_model: Path) -> None:
    policy = two(tiny_model)
    moved(policy.trainable_parameters().items())
    for rows, name in ((HIGH, "transformer"), (LOW, "transformer_2")):
        mixed = gradients(policy, velocity(policy)[rows])
        alone = gradients(policy, velocity(policy, rows))
        assert {key.split(".")[0] for key in alone} == {name}
        for key, gradient in mixed.items():
            torch.testing.assert_close(gradient, alone.get(key, 0 * gradient), atol=1e-5, rtol=1e-4)


def gradients(policy: Policy, predicted: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = policy.trainable_parameters()
    found = torch.autograd.grad(predicted.square().sum(), list(weights.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}


def test_one_module_keeps_its_own_names_and_several_are_named_before_theirs(tiny_model: Path) -> None:
    one, both = load_policy(settings(tiny_model)), two(tiny_model)
    names = [name for name, weight in one.transformer.named_parameters() if weight.requires_grad]
    assert list(one.trainable_parameters()) == names
    assert list(both.trainable_parameters()) == [f"{m}.{n}" for m in ("transformer", "transformer_2") for n in names]
    first, second = ([both.trainable_parameters()[f"{m}.{n}"] for n in names] for m in both.modules)
    assert all(map(torch.equal, first, one.trainable_parameters().values()))  # the same seed, the same beginning
    assert not all(map(torch.equal, first, second))
    assert {len(one.named_weights()), len(list(one.transformer.parameters()))} == {len(both.named_weights()) // 2}
    assert fingerprint(one) != fingerprint(both)


@pytest.mark.parametrize("lora", [Lora(rank=4, targets=("attention",)), None])
def test_snapshots_and_the_reference_are_of_both(tiny_model: Path, lora: Lora | None) -> None:
    policy = two(tiny_model, lora=lora)
    with torch.no_grad():
        before, start = velocity(policy), policy.trainable_state()
        policy.snapshot("old")
        moved(policy.trainable_parameters().items())
        after, trained = velocity(policy), policy.trainable_state()
        assert not any(torch.allclose(*pair) for pair in zip(before, after, strict=True))
        with policy.reference():
            torch.testing.assert_close(velocity(policy), before)
        with policy.using("old"):
            torch.testing.assert_close(velocity(policy), before)
        torch.testing.assert_close(velocity(policy), after)
    policy.blend("old", 0.75)
    for name, kept in policy.snapshots["old"].items():
        torch.testing.assert_close(kept, 0.75 * start[name] + 0.25 * trained[name])
    policy.load_trainable_state(start)
    assert all(torch.equal(weight, start[name]) for name, weight in policy.trainable_parameters().items())


def test_a_frozen_expert_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    policy = two(tiny_model)
    for weight in policy.modules["transformer"].parameters():
        weight.requires_grad_(False)
    moved(policy.trainable_parameters().items())
    assert {name.split(".")[0] for name in policy.trainable_parameters()} == {"transformer_2"}
    with policy.reference(), torch.no_grad():
        reference = velocity(policy)
    with torch.no_grad():
        changed = [not torch.equal(*pair) for pair in zip(velocity(policy), reference, strict=True)]
    assert changed == [row in LOW for row in range(5)]
    policy.export(tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["transformer_2"]


def test_each_module_s_adapter_is_a_file_that_a_pipeline_takes_and_a_new_run_begins_with(
    tiny_model: Path, tmp_path: Path
) -> None:
    policy, one = two(tiny_model), load_policy(settings(tiny_model))
    for each in (policy, one):
        moved((name.removeprefix("transformer."), weight) for name, weight in each.trainable_parameters().items())
        each.export(tmp_path / type(each).__name__)
    folder, alone = tmp_path / "TwoExperts", tmp_path / "SD3Policy"
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted(p.name for p in alone.iterdir())
    ours, theirs = (load_file(place / "pytorch_lora_weights.safetensors") for place in (folder, alone))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        trained = velocity(policy)
        merged = two(tiny_model, adapter=str(folder), lora=None)
        torch.testing.assert_close(velocity(merged), trained, atol=1e-5, rtol=1e-4)
        plain = StableDiffusion3Pipeline.from_pretrained(tiny_model, text_encoder_3=None, tokenizer_3=None)
        plain.transformer = two(tiny_model).pipeline.transformer_2
        plain.transformer.delete_adapters("default")
        plain.load_lora_weights(folder / "transformer_2")
        one.transformer = one.pipeline.transformer = plain.transformer
        torch.testing.assert_close(velocity(one, LOW), trained[LOW], atol=1e-5, rtol=1e-4)


def test_diffusers_takes_the_file_of_a_second_transformer_by_its_argument(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    experts = [WanTransformer3DModel(**sizes, text_dim=16, freq_dim=16, ffn_dim=32, rope_max_seq_len=16) for _ in "ab"]
    trained = copy.deepcopy(experts[1])
    trained.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["attn1.to_q", "attn1.to_v"]))
    moved((name, weight) for name, weight in trained.named_parameters() if "lora_" in name)
    state = {name: weight for name, weight in trained.named_parameters() if weight.requires_grad}
    assert get_peft_model_state_dict(trained, state)
    export_lora(WanPipeline, trained, state, None, tmp_path / "transformer_2")
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe = WanPipeline(
        **parts, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=experts[0], transformer_2=experts[1]
    )
    pipe.load_lora_weights(tmp_path / "transformer_2", load_into_transformer_2=True)
    assert not any("lora_" in name for name, _ in pipe.transformer.named_parameters())
    x, text = torch.randn(1, 4, 1, 4, 4), torch.randn(1, 3, 16)
    with torch.no_grad():
        ours, theirs = (
            one(hidden_states=x, timestep=torch.tensor([300.0]), encoder_hidden_states=text, return_dict=False)[0]
            for one in (trained, pipe.transformer_2)
        )
    torch.testing.assert_close(ours, theirs)


def test_whole_experts_are_written_into_folders_of_their_names(tiny_model: Path, tmp_path: Path) -> None:
    policy = two(tiny_model, lora=None)
    policy.export(tmp_path)
    for name, module in policy.modules.items():
        read = type(module).from_pretrained(tmp_path / name)  # type: ignore[attr-defined]
        assert all(map(torch.equal, read.parameters(), module.parameters()))


def trainer_of(values: dict[str, Any], steps: int, folder: Path, resume: bool = False) -> Trainer:
    model = values["model"] | {"lora": {"rank": 4, "targets": ["attention"]}}
    changes = {"model": model, "evaluation": {"prompts": None}, "run": {"folder": str(folder), "checkpoint_every": 1}}
    algorithm, rollout = {"name": "nft", "kl_weight": 0.1}, {"steps": 3, "batch": 8}
    recipe = recipe_from_dict(
        {**values, **changes, "algorithm": algorithm, "rollout": rollout, "train": values["train"] | {"steps": steps}}
    )
    policy = two(Path(values["model"]["path"]))
    return Trainer.from_recipe(recipe, policy=policy, resume=resume, display=Display(quiet=True))


def test_a_run_moves_both_experts_and_is_resumed_exactly(values: dict[str, Any], tmp_path: Path) -> None:
    whole = trainer_of(values, 3, tmp_path / "whole")
    start = whole.policy.trainable_state()
    whole.run()
    end = whole.policy.trainable_state()
    for name in whole.policy.modules:
        assert any(not torch.equal(end[key], start[key]) for key in end if key.startswith(f"{name}."))
    about = json.loads((tmp_path / "whole" / "run.json").read_text())["parameters"]
    assert about["all"] == sum(p.numel() for m in whole.policy.modules.values() for p in m.parameters())
    assert (tmp_path / "whole" / "lora" / "transformer_2" / "pytorch_lora_weights.safetensors").is_file()
    trainer_of(values, 2, tmp_path / "parts").run()
    resumed = trainer_of(values, 3, tmp_path / "parts", resume=True)
    assert resumed.step == 2
    resumed.run()
    assert all(torch.equal(weight, end[name]) for name, weight in resumed.policy.trainable_state().items())
    assert all(
        torch.equal(kept[key], whole.policy.snapshots[name][key])
        for name, kept in resumed.policy.snapshots.items()
        for key in kept
    )


def test_a_plan_counts_both_and_a_row_s_pass_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Costs(meta_policy(settings(tiny_model)))
    monkeypatch.setitem(loading.FAMILIES, "StableDiffusion3Pipeline", TwoExperts)
    both = Costs(meta_policy(settings(tiny_model)))
    assert both.counts["transformer"] == both.counts["transformer_2"] == one.counts["transformer"]
    assert both.counts["trainable"] == 2 * one.counts["trainable"]
    assert both.counts["buffers"] == 2 * one.counts["buffers"]
    assert both.flops(backward=True) == one.flops(backward=True)
    assert both.bytes(backward=True) == one.bytes(backward=True)
    assert whole_at_once(both.policy) > whole_at_once(one.policy)


def test_the_check_of_a_model_looks_for_gradients_in_both(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loading.FAMILIES, "StableDiffusion3Pipeline", TwoExperts)
    findings = {finding.check: finding for finding in check_model(settings(tiny_model), "cpu", steps=2)}
    found = findings["a gradient reaches feed_forward"]
    assert found.passed and found.detail == "12 of 12 modules"


def test_a_module_without_rows_in_one_process_takes_the_gradient_of_the_others() -> None:
    class Two:
        """A second process has the opposite gradients: of the first parameter none, of the second one."""

        num_processes, device = 2, torch.device("cpu")

        def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
            if tensor.dtype == torch.float64:
                assert tensor.tolist() == [1, 0, 0]
                return torch.tensor([1.0, 1.0, 0.0])
            return tensor + torch.tensor([0.0, 0.0, 7.0])

    here, there, nowhere = (torch.nn.Parameter(torch.zeros(size)) for size in (2, 1, 3))
    here.grad = torch.tensor([3.0, 4.0])
    sum_gradients(cast(Accelerator, Two()), [here, there, nowhere])
    assert here.grad.tolist() == [3, 4] and there.grad is not None and there.grad.tolist() == [7]
    assert nowhere.grad is None


SHARDED = """
import os, sys
from pathlib import Path

import torch
from accelerate import Accelerator
from test_trained_modules import HIGH, LOW, gradients, moved, two, velocity
from flowalign.training.processes import prepare

torch.set_num_threads(1)
folder = Path(sys.argv[1])
whole, policy = two(folder), two(folder, whole=False)
for each in (whole, policy):
    moved(each.trainable_parameters().items())
rank = 0 if os.fork() else 1
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
accelerator = Accelerator(cpu=True)
prepare(accelerator, policy)
assert policy.in_lockstep and not whole.in_lockstep
for rows in (HIGH if rank else LOW, [0, 1, 3] if rank else HIGH, LOW):
    expected, found = velocity(whole, rows), velocity(policy, rows)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    wanted, got = gradients(whole, expected), gradients(policy, found)
    assert wanted.keys() <= got.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted.get(name, 0 * gradient), atol=1e-4, rtol=1e-3)
    with torch.no_grad(), whole.reference(), policy.reference():
        torch.testing.assert_close(velocity(policy, rows), velocity(whole, rows), atol=1e-5, rtol=1e-4)
torch.distributed.destroy_process_group()
if rank:
    os._exit(0)
_, status = os.wait()
sys.exit(status != 0)
"""


@pytest.mark.slow
def test_processes_that_share_experts_out_wait_for_no_pass_that_is_not_made(tiny_model: Path) -> None:
    """Each process has rows of one expert alone, and both make the passes of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parents[1]}", "OMP_NUM_THREADS": "1"}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_FSDP": "true"}
    environment |= {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    environment |= {"FSDP_RESHARD_AFTER_FORWARD": "true"}
    subprocess.run([sys.executable, "-c", SHARDED, str(tiny_model)], check=True, timeout=300, env=environment)
