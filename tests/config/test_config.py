"""Recipes: what loads, what a mistake is answered with, and the batch arithmetic."""

import ast
import copy
import inspect
import itertools
import json
import math
import re
import string
import textwrap
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flowalign.algorithms.flow_grpo import FlowGRPOSettings
from flowalign.config import (
    Evaluation,
    Guard,
    Lora,
    Model,
    Recipe,
    RewardSettings,
    Rollout,
    Run,
    Train,
    bundled_recipes,
    dump_recipe,
    load_recipe,
    recipe_from_dict,
)
from flowalign.config.algorithm import algorithm_names, settings_class
from flowalign.config.base import Section, UserError
from flowalign.config.rewards import BaseAndBonus, LogSigmoid, Uncertainty, Worst

ALGORITHMS = {name: settings_class(name) for name in algorithm_names()}
GOOD = """\
name: demo
prompts: toyworld/words_train
model:
  path: toyworld
  lora:
    rank: 8
rewards:
  ocr: 1.0
algorithm:
  name: flow_grpo
  clip_range: 1.0e-3
rollout:
  steps: 10
train:
  steps: 5
"""


@pytest.fixture
def write(tmp_path):
    """Writes demo.yaml and gives its path."""

    def _write(text):
        path = tmp_path / "demo.yaml"
        path.write_text(text)
        return path

    return _write


def sentence_of(path, overrides=()):
    """What a person reads about the file's mistake, without the folder it is in."""
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence.replace(f"{path.parent}/", "")


# What loads


def test_the_smallest_recipe_has_a_name_prompts_rewards_and_an_algorithm(write):
    recipe = load_recipe(write("name: demo\nprompts: a.txt\nrewards: {ocr: 1}\nalgorithm: flow_grpo\n"))
    assert recipe.algorithm == FlowGRPOSettings()
    assert recipe.train == Train()
    assert str(recipe.folder) == "runs/demo"


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipes_load_by_name_and_survive_a_round_trip(name, write):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert load_recipe(write(dump_recipe(recipe))) == recipe


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
rates = st.floats(1e-12, 1e3)


settings_of_a_reward = st.fixed_dictionaries(
    {"weight": st.sampled_from([0.25, 1.0, 7.5])},
    optional={"options": st.dictionaries(st.text(), plain_values, max_size=2)},
)


@given(
    rewards=st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True), settings_of_a_reward, min_size=2, max_size=3
    ),
    learning_rate=rates,
    clip_range=rates,
    seed=st.integers(-(2**62), 2**62),
    lora=st.none() | st.fixed_dictionaries({"rank": st.integers(1, 512), "alpha": rates}),
    window=st.none() | st.integers(0, 8).map(lambda first: [first, first + 2]),
)
def test_a_dumped_recipe_loads_as_it_was(tmp_path_factory, rewards, learning_rate, clip_range, seed, lora, window):
    recipe = recipe_from_dict(
        {
            "name": "demo",
            "prompts": ["a.txt", "b.jsonl"],
            "model": {"lora": lora},
            "rewards": rewards,
            "algorithm": {"name": "flow_grpo", "clip_range": clip_range},
            "rollout": {"window": window},
            "train": {"learning_rate": learning_rate},
            "run": {"seed": seed},
        }
    )
    path = tmp_path_factory.mktemp("recipe") / "demo.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


def test_a_number_is_short_for_a_rewards_weight(write):
    text = GOOD.replace("ocr: 1.0", "ocr: 2\n  clip: 0.5")
    recipe = load_recipe(write(text + "evaluation:\n  prompts: a.txt\n  rewards: {ocr: 1, strict: {load: ocr}}\n"))
    assert recipe.rewards == {"ocr": RewardSettings(weight=2.0), "clip": RewardSettings(weight=0.5)}
    assert list(recipe.trained_rewards) == ["ocr", "clip"]
    assert recipe.evaluation.rewards == {"ocr": RewardSettings(weight=1.0), "strict": RewardSettings(load="ocr")}


