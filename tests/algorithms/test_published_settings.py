"""The recipes that are said to be published: what they hold, and what docs/published_settings.md says of them."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from flowalign.advantages import RewardTable
from flowalign.algorithms.base import algorithm_of
from flowalign.algorithms.batches import Turn
from flowalign.config import Train, bundled_recipes, load_recipe, recipe_from_dict
from flowalign.policies.base import Condition, Conditioning
from flowalign.rollout.prompts import Row
from flowalign.rollout.stages import Generated, Scored

PAGE = Path(__file__).parents[2] / "docs" / "published_settings.md"
TABLES = {
    section.split("`")[1]: [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| `")
    ]
    for section in PAGE.read_text().split("\n## ")[1:]
}


def test_every_recipe_called_published_is_on_the_page():
    assert set(TABLES) == {name for name in bundled_recipes() if not name.startswith("toyworld")}


@pytest.mark.parametrize("name", TABLES)
def test_the_page_gives_the_recipes_values_and_the_reasons_for_differences(name):
    values = json.loads(load_recipe(name).model_dump_json())
    assert len(TABLES[name]) > 10
    for setting, ours, published, why in TABLES[name]:
        held = values
        for key in setting.strip("`").split("."):
            held = held[key]
        assert held == yaml.safe_load(ours), setting
        assert why and published, setting
        assert published == "=" or yaml.safe_load(published) != held, setting


def test_recipes_hold_the_published_numbers_that_they_once_missed():
    """Read in the publications' code, not in the page."""
    ocr, crd, marble = (load_recipe(f"sd35_medium_{name}") for name in ("ocr", "ocr_crd", "marble"))
    assert (ocr.train.ema_decay, ocr.train.ema_interval, ocr.train.ema_warmup) == (0.9, 8, True)
    assert (crd.algorithm.timesteps, crd.rollout.steps, crd.model.max_sequence_length) == (20, 10, 256)
    assert (crd.rollout.schedule, crd.evaluation.schedule, crd.train.ema_decay) == ("uniform", "uniform", None)
    assert (marble.algorithm.timesteps, marble.rollout.steps) == (24, 25)
    assert load_recipe("sd35_medium_geneval_nft").train.ema_interval == 1


def test_bundled_recipes_with_guided_rollouts_set_the_guidance_of_the_loss():
    for name in bundled_recipes():
        recipe = load_recipe(name)
        if recipe.algorithm.needs == "final" and recipe.rollout.guidance > 1:
            assert recipe.train.guidance == 1, name


# The average


def test_the_average_follows_flow_grpos_schedule(shared):
    """Golden numbers of its code, which is right where it is called once an update."""
    for case in json.loads((shared / "golden" / "algorithms" / "ema.json").read_text()):
        train = Train(ema_decay=case["decay"], ema_interval=case["interval"], ema_warmup=True)
        average = torch.tensor(case["start"], dtype=torch.float64)
        for place, (weights, expected) in enumerate(zip(case["parameters"], case["average"], strict=True)):
            decay = train.ema_decay_at(case["first_step"] + place)
            if decay is not None:
                assert decay == pytest.approx(case["decays"][place])
                average = decay * average + (1 - decay) * torch.tensor(weights, dtype=torch.float64)
            torch.testing.assert_close(average, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("settings", "decays"),
    [
        ({}, [None] * 4),
        ({"ema_decay": 0.5}, [0.5] * 4),
        ({"ema_decay": 0.2, "ema_warmup": True}, [0.1, 2 / 11, 0.2, 0.2]),
        ({"ema_decay": 0.9, "ema_interval": 3}, [None, None, 0.9, None]),
        ({"ema_decay": 0.9, "ema_interval": 2, "ema_warmup": True}, [None, 2 / 11, None, 4 / 13]),
    ],
)
def test_the_average_moves_at_every_ema_interval(settings, decays):
    assert [Train(**settings).ema_decay_at(update) for update in range(4)] == decays


# Draws with repetition


def test_more_draws_than_levels_use_every_level_equally_often_with_different_noise():
    recipe = load_recipe("sd35_medium_ocr_crd", ["train.prompts_per_step=1", "train.group_size=2"])
    grid = torch.linspace(1, 0, 11)
    levels = recipe.algorithm.levels(grid, torch.Generator().manual_seed(0))
    assert levels.sort(descending=True).values.tolist() == grid[:-1].repeat_interleave(2).tolist()
    latents = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    empty = Condition({"a": torch.zeros(1, 1)})
    samples = Generated(
        rows=[Row(0, "a")] * 2,
        groups=torch.zeros(2, dtype=torch.long),
        condition=Conditioning(empty, empty),
        latents=latents,
        sigmas=grid,
        members=[0, 1],
    )
    values = torch.tensor([[0.0, 1.0]])
    table = RewardTable(values[0], values, values >= 0, torch.ones(1), ("a",))
    algorithm = algorithm_of(recipe.algorithm)
    weighted = algorithm.weigh(Scored(samples, table, table, 0, 2))
    items = algorithm.batches(weighted, Turn(0, 0, 0, 2, 40, 1.0, 1.0))
    units = items.units()
    assert len(units) == 20
    noised = items.batch(units, 0)
    assert torch.equal(noised.noise[0::2], noised.noise[1::2])  # a group shares a draw's noise,
    assert len(torch.unique(noised.noise, dim=0)) == 20  # and no two draws do


def test_stratified_draws_from_the_schedule_differ_and_a_range_without_a_sigma_is_refused():
    values = {"name": "a", "prompts": "a.txt", "rewards": {"ocr": 1}, "rollout": {"steps": 10}}
    algorithm = {"name": "nft", "timesteps": 5, "timestep_sampling": "schedule_strata"}
    recipe = recipe_from_dict({**values, "algorithm": algorithm})
    for seed in range(20):
        levels = recipe.algorithm.levels(torch.linspace(1, 0, 11), torch.Generator().manual_seed(seed))
        assert len(levels.unique()) == 5
    narrow = recipe_from_dict({**values, "algorithm": {**algorithm, "timestep_range": [0.42, 0.48]}})
    with pytest.raises(ValueError, match=re.escape("timestep_range [0.42, 0.48] holds none of the rollout's sigmas")):
        narrow.algorithm.levels(torch.linspace(1, 0, 11), torch.Generator())
