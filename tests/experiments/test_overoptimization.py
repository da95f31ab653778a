"""The over-optimisation bench: its gold judge of signs, its proxies, its runs and its results."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

import rewards
from flowalign.config.base import UserError
from flowalign.disk.assets import asset
from flowalign.experiments.overoptimization import DEFENCES, WORLDS, make_recipe, prepare
from flowalign.experiments.overoptimization_results import mean_curve, outcome, read_run, table, write_results
from flowalign.toyworld.gold import SignQuality, cleanliness
from flowalign.toyworld.grammar import random_lines, sign_prompt, sign_scene, words
from flowalign.toyworld.making.artifacts import KINDS, damaged
from flowalign.toyworld.proxies import BACKBONE, Legible, fit_learned
from flowalign.toyworld.render import render
from rewards.artifact import save_head


def signs(count: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Prompts and ground-truth pictures (N, 64, 64, 3) of signs."""
    rng, pool = np.random.default_rng(seed), words(held_out=False)
    lines = [random_lines(rng, pool) for _ in range(count)]
    return [sign_prompt(of) for of in lines], np.stack([render(sign_scene(of, rng)) for of in lines])


def media(pictures: np.ndarray) -> torch.Tensor:
    """(N, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def test_the_worlds_own_signs_are_clean() -> None:
    assert all(cleanliness(picture) == 1 for picture in signs(500)[1])


@torch.no_grad()
def test_signs_stay_clean_through_the_models_autoencoder() -> None:
    autoencoder = AutoencoderKL.from_pretrained(asset("toyworld/model"), subfolder="vae", dtype=torch.float32)
    pixels = media(signs(50)[1]) * 2 - 1
    decoded = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mean).sample
    levels = ((decoded + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.mean([cleanliness(picture) for picture in levels]) >= 0.97


@pytest.mark.parametrize("kind", ["noise", "blotch", "stripes", "ghost"])
def test_damage_makes_a_sign_unclean(kind: str) -> None:
    rng = np.random.default_rng(1)
    assert np.mean([cleanliness(damaged(picture, KINDS[kind], rng)) for picture in signs(60)[1]]) < 0.7


def test_ticks_specks_and_a_second_ink_count() -> None:
    picture = signs(1)[1][0]
    ticks, specks = picture.copy(), picture.copy()
    ticks[2:6, ::8] = 30
    specks[np.arange(4, 60, 5), 58 - (np.arange(4, 60, 5) % 7)] = (200, 40, 40)
    ground = np.median(picture, axis=(0, 1))
    coloured = np.where((np.abs(picture - ground).max(-1) > 100)[..., None], [250, 30, 30], picture)
    coloured[:, 32:] = picture[:, 32:]  # half of the letters red
    assert all(cleanliness(spoilt) < 0.97 for spoilt in (ticks, specks, coloured))


def test_a_dark_background_is_not_clean() -> None:
    assert all(cleanliness(picture // 2) == 0 for picture in signs(4)[1])


def test_sign_quality_is_the_strict_text_score_times_cleanliness() -> None:
    prompts, pictures = signs(12)
    judge = SignQuality()
    assert rewards.score(judge, media(pictures), prompts).mean() > 0.97
    wrong = rewards.score(judge, media(pictures), [sign_prompt(["QQQQQ"])] * 12)
    assert wrong.mean() < 0.2
    dirty = np.stack([damaged(picture, KINDS["stripes"], np.random.default_rng(0)) for picture in pictures])
    scores, strict = (
        rewards.score(one, media(dirty), prompts) for one in (judge, rewards.load("ocr", mode="lines", strict=True))
    )
    expected = strict * torch.tensor([cleanliness(picture) for picture in dirty])
    torch.testing.assert_close(scores, expected.float())


@pytest.mark.parametrize("judge", [SignQuality, Legible])
def test_the_judges_of_signs_keep_the_contract(judge: Callable[[], rewards.Reward]) -> None:
    prompts, pictures = signs(4)
    found = rewards.check(judge(), rewards.Items(media(pictures), prompts, [{}] * 4))
    assert [finding for finding in found if finding.passed is False] == []


def test_the_legible_proxy_prefers_a_fat_dirty_sign_that_gold_refuses() -> None:
    prompts, pictures = signs(8)
    fat = pictures.copy()
    fat[:, 54:] = 10  # a black bar under the text, which can still be read
    proxy, gold = Legible(), SignQuality()
    assert (
        rewards.score(proxy, media(fat), prompts) > rewards.score(proxy, media(pictures), prompts)
    ).float().mean() > 0.7
    assert (rewards.score(gold, media(fat), prompts) < rewards.score(gold, media(pictures), prompts)).all()


def test_a_learned_judge_learns_its_labels(tmp_path: Path) -> None:
    images = media(signs(64)[1])
    images[::2] = images[::2].flip(-2)
    head = fit_learned(images, (torch.arange(64) % 2).float(), seed=0)
    save_head(head, BACKBONE, tmp_path / "head.safetensors")
    judge = rewards.load("flowalign.toyworld.proxies:Learned", head=str(tmp_path / "head.safetensors"))
    scores = rewards.score(judge, images, ["any"] * 64)
    assert scores[1::2].mean() > scores[::2].mean() + 1


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("defence", DEFENCES)
def test_every_defence_has_a_recipe_that_measures_proxy_gold_and_distance(
    world: str, defence: str, tmp_path: Path
) -> None:
    recipe = make_recipe(world, defence, 3, tmp_path, tmp_path / "run", train={"steps": 5}, evaluation={"every": 2})
    assert list(recipe.evaluation.rewards or {}) == ["proxy", "gold"] and recipe.guard is not None
    assert recipe.train.steps == 5 and recipe.evaluation.every == 2 and recipe.run.seed == 3
    assert "gold" not in recipe.rewards and "proxy" in recipe.rewards


def test_too_few_prompts_for_a_learned_judge_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompts \(8\) must be at least 32"):
        prepare("shapes", tmp_path / "shapes", 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_script_trains_every_defence_and_continues_where_it_was_stopped(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "overoptimization.py"
    sizes = ["--steps", "1", "--prompts", "32", "--evaluation-prompts", "4", "--proxies", "shapes"]
    command = [sys.executable, str(script), *sizes, "--output", str(tmp_path)]
    first = subprocess.run([*command, "--defences", "none", "adversarial"], capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    before = (tmp_path / "shapes" / "none-seed1" / "run.json").stat().st_mtime_ns
    done = subprocess.run([*command, "--defences", "none", "kl", "par", "worst", "artifact"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "shapes" / "none-seed1" / "run.json").stat().st_mtime_ns == before
    found = json.loads((tmp_path / "overoptimization.json").read_text())["proxies"]
    ((_, defences),) = found.items()
    assert list(defences) == list(DEFENCES)
    assert all(of["runs"][0]["curve"][-1]["step"] == 1 for of in defences.values())


Point = tuple[float, list[float], list[float]]  # KL, proxies and golds of each picture


def write_run(folder: Path, points: list[Point], minutes: float = 2.0) -> Path:
    """The files of a run with an evaluation every 4 steps."""
    (folder / "evaluations").mkdir(parents=True)
    for place, (kl, proxies, golds) in enumerate(points):
        rows = [{"prompt": "p", "scores": {"proxy": p, "gold": g}} for p, g in zip(proxies, golds, strict=True)]
        text = json.dumps({"step": 4 * place, "audit": {"kl": kl}, "rows": rows})
        (folder / "evaluations" / f"step_{4 * place:06d}.json").write_text(text)
    (folder / "run.json").write_text(json.dumps({"minutes": minutes}))
    return folder


HACKED: list[Point] = [(0.0, [0.0, 2.0], [0.2, 0.4]), (4.0, [2.0, 4.0], [0.6, 0.8]), (16.0, [4.0, 6.0], [0.1, 0.2])]


def test_a_run_is_read_as_gains_in_deviations_against_the_root_of_the_kl(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", HACKED))
    assert [point["distance"] for point in run["curve"]] == [0, 2, 4]
    assert [point["proxy_gain"] for point in run["curve"]] == pytest.approx([0, 2**0.5, 2 * 2**0.5])
    assert [point["gold"] for point in run["curve"]] == pytest.approx([0.3, 0.7, 0.15])
    assert run["gold_change"] == pytest.approx(-0.15) and run["gold_change_error"] == pytest.approx(0.05)


def test_the_outcome_tells_how_much_gold_was_lost_after_its_best(tmp_path: Path) -> None:
    found = outcome([read_run(write_run(tmp_path / "run", HACKED))])
    assert found["gold_best"] == pytest.approx(0.7) and found["best_distance"] == 2
    assert found["gold_lost"] == pytest.approx(-0.55) and found["distance"] == 4 and found["minutes"] == 2


def test_seeds_are_averaged_at_the_steps_that_all_have() -> None:
    first = [{"step": 0, "gold": 0.0}, {"step": 4, "gold": 1.0}, {"step": 8, "gold": 5.0}]
    assert mean_curve([first, [{"step": 0, "gold": 1.0}, {"step": 4, "gold": 2.0}]]) == [
        {"step": 0, "gold": 0.5},
        {"step": 4, "gold": 1.5},
    ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda found: found.pop("audit"), "has no audit"),
        (lambda found: found["rows"][0]["scores"].pop("gold"), "has no reward 'gold'"),
    ],
)
def test_a_run_without_the_needed_measurements_is_one_sentence(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], object], message: str
) -> None:
    file = write_run(tmp_path / "run", HACKED) / "evaluations" / "step_000004.json"
    found = json.loads(file.read_text())
    spoil(found)
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match=message):
        read_run(tmp_path / "run")
    with pytest.raises(UserError, match="no evaluations"):
        read_run(tmp_path)


def test_the_results_are_a_table_a_figure_and_the_numbers(tmp_path: Path) -> None:
    runs = [{"run": "none-seed1", **read_run(write_run(tmp_path / "run", HACKED))}]
    found = {"a proxy": {name: {"runs": runs, "outcome": outcome(runs)} for name in ("none", "kl")}}
    write_results(tmp_path, {"seeds": [1]}, found)
    assert json.loads((tmp_path / "overoptimization.json").read_text())["proxies"] == found
    lines = (tmp_path / "overoptimization.md").read_text().splitlines()
    assert (tmp_path / "overoptimization.md").read_text() == table(found) and len(lines) == 4
    assert lines[2] == "| a proxy | none | +2.83 | 0.300 | 0.700 at 2.0 | 0.150 ± 0.050 | -0.550 | 4.0 | 2.0 |"
    assert (tmp_path / "overoptimization.svg").read_text().count("<svg") == 1
    assert (tmp_path / "overoptimization.png").read_bytes().startswith(b"\x89PNG")