def test_overrides_are_read_as_yaml_and_the_last_one_wins(write):
    overrides = ["train.steps=7", "train.steps=9", "model.lora=null", "prompts=[a.txt, b.txt]", "rewards.clip=0.5"]
    recipe = load_recipe(write(GOOD), overrides)
    assert recipe.train.steps == 9
    assert recipe.model.lora is None
    assert recipe.prompts == ("a.txt", "b.txt")
    assert recipe.rewards == {"ocr": RewardSettings(), "clip": RewardSettings(weight=0.5)}


def test_a_recipe_never_changes(write):
    recipe = load_recipe(write(GOOD))
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 6


def test_every_setting_is_described_where_it_is_held():
    sections, seen = [Recipe, *ALGORITHMS.values()], set()
    while sections:
        section = sections.pop()
        if section in seen:
            continue
        seen.add(section)
        own = set(section.model_fields) - _described(section)
        held = {key: _sections_in(field.annotation) for key, field in section.model_fields.items()}
        # A section describes itself, and so does an algorithm's name.
        silent = {key for key in own if key != "name" and not any(part.__doc__ for part in held[key])}
        assert not silent, section
        sections += [part for parts in held.values() for part in parts]
    assert {Lora, Rollout, RewardSettings, Guard, BaseAndBonus, LogSigmoid} < seen


def _described(section: type[Section]) -> set[str]:
    """The fields that a string literal follows in the source, here or in a class above."""
    found = set()
    for kind in section.__mro__[: section.__mro__.index(Section)]:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(text.value, ast.Constant) and isinstance(text.value.value, str), (kind, text.lineno)
                found.add(field.target.id)
    return found


