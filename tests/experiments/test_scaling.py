"""Best-of-N and pruning: closed forms against all subsets, counted cost against the formula, unchanged survivors."""

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flowalign.cli.app import main
from flowalign.config import Evaluation, Model, Sampler
from flowalign.config.base import UserError
from flowalign.experiments.best_of import best_of_weights, evaluate_best_of, expected_best_of
from flowalign.experiments.scaling import (
    Prune,
    best_of,
    check_judges,
    check_search,
    cost,
    parse_schedule,
    standing,
)
from flowalign.policies.base import Policy
from flowalign.policies.loading import load_policy
from flowalign.policies.request import MediaRequest
from flowalign.rollout.generate import Step, rollout
from flowalign.rollout.prompts import Row
from flowalign.rollout.stages import RolloutRequest
from rewards import Reward, TrainableReward, as_reward, score

ROWS = [Row(0, "a red star"), Row(1, "a photo of two rings"), Row(2, "a ring")]
REQUEST, KEY = MediaRequest(64, 64), (1, 0, 0)


def brightness(media, prompts, metadata):
    return media.flatten(1).mean(1)


def contrast(media, prompts, metadata):
    return media.flatten(1).std(1)


def constant(media, prompts, metadata):
    return torch.ones(len(media))


BRIGHTNESS, CONTRAST, CONSTANT = (as_reward(judge, judge.__name__) for judge in (brightness, contrast, constant))


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    settings = Model(path=str(tiny_model), height=64, width=64, dtype="fp32", max_sequence_length=0, lora=None)
    return load_policy(settings)


# The expectation of best-of-n


def of_all_subsets(selection: np.ndarray, measured: np.ndarray, n: int) -> float:
    """Mean over every n of the N of what is measured on the best; the best ones of a subset share it."""
    values = []
    for subset in combinations(range(len(selection)), n):
        highest = max(selection[list(subset)])
        values.append(np.mean([measured[place] for place in subset if selection[place] == highest]))
    return float(np.mean(values))


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-1, 1)), min_size=1, max_size=7), st.data())
def test_the_expected_best_of_n_is_the_mean_over_all_subsets(
    drawn: list[tuple[int, float]], data: st.DataObject
) -> None:
    selection, measured = (np.array(column, dtype=float) for column in zip(*drawn, strict=True))
    n = data.draw(st.integers(1, len(drawn)))
    assert expected_best_of(selection, measured, n) == pytest.approx(of_all_subsets(selection, measured, n), abs=1e-12)


def test_best_of_one_is_the_mean_and_of_all_the_highest() -> None:
    scores, other = np.array([0.3, 0.9, 0.5]), np.array([7.0, 1.0, 2.0])
    assert expected_best_of(scores, scores, 1) == pytest.approx(scores.mean())
    assert expected_best_of(scores, other, 3) == 1.0
    assert best_of_weights(40, 20).sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="best of 4 cannot be computed from 3"):
        expected_best_of(scores, scores, 4)


def test_several_rewards_choose_by_the_sum_of_their_ranks() -> None:
    scores = np.array([[0.0, 100.0, 1.0], [5.0, 1.0, 4.0]])
    assert standing(scores).tolist() == [4.0, 4.0, 4.0]
    assert standing(np.array([[0.0, 0.0, 1.0], [1.0, 2.0, 3.0]])).tolist() == [2.5, 3.5, 6.0]
    assert standing(scores[:1]).tolist() == [0.0, 100.0, 1.0]


# Drawing and pruning


