"""LoRA files: ours as other tools read them, other tools' as ours, and none of which a part is left out."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flowalign.cli.app import main
from flowalign.config import Lora, Model, Sampler
from flowalign.config.base import UserError
from flowalign.policies.adapters import adapter_files, merge_adapter, module_places
from flowalign.policies.base import Policy
from flowalign.policies.flux import FluxPolicy
from flowalign.policies.loading import load_policy
from flowalign.policies.sd3 import SD3Policy
from flowalign.rollout.generate import rollout
from flowalign.rollout.prompts import Row
from flowalign.rollout.stages import RolloutRequest

Flux = Callable[[bool], Path]
Tensors = dict[str, torch.Tensor]
FILE = "pytorch_lora_weights.safetensors"
QUERY = "transformer_blocks.0.attn.to_q"


def settings(folder: Path, **changes: Any) -> Model:
    base = Model(path=str(folder), height=16, width=16, dtype="fp32", max_sequence_length=4, lora=None)
    return base.model_copy(update=changes)


def weights(policy: Policy) -> Tensors:
    return {name: weight.clone() for name, weight in policy.transformer.state_dict().items()}


def plain(folder: Path, kind: Any) -> Any:
    return kind.from_pretrained(folder, dtype=torch.float32)


def random_pair(out: int, into: int, rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, into), torch.randn(out, rank)


def lora(
    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]], name: str = "transformer.{}.lora_{}.weight"
) -> Tensors:
    return {
        name.format(module, part): tensor
        for module, pair in layers.items()
        for part, tensor in zip("AB", pair, strict=True)
    }


def close(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.fixture(scope="module")
def trained(tiny_sd35: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Policy, Path]:
    """A policy with a LoRA of alpha twice its rank, moved, and its export."""
    targets = ("attention", "image_attention", "feed_forward")
    policy = load_policy(settings(tiny_sd35, lora=Lora(rank=4, alpha=8, targets=targets)))
    with torch.no_grad():
        for weight in policy.trainable_parameters().values():
            weight += 0.1 * torch.randn(weight.shape)
    folder = tmp_path_factory.mktemp("export") / "lora"
    policy.export(folder)
    return policy, folder


@pytest.fixture
def merged(tiny_sd35: Path) -> Callable[[Path | str], Tensors]:
    return lambda adapter: weights(load_policy(settings(tiny_sd35, adapter=str(adapter))))


def test_the_export_has_its_scale_in_the_weights(trained: tuple[Policy, Path]) -> None:
    policy, folder = trained
    exported = load_file(folder / FILE)
    assert all(re.fullmatch(r"transformer\..+\.lora_[AB]\.weight", key) for key in exported)
    with safe_open(folder / FILE, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    beside = json.loads((folder / "adapter_config.json").read_text())
    assert header["transformer.r"] == header["transformer.lora_alpha"] == beside["r"] == beside["lora_alpha"] == 4
    names = {key.removeprefix("transformer.").split(".lora_")[0] for key in exported}
    assert set(beside["target_modules"]) == names and beside["peft_type"] == "LORA"
    own = policy.trainable_parameters()
    for name in names:
        a, b = (own[f"{name}.lora_{part}.default.weight"] for part in "AB")
        products = [exported[f"transformer.{name}.lora_{part}.weight"] for part in "BA"]
        torch.testing.assert_close(products[0] @ products[1], 8 / 4 * b @ a)


def test_the_export_draws_the_same_with_and_without_its_header(
    trained: tuple[Policy, Path], tiny_sd35: Path, tmp_path: Path
) -> None:
    policy, folder = trained
    save_file(load_file(folder / FILE), tmp_path / FILE)
    rows, key = [Row(0, "a photo of a red star")], (0, 7, 0)
    sampler = Sampler(steps=2)
    wanted = rollout(policy, RolloutRequest(rows, 1, sampler, policy.request, key, batch=1)).media
    for adapter in (folder, tmp_path):
        pipeline = plain(tiny_sd35, StableDiffusion3Pipeline)
        pipeline.load_lora_weights(adapter)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        other = SD3Policy(pipeline, settings(tiny_sd35), torch.device("cpu"), 0)
        drawn = rollout(other, RolloutRequest(rows, 1, sampler, other.request, key, batch=1)).media
        torch.testing.assert_close(drawn, wanted, atol=1e-4, rtol=0)
    with policy.reference():
        assert (
            rollout(policy, RolloutRequest(rows, 1, sampler, policy.request, key, batch=1)).media - wanted
        ).abs().max() > 1e-3


def test_peft_reads_the_export(trained: tuple[Policy, Path], tiny_sd35: Path, tmp_path: Path, merged: Any) -> None:
    _, folder = trained
    renamed = {key.replace("transformer.", "base_model.model.", 1): w for key, w in load_file(folder / FILE).items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    model = PeftModel.from_pretrained(plain(tiny_sd35, StableDiffusion3Pipeline).transformer, tmp_path)
    close(merged(folder), model.merge_and_unload().state_dict())
    close(merged(tmp_path), merged(folder))


def test_exports_of_before_with_alpha_in_the_header_load_as_they_did(
    trained: tuple[Policy, Path], tmp_path: Path, merged: Any
) -> None:
    _, folder = trained
    unfolded = {key: w / 2 if "lora_B" in key else w for key, w in load_file(folder / FILE).items()}
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
    save_file(unfolded, tmp_path / FILE, metadata=header)
    close(merged(tmp_path), merged(folder))


def test_training_goes_on_from_an_export_at_its_strength(
    trained: tuple[Policy, Path], tiny_sd35: Path, merged: Any, tmp_path: Path
) -> None:
    policy, folder = trained
    again = load_policy(settings(tiny_sd35, adapter=str(folder), lora=Lora(rank=2)))
    x, sigma = torch.randn(2, 4, 2, 2), torch.rand(2)
    condition = again.encode_prompts(["a star", "a ring"])
    with torch.no_grad():
        torch.testing.assert_close(again.velocity(x, sigma, condition), policy.velocity(x, sigma, condition))


# How trainers write the same change of the first block's query: names, and where the scale of 2 is said.
_NAME, _BARE = "transformer_blocks.0.attn.to_q.lora{}.weight", "transformer_blocks_0_attn_to_q.lora{}.weight"
LAYOUTS: dict[str, tuple[str, str, str, tuple[str, str]]] = {
    "diffusers": ("x.safetensors", f"transformer.{_NAME}", "header", ("_A", "_B")),
    "diffusers with alpha": ("x.safetensors", f"transformer.{_NAME}", "alpha", ("_A", "_B")),
    "bare": ("x.safetensors", _NAME, "alpha", ("_A", "_B")),
    "old diffusers": ("x.safetensors", f"transformer.{_NAME}", "alpha", (".down", ".up")),
    "underscores": ("x.safetensors", f"lora_transformer_{_BARE}", "alpha", ("_down", "_up")),
    "lycoris": ("x.safetensors", f"lycoris_{_BARE}", "alpha", ("_down", "_up")),
    "peft": ("adapter_model.safetensors", f"base_model.model.{_NAME}", "config", ("_A", "_B")),
    "rslora": ("adapter_model.safetensors", f"base_model.model.{_NAME}", "rslora", ("_A", "_B")),
    "pattern": ("adapter_model.safetensors", f"base_model.model.{_NAME}", "pattern", ("_A", "_B")),
}
SCALES: dict[str, dict[str, Any]] = {
    "header": {"r": 4, "lora_alpha": 8},
    "config": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 4, "use_rslora": True},
    "pattern": {"r": 9, "lora_alpha": 1, "rank_pattern": {"to_q": 4}, "alpha_pattern": {"attn.to_q": 8}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_pair_is_the_same_change(layout: str, tmp_path: Path, merged: Any, tiny_sd35: Path) -> None:
    file, name, scale, parts = LAYOUTS[layout]
    before = weights(load_policy(settings(tiny_sd35)))
    a, b = random_pair(*before[f"{QUERY}.weight"].shape, rank=4)
    tensors = {name.format(part): tensor for part, tensor in zip(parts, (a, b), strict=True)}
    if scale == "alpha":
        tensors[re.sub(r"\.lora.*", ".alpha", name)] = torch.tensor(8.0)
    about = {f"transformer.{key}": value for key, value in SCALES.get(scale, {}).items()}
    header = {"lora_adapter_metadata": json.dumps(about)} if scale == "header" else {}
    save_file(tensors, tmp_path / file, metadata=header)
    if scale not in ("alpha", "header"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **SCALES[scale]}))
    found = merged(tmp_path)
    close(found, {**before, f"{QUERY}.weight": before[f"{QUERY}.weight"] + 2 * b @ a})
    close(found, merged(tmp_path / file))


def test_the_original_codes_names_are_those_that_diffusers_converts(tiny_sd35: Path, monkeypatch: Any) -> None:
    """A native checkpoint put together by our table is taken apart by diffusers' own converter as it was."""
    ours = plain(tiny_sd35, StableDiffusion3Pipeline).transformer
    places = module_places(ours, SD3Policy.native)
    joined = {}
    for name in (*native_names(SD3Policy.native, blocks=3), "context_embedder"):
        if found := places.get(name.replace(".", "_")):
            for kind in ("weight", "bias"):
                parts = [getattr(ours.get_submodule(place.module), kind) for place in found]
                rows = sum(len(part) for part in parts)
                whole = parts[0].new_empty(rows, *parts[0].shape[1:])
                for place, part in zip(found, parts, strict=True):
                    start = 0
                    for piece in place.rows:
                        whole[piece] = part[start : (start := start + piece.stop - piece.start)]
                joined[f"{name}.{kind}"] = whole
    state = ours.state_dict()
    joined["pos_embed"] = state["pos_embed.pos_embed"]
    norms = {
        "x_block.attn": ("attn", "norm_q", "norm_k"),
        "context_block.attn": ("attn", "norm_added_q", "norm_added_k"),
        "x_block.attn2": ("attn2", "norm_q", "norm_k"),
    }
    for block in range(3):
        for name, (module, *kinds) in norms.items():
            for kind, short in zip(kinds, "qk", strict=True):
                if (weight := state.get(f"transformer_blocks.{block}.{module}.{kind}.weight")) is not None:
                    joined[f"joint_blocks.{block}.{name}.ln_{short}.weight"] = weight
    with monkeypatch.context() as patched:  # it knows the published sizes alone
        patched.setattr("diffusers.loaders.single_file_utils.get_caption_projection_dim", lambda _: 32)
        converted = convert_sd3_transformer_checkpoint_to_diffusers(joined)
    close(converted, state)