def _sections_in(annotation) -> list[type[Section]]:
    """The sections that a field holds, however deep in unions and mappings."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


# What a mistake is answered with


@pytest.mark.parametrize(
    ("right", "wrong", "sentence"),
    [
        # Unknown keys
        ("train:\n", "trian:\n", "demo.yaml, line 14: unknown key 'trian'; did you mean 'train'?"),
        ("  steps: 5", "  stps: 5", "demo.yaml, line 15: unknown key 'train.stps'; did you mean 'steps'?"),
        ("rank: 8", "rnak: 8", "demo.yaml, line 6: unknown key 'model.lora.rnak'; did you mean 'rank'?"),
        (
            "clip_range",
            "clip_rnge",
            "demo.yaml, line 11: unknown key 'algorithm.clip_rnge'; did you mean 'clip_range'?",
        ),
        (
            "ocr: 1.0",
            "ocr: {wieght: 1}",
            "demo.yaml, line 8: unknown key 'rewards.ocr.wieght'; did you mean 'weight'?",
        ),
        (
            "  steps: 5",
            "  steps: 5\nevaluation:\n  rewards:\n    ocr:\n      wegiht: 1",
            "demo.yaml, line 19: unknown key 'evaluation.rewards.ocr.wegiht'; did you mean 'weight'?",
        ),
        ("rank: 8", "zzz: 8", "demo.yaml, line 6: unknown key 'model.lora.zzz'; known are rank, alpha, targets"),
        # Wrong values
        ("steps: 10", "steps: ten", "demo.yaml, line 13: rollout.steps should be a valid integer.*, not 'ten'"),
        ("steps: 10", "steps: 1.5", "demo.yaml, line 13: rollout.steps should be a valid integer.*, not 1.5"),
        ("rank: 8", "rank: 0", "demo.yaml, line 6: model.lora.rank should be greater than 0, not 0"),
        ("1.0e-3", "-1", "demo.yaml, line 11: algorithm.clip_range should be greater than 0, not -1"),
        ("1.0e-3", ".nan", "demo.yaml, line 11: algorithm.clip_range should be a finite number, not nan"),
        ("ocr: 1.0", "ocr: -1", "demo.yaml, line 8: rewards.ocr.weight should be greater than or equal to 0, not -1"),
        (
            "  steps: 5",
            "  group_size: 1",
            "demo.yaml, line 15: train.group_size should be greater than or equal to 2, not 1",
        ),
        (
            "  steps: 10",
            "  dynamics: csp",
            "demo.yaml, line 13: rollout.dynamics should be 'flow_sde', 'dance_sde', 'cps', 'memoryless', "
            "'linear_sde' or 'ode', not",
        ),
        (
            "  path: toyworld",
            "  dtype: fp8",
            "demo.yaml, line 4: model.dtype should be 'auto', 'bf16', 'fp16' or 'fp32', not 'fp8'",
        ),
        ("toyworld/words_train", "5", "demo.yaml, line 2: prompts should be a valid string, not 5"),
        ("name: demo", "name: a/b", "demo.yaml, line 1: name: "),
        ("\n  ocr: 1.0", " {}", "demo.yaml, line 7: rewards: .*at least 1 item"),
        # The algorithm's name
        (
            "name: flow_grpo",
            "name: flow_grop",
            "demo.yaml, line 9: algorithm: unknown algorithm 'flow_grop'; did you mean 'flow_grpo'?",
        ),
        ("  name: flow_grpo\n", "", "demo.yaml, line 9: algorithm: algorithm needs a name, one of flow_grpo"),
        # What is missing
        ("name: demo\n", "", "demo.yaml: name is missing"),
        ("prompts: toyworld/words_train\n", "", "demo.yaml: prompts is missing"),
        # What does not fit together
        (
            "  steps: 10",
            "  steps: 10\n  window: [3, 12]",
            r"demo.yaml, line 12: rollout: window \[3, 12\] must lie within the 10 steps",
        ),
        (
            "  steps: 10",
            "  window: [3, 3]",
            r"demo.yaml, line 12: rollout: window \[3, 3\] must .* hold one at least",
        ),
        (
            "  steps: 10",
            "  dynamics: cps\n  window: [2, 10]",
            "demo.yaml, line 12: rollout: window must end before step 10, where a cps step has no noise",
        ),
        (
            "  steps: 10",
            "  dynamics: cps\n  noise_level: 1.0",
            "demo.yaml, line 12: rollout: noise_level of cps must be below 1",
        ),
        (
            "  steps: 5",
            "  {prompts_per_step: 2, group_size: 3, updates_per_step: 55}",
            r"demo.yaml: .*train.updates_per_step \(55\) exceeds the 54 items of a step",
        ),
        # What is no recipe
        ("rewards:\n", "rewards: [\n", "demo.yaml, line 9: not YAML: "),
        ("  steps: 10", "\tsteps: 10", "demo.yaml, line 13: not YAML: "),
        ("  steps: 5", "  steps: 5\n  steps: 6", "demo.yaml, lines 15 and 16: train.steps is given twice; keep one"),
        (GOOD, "", "demo.yaml: a recipe is a mapping of keys to values"),
        (GOOD, "- a\n- b\n", "demo.yaml: a recipe is a mapping of keys to values"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_one_sentence_with_file_line_and_key(write, right, wrong, sentence):
    assert right in GOOD
    assert re.match(sentence, sentence_of(write(GOOD.replace(right, wrong, 1))))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.steps", "override 'train.steps' must be written key=value, such as train.steps=50"),
        ("=5", "override '=5' must be written key=value"),
        ("train.stps=3", "override 'train.stps=3': unknown key 'train.stps'; did you mean 'steps'?"),
        (
            "algorithm.clip_rnge=3",
            "override 'algorithm.clip_rnge=3': unknown key 'algorithm.clip_rnge'; did you mean 'clip_range'?",
        ),
        ("trian=3", "override 'trian=3': unknown key 'trian'; did you mean 'train'?"),
        ("train.steps=0", "override 'train.steps=0': train.steps should be greater than 0, not 0"),
        ("train.steps.x=3", "override 'train.steps.x=3': train.steps is a single value, not a section"),
        ("train.steps=[1", r"override 'train.steps=\[1': the value is not YAML"),
        ("train.steps=2024-13-45", "override 'train.steps=2024-13-45': the value is not YAML"),
        *(
            (f"rewards.second.weight={weight}", r".*: rewards\.second\.weight: \S+ must be 0 or between 1e-6 and 1e6")
            for weight in ("1e-320", "1e-7", "1e7", "1e300")
        ),
    ],
)
def test_a_mistake_in_an_override_is_one_sentence_that_quotes_it(write, override, sentence):
    assert re.match(sentence, sentence_of(write(GOOD), [override]))


@pytest.mark.parametrize("override", ["trian.steps=3", "rollout.window=[0,30]", "algorithm.name=flow_grop"])
def test_an_override_is_quoted_when_its_section_is_at_fault(write, override):
    assert sentence_of(write(GOOD), [override]).startswith(f"override {override!r}: ")


def test_a_missing_file_is_answered_with_the_nearest_bundled_recipe(tmp_path):
    sentence = "no recipe 'toyworld_orc': neither a readable file nor a bundled name; did you mean 'toyworld_ocr'?"
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_recipe("toyworld_orc")
    with pytest.raises(UserError, match=r"no recipe '.*absent\.yaml': .*known are .*toyworld_ocr"):
        load_recipe(tmp_path / "absent.yaml")


def test_a_file_that_is_no_text_is_a_sentence_too(tmp_path):
    path = tmp_path / "picture.yaml"
    path.write_bytes(b"\x89PNG\xff")
    assert sentence_of(path)


def test_plain_values_are_answered_in_the_same_way():
    with pytest.raises(UserError, match=r"resumed: unknown key 'train\.stps'; did you mean 'steps'"):
        recipe_from_dict({**yaml.safe_load(GOOD), "train": {"stps": 3}}, where="resumed")


# Numbers, truth and what is ignored


def whole_recipe(**algorithm):
    """The values of a recipe that holds every section, as plain data."""
    values = {
        "name": "demo",
        "prompts": "a.txt",
        "rewards": {"ocr": {"shaping": {"form": "sigmoid", "reference": [0.25]}}},
        "algorithm": algorithm,
        "train": {"micro_batch": 1000, "ema_decay": 0.9},
        "evaluation": {"prompts": "b.txt"},
        "guard": {
            "rewards": {"imagereward": 1},
            "corrected": {"reward": "ocr", "quality": "imagereward"},
            "features": {"model": "a_model"},
        },
        "run": {"max_minutes": 5.0},
    }
    return recipe_from_dict(values).model_dump(mode="json")


def places(section, values, prefix=()):
    """Every setting of a recipe that holds such a number or a truth: its keys and its kinds."""
    for key, field in section.model_fields.items():
        value = values[key]
        if key == "algorithm":
            yield from places(ALGORITHMS[value["name"]], value, (*prefix, key))
        elif key == "rewards" and value is not None:
            for name, entry in value.items():
                yield from places(RewardSettings, entry, (*prefix, key, name))
        elif isinstance(value, dict) and key != "options":
            inner = next(
                kind for kind in leaves(field.annotation) if isinstance(kind, type) and issubclass(kind, Section)
            )
            yield from places(inner, value, (*prefix, key))
        else:
            yield (*prefix, key), set(leaves(field.annotation))


def leaves(annotation):
    parts = get_args(annotation)
    return [kind for part in parts for kind in leaves(part)] if parts else [annotation]


def put(values, keys, wrong):
    """A copy of the values with `wrong` at a place, or in the first of the numbers that stand there."""
    changed = section = copy.deepcopy(values)
    for key in keys[:-1]:
        section = section[key]
    there = section[keys[-1]]
    section[keys[-1]] = [wrong, *there[1:]] if isinstance(there, list) else wrong
    return changed


def with_all_set(name):
    """A recipe of an algorithm in which every number has a value."""
    values = whole_recipe(name=name if name != "marble" else "nft")
    if name == "marble":
        values["rewards"]["clip"] = copy.deepcopy(values["rewards"]["ocr"])
        values["algorithm"] = json.loads(ALGORITHMS[name]().model_dump_json())
    if ALGORITHMS[name].needs == "trajectory":
        values["rollout"]["window"] = [0, 2]
    return values


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_number_is_infinite_or_a_truth_and_no_truth_a_number(name):
    values = with_all_set(name)
    assert recipe_from_dict(values)
    found = list(places(Recipe, values))
    numbers = [keys for keys, kinds in found if kinds & {int, float}]
    truths = [keys for keys, kinds in found if bool in kinds]
    assert len(numbers) > 50 and len(truths) > 4
    if ALGORITHMS[name].needs == "final":
        numbers.remove(("rollout", "window"))  # null, since there is no stochastic step
    for keys in numbers:
        for wrong in (math.inf, -math.inf, math.nan, True, False):
            with pytest.raises(UserError, match=re.escape(".".join(keys))) as caught:
                recipe_from_dict(put(values, keys, wrong))
            assert "number" in str(caught.value) and "\n" not in str(caught.value)
    for keys in truths:
        for wrong in (1, 0, "yes", "true", 1.0):
            with pytest.raises(UserError, match=re.escape(f"{'.'.join(keys)} should be true or false")):
                recipe_from_dict(put(values, keys, wrong))


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        # Weights
        ({"rewards": {"ocr": 0}}, "rewards: every weight is 0, so nothing is learnt from; give one a weight above 0"),
        ({"rewards": {"ocr": 0, "clip": 0.0}}, "rewards: every weight is 0"),
        ({"rewards": {"ocr": 2}}, "rewards.ocr.weight: one reward alone is weighed against nothing; leave it out"),
        ({"rewards": {"ocr": 0, "clip": 0.5}}, "rewards.clip.weight: one reward alone is weighed against nothing"),
        (
            {"rewards": {"ocr": 2, "clip": 1}, "combine": {"form": "worst"}},
            "rewards.ocr.weight: combine.form worst weighs nothing; leave it out",
        ),
        (
            {"rewards": {"ocr": 1, "clip": 2}, "combine": {"form": "bonus", "base": "ocr", "bonus": "clip"}},
            "rewards.clip.weight: combine.form bonus takes 1 of base and bonus, 0 of all others",
        ),
        (
            {"rewards": {"ocr": 1, "clip": 1, "x": 1}, "combine": {"form": "bonus", "base": "ocr", "bonus": "clip"}},
            "rewards.x.weight: combine.form bonus takes 1 of base and bonus, 0 of all others",
        ),
        ({"rewards": {"ocr": 1, "clip": 0}, "combine": {"disagreement": 1}}, "combine.disagreement needs two rewards"),
        ({"rewards": {"ocr": 1, "clip": 0}, "algorithm": {"name": "marble"}}, "marble balances two rewards or more"),
        (
            {"evaluation": {"prompts": "b.txt", "rewards": {"ocr": 2}}},
            "evaluation.rewards: ocr.weight: an evaluation measures rewards as they are; leave it out",
        ),
        ({"guard": {"rewards": {"clip": 2}}}, "guard.rewards: clip.weight: an evaluation measures rewards as they are"),
        # What needs a KL
        ({"algorithm": {"name": "flow_grpo", "kl": "flow_grpo"}}, "algorithm.kl: there is no KL with kl_weight 0"),
        (
            {
                "algorithm": {"name": "flow_grpo", "kl": "flow_grpo", "kl_weight": 1},
                "rollout": {"dynamics": "memoryless"},
            },
            "algorithm.kl flow_grpo: no such KL is published for memoryless; use exact",
        ),
        (
            {"algorithm": {"name": "crd", "kl_weight": 0, "adaptive_kl": True}},
            "algorithm.adaptive_kl: there is no KL to weigh with kl_weight 0; leave it out",
        ),
        (
            {"algorithm": {"name": "crd", "kl_weight": 0.0, "adaptive_kl": False}},
            "algorithm.adaptive_kl: there is no KL",
        ),
        *(
            (
                {"algorithm": {"name": name, "kl_weight": 0}, "train": {"reference_guidance": 1.0}},
                "train.reference_guidance: with algorithm.kl_weight 0 no reference takes part; leave it out",
            )
            for name in ("flow_grpo", "nft", "crd")
        ),
        # Stochastic steps
        *(
            (
                {"algorithm": {"name": "nft"}, "rollout": rollout},
                f"rollout: {next(iter(rollout))} is a setting of stochastic steps",
            )
            for rollout in ({"window": [0, 2]}, {"window_size": 3}, {"window_moves": "sliding"}, {"window_interval": 2})
        ),
        ({"rollout": {"window_moves": "sliding"}}, "rollout: window_moves says how a window_size moves within"),
        ({"rollout": {"window_interval": 4}}, "rollout: window_interval says how a window_size moves within"),
        (
            {"rollout": {"window_size": 2, "window_interval": 4}},
            "rollout: window_interval belongs to window_moves sliding; a random window moves at every step",
        ),
        # Averages and decays
        ({"train": {"ema_interval": 8}}, "train: ema_interval: without ema_decay no average is kept"),
        ({"train": {"ema_warmup": True}}, "train: ema_warmup: without ema_decay no average is kept"),
        (
            {"algorithm": {"name": "nft", "old_decay": {"first": 0.5, "last": 0.9}}},
            "algorithm.old_decay: last has no effect on a decay without a slope; set slope or leave last out",
        ),
        (
            {"algorithm": {"name": "crd", "old_decay": {"start": 3}}},
            "algorithm.old_decay: start has no effect on a decay",
        ),
        (
            {"rewards": {"a": 1, "b": 1}, "algorithm": {"name": "marble", "uniform_from": 0, "every": 3}},
            "algorithm.every: nothing is balanced with uniform_from 0; leave it out",
        ),
        # Evaluation
        (
            {"evaluation": {"every": 2}},
            "evaluation.every: without evaluation.prompts nothing is evaluated; name a list",
        ),
        (
            {"evaluation": {"prompts": None}, "guard": {"stop": True}},
            "guard.stop: without evaluation.prompts nothing is audited; name a list",
        ),
        # Guided rollouts
        *(
            (
                {"algorithm": {"name": name}, "rollout": {"guidance": 4.5}},
                f"train.guidance must be set where rollouts are guided (rollout.guidance 4.5): 1 trains the model's "
                f"own velocity, as published for {name}, more than 1 the guided one",
            )
            for name in ("nft", "crd", "gdro")
        ),
    ],
)
def test_what_would_be_ignored_is_refused(sections, sentence):
    values = {"name": "demo", "prompts": "a.txt", "rewards": {"ocr": 1}, "algorithm": {"name": "flow_grpo"}}
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        recipe_from_dict({**values, **sections})
    assert "\n" not in str(caught.value)


def test_objects_of_a_script_are_checked_as_a_file_is():
    values = {"name": "demo", "prompts": "a.txt", "rewards": {"ocr": RewardSettings()}}
    with pytest.raises(UserError, match=r"algorithm\.kl: there is no KL"):
        recipe_from_dict({**values, "algorithm": FlowGRPOSettings(kl="flow_grpo")})
    with pytest.raises(UserError, match=r"train\.guidance must be set"):
        recipe_from_dict({**values, "algorithm": ALGORITHMS["nft"](), "rollout": Rollout(guidance=2, dynamics="ode")})
    for wrong in ({"learning_rate": math.inf}, {"steps": True}, {"betas": (0.9, math.nan)}):
        with pytest.raises(ValueError, match="number"):
            Train(**wrong)
    with pytest.raises(ValueError, match="number"):
        FlowGRPOSettings(clip_range=math.inf)


SECTIONS = {
    (): Recipe,
    ("model",): Model,
    ("model", "lora"): Lora,
    ("rewards", "ocr"): RewardSettings,
    ("algorithm",): FlowGRPOSettings,
    ("rollout",): Rollout,
    ("train",): Train,
    ("evaluation",): Evaluation,
    ("evaluation", "rewards", "ocr"): RewardSettings,
    ("run",): Run,
}


@st.composite
def mistyped_keys(draw, required):
    """A section's place, one of its keys (that must be given, or that need not) and that key after one edit."""
    known = {
        (place, key)
        for place, section in SECTIONS.items()
        for key, field in section.model_fields.items()
        if (field.is_required() or (place, key) == (("algorithm",), "name")) == required
    }
    place, key = draw(st.sampled_from(sorted(known)))
    letter = draw(st.sampled_from(string.ascii_lowercase + "_"))
    at = draw(st.integers(0, len(key) - 1))
    mistyped = draw(
        st.sampled_from(
            [
                key[:at] + key[at + 1 :],
                key[:at] + letter + key[at + 1 :],
                key[:at] + letter + key[at:],
                key[:at] + key[at : at + 2][::-1] + key[at + 2 :],
            ]
        ).filter(lambda word: word and word not in SECTIONS[place].model_fields)
    )
    return place, key, mistyped