def test_the_best_of_each_prompt_is_chosen_and_the_first_of_equals(policy: Policy) -> None:
    found = best_of(policy, ROWS, {"brightness": BRIGHTNESS}, 4, Sampler(steps=2), REQUEST, KEY, batch=8, kept=2)
    levels = brightness(found.samples.media, [], []).view(3, 4)
    assert found.chosen.tolist() == (levels.argsort(1, descending=True)[:, :2] + 4 * torch.arange(3)[:, None]).tolist()
    assert [(one.row.index, one.candidate) for one in found.judged if one.rank == 0] == [
        (prompt, place) for prompt, place in enumerate(levels.argmax(1).tolist())
    ]
    assert found.judged[5].scores["brightness"] == pytest.approx(levels[1, 1].item(), abs=1e-6)
    equal = best_of(policy, ROWS, {"constant": CONSTANT}, 4, Sampler(steps=2), REQUEST, KEY, batch=5)
    assert equal.chosen.tolist() == [[0], [4], [8]]


@pytest.mark.parametrize(("batch", "tolerance"), [(1, 0.0), (8, 1e-5)])
def test_a_candidate_that_is_not_pruned_gives_the_same_image_as_without_pruning(
    policy: Policy, batch: int, tolerance: float
) -> None:
    sampler, judges = Sampler(steps=3), {"brightness": BRIGHTNESS, "contrast": CONTRAST}
    whole = rollout(policy, RolloutRequest(ROWS[:2], 4, sampler, REQUEST, KEY, batch=batch))
    schedule = (Prune(1, 0.8), Prune(2, 0.5))
    found = best_of(policy, ROWS[:2], judges, 4, sampler, REQUEST, KEY, batch=batch, schedule=schedule)
    left = zip(found.samples.groups.tolist(), found.samples.members, strict=True)
    places = [4 * group + member for group, member in left]
    assert len(places) == 2 * 2  # of 4 the best 3, then the best 2
    torch.testing.assert_close(found.samples.latents, whole.latents[places], atol=tolerance, rtol=tolerance)
    assert sorted(one.step for one in found.judged) == [1] * 2 + [2] * 2 + [3] * 4


def test_pruning_continues_the_candidates_with_the_best_predictions(policy: Policy) -> None:
    sampler = Sampler(steps=3)
    found = best_of(
        policy, ROWS, {"brightness": BRIGHTNESS}, 4, sampler, REQUEST, KEY, batch=12, schedule=[Prune(1, 0.5)]
    )
    first = rollout(
        policy, RolloutRequest(ROWS, 4, Sampler(steps=1), REQUEST, KEY, batch=12)
    )  # one step from the same noise is x0_hat
    levels = brightness(first.media, [], []).view(3, 4)
    left = [sorted(one.candidate for one in found.judged if one.row.index == n and one.step == 3) for n in range(3)]
    assert left == levels.argsort(1, descending=True)[:, :2].sort(1).values.tolist()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("schedule", [(), (Prune(2, 0.5),), (Prune(1, 0.7), Prune(2, 0.5))])
def test_counted_forwards_and_decodes_agree_with_the_formula(
    policy: Policy, guidance: float, schedule: tuple[Prune, ...]
) -> None:
    sampler = Sampler(steps=3, guidance=guidance)
    judges = {"brightness": BRIGHTNESS}
    found = best_of(policy, ROWS[:2], judges, 3, sampler, REQUEST, KEY, batch=4, schedule=schedule)
    spent = cost(3, schedule, 3, guidance)
    assert (found.forwards, found.decodes) == (2 * spent.forwards, 2 * spent.decodes)


def test_the_cost_is_that_of_the_paper_if_every_fraction_leaves_whole_candidates() -> None:
    schedule, steps, candidates = (Prune(5, 0.5), Prune(12, 0.25)), 20, 16
    judged, left, share, forwards = 0.0, 0, 1.0, 0.0
    for step, fraction in schedule:
        forwards, judged = forwards + share * (step - left), judged + share
        left, share = step, share * fraction
    expected = candidates * (forwards + share * (steps - left)), candidates * (judged + share)
    assert cost(candidates, schedule, steps) == expected == (16 * 5 + 8 * 7 + 2 * 8, 16 + 8 + 2)
    assert cost(6, [Prune(1, 0.34), Prune(2, 0.1)], 3) == (6 + 2 + 1, 6 + 2 + 1)  # the nearest, and one at least


