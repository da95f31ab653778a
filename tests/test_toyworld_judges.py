"""The embedded world's artifact judge and the script that trains such a head."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import rankdata

import rewards
from flowalign.toyworld.artifacts import HELD_OUT, KINDS, damaged
from flowalign.toyworld.grammar import random_example, words
from flowalign.toyworld.render import render

ROOT = Path(__file__).parents[1]
HEAD = "toyworld/judges/artifact.safetensors"


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean pictures and ones with damage of kinds that the judge was not trained on."""
    rng, pool, kinds = np.random.default_rng(5), words(held_out=True), list(HELD_OUT.values())
    clean = [render(random_example(rng, pool, 0.5)[1]) for _ in range(2 * count)]
    bad = [damaged(picture, kinds[i % len(kinds)], rng) for i, picture in enumerate(clean[count:])]
    first, second = (torch.from_numpy(np.stack(p)).permute(0, 3, 1, 2) / 255 for p in (clean[:count], bad))
    return first, second


def test_the_artifact_judge_finds_damage_of_kinds_it_never_saw() -> None:
    assert not set(KINDS) & set(HELD_OUT)
    clean, bad = pairs(100)
    judge = rewards.load("artifact", head=HEAD)
    scores = [rewards.score(judge, pictures, ["any"] * 100).numpy() for pictures in (bad, clean)]
    ranks = rankdata(np.concatenate(scores))[100:]
    assert (ranks.sum() - 100 * 101 / 2) / 100**2 >= 0.95


def test_the_map_is_redder_where_the_damage_is() -> None:
    clean, _ = pairs(40)
    bad = clean.clone()
    bad[:, :, 36:56, 36:56] = torch.rand(40, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    maps = rewards.load("artifact", head=HEAD).maps(bad)
    assert maps is not None
    assert maps[:, 36:56, 36:56].mean() > 5 * maps[:, :28, :28].mean()


def test_the_judge_keeps_the_contract() -> None:
    assert [finding for finding in rewards.check(rewards.load("artifact", head=HEAD)) if finding.passed is False] == []


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "train_artifact_reward.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_the_script_trains_a_head_that_a_recipe_can_name(tmp_path: Path) -> None:
    rng, pool = np.random.default_rng(0), words(held_out=False)
    for name in ("clean", "artifacts"):
        (tmp_path / name).mkdir()
        for index in range(40):
            picture = render(random_example(rng, pool, 0.5)[1])
            picture = damaged(picture, KINDS["blotch"], rng) if name == "artifacts" else picture
            Image.fromarray(picture).save(tmp_path / name / f"{index}.png")
    folders = ("--clean", str(tmp_path / "clean"), "--artifacts", str(tmp_path / "artifacts"))
    output = tmp_path / "head.safetensors"
    done = script(*folders, "--model", "toyworld/judges/vit", "--steps", "60", "--output", str(output))
    assert done.returncode == 0, done.stderr
    found = re.search(r"area under the curve ([\d.]+)", done.stdout)
    assert found is not None and float(found[1]) > 0.8
    assert rewards.load("artifact", head=str(output)).name == "artifact"
    done = script("--clean", str(tmp_path), "--artifacts", str(tmp_path / "artifacts"), "--output", str(output))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "--clean" in done.stderr