def sentence_of_mistyped(place, key, mistyped):
    values = section = yaml.safe_load(GOOD)
    section["rewards"]["ocr"] = {}
    for part in place:
        section = section.setdefault(part, {})
    section[mistyped] = section.pop(key, 1)
    with pytest.raises(UserError) as caught:
        recipe_from_dict(values)
    return str(caught.value)


@given(mistyped_keys(required=False))
def test_any_key_mistyped_by_one_edit_is_answered_with_that_key(mistake):
    place, key, mistyped = mistake
    shown = ".".join((*place, mistyped))
    assert sentence_of_mistyped(*mistake) == f"recipe: unknown key {shown!r}; did you mean {key!r}?"


@given(mistyped_keys(required=True))
def test_a_mistyped_key_that_must_be_given_is_named(mistake):
    _, key, _ = mistake
    assert re.search(rf"\b{key}\b", sentence_of_mistyped(*mistake))


def test_a_mistyped_key_that_must_be_given_is_shown_with_its_line(write):
    sentence = sentence_of(write(GOOD.replace("prompts:", "promts:")))
    assert sentence == "demo.yaml, line 2: unknown key 'promts'; did you mean 'prompts'?"


# The batch arithmetic


def test_the_arithmetic_of_a_small_recipe_is_as_by_hand():
    recipe = recipe_from_dict(
        {
            "name": "demo",
            "prompts": "a.txt",
            "rewards": {"ocr": 1},
            "algorithm": "flow_grpo",
            "rollout": {"steps": 5, "window": [1, 3], "guidance": 4.5},
            "train": {"steps": 7, "prompts_per_step": 4, "group_size": 3, "updates_per_step": 5, "micro_batch": 2},
        }
    )
    assert recipe.samples_per_step == 12  # 4 prompts, 3 pictures each
    assert recipe.items_per_step == 24  # at 2 of the 5 denoising steps
    assert dict(recipe.arithmetic(processes=2)) == {
        "samples per step": "4 prompts x 3 = 12",
        "trained noise levels": "steps 1 to 2 of 5",
        "items per step": "12 x 2 = 24",
        "items per update": "24 / 5 updates = 5",  # 5 5 5 5 4
        "micro-batches per update": "5 / 2 process(es) / 2 = 2",  # 3 items on the first, 2 at a time
        "rollout forwards per step": "120",  # 12 pictures, 5 steps, with and without the prompt
        "training steps": "7 x 5 updates",
    }


