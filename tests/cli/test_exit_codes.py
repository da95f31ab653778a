"""Every command's exit code: 0 success, 1 an alarm or a failed check, 2 it could not run, 130 interrupted."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from flowalign.cli import app as cli
from flowalign.config.base import UserError
from flowalign.config.options import parse_options
from flowalign.preflight.doctor import NEEDED


def code_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return int(stopped.value.code or 0)


def commands(group: Any, words: Sequence[str] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        own = hasattr(command, "commands")
        if own:
            yield from commands(command, (*words, name))
        if not own or command.invoke_without_command:
            yield (*words, name)


EVERY = sorted(commands(typer.main.get_command(cli.app)))
# Arguments with which each command cannot run; their folders and files do not exist.
IMPOSSIBLE = {
    ("audit",): ["/no/run"],
    ("collect",): ["toyworld_ocr", "dataset=null"],
    ("compare",): ["toyworld_ocr", "no_recipe", "--budget", "1"],
    ("data", "geneval"): ["/no/folder/new.jsonl", "--count", "2"],
    ("doctor",): ["too", "many", "words"],
    ("eval", "geneval"): ["/no/model"],
    ("eval", "ocr"): ["/no/model"],
    ("eval", "panel"): ["/no/model", "--prompts", "/no/list.txt", "--reward", "colorfulness"],
    ("eval", "recipe"): ["/no/recipe.yaml"],
    ("model", "check"): ["/no/model"],
    ("plan",): ["toyworld_ocr", "model.path=/no/model"],
    ("recipes",): ["nothing"],
    ("recipes", "copy"): ["no_recipe"],
    ("report",): ["/no/run"],
    ("rewards",): ["nothing"],
    ("rewards", "check"): ["no_reward"],
    ("sample",): ["/no/model", "a star"],
    ("score",): ["colorfulness", "--images", "/no/folder"],
    ("serve",): ["no_reward"],
    ("train",): ["toyworld_ocr", "train.steps=many"],
}


def test_every_command_is_tried() -> None:
    assert set(EVERY) == set(IMPOSSIBLE)


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_a_command_that_cannot_run_ends_with_2(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert code_of(*words, "--help") == 0
    assert code_of(*words, "--no-such-option") == 2
    capsys.readouterr()
    assert code_of(*words, *IMPOSSIBLE[words]) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err + shown.out and shown.err
    assert not list(tmp_path.iterdir())


def test_help_shows_version_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--version") == 0
    assert capsys.readouterr().out == f"flowalign {importlib.metadata.version('flowalign')}\n"
    assert code_of("--help") == 0
    assert "1 an alarm or a failed check" in " ".join(capsys.readouterr().out.split())


def test_a_defect_ends_with_2_and_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("flowalign.config.recipe.bundled_recipes", broken)
    assert code_of("recipes") == 2
    assert "a defect" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["OCR", "attention xformers"])
def test_doctor_ends_with_1_if_an_indispensable_part_is_missing(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "flowalign.preflight.doctor.diagnose", lambda: [(part, False, "missing"), ("packages", True, "all")]
    )
    assert code_of("doctor") == (1 if part in NEEDED else 0)


def test_a_plan_that_cannot_work_ends_with_1() -> None:
    assert code_of("plan", "toyworld_ocr", "--gpus", "5") == 1


def test_a_run_stopped_by_its_guard_ends_with_1(values, tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("a moon\ntwo moons\n")
    values["evaluation"] |= {"prompts": str(tmp_path / "test.txt"), "every": 1}
    values["guard"] = {"seeds": 2, "kl_samples": 2, "false_alarm": 0.49, "patience": 1, "stop": True}
    values["train"] |= {"learning_rate": 0.3, "steps": 3}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    code = code_of("train", str(tmp_path / "recipe.yaml"))
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["stopped"] == "sustained alarm" and code == 1


@pytest.mark.slow
def test_ctrl_c_in_an_evaluation_ends_it_with_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flowalign", "eval", "geneval", "toyworld", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out/*/samples/*.png")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted; what is done is kept" in shown and "Traceback" not in error


# The one syntax of --option

URL_OPTIONS = {"mode": "page", "url": "http://a"}


@pytest.mark.parametrize(
    ("names", "texts", "found"),
    [
        (["ocr"], ["mode=lines"], {"ocr": {"mode": "lines"}}),
        (["ocr"], ["ocr.mode=lines"], {"ocr": {"mode": "lines"}}),
        (["judge.py:Sharp"], ["Sharp.a=2", "judge.py:Sharp.b=-.5"], {"judge.py:Sharp": {"a": 2, "b": -0.5}}),
        (["a"], ["x=1e-3", "y='1e-3'", "z=null", "u=yes"], {"a": {"x": 1e-3, "y": "1e-3", "z": None, "u": True}}),
        (["a", "b"], ["a.x=[1, 2]", 'b.y={"k": "v=w"}'], {"a": {"x": [1, 2]}, "b": {"y": {"k": "v=w"}}}),
        (["http://host:8/ocr"], ["ocr.mode=page", "url=http://a"], {"http://host:8/ocr": URL_OPTIONS}),
        (["a"], [], {"a": {}}),
    ],
)
def test_options_have_one_syntax(names: list[str], texts: list[str], found: dict[str, dict[str, object]]) -> None:
    assert parse_options(names, texts) == found


@pytest.mark.parametrize(
    ("names", "text", "message"),
    [
        (["ocr"], "mode", "must be written KEY=VALUE"),
        (["ocr"], "=x", "must be written KEY=VALUE"),
        (["ocr"], '{"mode": "lines"}', "must be written KEY=VALUE"),
        (["a", "b"], "x=1", "must be written NAME.KEY=VALUE, with a name of a, b"),
        (["ocr", "aesthetic"], "orc.mode=page", "'orc' is no name given; did you mean 'ocr'"),
        (["ocr"], "mode=[1", "is not YAML"),
    ],
)
def test_an_option_with_another_syntax_is_refused(names: list[str], text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_options(names, [text])
    assert message in str(caught.value) and "--option" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "command",
    [
        ["score", "ocr", "--images", "{folder}", "--prompts", "{prompts}"],
        ["rewards", "check", "ocr"],
        ["sample", "toyworld", 'a sign that says "CAT"', "--best-of", "2", "--reward", "ocr"],
        ["eval", "panel", "toyworld", "--prompts", "{prompts}", "--reward", "ocr"],
        ["serve", "ocr"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_takes_that_syntax(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text('a sign that says "CAT"\n')
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"")
    words = [word.format(folder=folder, prompts=tmp_path / "prompts.txt") for word in command]
    for option in ("mod=lines", "ocr.mod=lines"):  # both reach the reward, which has no such option
        assert code_of(*words, "--option", option) == 2
        assert "has no option 'mod'" in capsys.readouterr().err
