"""The output of a run in terminals of different widths, and in a file."""

import io
import json
import signal
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from flowalign.config import recipe_from_dict
from flowalign.trainer import Trainer
from flowalign.training.display import Display, gain_table
from flowalign.training.interrupt import Interrupted

LINE = {
    "minutes": 1.0,
    "reward": {"total": 0.5, "ocr": 0.5, "aesthetic": 5.25},
    "metrics": {"policy_loss": 0.01, "clipped": 0.0},
    "seconds": {"rollout": 3.0, "reward": 0.5, "train": 4.0},
}


def terminal(width: int, kind: str = "xterm", **settings: str) -> Console:
    environment = {"TERM": kind, **settings}
    return Console(file=io.StringIO(), force_terminal=True, width=width, _environ=environment, highlight=False)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain(text: str) -> list[str]:
    """The lines without a terminal's control sequences."""
    return [Text.from_ansi(line).plain.rstrip() for line in text.replace("\r", "\n").split("\n")]


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_step_the_bar_and_the_time_left_fit_into_a_terminal(width: int) -> None:
    display = Display(console=terminal(width))
    with display.training(24, 3):
        display.step({**LINE, "step": 12})
        with display.phase("rollout", 48) as advance:
            for _ in range(16):
                advance(0.75)  # a denoising step of a batch
    lines = plain(shown(display.console))
    assert any(line.startswith("step 12: total 0.500 ocr 0.500 aesthetic 5.250 | policy") for line in lines)
    (steps,) = [line for line in lines if line.startswith("step ") and "━" in line and "12/24" in line][-1:]
    (phase,) = [line for line in lines if line.startswith("rollout") and "━" in line][-1:]
    for line in (steps, phase):
        assert len(line) <= width and line.endswith(" left") and line.count("━") >= 5
    assert "12/24" in steps and "12/48" in phase
    assert steps.split()[-2] != "-:--:--"  # this process did nine steps, so the time left is known


def test_a_phase_of_unknown_length_shows_its_name() -> None:
    display = Display(console=terminal(60))
    with display.training(2, 0), display.phase("scoring"):
        pass
    assert any(line.startswith("scoring") and "0/" not in line for line in plain(shown(display.console)))


@pytest.mark.parametrize("console", [terminal(80, "dumb"), Console(file=io.StringIO(), width=80)], ids=["dumb", "pipe"])
def test_output_that_cannot_be_redrawn_has_only_lines(console: Console) -> None:
    display = Display(console=console)
    with display.training(24, 3):
        with display.phase("rollout", 48) as advance:
            advance(12)
        display.step({**LINE, "step": 12})
        with display.evaluating(3) as advance:
            advance(3)
    text = shown(console)
    assert text.startswith("step 12: total 0.500") and text.count("\n") == 1 and "\x1b" not in text


def test_no_color_switches_colours_off() -> None:
    display = Display(console=terminal(80, NO_COLOR="1"))
    with display.training(2, 0):
        display.step({**LINE, "step": 1})
    assert "\x1b[32m" not in shown(display.console) and "\x1b[38" not in shown(display.console)


def run_of(tmp_path: Path, before: list[float], after: list[float]) -> Path:
    folder = tmp_path / "run"
    (folder / "evaluations").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("rewards: {ocr: {weight: 1.0}}\n")
    for step, scores in ((0, before), (9, after)):
        rows = [{"prompt": str(n), "scores": {"aesthetic": 2 * s, "ocr": s}} for n, s in enumerate(scores)]
        about = {"step": step, "guidance": 1, "sampler_steps": 4, "prompts": len(rows), "trained_prompts": 0}
        summary = {name: {"mean": 0, "standard_error": 0, "count": 1} for name in ("aesthetic", "ocr")}
        contents = {**about, "trained_rewards": ["ocr"], "rows": rows, "summary": summary}
        (folder / "evaluations" / f"step_{step:06d}.json").write_text(json.dumps(contents))
    return folder


@pytest.mark.parametrize("width", [80, 60])
def test_the_last_table_has_errors_and_names_the_trained_rewards(tmp_path: Path, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(gain_table(run_of(tmp_path, [0.2, 0.5, 0.4, 0.3], [0.6, 0.7, 0.7, 0.4])))
    text = shown(console)
    assert "held-out prompts, same noise" in text and max(map(len, text.splitlines())) <= width
    if width == 80:
        rows = [line.split() for line in text.splitlines()]
        assert ["ocr", "trained", "0.350", "0.600", "+0.250", "±", "0.065", "+0.045", "to", "+0.455"] in rows
        assert any(row[:3] == ["aesthetic", "held", "out"] for row in rows)
        assert text.index("ocr ") < text.index("aesthetic ")
        assert "fewer than 20 prompts" in text


# Ctrl-C


@pytest.mark.slow
def test_ctrl_c_in_an_evaluation_stops_there_and_the_run_goes_on_to_the_same_end(
    values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["evaluation"] |= {"every": 2, "batch": 1}
    whole = {**values, "run": {**values["run"], "folder": str(tmp_path / "whole")}}
    Trainer.from_recipe(recipe_from_dict(whole)).run()

    class Asking(Display):
        def evaluating(self, images, doing="evaluating"):
            if stopped.step == 2:
                signal.raise_signal(signal.SIGINT)
            return super().evaluating(images, doing)

    stopped = Trainer.from_recipe(recipe_from_dict(values), display=Asking())
    with pytest.raises(Interrupted, match="stopped in the evaluation after step 2 of 4; go on with --resume"):
        stopped.run()
    assert "but not an evaluation; ask once more to stop at once" in capsys.readouterr().out
    run = tmp_path / "run"
    assert not (run / "evaluations" / "step_000002.json").exists()
    assert json.loads((run / "run.json").read_text())["stopped"] == "asked to stop"
    Trainer.from_recipe(recipe_from_dict(values), resume=True).run()
    for name in ("step_000002.json", "step_000004.json"):
        summaries = [
            json.loads((folder / "evaluations" / name).read_text())["summary"] for folder in (run, tmp_path / "whole")
        ]
        assert summaries[0] == summaries[1]


def test_a_run_begins_again_after_ctrl_c_in_its_first_evaluation(values, tmp_path: Path) -> None:
    class Asking(Display):
        def evaluating(self, images, doing="evaluating"):
            signal.raise_signal(signal.SIGINT)
            return super().evaluating(images, doing)

    first = Trainer.from_recipe(recipe_from_dict(values), display=Asking())
    with pytest.raises(Interrupted, match="stopped in the evaluation after step 0"):
        first.run()
    folder = Trainer.from_recipe(recipe_from_dict(values), resume=True).run()
    assert (folder / "evaluations" / "step_000000.json").exists() and (folder / "lora").is_dir()