def native_names(native: Mapping[str, Any], blocks: int) -> list[str]:
    return [name.replace("*", str(n)) for name in native for n in (range(blocks) if "*" in name else (0,))]


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_kohyas_and_comfyuis_files_are_for_flux_what_diffusers_makes_of_them(
    tiny_flux: Flux, tmp_path: Path, prefix: str
) -> None:
    ours, theirs = (plain(tiny_flux(True), FluxPipeline) for _ in range(2))
    places, tensors = module_places(ours.transformer, FluxPolicy.native), {}
    # diffusers' own converter loses what is in no block, and knows linear1 in the published size alone.
    names = [name for name in native_names(FluxPolicy.native, blocks=2) if "_blocks." in name]
    for name in (name for name in names if not name.endswith("linear1")):
        found = places[name.replace(".", "_")]
        rows = sum(piece.stop - piece.start for place in found for piece in place.rows)
        a, b = random_pair(rows, ours.transformer.get_submodule(found[0].module).in_features)
        written = prefix + (name if prefix.endswith(".") else name.replace(".", "_"))
        tensors |= {f"{written}.lora_down.weight": a, f"{written}.lora_up.weight": b}
        tensors[f"{written}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "other.safetensors")
    before = {name: weight.clone() for name, weight in ours.transformer.state_dict().items()}
    merge_adapter(ours, str(tmp_path / "other.safetensors"), FluxPolicy.native)
    theirs.load_lora_weights(tmp_path / "other.safetensors")
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    close(ours.transformer.state_dict(), theirs.transformer.state_dict())
    moved = {name for name, weight in ours.transformer.state_dict().items() if not torch.equal(weight, before[name])}
    assert len(moved) == 2 * 14 + 2 * 2


def test_a_single_blocks_joined_weight_is_parted_by_rows(tiny_flux: Flux, tmp_path: Path) -> None:
    pipeline = plain(tiny_flux(False), FluxPipeline)
    block = pipeline.transformer.single_transformer_blocks[1]
    parts = [block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp]
    before = torch.cat([part.weight for part in parts]).clone()
    a, b = random_pair(*before.shape)
    names = "diffusion_model.single_blocks.1.linear1.lora_{}.weight"
    save_file({names.format("A"): a, names.format("B"): b}, tmp_path / "native.safetensors")
    merge_adapter(pipeline, str(tmp_path), FluxPolicy.native)
    torch.testing.assert_close(torch.cat([part.weight for part in parts]), before + b @ a)


def test_weights_for_a_text_encoder_go_there(tiny_sd35: Path, tmp_path: Path) -> None:
    pipeline = plain(tiny_sd35, StableDiffusion3Pipeline)
    linear = pipeline.text_encoder_2.get_submodule("text_model.encoder.layers.0.self_attn.q_proj")
    before = linear.weight.clone()
    a, b = random_pair(*before.shape)
    name = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight"
    save_file({name.format("down"): a, name.format("up"): b}, tmp_path / "text.safetensors")
    merge_adapter(pipeline, str(tmp_path), SD3Policy.native)
    torch.testing.assert_close(linear.weight, before + b @ a)


GOOD = lora({QUERY: random_pair(32, 32)})
A, B = (f"transformer.{QUERY}.lora_{part}.weight" for part in "AB")
BAD: dict[str, tuple[Tensors, str]] = {
    "half of a pair": ({A: GOOD[A]}, f"is incomplete: {A} has no lora_B.weight beside it"),
    "the other half": ({B: GOOD[B]}, f"is incomplete: {B} has no lora_A.weight beside it"),
    "an alpha alone": (GOOD | {"transformer.x.alpha": torch.tensor(1.0)}, "x.alpha has no pair beside it"),
    "NaN": ({A: GOOD[A] / 0 * 0, B: GOOD[B]}, f"holds numbers that are not finite, in {A}"),
    "infinity": ({A: GOOD[A], B: GOOD[B] / 0}, f"holds numbers that are not finite, in {B}"),
    "a block that is not there": (
        GOOD | lora({"transformer_blocks.9.attn.to_q": random_pair(32, 32)}),
        "its transformer has no module for transformer.transformer_blocks.9.attn.to_q.lora_A.weight",
    ),
    "another width": (lora({QUERY: random_pair(32, 64)}), f"{B} and its lora_A are (32, 2) and (2, 64)"),
    "more rows": (lora({QUERY: random_pair(96, 32)}), "for a weight of (32, 32)"),
    "ranks that differ": ({A: GOOD[A], B: torch.ones(32, 3)}, "are (32, 3) and (2, 32)"),
    "another family": (
        lora({"single_transformer_blocks.0.attn.to_q": random_pair(32, 32)}), "has no module for transformer.single_"),
    "a U-Net's": (lora({"down_blocks.0.attn": random_pair(4, 4)}, "unet.{}.lora_{}.weight"), "no module for unet.down"),
    "no LoRA at all": ({"transformer_blocks.0.attn.to_q.weight": torch.ones(2, 2)}, "is no LoRA that this reads"),
    "a checkpoint's": (lora({QUERY: random_pair(32, 32)}, "{}.lora_{}.default.weight"), "is no LoRA that this reads"),
    "nothing": ({}, "holds no weights"),
    "quantised": ({A: GOOD[A].to(torch.int8), B: GOOD[B]}, f"holds torch.int8 in {A}, so it is quantised"),
    "DoRA": (GOOD | {f"transformer.{QUERY}.lora_magnitude_vector": torch.ones(32)}, "holds DoRA (transformer."),
    "LoHa": ({f"lora_unet_{QUERY}.hada_w1_a": torch.ones(2, 2)}, "holds LoHa (lora_unet_"),
    "LoKr": ({f"lora_unet_{QUERY}.lokr_w1": torch.ones(2, 2)}, "holds LoKr (lora_unet_"),
    "a text encoder that is not there": (
        lora({"layers.0": random_pair(4, 4)}, "text_encoder_3.{}.lora_{}.weight"), "is for a text_encoder_3, which"),
    "a weight twice": (
        GOOD | lora({"joint_blocks.0.x_block.attn.qkv": random_pair(96, 32)}, "diffusion_model.{}.lora_{}.weight"),
        "holds one weight twice, as ",
    ),
    "a weight under two spellings": (GOOD | lora({QUERY: random_pair(32, 32)}, "{}.lora_{}.weight"), "holds one"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_wholly_understood_is_refused_with_its_key(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    tensors, message = BAD[kind]
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model, text_encoder_3=None, tokenizer_3=None)
    before = {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        merge_adapter(pipeline, str(tmp_path / "x.safetensors"), SD3Policy.native)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("model.adapter: ")
    assert all(torch.equal(before[name], weight) for name, weight in pipeline.transformer.state_dict().items())


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"peft_type": "LOHA", "r": 2, "lora_alpha": 2}, "is LOHA by adapter_config.json"),
        ({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True}, "is DoRA by adapter_config.json"),
        ({"r": 2, "lora_alpha": 2, "init_lora_weights": "pissa_niter_4"}, "was begun with pissa_niter_4"),
        ({"r": 3, "lora_alpha": 3}, "says rank 3 in adapter_config.json"),
        ({"r": 2, "lora_alpha": 4}, "says two scales for"),
        ({"r": 2}, "has in adapter_config.json r 2 and lora_alpha None, which must be numbers"),
        ({"r": 2, "lora_alpha": "2"}, "has in adapter_config.json r 2 and lora_alpha '2', which must be numbers"),
        ({"r": 2, "lora_alpha": 2, "rank_pattern": [2]}, "as rank_pattern what is no mapping of names to numbers: [2]"),
        ({"r": 2, "lora_alpha": 2, "alpha_pattern": {"(": 2}}, "as alpha_pattern what is no mapping of names to"),
        ({"r": 2, "lora_alpha": 2, "alpha_pattern": {QUERY: "2"}}, "as alpha_pattern what is no mapping of names"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    about: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 2})}
    save_file(GOOD, tmp_path / FILE, metadata=header)
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model, text_encoder_3=None, tokenizer_3=None)
    with pytest.raises(UserError, match=re.escape(message)):
        merge_adapter(pipeline, str(tmp_path), SD3Policy.native)


