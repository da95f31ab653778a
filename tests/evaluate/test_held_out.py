"""Prompts that are trained on are never called held-out, wherever an evaluation is shown."""

import json
from pathlib import Path

import pytest

from flowalign.cli.app import main
from flowalign.config import recipe_from_dict
from flowalign.config.base import UserError
from flowalign.evaluate.audit.guard import refuse_shared_prompts
from flowalign.evaluate.held_out import HeldOut, held_out_from
from flowalign.evaluate.report.comparison import legend
from flowalign.rollout.prompts import Row, normalised, shared_rows
from flowalign.trainer import Trainer
from flowalign.training.tracking import evaluation_values


@pytest.mark.parametrize(
    "other",
    [
        "a STAR that says \u201cCaf\u00e9\u201d",
        '  a star\tthat  says "caf\u00e9" ',
        'a star\u3000that says "cafe\u0301"',
        '\uff41 star that says "CAF\u00c9"',
    ],
)
def test_prompts_are_compared_without_case_spaces_quotes_and_forms_of_unicode(other: str) -> None:
    plain = Row(0, 'a star that says "café"')
    assert normalised(other) == normalised(plain.prompt)
    assert shared_rows([Row(3, other), Row(4, "a ring")], [plain]) == [Row(3, other)]
    with pytest.raises(UserError, match=r"prompt 4 .* is trained on, but an audit needs held-out prompts"):
        refuse_shared_prompts([Row(3, other)], [plain])


def test_words_count_the_prompts_that_are_trained_on() -> None:
    assert HeldOut(0, 5).words == "held-out prompts" and HeldOut(0, 5).word == "held-out"
    assert HeldOut(1, 1).words == "not held out: 1 of 1 prompt is trained on"
    assert HeldOut(3, 12).words == "not held out: 3 of 12 prompts are trained on"
    assert HeldOut(None, 5).words.startswith("it is not known") and HeldOut(None, 5).word == "evaluation"


def test_it_is_unknown_what_a_missing_training_list_held(values, tmp_path: Path) -> None:
    recipe = recipe_from_dict(values)
    assert held_out_from(recipe, [Row(0, "A photo of TWO  stars"), Row(1, "x")]) == HeldOut(1, 2)
    (tmp_path / "prompts.txt").unlink()
    assert held_out_from(recipe, [Row(0, "x")]) == HeldOut(None, 1)


@pytest.mark.parametrize(("lines", "shared"), [("A photo of two  Stars\na ring\n", 1), ("a moon\na ring\n", 0)])
def test_a_run_counts_the_prompts_that_it_is_measured_and_trained_on(
    values, tmp_path: Path, lines: str, shared: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test.txt").write_text(lines)
    values["evaluation"] |= {"prompts": str(tmp_path / "test.txt"), "every": 0}
    values["train"] |= {"steps": 1}
    folder = Trainer.from_recipe(recipe_from_dict(values)).run()
    evaluation = json.loads((folder / "evaluations" / "step_000001.json").read_text())
    assert (evaluation["trained_prompts"], evaluation["prompts"]) == (shared, 2)
    assert evaluation_values(evaluation["summary"], evaluation)["evaluation/trained_prompts"] == shared
    words = "not held out: 1 of 2 prompts is trained on"
    shown, page = capsys.readouterr().out, (folder / "report.html").read_text()
    for text in (shown, page):
        assert (words in text) is bool(shared)
    assert ("eld-out" in page.partition("<body")[2].partition("Recipe</summary>")[0]) is not bool(shared)


@pytest.mark.parametrize(("trained", "begins"), [(0, "Held-out ocr of t"), (2, "Evaluation ocr of t (not held out: 2")])
def test_a_comparison_says_whether_its_prompts_are_held_out(trained: int, begins: str) -> None:
    result = {
        "reward": "ocr",
        "seeds": [0],
        "shared": {"evaluation.prompts": ["t"]},
        "budget_minutes": 1,
        "devices": ["cpu"],
        "target": None,
        "prompts": 5,
        "trained_prompts": trained,
    }
    assert legend(result).startswith(begins)


def test_an_evaluation_of_a_recipe_says_how_it_drew_and_gives_two_correct_prompts_a_wide_interval(
    values, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    values["rewards"] = {"constant": {"load": f"{tmp_path / 'judge.py'}:constant"}}
    values["evaluation"] |= {"count": 2}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "recipe", str(tmp_path / "recipe.yaml")])
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "3 steps, guidance 1, model schedule, euler, 64 x 64 pixels, seed 0" in shown
    assert "not held out: 2 of 2 prompts are trained on" in shown
    assert "0.3424 to 1.0000" in shown and "fewer than 20 prompts" in shown
