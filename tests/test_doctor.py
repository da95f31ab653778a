"""What `flowalign doctor` says."""

import importlib.metadata
import sys

import huggingface_hub
import pytest

from flowalign import assets
from flowalign.doctor import EXTRAS, diagnose
from flowalign.policies.attention import CANDIDATES


def rows():
    return {part: (works, detail) for part, works, detail in diagnose()}


@pytest.fixture(scope="module")
def here():
    return rows()


def test_every_part_has_a_row_of_one_line(here):
    parts = {"packages", "CPU", "CUDA", "bf16", "torch.compile", "OCR", "embedded model", "bundled prompts"}
    parts |= {"model hub", "disk"}
    assert set(here) == parts | {f"attention {name}" for name in CANDIDATES} | {f"extra {name}" for name in EXTRAS}
    assert all(detail and "\n" not in detail for _, detail in here.values())


def test_what_the_tests_need_works_here(here):
    for part in ("packages", "CPU", "attention native", "OCR", "bundled prompts"):
        assert here[part][0], here[part]


def test_bf16_is_compared_with_fp32(here):
    works, detail = here["bf16"]
    assert ("times as fast as fp32" in detail) is works
    assert ("model.dtype=fp32" in detail) is not works


def test_a_missing_extra_names_the_command_that_adds_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    found = rows()
    for name in EXTRAS:
        works, detail = found[f"extra {name}"]
        assert not works
        assert f"pip install 'flowalign[{name}]'" in detail


def test_what_is_missing_or_forbidden_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "_PLACES", (tmp_path,))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delitem(sys.modules, "rewards.ocr_engine", raising=False)
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
