"""`flowalign model check`: correct adapters pass, and each kind of mistake fails the line that names it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flowalign.cli.app import main
from flowalign.cli.console import console
from flowalign.config import Model
from flowalign.config.base import UserError
from flowalign.policies import loading
from flowalign.policies.diffusers_pipeline import PipelinePolicy
from flowalign.policies.flux import FluxPolicy
from flowalign.preflight.check_model import check_model

Flux = Callable[[bool], Path]


def failed_lines(folder: Path) -> set[str]:
    model = Model(path=str(folder), height=16, width=24, max_sequence_length=12)
    return {finding.check for finding in check_model(model, "cpu", steps=2) if finding.passed is False}


@pytest.mark.parametrize("kind", ["sd35", "flux"])
def test_a_correct_adapter_passes_every_line(tiny_sd35: Path, tiny_flux: Flux, kind: str) -> None:
    folder = tiny_sd35 if kind == "sd35" else tiny_flux(True)
    model = Model(path=str(folder), height=16, width=24, max_sequence_length=12)
    findings = check_model(model, "cpu", steps=2)
    assert {f.check: f.detail for f in findings if f.passed is False} == {}
    reported = {finding.check for finding in findings if finding.passed is None}
    assert reported == {"VAE round trip", "one step to x0"}
    gradients = {f.check: f.detail for f in findings if f.check.startswith("a gradient reaches")}
    if kind == "sd35":
        # The text stream ends before the last block's end, so that its text queries change nothing.
        assert gradients["a gradient reaches attention"] == "22 of 23 modules; the velocity does not depend on 1 more"
        assert gradients["a gradient reaches image_attention"] == "8 of 8 modules"
    else:
        assert gradients["a gradient reaches attention"] == "22 of 22 modules"


class Backwards(FluxPolicy):
    def _forward(self, module, x, sigma, condition):
        return -super()._forward(module, x, sigma, condition)


class Unshifted(FluxPolicy):
    def _resolution_shift(self):
        return super()._resolution_shift() * 1.6


class Mixed(FluxPolicy):
    def encode_prompts(self, prompts):
        condition = super().encode_prompts(prompts)
        return condition[[*range(1, len(prompts)), 0]]


class Overguided(FluxPolicy):
    def guided_velocity(self, x, sigma, conditioning, guidance):
        return super().guided_velocity(x, sigma, conditioning, guidance + 1)


class Detached(FluxPolicy):
    def _forward(self, module, x, sigma, condition):
        with torch.no_grad():
            return super()._forward(module, x, sigma, condition)


class Unexported(FluxPolicy):
    def export(self, folder):
        kept = self.trainable_state()
        self.load_trainable_state({name: 0 * weight for name, weight in kept.items()})
        super().export(folder)
        self.load_trainable_state(kept)


DRAWS = {
    "ODE rollout is the pipeline's",
    "ODE rollout with guidance 4 is the pipeline's",
    "the exported LoRA draws the same in the pipeline",
}


@pytest.mark.parametrize(
    ("broken", "lines"),
    [
        (Unshifted, {*DRAWS, "sigmas are the pipeline's"}),
        (Mixed, {*DRAWS, "a row of a batch is the row alone", "velocity has the pipeline's sign"}),
        (Overguided, {"ODE rollout with guidance 4 is the pipeline's", "one guidance batch is two passes", *DRAWS}),
        (Detached, {"a gradient reaches attention", "a gradient reaches feed_forward"}),
        (Unexported, {"the exported LoRA draws the same in the pipeline"}),
    ],
)
def test_a_broken_adapter_fails_the_line_of_its_mistake(
    tiny_flux: Flux, monkeypatch: pytest.MonkeyPatch, broken: type[PipelinePolicy], lines: set[str]
) -> None:
    monkeypatch.setitem(loading.FAMILIES, "FluxPipeline", broken)
    assert failed_lines(tiny_flux(True)) == lines


ALL = {
    *(*DRAWS, "sigmas are the pipeline's", "velocity has the pipeline's sign", "zero SDE noise is the ODE"),
    *("a row of a batch is the row alone", "one guidance batch is two passes", "one step to x0", "VAE round trip"),
    *("a gradient reaches attention", "a gradient reaches feed_forward"),
}
# Lines that need no text, no velocity, no picture, no file.
WITHOUT: dict[str, set[str]] = {
    "encode": {"VAE round trip"},
    "_forward": {"VAE round trip"},
    "decode": ALL - {*DRAWS, "VAE round trip", "zero SDE noise is the ODE", "velocity has the pipeline's sign",
                     "sigmas are the pipeline's"},
    "sigmas": {"VAE round trip", "one step to x0", "a row of a batch is the row alone",
               "one guidance batch is two passes", "a gradient reaches attention", "a gradient reaches feed_forward"},
    "export": ALL - {"the exported LoRA draws the same in the pipeline"},
}  # fmt: skip


@pytest.mark.parametrize("method", WITHOUT)
def test_an_adapters_error_fails_the_lines_that_need_its_result_and_no_others(
    tiny_flux: Flux, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the adapter\nis asleep")

    monkeypatch.setitem(loading.FAMILIES, "FluxPipeline", type("Broken", (FluxPolicy,), {method: broken}))
    model = Model(path=str(tiny_flux(False)), height=16, width=16, max_sequence_length=8)
    findings = {finding.check: finding for finding in check_model(model, "cpu", steps=2)}
    failed = {name for name, finding in findings.items() if finding.passed is False}
    assert findings.keys() == {*ALL} and failed == ALL - WITHOUT[method]
    assert {findings[name].detail for name in failed} == {"raises RuntimeError: the adapter is asleep"}


def test_an_adapter_that_cannot_be_made_or_names_no_module_is_a_failed_line(
    tiny_flux: Flux, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asleep(*_: object, **__: object) -> None:
        return [][0]

    for change, detail in (
        ({"_check": asleep}, "raises IndexError"),
        ({"targets": {"attention": ("nothing",)}}, "none of attention names one of this model"),
    ):
        monkeypatch.setitem(loading.FAMILIES, "FluxPipeline", type("Broken", (FluxPolicy,), change))
        with pytest.raises(SystemExit) as ended:
            main(["model", "check", str(tiny_flux(False)), "--size", "16", "--max-sequence-length", "8"])
        assert ended.value.code == 1
        out = capsys.readouterr().out
        assert out.count("FAIL") == 1 and detail in " ".join(out.split())


def test_the_command_prints_the_table_and_ends_with_1_if_a_line_fails(
    tiny_flux: Flux, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "width", 200)
    arguments = ["model", "check", str(tiny_flux(False)), "--size", "16", "--steps", "2", "--max-sequence-length", "8"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert "FAIL" not in (text := capsys.readouterr().out) and text.count("pass") >= 8
    monkeypatch.setitem(loading.FAMILIES, "FluxPipeline", Backwards)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    lines = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert set(lines) == {*DRAWS, "velocity has the pipeline's sign"}


def test_an_installed_package_adds_an_adapter(tiny_flux: Flux, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    entries = (
        "FluxPipeline = flowalign.policies.flux:FluxPolicy",
        "LostPipeline = no_module:X",
        "OddPipeline = os:sep",
    )
    (info / "entry_points.txt").write_text("\n".join(["[flowalign.policies]", *entries]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(loading.FAMILIES, "FluxPipeline")
    assert loading.find_family(Model(path=str(tiny_flux(True))))[0] is FluxPolicy
    for kind, message in {
        "LostPipeline": "adapter no_module:X for LostPipeline cannot be imported: No module named 'no_module'",
        "OddPipeline": "adapter os:sep for OddPipeline is no subclass of PipelinePolicy",
        "OtherPipeline": "is a OtherPipeline; supported are StableDiffusion3Pipeline, FluxPipeline, LostPipeline",
    }.items():
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        with pytest.raises(UserError, match=message):
            loading.find_family(Model(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "does not exist; give a diffusers pipeline folder or a hub id"),
        ("nobody/nothing", ", and the hub did not give it (LocalEntryNotFoundError)"),
    ],
)
def test_a_path_that_is_no_model_is_one_sentence(
    path: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as ended:
        main(["model", "check", path])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
