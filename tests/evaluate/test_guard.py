"""The audit: image statistics, bands with a stated false-alarm rate, and a run with a guard."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from flowalign.cli.app import app
from flowalign.cli.auditing import audit
from flowalign.config import recipe_from_dict
from flowalign.config.base import UserError
from flowalign.config.sections import Sampler
from flowalign.evaluate.audit.audit import PANEL, VELOCITY, Audit, corrected_score, panel, spaced
from flowalign.evaluate.audit.bands import Band, band, learn_bands
from flowalign.evaluate.audit.divergence import NOISE_LEVEL, reference_divergence
from flowalign.evaluate.audit.image_statistics import STATISTICS, group_diversity, image_statistics
from flowalign.evaluate.report.audit_section import hacking_section
from flowalign.evaluate.report.report import write_report
from flowalign.policies.base import Condition, TextPolicy
from flowalign.policies.request import MediaRequest
from flowalign.rollout.prompts import Row
from flowalign.trainer import Trainer
from flowalign.training.display import Display

SIDE = 32


def picture(function):
    """(1, 3, SIDE, SIDE) of a function of pixel columns and rows."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return function(columns, rows).float().expand(1, 3, SIDE, SIDE)


BLACK, WHITE = torch.zeros(1, 3, SIDE, SIDE), torch.ones(1, 3, SIDE, SIDE)
HALVES = picture(lambda x, y: x < SIDE // 2)
CHECKERS = picture(lambda x, y: (x + y) % 2)
BROAD = picture(lambda x, y: 0.5 + 0.5 * torch.cos(2 * math.pi * x / SIDE))
WAVES = picture(lambda x, y: 0.5 + 0.25 * torch.cos(2 * math.pi * x / SIDE) + 0.25 * torch.cos(2 * math.pi * y / SIDE))
TILED = picture(lambda x, y: (x % 8 < 3) & (y % 8 < 3))
RED = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, SIDE, SIDE)


@pytest.mark.parametrize(
    ("statistic", "media", "value"),
    [
        ("dark_fraction", BLACK, 1.0),
        ("dark_fraction", HALVES, 0.5),
        ("color_entropy", WHITE, 0.0),
        ("color_entropy", HALVES, 1.0),
        ("edge_density", WHITE, 0.0),
        ("edge_density", HALVES, 2 / SIDE),  # Sobel sees the step from both of its sides
        ("saturation", RED, 1.0),
        ("saturation", HALVES, 0.0),
        ("grid_energy", CHECKERS, 1.0),
        ("grid_energy", BROAD, 0.0),
        ("grid_energy", WHITE, 0.0),
        ("repetition", TILED, 1.0),
        ("repetition", WAVES, (1 + math.cos(math.pi / 4)) / 2),  # moved by an eighth of one side
    ],
)
def test_an_image_statistic_has_its_closed_form(statistic, media, value):
    assert STATISTICS[statistic](media).item() == pytest.approx(value, abs=1e-5)


def test_image_statistics_do_not_depend_on_the_batch_and_average_a_videos_frames():
    both = image_statistics(torch.cat([TILED, HALVES]))
    for name, values in image_statistics(HALVES).items():
        assert both[name][1] == values[0]
        video = image_statistics(torch.stack([TILED[0], HALVES[0]])[None])[name]
        assert video.item() == pytest.approx(both[name].mean().item(), abs=1e-6)


def test_diversity_is_the_mean_distance_of_the_pairs():
    corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    assert group_diversity(corners) == pytest.approx((3 + 4 + 5) / 3)
    assert group_diversity(corners[:1].repeat(4, 1)) == 0


def test_the_corrected_score_is_that_of_gdro():
    assert corrected_score(0.8714, 3.4) == pytest.approx(0.8714 * 0.4 + 0.2)


# Bands


def base_sets(rng, seeds, prompts, worlds):
    """(worlds, seeds, prompts) of a measure whose prompts differ far more than its seeds."""
    return 5 * rng.standard_normal((worlds, 1, prompts)) + 0.3 * rng.standard_normal((worlds, seeds, prompts))


