"""Compiled blocks and the timing of attention backends."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from flowalign.config import Lora, Model
from flowalign.config.base import UserError
from flowalign.policies.attention import attention_seconds
from flowalign.policies.compiling import compile_blocks
from flowalign.policies.diffusers_pipeline import PipelinePolicy
from flowalign.policies.loading import load_policy
from flowalign.sampling import counted_generator

CPU = torch.device("cpu")
SHAPE = (512, 2, 32)


def policy_of(folder: Path, compiled: bool, dtype: Literal["fp32", "bf16"] = "fp32") -> PipelinePolicy:
    settings = Model(
        path=str(folder),
        height=64,
        width=64,
        max_sequence_length=0,
        dtype=dtype,
        compile=compiled,
        lora=Lora(rank=4),
    )
    policy = load_policy(settings)
    generator = counted_generator(1)
    with torch.no_grad():
        for weight in policy.trainable_parameters().values():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    policy.snapshot("old")
    with torch.no_grad():
        for weight in policy.trainable_parameters().values():
            weight.mul_(1.5)
    return policy


def passes(policy: PipelinePolicy, rows: int) -> dict[str, torch.Tensor]:
    """What is computed with the trained weights, a snapshot and none, and the gradients."""
    generator = counted_generator(rows)
    x, sigma = torch.randn(rows, 4, 16, 16, generator=generator), torch.rand(rows, generator=generator)
    condition = policy.encode_prompts(["a red cube", 'a sign that says "HI"', "two dogs"][:rows])
    with torch.no_grad():
        found = {"now": policy.velocity(x, sigma, condition)}
        with policy.using("old"):
            found["old"] = policy.velocity(x, sigma, condition)
        with policy.reference():
            found["reference"] = policy.velocity(x, sigma, condition)
    policy.velocity(x, sigma, condition).square().mean().backward()
    gradients = [weight.grad for weight in policy.trainable_parameters().values() if weight.grad is not None]
    found["gradients"] = torch.cat([gradient.flatten() for gradient in gradients])
    policy.transformer.zero_grad(set_to_none=True)
    return found


@pytest.mark.slow
def test_compiled_blocks_compute_what_plain_ones_do_with_every_set_of_weights(tiny_model: Path) -> None:
    plain, compiled = policy_of(tiny_model, compiled=False), policy_of(tiny_model, compiled=True)
    for rows in (3, 2):
        expected, found = passes(plain, rows), passes(compiled, rows)
        for name, values in expected.items():
            torch.testing.assert_close(
                found[name], values, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: name + text
            )
        assert not torch.allclose(found["now"], found["reference"], atol=1e-3)
        assert not torch.allclose(found["now"], found["old"], atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled.trainable_parameters().keys() == plain.trainable_parameters().keys()


@pytest.mark.slow
def test_compiled_blocks_in_bf16_are_no_further_from_fp32_than_plain_ones(tiny_model: Path) -> None:
    """Compiled ones round in other places, which bf16 shows; neither is the other's measure."""
    exact = passes(policy_of(tiny_model, compiled=False), 2)
    plain = passes(policy_of(tiny_model, compiled=False, dtype="bf16"), 2)
    compiled = passes(policy_of(tiny_model, compiled=True, dtype="bf16"), 2)
    for name, values in exact.items():
        error = (plain[name].float() - values).norm() / values.norm()
        assert 0 < error < 0.05
        assert (compiled[name].float() - values).norm() / values.norm() < 1.5 * error, name


def test_compiling_without_a_compiler_is_one_sentence(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"^model\.compile: there is no C\+\+ compiler no-such-compiler; install it"):
        policy_of(tiny_model, compiled=True)


def test_a_transformer_without_named_blocks_is_not_compiled() -> None:
    transformer = torch.nn.Linear(2, 2)
    transformer._no_split_modules = None  # type: ignore[assignment]  # as diffusers' models have it
    with pytest.raises(UserError, match=r"^model\.compile: a Linear names no blocks to compile; leave it out$"):
        compile_blocks(transformer, CPU)


def test_a_backend_without_its_library_says_so_before_it_is_timed() -> None:
    with pytest.raises((ImportError, RuntimeError), match="xformers"):
        attention_seconds("xformers", SHAPE, CPU, torch.float32)
