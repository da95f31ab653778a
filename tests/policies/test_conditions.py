"""Conditions kept on disk: the numbers of a run stay the same, and its text encoders are gone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flowalign.config import Model, recipe_from_dict
from flowalign.config.base import UserError
from flowalign.policies import conditions
from flowalign.policies.base import Condition, Conditioning, TextPolicy
from flowalign.policies.conditions import CachedConditions, cache_conditions, cached_policy
from flowalign.policies.loading import FAMILIES, load_policy
from flowalign.policies.request import Row
from flowalign.policies.sd3 import SD3Policy
from flowalign.trainer import Trainer, train
from flowalign.training.display import Display

PROMPTS = ["two stars", "three stars", "a star"]
ROWS = [Row(index, prompt) for index, prompt in enumerate(PROMPTS)]
Make = Callable[..., tuple[TextPolicy, Model]]


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Make:
    """A tiny policy and its settings, with a cache in the test's folder."""

    def made(**changes: Any) -> tuple[TextPolicy, Model]:
        values = {"path": str(tiny_model), "height": 64, "width": 64, "dtype": "fp32", "max_sequence_length": 0}
        model = Model(**values, cache_conditions=str(tmp_path / "cache"), **changes)
        return load_policy(model), model

    return made


def rows_of(prompts: Sequence[str]) -> list[Row]:
    return [Row(index, prompt) for index, prompt in enumerate(prompts)]


def cache_of(policy: TextPolicy, model: Model, folder: Path | None = None) -> CachedConditions:
    return CachedConditions(
        folder or Path(str(model.cache_conditions)), model, type(policy), policy.device, policy.dtype
    )


def test_what_is_read_is_what_was_encoded_bit_for_bit(make: Make) -> None:
    policy, model = make()
    expected = policy.encode(ROWS)[[0, 1, 2, 0]]
    cache_conditions(policy, model, ROWS)
    found = policy.encode([*ROWS, Row(7, PROMPTS[0], {"tag": "again"})])  # what is no input does not count
    for side in ("positive", "negative"):
        for name, tensor in getattr(found, side).tensors.items():
            wanted = getattr(expected, side).tensors[name]
            assert torch.equal(tensor, wanted) and tensor.dtype == wanted.dtype
    assert {tensor.stride(0) for tensor in found.negative.tensors.values()} == {0}  # the memory of one row


def test_the_text_encoders_are_released_and_an_unknown_prompt_is_one_sentence(make: Make) -> None:
    policy, model = make()
    cache_conditions(policy, model, ROWS)
    parts = policy.pipeline.components  # type: ignore[attr-defined]
    assert [name for name, part in parts.items() if name.startswith("text_encoder") and part is not None] == []
    with pytest.raises(UserError, match=r"'four stars' was not encoded"):
        policy.encode(rows_of(["four stars"]))