def test_an_unchanged_model_alarms_as_often_as_stated():
    rng, rate, worlds = np.random.default_rng(0), 0.05, 4000
    sets = base_sets(rng, 4, 24, worlds)
    states = [band(one[:3], "quality", rate).state(float(one[3].mean())) for one in sets]
    share = np.mean([state == "alarm" for state in states])
    assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / worlds)
    falls = [one[3].mean() < one[0].mean() - b.fall for b, one in ((band(w[:3], "quality", rate), w) for w in sets)]
    assert abs(np.mean(falls) - rate) < 4 * math.sqrt(rate * (1 - rate) / worlds)
    statistics = [band(one[:3], "statistic", rate) for one in sets]
    assert not any(b.state(float(one[3].mean())) == "alarm" for b, one in zip(statistics, sets, strict=True))
    drifting = np.mean([b.state(float(one[3].mean())) == "drift" for b, one in zip(statistics, sets, strict=True)])
    assert abs(drifting - rate) < 4 * math.sqrt(rate * (1 - rate) / worlds)


def test_any_alarm_at_all_is_as_rare_as_stated_over_many_measures():
    rng, rate, worlds = np.random.default_rng(1), 0.05, 1500
    names = [f"m{index}" for index in range(8)]
    sets = {name: base_sets(rng, 4, 16, worlds) for name in names}
    alarms = 0
    for world in range(worlds):
        base = [{name: sets[name][world, seed] for name in names} for seed in range(3)]
        bands = learn_bands(base, dict.fromkeys(names, "quality"), rate / len(names))
        alarms += any(bands[name].state(float(sets[name][world, 3].mean())) == "alarm" for name in names)
    assert alarms / worlds < rate + 4 * math.sqrt(rate * (1 - rate) / worlds)


def test_a_fall_alarms_and_a_rise_of_a_held_out_reward_does_not():
    known = band(base_sets(np.random.default_rng(2), 3, 64, 1)[0], "quality", 0.01)
    assert known.state(known.center - 0.3) == "alarm"
    assert known.state(known.center + 5) == "drift"
    assert known.state(known.center) == "inside"


def test_prompts_to_which_a_measure_does_not_apply_are_left_out():
    sets = base_sets(np.random.default_rng(3), 3, 20, 1)[0]
    holes = np.concatenate([sets, np.full((3, 5), np.nan)], axis=1)
    assert band(holes, "statistic", 0.01) == band(sets, "statistic", 0.01)


def quality(spread=1.0, center=0.0, low=-1.0):
    return Band("quality", center, spread, low, math.inf, 0.5, 0.5)


def test_the_panel_is_the_mean_in_units_of_the_spread_over_seeds():
    of = {"a": quality(0.5), "b": quality(0.1), "c": Band("statistic", 0, 1, -9, 9, 1)}
    values = {"a": np.array([1.0, 2.0, np.nan]), "b": np.array([0.3, np.nan, np.nan]), "c": np.array([7.0, 7.0, 7.0])}
    assert panel(values, of) == pytest.approx([(2 + 3) / 2, 4.0, math.nan], nan_ok=True)


def test_an_image_statistic_outside_its_band_is_excused_while_held_out_rewards_have_risen():
    bands = {PANEL: quality(), "a": quality(), "c": Band("statistic", 0, 1, -4, 4, 1)}
    states = {
        risen: Audit({PANEL: risen, "a": 0.0, "c": 5.0}, bands, 0.0, 1.0).state("c") for risen in (-0.2, 0.4, 0.6)
    }
    assert states == {-0.2: "alarm", 0.4: "alarm", 0.6: "excused"}
    fallen = Audit({PANEL: 0.6, "a": -1.5, "c": 5.0}, bands, 0.0, 1.0)
    assert fallen.alarms == ["a -1.5 is below -1 (base model 0)"]
    past = Audit({PANEL: 0.6, "a": 0.2, "c": 0.0}, bands, 0.0, 1.0, {"a": 0.8})
    assert past.alarms == ["a 0.2 has fallen from 0.8, by more than 0.5"]
    assert Audit({PANEL: 0.6, "a": 0.4, "c": 0.0}, bands, 0.0, 1.0, {"a": 0.8}).alarms == []
    without = Audit({"c": 5.0}, {"c": bands["c"]}, 0.0, 1.0)
    assert without.panel is None and without.state("c") == "alarm"