def test_one_draw_gives_best_of_n_for_every_n_and_for_all_candidates_that_of_a_search(policy: Policy) -> None:
    settings = Evaluation(steps=2, batch=8)
    judges = {"brightness": BRIGHTNESS, "contrast": CONTRAST}
    points = evaluate_best_of(policy, ROWS, judges, "contrast", (1, 2, 4), settings, REQUEST)
    chosen = best_of(policy, ROWS, {"contrast": CONTRAST}, 4, settings, REQUEST, KEY, batch=8).media
    assert [(point.candidates, point.cost.forwards) for point in points] == [(1, 2), (2, 4), (4, 8)]
    for name in judges:
        scores = score(judges[name], chosen, [row.prompt for row in ROWS])
        assert points[-1].summary[name]["mean"] == pytest.approx(float(scores.mean()), abs=1e-6)
        error = float(scores.std()) / len(scores) ** 0.5
        assert points[-1].summary[name]["standard_error"] == pytest.approx(error, abs=1e-6)
    drawn = rollout(policy, RolloutRequest(ROWS, 4, settings, REQUEST, KEY, batch=8))
    assert points[0].summary["brightness"]["mean"] == pytest.approx(float(drawn.media.mean()), abs=1e-6)
    means = [point.summary["contrast"]["mean"] for point in points]
    assert means == sorted(means) and means[0] < means[-1]


# Bad input


class Rank(Reward):
    scope = "group"

    def __call__(self, media, prompts, metadata):
        return media.flatten(1).mean(1).argsort().argsort().float()


class Learns(TrainableReward):
    def __call__(self, media, prompts, metadata):
        return torch.zeros(len(media))

    def update(self, media, prompts, metadata, step):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(
    ("candidates", "schedule", "changes", "message"),
    [
        (0, [], {}, "--best-of 0 must be at least 1"),
        (4, [Prune(0, 0.5)], {}, "--prune 0:0.5: with 4 steps, pruning saves work only after step 1 to 3"),
        (4, [Prune(4, 0.5)], {}, "--prune 4:0.5: with 4 steps, pruning saves work only after step 1 to 3"),
        (4, [Prune(2, 0.0)], {}, "--prune 2:0: the fraction must be above 0 and at most 1"),
        (4, [Prune(2, 1.5)], {}, "--prune 2:1.5: the fraction"),
        (4, [Prune(2, math.nan)], {}, "--prune 2:nan: the fraction"),
        (4, [Prune(2, 0.5), Prune(2, 0.5)], {}, "--prune steps must rise, but 2 follows 2"),
        (4, [Prune(1, 0.5)], {"solver": "dpm++"}, "--prune needs solver euler; dpm"),
        (4, [Prune(1, 0.5)], {"kept": 3}, "--images 3: only 2 of a prompt's 4 candidates are drawn to the end"),
    ],
)
def test_an_impossible_search_is_one_sentence(candidates, schedule, changes, message) -> None:
    kept = changes.pop("kept", 1)
    with pytest.raises(UserError, match=message.replace("+", r"\+")) as error:
        check_search(candidates, schedule, Sampler(steps=4, **changes), kept)
    assert "\n" not in str(error.value)


def test_a_schedule_is_parsed_and_another_text_is_one_sentence() -> None:
    assert parse_schedule(["1:0.5", "3:.25"]) == (Prune(1, 0.5), Prune(3, 0.25))
    for text in ("half", "1:", "1.5:0.5"):
        with pytest.raises(UserError, match=f"--prune '{text}' must be written STEP:FRACTION"):
            parse_schedule([text])


def test_a_reward_that_judges_no_prompt_cannot_choose(policy: Policy) -> None:
    class Signs(Reward):
        def applies_to(self, row):
            return '"' in row["prompt"]

        def __call__(self, media, prompts, metadata):
            return torch.zeros(len(media))

    with pytest.raises(UserError, match="signs judges none of the evaluation prompts"):
        evaluate_best_of(policy, ROWS, {"signs": Signs()}, "signs", [1], Evaluation(steps=2), REQUEST)


