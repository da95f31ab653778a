"""Paths in recipes and options: ~, beside the recipe, in the working folder, and where an error says it looked."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from flowalign.cli.app import main
from flowalign.config import Recipe, dump_recipe, load_recipe, recipe_from_dict
from flowalign.config.base import UserError
from flowalign.policies.adapters import adapter_files
from flowalign.rollout.dataset import GroupDataset
from flowalign.rollout.prompts import load_prompts
from flowalign.score import load_rewards

FILES = ("words.txt", "test.txt", "judge.py", "heads/x.safetensors")
VALUES: dict[str, Any] = {
    "name": "paths",
    "model": {"path": "models/own", "adapter": "lora", "cache_conditions": "~/cache"},
    "prompts": ["words.txt", "toyworld/words_train", "test.txt#text"],
    "dataset": "groups",
    "rewards": {
        "mine": {"load": "judge.py:brightness", "shaping": {"form": "standardise", "reference": "groups"}},
        "ocr": {
            "load": "ocr",
            "options": {"mode": "lines", "head": "heads/x.safetensors", "model": "openai/clip", "url": "http://a/b"},
        },
    },
    "algorithm": {"name": "gdro"},
    "rollout": {"dynamics": "ode"},
    "evaluation": {"prompts": "test.txt", "rewards": {"mine": {"load": "judge.py:brightness"}}},
    "guard": {"rewards": {"other": {"load": "judge.py:constant"}}, "features": {"model": "models/own"}},
    "run": {"folder": "~/runs/x"},
}  # fmt: skip


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """A recipe's folder with its files beside it, the working folder, and the home."""
    beside, working, home = (tmp_path / name for name in ("recipes of mine", "working", "home"))
    for folder in (beside / "models" / "own", beside / "lora", beside / "groups", beside / "heads", working, home):
        folder.mkdir(parents=True)
    for file in FILES:
        (beside / file).write_text("def brightness(media, prompts, metadata): return media.flatten(1).mean(1)")
    (beside / "my.yaml").write_text(yaml.safe_dump(VALUES))
    for name in ("ocr", "lines", "toyworld"):  # of the names of a reward, of an option, and of what is bundled
        (beside / name).mkdir()
    monkeypatch.chdir(working)
    monkeypatch.setenv("HOME", str(home))
    return beside, working, home


def named(recipe: Recipe) -> dict[str, Any]:
    ocr, mine = recipe.rewards["ocr"].options, recipe.rewards["mine"]
    assert (
        recipe.evaluation.rewards and recipe.guard and recipe.guard.rewards and recipe.guard.features and mine.shaping
    )
    return {
        "model": recipe.model.path,
        "adapter": recipe.model.adapter,
        "prompts": recipe.prompts[0],
        "dataset": recipe.dataset,
        "reward": mine.load,
        "reference": mine.shaping.reference,
        "option": ocr["head"],
        "tests": recipe.evaluation.prompts,
        "measured": recipe.evaluation.rewards["mine"].load,
        "held out": recipe.guard.rewards["other"].load,
        "features": recipe.guard.features.model,
    }


def test_files_are_found_beside_the_recipe_from_anywhere_and_stay_so_in_the_dump(places: tuple[Path, ...]) -> None:
    beside, working, home = places
    recipe = load_recipe(beside / "my.yaml")
    assert named(recipe) == {
        "model": str(beside / "models/own"),
        "adapter": str(beside / "lora"),
        "prompts": str(beside / "words.txt"),
        "dataset": str(beside / "groups"),
        "reward": f"{beside / 'judge.py'}:brightness",
        "reference": str(beside / "groups"),
        "option": str(beside / "heads/x.safetensors"),
        "tests": str(beside / "test.txt"),
        "measured": f"{beside / 'judge.py'}:brightness",
        "held out": f"{beside / 'judge.py'}:constant",
        "features": str(beside / "models/own"),
    }
    assert recipe.prompts[1:] == ("toyworld/words_train", f"{beside / 'test.txt'}#text")
    assert recipe.rewards["ocr"].load == "ocr"
    assert recipe.rewards["ocr"].options == {**VALUES["rewards"]["ocr"]["options"], "head": str(beside / FILES[3])}
    assert recipe.run.folder == str(home / "runs/x") and recipe.model.cache_conditions == str(home / "cache")
    (working / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(working / "recipe.yaml") == recipe
    assert load_recipe(f"../{beside.name}/my.yaml") == recipe  # however it is named, so that a run can go on with it


def test_the_recipes_folder_comes_before_the_working_folder_and_after_it_for_an_override(
    places: tuple[Path, ...],
) -> None:
    beside, working, _ = places
    for file in ("words.txt", "test.txt"):
        (working / file).write_text("here")
    shutil.move(beside / "lora", working / "lora")
    recipe = load_recipe(beside / "my.yaml", ["evaluation.prompts=test.txt"])
    assert recipe.prompts[0] == str(beside / "words.txt")
    assert recipe.model.adapter == str(working / "lora")
    assert recipe.evaluation.prompts == str(working / "test.txt")


def test_files_of_a_base_lie_beside_the_base(places: tuple[Path, ...]) -> None:
    beside, working, _ = places
    (working / "deep").mkdir()
    (working / "deep" / "child.yaml").write_text(f"base: {beside / 'my.yaml'}\nname: child\nstore: own\n")
    (working / "deep" / "own").mkdir()
    recipe = load_recipe(working / "deep" / "child.yaml")
    assert recipe.dataset == str(working / "deep" / "own") and recipe.prompts[0] == str(beside / "words.txt")


def test_home_is_expanded_in_recipes_scripts_and_options(
    places: tuple[Path, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    beside, _, home = places
    for name in (*FILES[:3], "my.yaml", "lora", "models"):
        shutil.move(beside / name, home / name)
    (home / "pictures").mkdir()
    Image.new("RGB", (8, 8), "white").save(home / "pictures" / "0.png")
    (home / "one.txt").write_text("white")
    own = recipe_from_dict({**VALUES, "prompts": "~/words.txt", "model": {"path": "~/models/own", "adapter": "~/lora"}})
    assert (own.prompts, own.model.path) == (str(home / "words.txt"), str(home / "models/own"))
    assert load_recipe("~/my.yaml", ["dataset=~/kept"]).dataset == str(home / "kept")
    assert load_prompts("~/one.txt")[0].prompt == "white"
    arguments = ["score", "~/judge.py:brightness", "--images=~/pictures", "--prompts", "~/one.txt"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--output=~/scores.csv"])
    assert ended.value.code == 0, capsys.readouterr().err
    assert "1.0" in (home / "scores.csv").read_text()


def test_an_error_says_where_a_file_was_looked_for(places: tuple[Path, ...]) -> None:
    beside, working, _ = places
    for file in FILES[:3]:
        (beside / file).unlink()
    for folder in ("lora", "groups"):
        (beside / folder).rmdir()
    recipe = load_recipe(beside / "my.yaml", ["evaluation.prompts=gone.txt"])
    where = f"(looked beside the recipe in {beside} and in the working folder {working})"
    assert recipe.dataset and recipe.model.adapter
    for ask in (
        lambda: load_prompts(recipe.prompts),
        lambda: load_prompts(recipe.evaluation.prompts or ""),
        lambda: GroupDataset.open(Path(str(recipe.dataset))),
        lambda: load_rewards(recipe.rewards, "cpu"),
        lambda: adapter_files(str(recipe.model.adapter)),
    ):
        with pytest.raises(UserError) as caught:
            ask()
        assert where in str(caught.value) and "\n" not in str(caught.value)
