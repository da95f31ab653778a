"""Prompts that a text encoder cuts are counted and named."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.config import Model, recipe_from_dict
from flowalign.policies.cutting import cut_prompts
from flowalign.policies.loading import load_policy
from flowalign.trainer import train

STARS = "a star " * 4
WHOLE = (STARS + "a star").strip()  # 12 tokens with begin and end


def test_every_text_encoder_counts_what_it_does_not_read(tiny_sd35: Path) -> None:
    policy = load_policy(Model(path=str(tiny_sd35), height=64, width=64, dtype="fp32", max_sequence_length=30))
    (clip, clip_limit), (_, t5_limit) = (policy.text_limits()[kind] for kind in ("CLIP", "T5"))
    assert (clip_limit, t5_limit) == (20, 30)
    exactly = {limit: "a" + " star" * (limit - 3) for limit in (20, 30)}
    assert [len(clip(text).input_ids) for text in exactly.values()] == [20, 30]
    assert cut_prompts(policy, ["a star", exactly[20]]) == []
    (sentence,) = cut_prompts(policy, ["a star", "a star", exactly[30]], "training prompts")
    assert sentence == (
        "training prompts: CLIP reads 20 tokens and cuts 1 of 2, the longest of 30 tokens (T5 reads up to 30): "
        f"{exactly[30][:97] + '...'!r}"
    )
    assert [
        one.partition(":")[2].partition(",")[0] for one in cut_prompts(policy, [exactly[30], exactly[30] + " a"])
    ] == [
        " CLIP reads 20 tokens and cuts 2 of 2",
        " T5 reads 30 tokens and cuts 1 of 2",
    ]
    # What is counted as cut is not read.
    read = policy.encode_prompts([exactly[30], exactly[30] + " ring ring"]).tensors
    assert torch.equal(read["pooled"][0], read["pooled"][1])
    assert cut_prompts(policy, []) == []


def test_a_run_says_at_its_start_what_is_cut_and_nothing_where_all_is_read(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.txt").write_text("a red star\na blue ring\n" + "a red star and " * 9 + "a ring\na green star\n")
    (tmp_path / "cache").mkdir()
    for number, (prompts, said) in enumerate(((str(tmp_path / "long.txt"), 1), (values["prompts"], 0))):
        run = {**values["run"], "folder": str(tmp_path / f"run{number}")}
        shared = {"prompts": prompts, "run": run, "train": {**values["train"], "steps": 1}}
        model = {**values["model"], "cache_conditions": str(tmp_path / "cache")}
        recipe = {**values, **shared, "model": model}
        train(recipe_from_dict(recipe))
        shown = capsys.readouterr().out
        assert shown.count("training prompts: CLIP reads 20 tokens and cuts 1 of 4") == said
        assert "evaluation prompts" not in shown
