"""The settings of the algorithms and their variants: windows that move, what goes together, what is written back."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flowalign.config import Recipe, Rollout, dump_recipe, load_recipe, recipe_from_dict
from flowalign.config.algorithm import algorithm_class, algorithm_names
from flowalign.config.base import UserError

# Windows that move


ALGORITHMS = {name: algorithm_class(name) for name in algorithm_names()}


@given(
    st.integers(2, 12), st.data(), st.sampled_from(["random", "sliding"]), st.integers(0, 2**31), st.integers(0, 10**6)
)
def test_a_window_lies_within_its_range_and_is_counted(steps, data, moves, seed, step):
    first = data.draw(st.integers(0, steps - 1))
    end = data.draw(st.integers(first + 1, steps))
    size = data.draw(st.integers(1, end - first))
    rollout = Rollout(steps=steps, window=(first, end), window_size=size, window_moves=moves)
    begin, stop = rollout.window_at(seed, step)
    assert first <= begin < stop <= end
    assert stop - begin == size == rollout.window_length
    assert rollout.model_copy().window_at(seed, step) == (begin, stop)


def test_a_window_without_a_size_does_not_move():
    assert {Rollout(steps=8).window_at(0, step) for step in range(20)} == {(0, 7)}
    assert {Rollout(steps=8, window=(2, 5)).window_at(seed, 3) for seed in range(20)} == {(2, 5)}
    assert Rollout(steps=8, dynamics="ode").window_at(0, 3) == (0, 0)


def test_a_random_window_takes_every_place_about_equally_often():
    rollout = Rollout(steps=10, window=(1, 7), window_size=2)
    places = [rollout.window_at(3, step)[0] for step in range(1000)]
    assert set(places) == {1, 2, 3, 4, 5}
    assert all(150 < places.count(place) < 250 for place in set(places))
    assert places != [rollout.window_at(4, step)[0] for step in range(1000)]


def test_a_sliding_window_moves_on_by_one_and_begins_again():
    rollout = Rollout(steps=10, window=(1, 5), window_size=2, window_moves="sliding", window_interval=3)
    places = [rollout.window_at(0, step) for step in range(12)]
    assert places == [(1, 3)] * 3 + [(2, 4)] * 3 + [(3, 5)] * 3 + [(1, 3)] * 3
    assert rollout.window_at(7, 5) == rollout.window_at(0, 5)  # nothing is drawn


def test_the_arithmetic_counts_the_steps_that_are_trained_at_a_time():
    values = {**BASE, "rollout": {"steps": 10, "window": [0, 6], "window_size": 2}}
    recipe = recipe_from_dict(values)
    assert recipe.items_per_step == 8 * 2
    assert dict(recipe.arithmetic())["trained noise levels"] == "2 at a time, from steps 0 to 5 of 10"


# What does not go together

BASE: dict[str, Any] = {
    "name": "demo",
    "prompts": "a.txt",
    "rewards": {"ocr": 1},
    "algorithm": {"name": "flow_grpo"},
    "rollout": {"steps": 6},
    "train": {"prompts_per_step": 2, "group_size": 4, "micro_batch": 4},
}


def merged(sections: dict[str, Any]) -> dict[str, Any]:
    """BASE with some keys of some sections changed; another algorithm keeps nothing of the first."""
    values = dict(BASE)
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return values


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        # Windows
        ({"rollout": {"window": [2, 7]}}, "rollout: window [2, 7] must lie within the 6 steps and hold one at least"),
        ({"rollout": {"window": [4, 4]}}, "rollout: window [4, 4] must lie within the 6 steps"),
        (
            {"rollout": {"window": [1, 4], "window_size": 4}},
            "rollout: window_size 4 exceeds the 3 steps of window [1, 4]",
        ),
        ({"rollout": {"window_size": 6}}, "rollout: window_size 6 exceeds the 5 steps of window [0, 5]"),
        ({"rollout": {"window_moves": "jumping"}}, "rollout.window_moves should be 'random' or 'sliding'"),
        # Dynamics and solvers
        (
            {"rollout": {"dynamics": "memoryless", "noise_level": 0.7}},
            "rollout: dynamics memoryless takes no noise_level; leave it out",
        ),
        (
            {"rollout": {"dynamics": "ode", "noise_level": 0.7}},
            "rollout: dynamics ode takes no noise_level; leave it out",
        ),
        (
            {"rollout": {"dynamics": "memoryless", "window": [2, 6]}},
            "rollout: window must end before step 6, where a memoryless step has no noise",
        ),
        ({"rollout": {"noise_level": None}}, "rollout: dynamics flow_sde needs a noise_level"),
        (
            {"rollout": {"solver": "dpm++"}},
            "rollout: solver dpm++ follows the ODE and cannot take the stochastic steps of flow_sde",
        ),
        ({"rollout": {"dynamics": "ode"}}, "rollout.dynamics ode leaves no stochastic step to flow_grpo"),
        (
            {"algorithm": {"name": "prdp"}, "rollout": {"dynamics": "ode"}},
            "rollout.dynamics ode leaves no stochastic step to prdp",
        ),
        (
            {"algorithm": {"name": "nft"}, "rollout": {"shared_noise": True}},
            "rollout: shared_noise makes all samples of a group alike with dynamics ode; leave it out",
        ),
        # The variants of Flow-GRPO
        (
            {"algorithm": {"ratio": "guard"}, "rollout": {"dynamics": "cps"}},
            "algorithm.ratio guard needs true log-probabilities; rollout.dynamics cps has none",
        ),
        (
            {"algorithm": {"values": "dense", "advantage": "summed"}},
            "algorithm.advantage: dense values use the weighted total, within groups; leave it out",
        ),
        ({"algorithm": {"discount": 0.5}}, "algorithm.discount: belongs to values: dense"),
        ({"algorithm": {"absolute": 0.5}}, "algorithm.absolute: belongs to values: dense"),
        # Algorithms of the forward process
        (
            {"algorithm": {"name": "nft", "timesteps": 7}},
            "algorithm.timesteps (7) exceeds the 6 sigmas of the rollout's schedule",
        ),
        ({"algorithm": {"name": "nft", "timestep_range": [0.8, 0.2]}}, "algorithm: timestep_range [0.8, 0.2] is empty"),
        (
            {"algorithm": {"name": "nft", "old_decay": {"first": 1.0}}},
            "algorithm.old_decay: a decay that begins at 1 never moves the snapshot; set first below 1",
        ),
        (
            {"algorithm": {"name": "crd", "old_decay": {"first": 0.5, "last": 0.2}}},
            "algorithm.old_decay: last (0.2) must not be below first (0.5)",
        ),
        (
            {"algorithm": {"name": "marble"}},
            "marble balances two rewards or more, those of weight 0 not counted; with one, use nft",
        ),
        (
            {"algorithm": {"name": "gdro", "kl_weight": 0.1}},
            "algorithm.kl_weight: gdro has no separate KL; beta sets its pull to the reference",
        ),
        (
            {"algorithm": {"name": "prdp", "kl_weight": 0.1}, "train": {"micro_batch": 20}},
            "algorithm.kl_weight: prdp has no separate KL; beta sets its pull to the reference",
        ),
        (
            {"algorithm": {"name": "prdp"}, "rollout": {"dynamics": "cps"}, "train": {"micro_batch": 20}},
            "rollout.dynamics cps has no true log-probabilities; use other dynamics with prdp",
        ),
        ({"train": {"group_size": 1}}, "train.group_size should be greater than or equal to 2, not 1"),
        ({"collect": {"group_size": 1}}, "collect.group_size should be greater than or equal to 2, not 1"),
        # Stores
        ({"dataset": "here"}, "dataset: flow_grpo learns from its own rollouts; from a dataset learns gdro"),
        ({"algorithm": {"name": "nft"}, "dataset": "here"}, "dataset: nft learns from its own rollouts"),
    ],
)
def test_settings_that_do_not_fit_together_are_an_error_of_one_sentence(sections, sentence, tmp_path: Path):
    values = merged(sections)
    if "name" in sections.get("algorithm", {}):
        values["algorithm"] = sections["algorithm"]
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        recipe_from_dict(values)
    assert "\n" not in str(caught.value)
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}")


def test_a_setting_of_another_algorithm_is_an_unknown_key():
    with pytest.raises(UserError, match=r"unknown key 'algorithm.clip_rang'"):
        recipe_from_dict(merged({"algorithm": {"clip_rang": 1}}))
    with pytest.raises(UserError, match=r"unknown key 'algorithm.clip_range'"):
        recipe_from_dict({**BASE, "algorithm": {"name": "nft", "clip_range": 1}})


@pytest.mark.parametrize(("name", "unit"), [("flow_grpo", 1), ("nft", 1), ("crd", 4), ("gdro", 4), ("prdp", 4 * 5)])
def test_a_micro_batch_may_be_smaller_than_a_unit(name: str, unit: int):
    values = {**merged({"train": {"micro_batch": 1}}), "algorithm": name}
    recipe = recipe_from_dict(values)
    assert (recipe.unit_items, recipe.in_parts) == (unit, unit > 1)
    whole = recipe_from_dict({**values, "train": {**values["train"], "micro_batch": unit}})
    assert not whole.in_parts


# What is resolved and written back


def of(name: str, **more: Any) -> Recipe:
    values = merged({"train": {"micro_batch": 20}, "rewards": {"ocr": 1, "geneval": {"weight": 2}}})
    return recipe_from_dict({**values, "algorithm": {"name": name, **more}})


VARIANTS: dict[str, dict[str, Any]] = {
    "flow_grpo": {"ratio": "guard", "values": "dense", "discount": 0.5, "absolute": 0.1},
    "nft": {"old_decay": {"slope": 0.01, "last": 0.5}, "timestep_range": [0.1, 0.9]},
    "crd": {"kind": "bce", "weight_temperature": 0.5, "sampling_decay": {"start": 3, "slope": 0.1}},
    "gdro": {"temperature": 0.0, "top_1": True, "timestep_sampling": "logit_normal"},
    "marble": {"balance": "raco", "every": 2, "uniform_from": 7},
    "prdp": {"beta": 0.5, "proximity": 1.0},
}


def test_every_algorithm_is_among_the_variants():
    assert set(VARIANTS) == set(ALGORITHMS)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("varied", [False, True])
def test_a_resolved_recipe_of_every_algorithm_loads_as_it_was(name: str, varied: bool, tmp_path: Path):
    recipe = of(name, **(VARIANTS[name] if varied else {}))
    path = tmp_path / "demo.yaml"
    path.write_text(dump_recipe(recipe))
    again = load_recipe(path)
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)
    assert isinstance(again.algorithm, ALGORITHMS[name].Settings)


@pytest.mark.parametrize(
    "rollout", [{"dynamics": "memoryless"}, {"dynamics": "cps"}, {"dynamics": "ode", "solver": "dpm++"}]
)
def test_a_resolved_rollout_loads_as_it_was(rollout: dict[str, Any], tmp_path: Path):
    recipe = recipe_from_dict(
        {**merged({"rollout": rollout}), "algorithm": "nft" if "solver" in rollout else "flow_grpo"}
    )
    path = tmp_path / "demo.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe
    assert recipe.rollout.noise_level == (0.7 if rollout["dynamics"] == "cps" else None)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rollouts_follow_the_ode_where_no_trajectory_is_needed(name: str):
    recipe = of(name)
    assert (recipe.rollout.dynamics == "ode") == (recipe.algorithm.needs == "final")
    values = merged({"rewards": {"ocr": 1, "geneval": 1}, "train": {"micro_batch": 20}})
    given = recipe_from_dict({**values, "algorithm": name, "rollout": {"steps": 6, "dynamics": "dance_sde"}})
    assert given.rollout.dynamics == "dance_sde"


@pytest.mark.parametrize(("name", "draws"), [("nft", 2), ("crd", 2), ("gdro", 2), ("marble", 2), ("prdp", 5)])
def test_an_item_is_a_sample_at_a_noise_level_or_a_stochastic_step(name: str, draws: int):
    assert of(name).items_per_step == 8 * draws
