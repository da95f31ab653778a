"""The rows of `flowalign doctor`."""

import importlib.metadata
import sys

import huggingface_hub
import pytest
import torch

from flowalign.disk import assets
from flowalign.preflight import doctor
from flowalign.preflight.doctor import EXTRAS, diagnose


def rows():
    return {part: (works, detail) for part, works, detail in diagnose()}


@pytest.fixture(scope="module")
def here():
    return rows()


def test_every_part_is_one_row_of_one_line(here):
    parts = [part for part, _, _ in diagnose()]
    assert len(parts) == len(set(parts))
    assert all(detail and "\n" not in detail for _, detail in here.values())


def test_every_extra_that_can_be_installed_has_a_row(here):
    extras = importlib.metadata.metadata("flowalign").get_all("Provides-Extra")
    assert {f"extra {name}" for name in extras if name != "test"} == {part for part in here if part.startswith("extra")}


def test_the_parts_that_the_tests_need_work_here(here):
    for part in ("packages", "CPU", "attention native", "OCR", "bundled prompts"):
        assert here[part][0], here[part]


@pytest.mark.parametrize(
    ("bf16", "works", "words"),
    [
        (0.5, True, "4.0 times as fast as fp32 in a 512 x 512 product on cpu"),
        (4.0, False, "works, but 2.0 times as slow as fp32 on cpu; model.dtype=fp32 is faster"),
    ],
)
def test_bf16_is_compared_with_fp32(monkeypatch, bf16, works, words):
    monkeypatch.setattr(doctor, "_seconds", lambda size, dtype, device: bf16 if dtype == torch.bfloat16 else 2.0)
    assert doctor._bf16(torch.device("cpu")) == ("bf16", works, words)


def test_a_product_that_fails_in_bf16_says_why(monkeypatch):
    def seconds(size, dtype, device):
        if dtype == torch.bfloat16:
            raise RuntimeError("no such kernel.\nand a stack")
        return 1.0

    monkeypatch.setattr(doctor, "_seconds", seconds)
    row = doctor._bf16(torch.device("cpu"))
    assert row == ("bf16", False, "a matrix product fails (no such kernel); use model.dtype=fp32")


def test_a_missing_extra_names_the_command_that_adds_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    found = rows()
    for name in EXTRAS:
        works, detail = found[f"extra {name}"]
        assert not works
        assert f"pip install 'flowalign[{name}]'" in detail


def test_a_missing_or_forbidden_part_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "_PLACES", (tmp_path,))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delitem(sys.modules, "rewards.detectors.ocr_engine", raising=False)
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    found = rows()
    for part, word in {
        "embedded model": "assets/toyworld/model",
        "bundled prompts": "assets/toyworld/prompts/",
        "model hub": "HF_HUB_OFFLINE is set",
        "OCR": "rapidocr",
    }.items():
        works, detail = found[part]
        assert not works
        assert word in detail