def test_the_words_of_an_audit_agree_with_its_table():
    def look(name):
        return Band("statistic", 0, 1, -4, 4, 1)

    bands = {PANEL: quality(), "a": quality(), "c": look("c"), "d": look("d")}
    inside = Audit({PANEL: 0.0, "a": 0.0, "c": 0.0, "d": 0.0}, bands, 0.0, 1.0)
    assert inside.verdict == "no alarm; all measures are inside the base model's bands"
    one = Audit({PANEL: 0.6, "a": 0.0, "c": 5.0, "d": 0.0}, bands, 0.0, 1.0)
    excuse = "excused because the held-out rewards rose"
    assert one.verdict == f"no alarm; 1 outside its band, {excuse}: c"
    two = Audit({PANEL: 0.6, "a": 0.0, "c": 5.0, "d": -5.0, VELOCITY: 1.0}, bands, 0.0, 1.0)
    assert two.verdict == f"no alarm; 2 outside their bands, {excuse}: c, d"
    assert two.contents()["verdict"] == two.verdict and two.contents()["excused"] == ["c", "d"]
    both = Audit({PANEL: 0.6, "a": -1.5, "c": 5.0, "d": 0.0}, bands, 0.0, 1.0)
    assert both.verdict == f"a -1.5 is below -1 (base model 0); 1 outside its band, {excuse}: c"
    alarm = Audit({PANEL: 0.0, "a": 0.0, "c": 5.0, "d": 2.0}, bands, 0.0, 1.0)
    assert alarm.verdict == "c 5 is above 4 (base model 0)"


def test_the_terminal_and_the_report_say_what_was_excused(tmp_path, capsys):
    bands = {PANEL: quality(), "a": quality(), "c": Band("statistic", 0, 1, -4, 4, 1)}
    found = Audit({PANEL: 0.6, "a": 0.0, "c": 5.0, VELOCITY: 1.0}, bands, 0.0, 1.0)
    Display().audit(3, found)
    words = "1 outside its band, excused because the held-out rewards rose: c"
    assert words in capsys.readouterr().out
    evaluation = {"step": 0, "rows": [], "audit": json.loads(json.dumps(found.contents()))}
    section = hacking_section([evaluation], tmp_path)
    excuse = "outside the bands, excused because the held-out rewards rose"
    assert section["answer"] == f"None of 1 audit alarmed; in 1 of them c was {excuse}"
    assert words in section["audits"][0]["verdict"]


# Divergence


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))


class Offset(TextPolicy):
    """Its velocity is its state's plus a constant, which it learns."""

    request = MediaRequest(1, 5)
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.transformer = Constant()
        self.snapshot("reference")

    def encode_prompts(self, prompts):
        return Condition({"prompt": torch.zeros(len(prompts), 1)})

    def _forward(self, module, x, sigma, condition):
        return x + module.offset

    def decode(self, latents):
        return latents.sigmoid().view(-1, 1, 1, 5).expand(-1, 3, 1, -1)

    def latent_shape(self, request):
        return (5,)

    def sigmas(self, steps, schedule="model"):
        return torch.linspace(1, 0, steps + 1)

    def export(self, folder):
        folder.mkdir()


def test_the_kl_of_a_path_is_the_sum_of_its_steps():
    policy, rows = Offset(), [Row(index, "a") for index in range(7)]
    policy.transformer.offset.data.fill_(0.3)
    found = reference_divergence(policy, rows, Sampler(steps=4), policy.request, (1, 2), batch=3)
    sigmas, expected = np.linspace(1, 0, 5), 0.0
    for sigma, after in itertools.pairwise(sigmas[:4]):  # not the last step
        delta, bounded = after - sigma, sigmas[1] if sigma == 1 else sigma
        scale = NOISE_LEVEL * math.sqrt(sigma / (1 - bounded))
        move = 0.3 * (1 + scale**2 * (1 - sigma) / (2 * sigma)) * delta
        expected += 5 * move**2 / (2 * scale**2 * -delta)
    assert found.kl.tolist() == pytest.approx([expected] * 7, rel=1e-5)
    assert found.kl.shape == found.velocity_ratio.shape == (7,)


