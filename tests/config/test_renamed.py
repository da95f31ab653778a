"""Recipes and run folders of earlier versions are read under the names of today."""

from pathlib import Path

import pytest

from flowalign.config import load_recipe, recipe_from_dict
from flowalign.config.base import UserError
from flowalign.config.recipe import dump_recipe

OLD = """
name: old
model: {path: toyworld}
prompts: toyworld/words_train
rewards: {ocr: 1.0}
algorithm: {name: nft, timestep_sampling: grid_strata}
rollout: {steps: 4, grid: uniform}
train: {passes: 2}
evaluation: {prompts: toyworld/words_test, grid: uniform, pictures: 3}
"""


def test_every_old_name_means_what_it_meant(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(OLD)
    recipe = load_recipe(tmp_path / "old.yaml", ["evaluation.pictures=5", "evaluation={grid: model}"])
    assert (recipe.rollout.schedule, recipe.train.inner_epochs) == ("uniform", 2)
    assert recipe.algorithm.timestep_sampling == "schedule_strata"  # type: ignore[attr-defined]
    assert recipe.evaluation.schedule == "model"
    recipe = load_recipe(tmp_path / "old.yaml", ["evaluation.pictures=5"])
    assert (recipe.evaluation.schedule, recipe.evaluation.keep_media) == ("uniform", 5)
    assert not {"grid:", "passes:", "pictures:", "store:"} & set(dump_recipe(recipe).split())


def test_a_recipe_with_new_names_has_an_old_one_as_its_base(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(OLD)
    (tmp_path / "new.yaml").write_text(
        "base: old.yaml\nname: new\ntrain: {inner_epochs: 3}\nrollout: {schedule: model}\n"
    )
    recipe = load_recipe(tmp_path / "new.yaml")
    assert (recipe.rollout.schedule, recipe.train.inner_epochs, recipe.evaluation.keep_media) == ("model", 3, 3)


def test_an_old_dataset_key_is_read_from_plain_values(tmp_path: Path) -> None:
    values = {"name": "old", "prompts": "toyworld/words_train", "rewards": {"ocr": 1}, "algorithm": "gdro"}
    assert recipe_from_dict({**values, "store": "groups"}).dataset == "groups"


def test_an_old_name_beside_the_new_one_is_a_mistake_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text(OLD.replace("passes: 2", "passes: 2, inner_epochs: 3"))
    with pytest.raises(UserError, match=r"both\.yaml, line 8: unknown key 'train\.passes'"):
        load_recipe(tmp_path / "both.yaml")
    (tmp_path / "wrong.yaml").write_text(OLD.replace("passes: 2", "passes: 0"))
    with pytest.raises(UserError, match=r"wrong\.yaml, line 8: train\.inner_epochs should be greater than 0, not 0"):
        load_recipe(tmp_path / "wrong.yaml")