def test_only_new_prompts_are_written_and_other_settings_have_a_folder_of_their_own(make: Make) -> None:
    policy, model = make()
    cache_conditions(policy, model, ROWS)
    (folder,) = Path(str(model.cache_conditions)).iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(before) == len(PROMPTS) + 1
    assert json.loads((folder / "model.json").read_text())["max_sequence_length"] == 0
    policy, model = make()
    cache_conditions(policy, model, rows_of([*PROMPTS, "four stars"]))
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 1
    text_encoder = Path(model.path) / "text_encoder" / "model.safetensors"
    seen = text_encoder.stat()
    try:  # as if another encoder had been put there
        os.utime(text_encoder, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))
        assert cache_of(policy, model).folder != folder
    finally:
        os.utime(text_encoder, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    longer = model.model_copy(update={"max_sequence_length": 8})
    assert cache_of(policy, longer).folder != folder
    assert cache_of(policy, model).folder == folder


def test_shares_of_several_processes_are_encoded_in_the_same_batches_as_by_one(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditions, "AT_ONCE", 2)
    policy, model = make()
    rows = rows_of([f"{n} stars" for n in range(7)])
    seen: list[list[str]] = []
    encode = policy.encode

    def watched(rows: Sequence[Row]) -> Conditioning:
        seen.append([row.prompt for row in rows])
        return encode(rows)

    monkeypatch.setattr(policy, "encode", watched)
    alone, shared = (cache_of(policy, model, tmp_path / name) for name in ("alone", "shared"))
    alone.fill(policy, rows)
    whole, seen[:] = list(seen), []
    shared.fill(policy, rows, slice(1, None, 2))
    assert [row.prompt for row in shared.missing(rows)] == ["0 stars", "1 stars", "4 stars", "5 stars"]
    shared.fill(policy, rows, slice(0, None, 2))
    assert sorted(seen) == whole
    both = [cache.read(rows) for cache in (alone, shared)]
    for side in ("positive", "negative"):
        one, other = (getattr(conditioning, side).tensors for conditioning in both)
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class Editing(SD3Policy):
    """Its conditions hold the bytes of the row's image and its strength, on both sides of guidance."""

    inputs, input_files = ("prompt", "strength"), ("image",)

    def encode(self, rows: Sequence[Row]) -> Conditioning:
        text = super().encode(rows)
        given = [[*Path(row.metadata["image"]).read_bytes()[:1], row.metadata["strength"]] for row in rows]
        return Conditioning(
            *(Condition({**side.tensors, "given": torch.tensor(given)}) for side in (text.positive, text.negative))
        )


def test_a_condition_is_known_by_the_content_of_every_input(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "StableDiffusion3Pipeline", Editing)
    for name, content in (("cat", b"c"), ("dog", b"d"), ("same_cat", b"c")):
        (tmp_path / f"{name}.png").write_bytes(content)

    def row(prompt: str, image: str, strength: int = 1, **others: str) -> Row:
        return Row(0, prompt, {"image": str(tmp_path / f"{image}.png"), "strength": strength, **others})

    policy, model = make()
    rows = [row("a hat", "cat"), row("a hat", "dog"), row("a hat", "cat", 2), row("a bow", "cat")]
    again = row("a hat", "same_cat", tag="not read")
    expected = policy.encode([*rows, again])
    cache = cache_of(policy, model)
    cache_conditions(policy, model, rows)
    assert len(list(cache.folder.glob("*.safetensors"))) == 4 + 3  # rows that differ in their prompts share a negative
    found = policy.encode([*rows, again])
    for side in ("positive", "negative"):
        for name, tensor in getattr(found, side).tensors.items():
            torch.testing.assert_close(tensor, getattr(expected, side).tensors[name])
    (tmp_path / "cat.png").write_bytes(b"another cat")
    assert cache_of(policy, model).missing(rows) == [rows[0], rows[2], rows[3]]
    assert cache_of(policy, model.model_copy(update={"height": 32})).folder != cache.folder
    with pytest.raises(UserError, match=r"the image of prompt 'a hat' cannot be read: .*bird\.png"):
        cache.missing([row("a hat", "bird")])
    with pytest.raises(UserError, match="prompt 'a hat' has no strength, which this model needs of every prompt"):
        cache.missing([Row(0, "a hat", {"image": str(tmp_path / "dog.png")})])


def test_a_damaged_file_is_named(make: Make) -> None:
    policy, model = make()
    cache = cache_of(policy, model)
    cache.fill(policy, ROWS)
    torn, _ = cache.paths(ROWS[1])
    torn.write_bytes(b"torn")
    with pytest.raises(UserError, match=rf"{torn.name} is damaged .*; remove it"):
        cache.read(ROWS)


def test_a_folder_that_cannot_be_written_is_one_sentence(make: Make, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    policy, model = make()
    with pytest.raises(UserError, match=r"model\.cache_conditions: cannot write to"):
        cache_conditions(policy, model, ROWS)


@pytest.mark.slow
def test_a_run_with_kept_conditions_has_the_numbers_of_one_without(values: dict[str, Any], tmp_path: Path) -> None:
    values["train"]["steps"] = 2
    values["rollout"]["guidance"] = 2.0
    plain = train(recipe_from_dict(values), display=Display(quiet=True))
    values["run"]["folder"] = str(tmp_path / "cached")
    values["model"]["cache_conditions"] = str(tmp_path / "cache")
    trainer = Trainer.from_recipe(recipe_from_dict(values), display=Display(quiet=True))
    assert trainer.policy.pipeline.text_encoder is None  # type: ignore[attr-defined]
    a, b = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (plain, trainer.run())
    )
    for one, other in zip(a, b, strict=True):
        assert one["reward"]["total"] == pytest.approx(other["reward"]["total"], rel=1e-5)
        assert one["forwards"] == other["forwards"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def spoilt(file: Path, position: int) -> None:
    """Another header, under which safetensors reads nothing; size and time stay."""
    seen, contents = file.stat(), bytearray(file.read_bytes())
    contents[position] ^= 0x80
    file.write_bytes(contents)
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))