def test_an_untrained_policy_has_no_distance_from_its_reference_and_from_an_equal_model():
    policy, rows = Offset(), [Row(0, "a"), Row(1, "b")]
    for reference in (None, Offset()):
        found = reference_divergence(policy, rows, Sampler(steps=3), policy.request, (1,), reference=reference)
        assert found.kl.tolist() == [0, 0]
        assert found.velocity_ratio.tolist() == [1, 1]


# A run that is watched


JUDGES = """
import torch
def brightness(media, prompts, metadata):
    return media.flatten(1).mean(1)
def darkness(media, prompts, metadata):
    return 1 - media.flatten(1).mean(1)
def redness(media, prompts, metadata):
    return media[:, 0].flatten(1).mean(1)
"""


@pytest.fixture
def watched(values, tmp_path):
    """A run that learns brightness while darkness, its opposite, is held out."""
    (tmp_path / "judges.py").write_text(JUDGES)
    (tmp_path / "test.txt").write_text("".join(f"a photo of {n} moons\n" for n in ("two", "three", "four", "five")))
    values["evaluation"] |= {"prompts": str(tmp_path / "test.txt"), "every": 1, "images_per_prompt": 2}
    held_out = {"darkness": {"load": f"{tmp_path / 'judges.py'}:darkness"}}
    values["guard"] = {"rewards": held_out, "seeds": 2, "kl_samples": 2, "false_alarm": 0.2}
    values["train"] |= {"learning_rate": 0.03, "updates_per_step": 1, "micro_batch": 16}
    return values


def audits(folder):
    return [json.loads(path.read_text())["audit"] for path in sorted(folder.glob("evaluations/step_*.json"))]


def test_a_hacked_run_alarms_and_keeps_the_weights_from_before(watched):
    folder = Trainer.from_recipe(recipe_from_dict(watched)).run()
    found = audits(folder)
    assert [one["kl"] == 0 for one in found] == [True, False, False, False, False]
    assert found[0]["alarms"] == [] and any("darkness" in alarm for alarm in found[-1]["alarms"])
    assert found[-1]["panel"] < -1 < found[-1]["proxy"]
    assert set(found[-1]["measures"]) == {"panel", "darkness", *STATISTICS, "diversity", "velocity_ratio"}
    kept = {name: json.loads((folder / name / "evaluation.json").read_text()) for name in ("best", "best_unhacked")}
    assert kept["best"]["audit"]["proxy"] == max(one["proxy"] for one in found)
    unhacked = max((one for one in found if not one["alarms"]), key=lambda one: one["panel"])
    assert kept["best_unhacked"]["audit"]["panel"] == unhacked["panel"]
    assert (folder / "best" / "pytorch_lora_weights.safetensors").is_file()
    page = write_report(folder).read_text()
    assert "Reward hacking" in page and "Suspected reward hacking" in page and "the first alarm" in page


def test_a_sustained_alarm_ends_the_run_if_the_guard_stops_it(watched):
    watched["guard"] |= {"stop": True, "patience": 2}
    watched["train"]["steps"] = 9
    folder = Trainer.from_recipe(recipe_from_dict(watched)).run()
    alarmed = [bool(one["alarms"]) for one in audits(folder)]
    assert alarmed[-2:] == [True, True]
    assert not any(first and second for first, second in itertools.pairwise(alarmed[:-1]))
    assert json.loads((folder / "run.json").read_text())["stopped"] == "sustained alarm"
    assert len(alarmed) < 10


@pytest.mark.slow
def test_a_resumed_run_audits_as_one_that_was_not_stopped(watched, tmp_path):
    watched["train"]["steps"] = 2
    whole = audits(Trainer.from_recipe(recipe_from_dict(watched)).run())
    watched["run"]["folder"] = str(tmp_path / "parted")
    Trainer.from_recipe(recipe_from_dict({**watched, "train": {**watched["train"], "steps": 1}})).run()
    trainer = Trainer.from_recipe(recipe_from_dict(watched), resume=True)
    assert trainer.guarding.bands and trainer.guarding.best
    assert audits(trainer.run()) == whole