def test_rewards_that_learn_or_compare_cannot_choose() -> None:
    with pytest.raises(UserError, match="reward 'learns' learns during training and cannot score before it"):
        check_judges({"learns": Learns()})
    with pytest.raises(UserError, match="reward 'rank' compares a prompt's images; best-of-N needs one that scores"):
        check_judges({"rank": Rank()})


def test_dropping_samples_whose_trajectory_is_kept_is_refused(policy: Policy) -> None:
    def drop(step: Step) -> None:
        step.going = [0]

    with pytest.raises(ValueError, match="only with solver euler and no kept trajectory"):
        rollout(policy, RolloutRequest(ROWS, 2, Sampler(solver="dpm++"), REQUEST, KEY, batch=8), watch=drop)


# The command


@pytest.fixture
def command(tiny_model: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "judge.py").write_text(
        "def level(media, prompts, metadata, scale=1.0):\n    return media.flatten(1).mean(1) * scale\n"
        "def contrast(media, prompts, metadata):\n    return media.flatten(1).std(1)\n"
    )
    sampler = ["--steps", "3", "--guidance", "1", "--size", "64", "--max-sequence-length", "0"]
    return ["sample", str(tiny_model), "a red star", "a ring", *sampler, "--output", str(tmp_path / "drawn")]


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code in (0, None)


def test_the_best_of_n_are_written_with_all_scores(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judges = ["--reward", f"{tmp_path / 'judge.py'}:level", "--option", "scale=-2"]
    run(*command, "--best-of", "4", "--prune", "1:0.5", *judges)
    lines = [json.loads(line) for line in (tmp_path / "drawn" / "scores.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["candidate"]) for line in lines] == [
        (prompt, candidate) for prompt in ("a red star", "a ring") for candidate in range(4)
    ]
    written = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert written == ["00.png", "01.png", "metadata.jsonl", "scores.jsonl"]
    manifest = [json.loads(line) for line in (tmp_path / "drawn" / "metadata.jsonl").read_text().splitlines()]
    assert [(row["file_name"], row["prompt"]) for row in manifest] == [("00.png", "a red star"), ("01.png", "a ring")]
    for prompt, picture in (("a red star", "00.png"), ("a ring", "01.png")):
        finished = [line for line in lines if line["prompt"] == prompt and line["step"] == 3]
        best = max(finished, key=lambda line: line["scores"]["level"])
        assert len(finished) == 2
        assert best["picture"] == picture
        assert [line["picture"] for line in lines if line["prompt"] == prompt].count(None) == 3
        with Image.open(tmp_path / "drawn" / picture) as image:
            level = -2 * float(np.asarray(image).mean()) / 255
        assert best["scores"]["level"] == pytest.approx(level, abs=4e-3)
    output = " ".join(capsys.readouterr().out.split())
    assert "8 transformer forwards and 6 scored images per prompt" in output  # 4 + 2 x 2, 4 + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--best-of", "4"], "--best-of needs a --reward to choose by"),
        (["--reward", "compressibility"], "--reward, --option and --prune need --best-of; give it the number"),
        (["--prune", "1:0.5"], "--reward, --option and --prune need --best-of"),
        (["--best-of", "0", "--reward", "compressibility"], "--best-of 0 must be at least 1"),
        (
            ["--best-of", "2", "--reward", "compressibility", "--prune", "3:0.5"],
            "with 3 steps, pruning saves work only after step 1 to 2",
        ),
        (["--best-of", "2", "--reward", "ocr"], "'a red star') cannot be judged by ocr"),
        (["--best-of", "2", "--reward", "orc"], "did you mean 'ocr'"),
        (["--best-of", "2", "--reward", "compressibility", "--images", "3"], "--images 3: only 2"),
    ],
)
def test_a_mistake_in_sampling_is_one_sentence_and_leaves_nothing(
    command: list[str], arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and message in error
    assert not (tmp_path / "drawn").exists()