@pytest.mark.slow
def test_text_encoders_are_not_even_read_once_every_prompt_is_kept(
    values: dict[str, Any], tiny_sd35: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_sd35, tmp_path / "model")
    values["model"] |= {"path": str(folder), "max_sequence_length": 8, "cache_conditions": str(tmp_path / "cache")}
    values["train"]["steps"] = 1
    runs = {name: recipe_from_dict(values | {"run": {"folder": str(tmp_path / name)}}) for name in ("first", "again")}
    first = train(runs["first"], display=Display(quiet=True))
    for file in folder.glob("text_encoder*/*.safetensors"):
        spoilt(file, position=8)
    trainer = Trainer.from_recipe(runs["again"], display=Display(quiet=True))
    parts = trainer.policy.pipeline.components  # type: ignore[attr-defined]
    assert {name for name, part in parts.items() if part is None} >= {f"text_encoder{n}" for n in ("", "_2", "_3")}
    first_line, line = (json.loads((place / "metrics.jsonl").read_text()) for place in (first, trainer.run()))
    for clocked in (first_line, line):
        del clocked["minutes"], clocked["seconds"]
    assert line == first_line
    rows = rows_of([*(tmp_path / "prompts.txt").read_text().splitlines(), "a new one"])
    with pytest.raises(UserError, match="header"):
        cached_policy(runs["again"].model, rows, "cpu", 0)
    for file in folder.glob("text_encoder*/*.safetensors"):
        spoilt(file, position=8)
    policy = cached_policy(runs["again"].model, rows, "cpu", 0)
    assert len(policy.encode(rows_of(["a new one"]))) == 1


@pytest.mark.slow
def test_two_processes_encode_a_share_each_and_read_one_cache(values: dict[str, Any], tmp_path: Path) -> None:
    values["train"]["steps"] = 1
    values["model"]["cache_conditions"] = str(tmp_path / "cache")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29533"]
    script = Path(__file__).parents[2] / "scripts" / "train.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, str(script), str(tmp_path / "recipe.yaml")], check=True, env=environment, timeout=900)
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.glob("*.safetensors"))) == 5  # four prompts and the empty one
    assert not list(folder.glob(".partial*"))
    two = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    values["run"]["folder"] = str(tmp_path / "one")
    one = json.loads((train(recipe_from_dict(values), display=Display(quiet=True)) / "metrics.jsonl").read_text())
    assert two["reward"]["total"] == pytest.approx(one["reward"]["total"], rel=1e-5)


def test_a_script_s_own_policy_is_not_taken_for_the_recipe_s_model(make: Make, values: dict[str, Any]) -> None:
    values["model"]["cache_conditions"] = "cache"
    with pytest.raises(UserError, match="keeps what the recipe's own model encodes"):
        Trainer.from_recipe(recipe_from_dict(values), display=Display(quiet=True), policy=make()[0])