@pytest.mark.slow
def test_audit_of_a_run_repeats_its_last_evaluation(watched, tmp_path):
    folder = Trainer.from_recipe(recipe_from_dict(watched)).run()
    title, found = audit(str(folder))
    how = "3 steps, guidance 1, model schedule, euler, 64 x 64 pixels, seed 0"
    assert title == f"{folder}, step_000004 against the model it started from, {how}"
    last = audits(folder)[-1]
    assert found.alarms == last["alarms"]
    assert found.kl == pytest.approx(last["kl"], rel=1e-4)
    assert found.values == pytest.approx({name: one["value"] for name, one in last["measures"].items()}, abs=1e-5)
    shown = CliRunner().invoke(app, ["audit", str(folder)], env={"COLUMNS": "160"})
    assert shown.exit_code == 1
    assert "ALARM: darkness" in shown.stdout


def test_audit_of_a_model_against_itself_finds_nothing(watched, tiny_model, tmp_path):
    import yaml

    (tmp_path / "how.yaml").write_text(yaml.safe_dump(watched))
    _, found = audit(str(tiny_model), against=str(tiny_model), recipe=str(tmp_path / "how.yaml"))
    assert found.kl == 0 and found.alarms == []
    with pytest.raises(UserError, match="give --against, its base model, and --recipe"):
        audit(str(tiny_model))


def test_gdros_corrected_score_is_audited(watched, tmp_path):
    watched["guard"]["rewards"]["redness"] = {"load": f"{tmp_path / 'judges.py'}:redness"}
    watched["guard"]["corrected"] = {"reward": "brightness", "quality": "redness", "low": 0, "high": 1}
    watched["train"]["steps"] = 1
    folder = Trainer.from_recipe(recipe_from_dict(watched)).run()
    last = json.loads((folder / "evaluations" / "step_000001.json").read_text())
    scores = [row["scores"] for row in last["rows"]]
    expected = np.mean([one["brightness"] * (1 + 4 * one["redness"] - 3) + 0.2 for one in scores])
    assert last["audit"]["measures"]["corrected"]["value"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"guard": {"rewards": {"brightness": 1}}}, "brightness.* is trained on \\(rewards.brightness\\)"),
        ({"guard": {"corrected": {"reward": "ocr", "quality": "darkness"}}}, "guard.corrected.reward: 'ocr' is none"),
        ({"guard": {"corrected": {"reward": "brightness", "quality": "x"}}}, "guard.corrected.quality: 'x' is none"),
        ({"guard": {"false_alarm": 0.7}}, "false_alarm"),
        ({"guard": {"patiense": 2}}, "did you mean 'patience'"),
        ({"guard": {"rewards": {"darkness": {"shaping": {"form": "sigmoid", "reference": [1]}}}}}, "leave it out"),
    ],
)
def test_settings_that_cannot_be_audited_are_refused(watched, tmp_path, change, sentence):
    held_out = change["guard"].get("rewards", {})
    for name in held_out:
        given = held_out[name] if isinstance(held_out[name], dict) else {}
        held_out[name] = {"load": f"{tmp_path / ('judge.py' if name == 'brightness' else 'judges.py')}:{name}", **given}
    with pytest.raises(UserError, match=sentence):
        recipe_from_dict({**watched, **change})


def test_evaluation_prompts_that_are_trained_on_are_refused(watched):
    watched["evaluation"]["prompts"] = watched["prompts"]
    with pytest.raises(UserError, match=r"prompt 1 \('a photo of two stars'\) is trained on, .* set guard=null"):
        Trainer.from_recipe(recipe_from_dict(watched))


def test_a_training_reward_that_the_evaluation_lacks_is_measured_beside_it(watched, tmp_path):
    watched["evaluation"]["rewards"] = {"brightness": {"load": f"{tmp_path / 'judges.py'}:redness"}}
    measured, names = recipe_from_dict(watched).measured()
    assert names == {"brightness": "brightness (trained)"}
    assert list(measured) == ["brightness", "brightness (trained)", "darkness"]
    watched["guard"] = None
    measured, names = recipe_from_dict(watched).measured()
    assert list(measured) == ["brightness"] and names == {}


def test_audited_prompts_are_spread_over_all_lists():
    assert spaced(list(range(10)), 4) == [0, 2, 5, 7]
    assert spaced([1, 2], 4) == [1, 2]