def test_all_steps_but_the_last_are_stochastic_unless_a_window_is_given():
    assert Rollout(steps=10).sde_window == (0, 9)
    assert Rollout(steps=10, window=(2, 5)).sde_window == (2, 5)
    assert Rollout(steps=1).sde_window == (0, 1)


# A recipe on top of another


def test_a_recipe_takes_from_its_base_what_it_does_not_say(write, tmp_path):
    below = write(GOOD)
    above = tmp_path / "above.yaml"
    above.write_text(f"base: {below.name}\nname: above\nalgorithm: {{name: nft, timesteps: 1}}\n")
    recipe, base = load_recipe(above), load_recipe(below)
    assert (recipe.name, recipe.algorithm.name) == ("above", "nft")
    assert recipe.train == base.train and recipe.model == base.model and recipe.rollout.steps == base.rollout.steps
    assert load_recipe(above, ["train.steps=99"]).train.steps == 99


def test_a_section_changes_the_keys_that_it_names_and_keeps_the_others_of_its_base(tmp_path):
    below = """name: below
prompts: a.txt
model: {lora: {rank: 4, alpha: 8}}
rewards: {ocr: 1, clip: 2}
combine: {form: uncertainty, penalty: 3, disagreement: 1}
algorithm: {name: nft, timesteps: 3, beta: 0.5}
train: {steps: 7, group_size: 5, ema_decay: 0.5}
"""
    above = """base: below.yaml
name: above
model: {lora: {rank: 2}}
train: {steps: 9, ema_decay: null}
"""
    (tmp_path / "below.yaml").write_text(below)
    (tmp_path / "above.yaml").write_text(above)
    recipe = load_recipe(tmp_path / "above.yaml")
    assert recipe.model.lora == Lora(rank=2, alpha=8)
    assert (recipe.train.steps, recipe.train.group_size, recipe.train.ema_decay) == (9, 5, None)
    assert recipe.combine == Uncertainty(form="uncertainty", penalty=3, disagreement=1)

    (tmp_path / "above.yaml").write_text(above + "algorithm: {name: nft, beta: 0.1}\n")
    assert load_recipe(tmp_path / "above.yaml").algorithm.model_dump(include={"timesteps", "beta"}) == {
        "timesteps": 3,
        "beta": 0.1,
    }
    whole = "rewards: {pickscore: 1, hpsv2: 1}\ncombine: {form: worst}\nalgorithm: {name: crd}\n"
    (tmp_path / "above.yaml").write_text(above + whole)
    recipe = load_recipe(tmp_path / "above.yaml")
    assert list(recipe.rewards) == ["pickscore", "hpsv2"]
    assert recipe.combine == Worst(form="worst")
    assert recipe.algorithm == ALGORITHMS["crd"](name="crd")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("base: nowhere\nname: a\n", r"above.yaml: base: no recipe 'nowhere': neither a readable file"),
        ("base: above.yaml\nname: a\n", r"above.yaml: base: .*above.yaml is based on this recipe itself"),
        ("base: [a]\nname: a\n", r"above.yaml, line 1: base must be a recipe's name or file, not \['a'\]"),
        ("base: demo.yaml\nname: a\ntrain: {stepz: 1}\n", r"above.yaml, line 3: unknown key 'train.stepz'"),
        ("base: broken.yaml\nname: a\n", r"broken.yaml, line 2: unknown key 'train.stepz'"),
        ("base: broken.yaml\nname: a\ntrain:\n  steps: 3\n", r"broken.yaml, line 2: unknown key 'train.stepz'"),
        (
            "base: demo.yaml\nname: a\ntrain:\n  steps: 3\n  ema_warmup: true\n",
            r"above.yaml, line 3: train: ema_warmup",
        ),
        ("base: demo.yaml\nname: a\nrewards:\n  ocr: {shaping: {}}\n", r"above.yaml, line 4: rewards.ocr.shaping.form"),
    ],
)
def test_a_mistake_names_the_file_in_which_it_stands(write, tmp_path, text, sentence):
    write(GOOD)
    (tmp_path / "broken.yaml").write_text("base: demo.yaml\ntrain: {stepz: 1}\n")
    (tmp_path / "above.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "above.yaml")
    assert re.search(sentence, str(caught.value)), caught.value


def test_the_recipes_of_runs_that_earlier_versions_wrote_are_read():
    values = {"name": "demo", "prompts": "a.txt", "algorithm": "nft", "model": {"attention": "auto"}}
    shaping = {"form": "sigmoid", "reference": [0.1, 0.2], "scale": 2.0, "quantile": 0.85}
    rewards = {"ocr": {"weight": 1.0, "load": None, "options": {}, "shaping": shaping}}
    combine = {"form": "sum", "penalty": 1.0, "base": None, "bonus": None, "floor": 0.4, "disagreement": 0.0}
    recipe = recipe_from_dict({**values, "rewards": rewards, "combine": combine})
    assert recipe.model.attention == "native" and recipe.combine.form == "sum"
    assert recipe.rewards["ocr"].shaping.scale == 2.0
    with pytest.raises(UserError, match=r"combine: floor belongs to form bonus, not to sum; leave it out"):
        recipe_from_dict({**values, "rewards": rewards, "combine": combine | {"floor": 0.5}})
