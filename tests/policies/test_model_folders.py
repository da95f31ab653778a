"""Model folders as people have them: other schedulers, variants and spellings work, a broken one is one sentence."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowalign.config import Model
from flowalign.config.base import UserError
from flowalign.disk.assets import asset
from flowalign.policies import schedules
from flowalign.policies.loading import find_family, load_policy

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
Edit = Callable[[Path], Any]


def settings(folder: Path, **changes: Any) -> Model:
    base = Model(path=str(folder), height=16, width=16, dtype="fp32", max_sequence_length=0, lora=None)
    return base.model_copy(update=changes)


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "my models" / "ünïcode [x]"
    shutil.copytree(tiny_model, folder)
    return folder


def edit_json(folder: Path, file: str, **changes: Any) -> None:
    contents = {**json.loads((folder / file).read_text()), **changes}
    (folder / file).write_text(json.dumps({key: value for key, value in contents.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def shards(folder: Path, ending: str = "") -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    stem, names = f"diffusion_pytorch_model{ending}", sorted(tensors)
    files = {name: f"{stem}-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        save_file(part, folder / "transformer" / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "transformer" / f"diffusion_pytorch_model.safetensors.index{ending}.json").write_text(json.dumps(index))


def variant(folder: Path) -> None:
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))


@pytest.mark.parametrize(
    "edit",
    [
        lambda folder: None,
        variant,
        shards,
        lambda folder: shards(folder, ".fp16"),
        lambda folder: edit_json(folder, "model_index.json", safety_checker=["stable_diffusion", "SafetyChecker"]),
        lambda folder: edit_json(folder, "model_index.json", text_encoder_3=None, tokenizer_3=None, image_encoder=None),
    ],
    ids=["as it is", "fp16 files", "shards", "fp16 shards", "a safety checker", "an older index"],
)
def test_a_folder_of_another_make_is_the_same_model(copied: Path, tiny_model: Path, edit: Edit) -> None:
    edit(copied)
    ours, theirs = (load_policy(settings(folder)).transformer.state_dict() for folder in (copied, tiny_model))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def cut(folder: Path, file: str = WEIGHTS) -> None:
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])


def shard_lost(folder: Path) -> None:
    shards(folder)
    (folder / "transformer/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"
TEXT = "text_encoder/model.safetensors"
BROKEN: dict[str, tuple[Edit, str]] = {
    "torn index": (lambda f: (f / "model_index.json").write_text('{"_class'), "model_index.json is no JSON"),
    "index of a list": (lambda f: (f / "model_index.json").write_text("[]"), "names no pipeline class"),
    "no class": (lambda f: edit_json(f, "model_index.json", _class_name=None), "names no pipeline class"),
    "unknown class": (
        lambda f: edit_json(f, "model_index.json", _class_name="PixArtAlphaPipeline"),
        "is a PixArtAlphaPipeline; supported are StableDiffusion3Pipeline, FluxPipeline",
    ),
    "no autoencoder": (lambda f: edit_json(f, "model_index.json", vae=None), "names no vae"),
    "a null transformer": (lambda f: edit_json(f, "model_index.json", transformer=[None, None]), "no transformer"),
    "folder gone": (lambda f: shutil.rmtree(f / "vae"), "vae is missing, which model_index.json names"),
    "scheduler gone": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler is missing, which"),
    "tokenizer gone": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer is missing, which"),
    "T5 gone": (
        lambda f: edit_json(f, "model_index.json", text_encoder_3=["transformers", "T5EncoderModel"]),
        "text_encoder_3 is missing, which model_index.json names; fetch it again, or [null, null] there to go without",
    ),
    "tokenizer empty": (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "its scheduler or tokenizer cannot be"),
    "configuration gone": (lambda f: (f / "transformer/config.json").unlink(), "config.json is missing or no JSON"),
    "configuration torn": (lambda f: cut(f, "vae/config.json"), "config.json is missing or no JSON"),
    "weights torn": (cut, "damaged or was not fetched to its end"),
    "text weights torn": (lambda f: cut(f, TEXT), f"{TEXT} is damaged or was not fetched to its end"),
    "a pointer": (lambda f: (f / WEIGHTS).write_text(POINTER), "is a Git LFS pointer"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is empty"),
    "a stopped download": (
        lambda f: (f / WEIGHTS).rename(f / f"{WEIGHTS}.incomplete"),
        "holds only diffusion_pytorch_model.safetensors.incomplete of a download that was stopped",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds no weights (.safetensors)"),
    "a shard lost": (shard_lost, "-00002-of-00002.safetensors is missing, which diffusion_pytorch_model.safet"),
    "a layer lost": (
        lambda f: edit_weights(f, lambda t: t.pop("proj_out.weight")), "transformer: the weights lack proj_out.weight"),
    "an autoencoder's layer lost": (
        lambda f: edit_weights(
            f, lambda t: t.pop("decoder.conv_in.weight"), "vae/diffusion_pytorch_model.safetensors"),
        "vae: the weights lack decoder.conv_in.weight",
    ),
    "a text encoder's layer lost": (
        lambda f: edit_weights(f, lambda t: t.pop("text_projection.weight"), TEXT),
        "text_encoder: the weights lack text_projection.weight",
    ),
    "another width": (
        lambda f: edit_weights(f, lambda t: t.update({"proj_out.bias": torch.ones(3)})), "proj_out.bias"),
    "a deeper network": (
        lambda f: edit_weights(f, lambda t: t.update({"transformer_blocks.7.x": torch.ones(1)})),
        "the weights have, and its configuration has not, transformer_blocks.7.x",
    ),
    "a class that is not there": (
        lambda f: edit_json(f, "model_index.json", scheduler=["diffusers", "NoSuchScheduler"]),
        "its scheduler is a NoSuchScheduler, which the installed diffusers does not have",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_one_sentence_that_names_the_part(copied: Path, fault: str) -> None:
    edit, message = BROKEN[fault]
    edit(copied)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_policy(settings(copied))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("model.path")


def test_a_file_in_place_of_a_folder_says_what_it_is_and_what_to_do(tmp_path: Path) -> None:
    kinds = {
        "sd3": ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "import StableDiffusion3Pi"),
        "flux": ("double_blocks.0.img_attn.qkv.weight", "FluxPipeline.from_single_file("),
        "lora": ("transformer.a.lora_A.weight", "is a LoRA, not a model; give it as the adapter"),
        "other": ("weight", "is a file; give a diffusers pipeline folder"),
    }  # fmt: skip
    for name, (key, message) in kinds.items():
        save_file({key: torch.ones(1)}, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=re.escape(message)):
            load_policy(settings(tmp_path / f"{name}.safetensors"))
    (tmp_path / "old.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="is a pickle"):
        load_policy(settings(tmp_path / "old.ckpt"))


@pytest.mark.parametrize("path", ["models/sd35/medium", "../gone", "./gone", "gone"])
def test_a_missing_relative_path_is_not_asked_of_the_hub(path: str, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("asked"))
    with pytest.raises(UserError, match=rf"does not exist \(looked in the working folder {tmp_path}\)"):
        load_policy(settings(Path("x"), path=path))


def schedule(folder: Path, kind: str, **config: Any) -> None:
    edit_json(folder, "model_index.json", scheduler=["diffusers", kind])
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": kind, **config}))


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
RESOLUTION = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SCHEDULERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "its shift of 3"),
    "LCM": ("FlowMatchLCMScheduler", {"shift": 3.0}, "its shift of 3"),
    "UniPC": ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0}, "its shift of 3"),
    "DPM": ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3.0}, "its shift of 3"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_another_flow_scheduler_gives_its_shift_and_that_is_said_once(
    copied: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind, config, how = SCHEDULERS[name]
    schedule(copied, kind, **config)
    schedules._say.cache_clear()
    with caplog.at_level(logging.WARNING, logger="flowalign"):
        for _ in range(2):
            policy = load_policy(settings(copied))
    said = [record.message for record in caplog.records if record.name.startswith("flowalign")]
    assert said == [f"model.path: its scheduler is a {kind}; images are drawn by Euler steps with {how}"]
    even = torch.tensor([1, 0.75, 0.5, 0.25])
    torch.testing.assert_close(policy.sigmas(4), torch.cat([3 * even / (1 + 2 * even), torch.zeros(1)]))
    assert policy.sigmas(7)[0] == 1
    theirs = getattr(diffusers, kind)(**config)
    if name in ("UniPC", "DPM"):  # whose own grid it is, but for its ends
        theirs.set_timesteps(4)
        torch.testing.assert_close(policy.sigmas(4), theirs.sigmas, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "config", [{"shift": 3.0}, {**RESOLUTION, "time_shift_type": "linear"}, {**RESOLUTION, "shift_terminal": 0.1}]
)
def test_the_schedule_is_that_of_the_scheduler_in_the_folder(copied: Path, config: dict[str, Any]) -> None:
    schedule(copied, "FlowMatchEulerDiscreteScheduler", **config)
    policy = load_policy(settings(copied))
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    if "shift" in config:
        theirs.set_timesteps(6)
    else:  # on the line from 256 to 4096 tokens
        theirs.set_timesteps(6, mu=0.5 + (1.15 - 0.5) * (policy._tokens() - 256) / (4096 - 256))
    torch.testing.assert_close(policy.sigmas(6), theirs.sigmas, atol=2e-7, rtol=0)


def test_a_shift_by_resolution_is_taken_from_any_flow_scheduler(copied: Path) -> None:
    found = []
    for kind, config in (("FlowMatchEulerDiscreteScheduler", {}), ("UniPCMultistepScheduler", FLOW)):
        schedule(copied, kind, **RESOLUTION, **config)
        found.append(load_policy(settings(copied)).sigmas(4, "uniform"))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("EulerDiscreteScheduler", {}, "its scheduler is a EulerDiscreteScheduler, by its configuration"),
        ("UniPCMultistepScheduler", {}, "for a model that predicts no velocity"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "epsilon"}, "no velocity"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "has invert_sigmas"),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, "has use_karras_sigmas, and no flow"),
    ],
)  # fmt: skip
def test_a_scheduler_of_no_flow_is_refused(copied: Path, kind: str, config: dict[str, Any], message: str) -> None:
    schedule(copied, kind, **config)
    with pytest.raises(UserError, match=message):
        load_policy(settings(copied))


def test_the_embedded_folder_opens_in_plain_diffusers_as_the_readme_says() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert 'from_pretrained("assets/toyworld/model", text_encoder_3=None, tokenizer_3=None)' in readme
    folder = asset("toyworld/model")
    plain = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    ours = load_policy("toyworld").pipeline
    assert plain.scheduler.config == ours.scheduler.config and set(plain.components) == set(ours.components)


def test_what_the_hub_calls_no_name_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"'no--body/nothing' is no local folder .* the hub did not give it"):
        find_family(Model(path="no--body/nothing"))