def test_what_makes_weights_that_are_not_finite_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model, text_encoder_3=None, tokenizer_3=None)
    header = {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": NaN}'}
    for tensors, about in ((GOOD, header), ({name: 1e30 * own for name, own in GOOD.items()}, None)):
        save_file(tensors, tmp_path / "x.safetensors", metadata=about)
        with pytest.raises(UserError, match=f"makes weights that are not finite, of {re.escape(A)} times (nan|1)$"):
            merge_adapter(pipeline, str(tmp_path / "x.safetensors"), SD3Policy.native)


def test_endings_of_any_case_are_read_and_hidden_files_are_not(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "X.SAFETENSORS")
    (tmp_path / "._X.safetensors").write_bytes(b"x")
    assert (
        adapter_files(str(tmp_path)) == adapter_files(str(tmp_path / "X.SAFETENSORS")) == [tmp_path / "X.SAFETENSORS"]
    )


def test_a_file_that_is_no_weights_is_one_sentence(
    trained: tuple[Policy, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    whole = (trained[1] / FILE).read_bytes()
    files = {
        "torn.safetensors": (whole[: len(whole) // 2], "is damaged or was not fetched to its end"),
        "empty.safetensors": (b"", "is empty"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid x", "is a Git LFS pointer"),
        "pickle.bin": (b"x", "is a pickle, which may run anything"),
        "notes.txt": (b"x", "is no .safetensors file"),
    }
    for name, (contents, _) in files.items():
        (tmp_path / name).write_bytes(contents)
    wanted = {str(tmp_path / name): message for name, (_, message) in files.items()}
    (tmp_path / "bare").mkdir()
    (tmp_path / "run" / "lora").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").touch()
    wanted |= {
        str(tmp_path): "holds 3 files (empty.safetensors, pointer.safetensors, torn.safetensors",
        str(tmp_path / "bare"): "holds no .safetensors file",
        str(tmp_path / "run"): f"is a run folder; give its adapter, {tmp_path / 'run' / 'lora'}",
        str(tmp_path / "gone"): "does not exist; give a LoRA's file or folder",
        "nobody/nothing": f"is no local file or folder (looked in the working folder {Path.cwd()}), and the hub",
        "no--body/nothing": "and the hub did not give it (HFValidationError)",
        "./nothing/there": "does not exist (looked in the working folder",
        300 * "x": "does not exist (looked in the working folder",
    }
    for adapter, message in wanted.items():
        with pytest.raises(SystemExit):
            main(["sample", str(tiny_model), "a star", "--adapter", adapter, "--output", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: model.adapter: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert adapter_files(str(trained[1])) == [trained[1] / FILE, trained[1] / "adapter_config.json"]
