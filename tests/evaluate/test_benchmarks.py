"""The benchmarks of `flowalign eval`: GenEval, OCR and panels, on images that are drawn or given."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.cli.app import main
from flowalign.config import Sampler
from flowalign.config.base import UserError
from flowalign.evaluate import panel
from flowalign.evaluate.drawing import Drawing, draw, drawing_of, listed, seen_by_size
from flowalign.evaluate.geneval import Judge, check_sight, line_of, load_judge, summarise
from flowalign.evaluate.intervals import (
    clustered_error,
    combined_interval,
    difference_interval,
    mean_interval,
    proportion_interval,
)
from flowalign.evaluate.results import Stopwatch, continued
from flowalign.policies.base import Policy
from flowalign.policies.loading import load_policy, model_settings
from flowalign.rollout.prompts import Row
from flowalign.toyworld.detector import ExactDetector
from flowalign.toyworld.grammar import shape_scene, sign_prompt, sign_scene, task_prompts
from flowalign.toyworld.render import Scene, render
from rewards.geneval import TASKS

EXACT = "flowalign.toyworld.detector:ExactDetector"
# Sees a star or a ring, as the picture's first pixel has it.
EYES = """
import time
class Eyes:
    names = ("star", "ring")
    pause = 0.0
    def identity(self):
        return {"detector": "eyes", "checksum": "two"}
    def __call__(self, images):
        time.sleep(self.pause)
        names = [("star", "ring")[int(image[0, 0, 0] * 255) % 2] for image in images]
        return [[{"class": name, "box": [0, 0, 8, 8], "score": 1.0, "color": "red"}] for name in names]
class SlowEyes(Eyes):
    pause = 0.5
def nameless(images):
    return [[] for _ in images]
"""
STARS = [
    {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
    for name in ("star", "ring", "star", "ring", "star", "ring")
]


def succeed(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code in (0, None)


@pytest.fixture
def failing(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail; returns its one sentence."""

    def run(*arguments: object, code: int = 2) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == code and error.startswith("error: ") and "\n" not in error
        return error

    return run


def write_pictures(folder: Path, rows: Sequence[dict[str, Any]], scenes: Sequence[Sequence[Scene]]) -> Path:
    """A folder in GenEval's layout."""
    for index, (row, own) in enumerate(zip(rows, scenes, strict=True)):
        samples = folder / f"{index:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        for member, scene in enumerate(own):
            Image.fromarray(render(scene)).save(samples / f"{member:04d}.png")
    return folder


def write_prompts(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def shapes(tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Ten true pictures of each task, and their prompts."""
    rng = np.random.default_rng(0)
    rows = [task_prompts(task)[int(rng.integers(len(task_prompts(task))))] for task in TASKS for _ in range(5)]
    scenes = [[shape_scene(row, rng), shape_scene(row, rng)] for row in rows]
    return write_pictures(tmp_path / "shapes", rows, scenes), rows


@pytest.fixture
def tiny(tiny_model: Path, tmp_path: Path) -> list[str]:
    """The arguments with which a command draws with the tiny model, in a second."""
    (tmp_path / "eyes.py").write_text(EYES)
    write_prompts(tmp_path / "stars.jsonl", STARS)
    size = ["--size", "64", "--max-sequence-length", "0", "--steps", "2", "--guidance", "2"]
    return [str(tiny_model), *size, "--images-per-prompt", "2", "--batch", "4", "--prompts", f"{tmp_path}/stars.jsonl"]


def everything(folder: Path) -> dict[str, bytes]:
    """The contents of a folder but for the times."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "timing.json"
    }


# GenEval


def test_rendered_images_of_the_prompts_score_1_on_every_task(
    shapes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = shapes
    options = ("--images-per-prompt", 2, "--detector", EXACT, "--output", tmp_path / "out")
    succeed("eval", "geneval", "--images", folder, *options)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(tag, task["score"], task["prompts"]) for tag, task in summary["tasks"].items()] == [
        (tag, 1.0, 5) for tag in TASKS
    ]
    assert summary["overall"]["score"] == summary["image_mean"]["score"] == summary["any_success"]["score"] == 1
    assert "overall, the mean of the tasks" in capsys.readouterr().out
    line = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[0])
    official = {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    assert set(line) == official | {"detector", "checksum"}
    assert line["filename"] == "00000/samples/0000.png" and line["detector"] == EXACT and line["checksum"] == "exact"
    assert len(next(iter(json.loads(line["details"]).values()))[0]) == 5  # a box and its score, as mmdet has them


def test_the_overall_is_the_mean_of_the_tasks_and_not_of_the_images() -> None:
    tags = ["single_object"] * 4 + ["counting"] * 12
    correct = [1, 1, 1, 0] + [1, 0, 0, 0] * 3
    rows = [json.dumps({"tag": tag, "prompt": f"prompt {place // 4}"}) for place, tag in enumerate(tags)]
    lines = [{"tag": t, "correct": bool(c), "metadata": row} for t, c, row in zip(tags, correct, rows, strict=True)]
    found = summarise(lines, 4)
    assert found["overall"]["score"] == pytest.approx((0.75 + 0.25) / 2)
    assert found["image_mean"]["score"] == pytest.approx(6 / 16)
    assert found["any_success"]["score"] == 1
    counting = found["tasks"]["counting"]
    assert counting == {"score": 0.25, "interval": proportion_interval([[1, 0, 0, 0]] * 3), "prompts": 3}
    assert found["tasks"]["single_object"]["interval"] == proportion_interval([[1, 1, 1, 0]])
    low, high = found["overall"]["interval"]
    assert low < 0.5 < high
    # 3 prompts that each have some success: Wilson's interval of 4 of 4
    assert found["any_success"]["interval"] == pytest.approx((4 / (4 + 1.96**2), 1), abs=1e-4)


def test_a_task_that_is_always_correct_or_wrong_widens_the_interval_of_the_overall() -> None:
    tags = ["single_object"] * 2 + ["counting"] * 2
    rows = [{"tag": tag, "prompt": f"prompt {place}"} for place, tag in enumerate(tags)]
    found = summarise(
        [{"tag": row["tag"], "correct": row["tag"] == "single_object", "metadata": json.dumps(row)} for row in rows], 1
    )
    one, none = found["tasks"]["single_object"]["interval"], found["tasks"]["counting"]["interval"]
    assert one == pytest.approx((2 / (2 + 1.96**2), 1), abs=1e-4)
    assert none == pytest.approx((0, 1.96**2 / (2 + 1.96**2)), abs=1e-4)
    half = (1 - one[0]) / 2  # each task weighs a half
    assert found["overall"] == {"score": 0.5, "interval": pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)}


def test_equal_rows_count_as_one_prompt() -> None:
    """The published scripts group by metadata: a file may repeat a row where others draw several pictures of it."""
    rng = np.random.default_rng(0)
    right = rng.random((40, 4)) < 0.4

    def line(prompt: int, correct: bool, turned: bool = False) -> dict[str, Any]:
        row = {"prompt": f"prompt {prompt}", "tag": "colors", "include": [{"class": "star", "count": 1}]}
        return {
            "tag": "colors",
            "correct": bool(correct),
            "metadata": json.dumps(dict(reversed(row.items())) if turned else row),
        }

    together = [line(prompt, one) for prompt in range(40) for one in right[prompt]]
    repeated = [line(prompt, right[prompt, turn], bool(turn % 2)) for turn in range(4) for prompt in range(40)]
    once, apart = summarise(together, 4), summarise(repeated, 1)
    assert {**apart, "images_per_prompt": 4} == once
    assert once["any_success"]["score"] == right.any(1).mean() > once["image_mean"]["score"] == right.mean()
    more = summarise([*together, line(0, True), line(0, True)], 4)  # and pictures count alike where prompts have more
    assert more["overall"]["score"] == pytest.approx((right.sum() + 2) / 162) and more["prompts"] == 40


def test_an_image_of_another_object_is_judged_wrong_with_a_reason(shapes, tmp_path: Path) -> None:
    folder, rows = shapes
    Image.new("RGB", (64, 64), "white").save(folder / "00003" / "samples" / "0001.png")
    judging = load_judge(EXACT)
    samples = listed(folder, 2)
    lines = list(map(partial(line_of, judging), samples, seen_by_size(samples, judging.detector)))
    assert [line["filename"] for line in lines if not line["correct"]] == ["00003/samples/0001.png"]
    assert lines[7]["reason"] == f"expected {rows[3]['include'][0]['class']}>=1, found 0"


def test_images_with_a_manifest_are_judged_like_those_in_genevals_layout(shapes, tmp_path: Path, failing) -> None:
    folder, rows = shapes
    flat, command = tmp_path / "flat", ["eval", "geneval", "--detector", EXACT, "--images"]
    flat.mkdir()
    lines = []
    for place, picture in enumerate(listed(folder, 2)):
        Image.open(picture.path).save(flat / f"{place}.png")
        lines.append({"file_name": f"{place}.png", "text": picture.row.prompt, **picture.row.metadata})
    (flat / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for source, output in ((folder, "one"), (flat, "two")):
        succeed(*command, source, "--images-per-prompt", 2, "--output", tmp_path / output)
    summaries = [json.loads((tmp_path / output / "summary.json").read_text()) for output in ("one", "two")]
    assert summaries[0] == summaries[1] and summaries[0]["overall"]["score"] == 1
    out = ["--output", tmp_path / "three"]
    assert "flat holds 2 images of" in failing(*command, flat, *out)
    other = write_prompts(tmp_path / "other.jsonl", rows[::-1])
    assert "does not hold the prompts of the list in their order" in failing(
        *command, flat, "--images-per-prompt", 2, "--prompts", other, *out
    )


def test_a_detector_that_finds_nothing_is_refused_before_drawing(tmp_path: Path, tiny, failing) -> None:
    (tmp_path / "blind.py").write_text(
        "class Blind:\n    names = ('circle', 'square', 'triangle', 'star', 'cross', 'ring', 'diamond')\n"
        "    def __call__(self, images):\n        return [[] for _ in images]\n"
    )
    command = ["eval", "geneval", *tiny, "--detector", f"{tmp_path}/blind.py:Blind", "--output", tmp_path / "out"]
    assert "finds nothing in an image of ring and star" in failing(*command, code=1)
    assert not (tmp_path / "out").exists()
    assert "every score is 0: none of the 12 images is correct" in failing(*command, "--no-check-detector", code=1)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_the_image_that_checks_a_detector_depends_on_its_classes() -> None:
    assert check_sight(Judge(ExactDetector(), ExactDetector.names, ExactDetector().identity())) == "ring and star"
    shown: list[torch.Tensor] = []

    def sees_a_person(images: torch.Tensor) -> list[list[dict[str, Any]]]:
        shown.append(images)
        return [[{"class": "person", "box": [0, 0, 9, 9], "score": 0.9, "color": "black"}] for _ in images]

    assert check_sight(Judge(sees_a_person, ("person", "cup"), {"detector": "it"})) == "person"
    assert shown[0].shape == (1, 3, 600, 512)  # the photograph that comes with matplotlib
    assert check_sight(Judge(sees_a_person, ("cup",), {"detector": "it"})) is None


# Images and results that a killed evaluation leaves


def test_results_continue_where_they_were_cut_and_end_with_the_same_bytes(tmp_path: Path) -> None:
    asked: list[range] = []

    def judge(places: range) -> list[dict[str, Any]]:
        asked.append(places)
        return [{"place": place, "first of its batch": places[0]} for place in places]

    whole = tmp_path / "whole.jsonl"
    expected = continued(whole, 10, 4, judge)
    text = whole.read_bytes()
    for cut in (0, 1, 30, len(text) // 2, len(text) - 1, len(text)):
        part = tmp_path / f"{cut}.jsonl"
        part.write_bytes(text[:cut])
        asked.clear()
        assert continued(part, 10, 4, judge) == expected and part.read_bytes() == text
        assert set(asked) <= {range(4), range(4, 8), range(8, 10)}
    assert asked == []  # of the last, which was whole
    with pytest.raises(UserError, match="holds 10 lines for 6 images"):
        continued(whole, 6, 4, judge)
    whole.write_bytes(b'{"place": 0}\n{"pla\n{"place": 2}\n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        continued(whole, 10, 4, judge)


def tiny_drawing(tiny_model: Path, **changes: Any) -> Drawing:
    values = {"model": model_settings(str(tiny_model), size=64, max_sequence_length=0), "seed": 0, "images": 2}
    return Drawing(**{**values, "sampler": Sampler(steps=2), "batch": 4, "device": "cpu", **changes})


def test_a_killed_drawing_continues_with_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        Row(index, row["prompt"], {"tag": row["tag"], "include": row["include"]}) for index, row in enumerate(STARS)
    ]
    policy = load_policy(model_settings(str(tiny_model), size=64, max_sequence_length=0))
    loaded: list[Policy] = []

    def load(*_: object) -> Policy:
        loaded.append(policy)
        return policy

    drawing, watch = tiny_drawing(tiny_model), Stopwatch(tmp_path)
    draw(tmp_path / "whole", drawing, rows, watch, load=load)
    draw(tmp_path / "cut", drawing, rows, watch, load=load)
    cut = tmp_path / "cut"
    (cut / "00001" / "samples" / "0000.png").unlink()
    torn = cut / "00003" / "samples" / "0001.png"
    torn.write_bytes(torn.read_bytes()[:-20])
    (cut / "00005" / "samples" / ".partial_0000.png").write_bytes(b"half")
    (cut / "00005" / "samples" / "0000.png").unlink()
    kept = (cut / "00000" / "samples" / "0000.png").stat().st_mtime_ns
    draw(cut, drawing, rows, watch, load=load)
    assert everything(cut) == everything(tmp_path / "whole")
    assert (cut / "00000" / "samples" / "0000.png").stat().st_mtime_ns == kept
    assert len(loaded) == 3
    draw(cut, drawing, rows, watch, load=load)
    assert len(loaded) == 3  # nothing is missing, so no model is loaded
    for changes, key in (({"seed": 1}, "seed 0, not 1"), ({"sampler": Sampler(steps=3)}, "steps 2, not 3")):
        with pytest.raises(UserError, match=f"drawing.json was started with {key}"):
            draw(cut, tiny_drawing(tiny_model, **changes), rows, watch, load=load)
    with pytest.raises(UserError, match=r"drawing.json was started with prompts .*; choose another --output"):
        draw(cut, drawing, rows[:-1], watch, load=load)


def test_images_do_not_depend_on_how_many_prompts_follow(tiny_model: Path, tmp_path: Path) -> None:
    rows = [Row(index, row["prompt"]) for index, row in enumerate(STARS)]
    policy = load_policy(model_settings(str(tiny_model), size=64, max_sequence_length=0))
    for name, part in (("six", rows), ("four", rows[:4])):
        drawing = tiny_drawing(tiny_model)
        draw(tmp_path / name, drawing, part, Stopwatch(tmp_path), load=lambda *_: policy)
    pictures = {name: image for name, image in everything(tmp_path / "four").items() if name.endswith(".png")}
    assert len(pictures) == 8 and pictures.items() <= everything(tmp_path / "six").items()


@pytest.mark.slow
def test_a_killed_evaluation_ends_with_the_same_bytes(tiny, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flowalign", "eval", "geneval", *tiny, "--detector"]
    command += [f"{tmp_path}/eyes.py:SlowEyes", "--images-per-prompt", "6", "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], check=True, env=environment, capture_output=True)
    moments: list[Callable[[], bool]] = [
        lambda: len(list(killed.glob("*/samples/*.png"))) >= 2,
        lambda: len(list(killed.glob("*/samples/*.png"))) >= 15,
        lambda: (killed / "results.jsonl").exists() and (killed / "results.jsonl").stat().st_size > 100,
    ]
    for reached in moments:
        process = subprocess.Popen([*command, str(killed)], env=environment, stdout=subprocess.DEVNULL)
        while not reached():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (killed / "summary.json").exists()
    subprocess.run([*command, str(killed)], check=True, env=environment, capture_output=True)
    assert everything(killed) == everything(whole)
    assert len((whole / "results.jsonl").read_text().splitlines()) == 36


# Bad input


def test_unsuitable_images_are_named_in_the_error(shapes, tmp_path: Path, failing) -> None:
    folder, rows = shapes
    command = ["eval", "geneval", "--detector", EXACT, "--output", tmp_path / "out", "--images", folder]
    prompts = write_prompts(tmp_path / "prompts.jsonl", rows)
    assert "00000/samples holds 2 images NNNN.png, not 4; see --images-per-prompt" in failing(*command)
    command += ["--images-per-prompt", 2]
    write_prompts(tmp_path / "more.jsonl", [*rows, rows[0]])
    assert "has no folder 00030 for prompt 31" in failing(*command, "--prompts", tmp_path / "more.jsonl")
    write_prompts(tmp_path / "fewer.jsonl", rows[:-1])
    assert "00029 belongs to none of the 29 prompts" in failing(*command, "--prompts", tmp_path / "fewer.jsonl")
    write_prompts(tmp_path / "other.jsonl", [rows[7], *rows[1:]])
    assert "00000/metadata.jsonl does not hold prompt 1 of the list" in failing(
        *command, "--prompts", tmp_path / "other.jsonl"
    )
    picture = folder / "00011" / "samples" / "0001.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:100])
    assert f"{picture} is not a readable image" in failing(*command, "--prompts", prompts)
    picture.write_bytes(whole)
    metadata = folder / "00002" / "metadata.jsonl"
    text = metadata.read_text()
    metadata.write_text('{"prompt": "a star"}\n')
    assert f"{metadata}: no GenEval metadata: tag: Field required" in failing(*command)
    metadata.unlink()
    assert f"{metadata} is missing" in failing(*command)
    metadata.write_text(text)
    assert f"--images {tmp_path / 'nothing'} is not a folder" in failing(*command[:-3], tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no images in GenEval's layout" in failing(*command[:-3], tmp_path / "empty")
    assert not (tmp_path / "out").exists()
    succeed(*command, "--prompts", prompts)
    (tmp_path / "eyes.py").write_text(EYES.replace('("star", "ring")', str(ExactDetector.names), 1))
    error = failing(*command, "--no-check-detector", "--detector", f"{tmp_path}/eyes.py:Eyes")
    assert f'evaluation.json was started with detector "{EXACT}", not "eyes"' in error


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"include": [{"class": "star", "count": 1}]}, "prompt 2: no GenEval metadata: tag: Field required"),
        ({"tag": "colors", "include": []}, "include: List should have at least 1 item"),
        (
            {"tag": "colors", "include": [{"class": "star", "count": 0}]},
            "include.0.count: Input should be greater than 0",
        ),
        (
            {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "teal"}]},
            "'teal' is none of red, orange",
        ),
        (
            {"tag": "position", "include": [{"class": "star", "count": 1, "position": ["above", 0]}]},
            "include.0.position names clause 0, which is not an earlier one",
        ),
        (
            {"tag": "colors", "include": [{"class": "cup", "count": 1}]},
            "prompt 2: geneval: the prompts ask for the class 'cup'",
        ),
    ],
)
def test_a_bad_prompt_is_named_by_its_line(row: dict[str, Any], message: str, tmp_path: Path, failing) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", [STARS[0], {**row, "prompt": "a star"}])
    out = tmp_path / "out"
    assert message in failing("eval", "geneval", "toyworld", "--prompts", prompts, "--output", out)
    assert not out.exists()


def test_wrong_arguments_are_one_sentence(tmp_path: Path, tiny, tiny_model: Path, failing) -> None:
    out = ["--output", tmp_path / "out"]
    assert "give either MODEL, to draw images with it, or --images" in failing("eval", "geneval")
    assert "--seed changes how images are drawn" in failing("eval", "ocr", "--images", tmp_path, "--seed", 1)
    assert "--count takes the first prompts of a list" in failing("eval", "ocr", "--images", tmp_path, "--count", 1)
    eyes = ["eval", "geneval", *tiny, *out, "--detector", f"{tmp_path}/eyes.py:Eyes"]
    assert "does not take these options" in failing(*eyes, "--detector-option", "clip=none")
    assert "has no `names`" in failing("eval", "geneval", *tiny, *out, "--detector", f"{tmp_path}/eyes.py:nameless")
    assert "'/no/model' does not exist" in failing("eval", "panel", "/no/model", "--prompts", f"{tmp_path}/stars.jsonl",
                                                   "--reward", "colorfulness", *out)  # fmt: skip
    panel = ["eval", "panel", *tiny, "--reward", "colorfulness", "--reward"]
    assert "reward 'ocr' can judge none of the prompts" in failing(*panel, "ocr", *out)
    assert "there is already a reward 'colorfulness'" in failing(*panel, "colorfulness", *out)
    assert "--prompts is missing" in failing("eval", "ocr", tiny_model, *out)
    assert "has no text in quotes to read" in failing("eval", "ocr", *tiny, *out)
    (tmp_path / "russian.txt").write_text("a sign that says «\u0414\u0430»\n", "utf-8")
    russian = ["eval", "ocr", tiny_model, "--prompts", tmp_path / "russian.txt", "--mode", "lines", *out]
    assert "does not know \u0434 \u0430" in failing(*russian)
    assert "did you mean 'cyrillic'" in failing(*russian, "--recogniser", "cyrilic")
    assert "is neither empty nor a folder of an evaluation" in failing("eval", "geneval", *tiny, "--detector",
                                                f"{tmp_path}/eyes.py:Eyes", "--output", tmp_path)  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert "must be written TASK=SHARE" in failing("data", "geneval", tmp_path / "new.jsonl", "--mix", "position")


def test_a_run_folder_stands_for_its_model_with_its_adapter(tmp_path: Path) -> None:
    recipe = (
        "name: r\nprompts: toyworld/words_train\nrewards: {ocr: 1.0}\nalgorithm: {name: flow_grpo, clip_range: 0.01}\n"
    )
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(UserError, match=r"has no lora/ yet"):
        model_settings(str(tmp_path))
    (tmp_path / "lora").mkdir()
    assert model_settings(str(tmp_path)).adapter == str(tmp_path / "lora")
    with pytest.raises(UserError, match="leave --adapter out"):
        model_settings(str(tmp_path), tmp_path)


# Intervals


@pytest.mark.parametrize(("prompts", "mean", "alike"), [(3, 0.5, 0.3), (10, 0.9, 0.3), (60, 0.4, 0), (60, 0.95, 0.8)])
def test_intervals_of_proportions_contain_the_true_value_as_often_as_stated(
    prompts: int, mean: float, alike: float
) -> None:
    rng = np.random.default_rng(1)
    held = []
    for _ in range(400):
        own = rng.beta(mean * (1 / alike - 1), (1 - mean) * (1 / alike - 1), prompts) if alike else [mean] * prompts
        low, high = proportion_interval([rng.binomial(1, share, 4).tolist() for share in own])
        assert 0 <= low < high <= 1
        held.append(low <= mean <= high)
    assert np.mean(held) >= 0.92


def test_intervals_of_gains_in_proportions_contain_the_true_value_as_often_as_stated() -> None:
    rng = np.random.default_rng(2)
    held = []
    for prompts in (5, 40) * 200:
        first, last = (rng.binomial(1, share, (prompts, 2)).tolist() for share in (0.6, 0.9))
        low, high = difference_interval(first, last)
        held.append(low <= 0.3 <= high)
    assert np.mean(held) >= 0.92


def test_intervals_of_soft_scores_contain_the_true_value_about_as_often_as_stated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flowalign.evaluate.intervals.RESAMPLES", 999)
    rng = np.random.default_rng(1)
    for prompts in (4, 60):
        held = 0
        for _ in range(200):
            low, high = mean_interval(0.5 * rng.uniform(size=(prompts, 2)) + 0.5 * rng.uniform(size=(prompts, 1)))
            held += low <= 0.5 <= high
        assert 180 <= held <= 198  # 190 expected


def test_intervals_are_over_prompts_and_pairs() -> None:
    assert mean_interval([[1.0]] * 2) == pytest.approx((2 / (2 + 1.96**2), 1), abs=1e-4)  # Wilson's
    assert mean_interval([[1.0]] * 9) == pytest.approx((9 / (9 + 1.96**2), 1), abs=1e-4)
    # Wilson 1927: 8 of 20
    assert mean_interval([[1.0]] * 8 + [[0.0]] * 12) == pytest.approx((0.2188, 0.6134), abs=1e-4)
    # ten pictures of one prompt that are all alike say no more than one
    repeated = [[1.0] * 10] * 8 + [[0.0] * 10] * 12
    assert mean_interval(repeated) == pytest.approx((0.2188, 0.6134), abs=1e-4)
    # Student's t of two prompts, within the bounds of the score
    assert mean_interval([[0.8], [0.9]]) == pytest.approx((0.85 - 12.706 * 0.05, 0.85 + 12.706 * 0.05), abs=1e-3)
    assert mean_interval([[0.8], [0.9]], (0, 1)) == (pytest.approx(0.2147, abs=1e-3), 1)
    assert mean_interval([[0.5]]) is mean_interval([]) is mean_interval([[0.3]] * 9) is None
    # MOVER of two alike is one by the square root of 2
    assert combined_interval([0.5, 0.5], [(0.3, 0.6), (0.3, 0.6)]) == pytest.approx(
        (0.5 - 0.2 / 2**0.5, 0.5 + 0.1 / 2**0.5)
    )
    assert combined_interval([0.2, 0.6], [(0.1, 0.3), (0.5, 0.9)], [3, 1]) == pytest.approx(
        (0.3 - (0.075**2 + 0.025**2) ** 0.5, 0.3 + (0.075**2 + 0.075**2) ** 0.5)
    )
    assert combined_interval([0.5, 0.5], [(0.3, 0.6), None]) is None
    # Agresti and Min 2005: 1 prompt lost, 5 won and 4 unchanged, with half of one more in each of the four cells
    pairs = [(1, 0), *[(0, 1)] * 5, *[(1, 1)] * 4]
    first, last = ([[float(pair[end])] for pair in pairs] for end in (0, 1))
    low, high = difference_interval(first, last)
    half = 1.96 * ((6.0 + 1) / 12 - (4 / 12) ** 2) ** 0.5 / 12**0.5
    assert (low, high) == pytest.approx((4 / 12 - half, 4 / 12 + half), abs=1e-4)
    rng = np.random.default_rng(2)
    before = rng.uniform(0, 5, (50, 1))
    moved = before + 0.01 + 0.001 * rng.uniform(size=(50, 1))
    low, high = difference_interval(before, moved)  # prompts differ, their differences do not
    assert 0.01 < low < high < 0.011
    assert difference_interval(before, before) is None


def test_the_error_of_a_mean_is_over_prompts() -> None:
    assert clustered_error([[0.2], [0.5], [0.9]]) == pytest.approx(np.std([0.2, 0.5, 0.9], ddof=1) / 3**0.5)
    alike = clustered_error([[0.2] * 7, [0.5] * 7, [0.9] * 7])
    assert alike == pytest.approx(np.std([0.2, 0.5, 0.9], ddof=1) / 3**0.5)
    assert clustered_error([[0.2, 0.4]]) is None


# OCR and panels


def test_signs_are_read_and_scored_by_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    words = ("HOUSE", "TREE", "WATER", "STONE")
    rows = [{"prompt": sign_prompt([word])} for word in words]
    scenes = [[sign_scene([word], rng)] for word in words]
    scenes[3] = [sign_scene(["STONE", "AGE"], rng)]
    folder = write_pictures(tmp_path / "signs", rows, scenes)
    command = [
        "eval",
        "ocr",
        "--images",
        folder,
        "--images-per-prompt",
        1,
        "--mode",
        "lines",
        "--output",
        tmp_path / "o",
    ]
    succeed(*command)
    assert "5-8" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "o" / "results.jsonl").read_text().splitlines()]
    assert [line["target"] for line in lines] == list(words)
    assert lines[3]["lines"] == ["STONE", "AGE"]
    assert lines[3]["accuracy"] == 1 and lines[3]["similarity"] == pytest.approx(2 / 5) and not lines[3]["exact"]
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert summary["accuracy"]["score"] == 1 and summary["exact"]["score"] == 0.75
    assert list(summary["lengths"]) == ["1-4", "5-8"] and summary["lengths"]["5-8"]["prompts"] == 3
    before = everything(tmp_path / "o")
    succeed(*command)
    assert everything(tmp_path / "o") == before


def test_blank_signs_are_a_loud_failure(tmp_path: Path, failing) -> None:
    folder = write_pictures(tmp_path / "signs", [{"prompt": sign_prompt(["HOUSE"])}], [[Scene()]])
    command = [
        "eval",
        "ocr",
        "--images",
        folder,
        "--images-per-prompt",
        1,
        "--mode",
        "lines",
        "--output",
        tmp_path / "o",
    ]
    assert "every score is 0" in failing(*command, code=1)


def test_a_panel_compares_a_model_with_its_base_over_the_same_noise(tiny, tiny_model: Path, tmp_path: Path) -> None:
    policy = load_policy(model_settings(str(tiny_model), size=64, max_sequence_length=0))
    for parameter in policy.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    (tmp_path / "lora").mkdir()
    policy.export(tmp_path / "lora")
    (tmp_path / "judge.py").write_text(
        "def level(media, prompts, metadata, scale=1.0):\n    return media.flatten(1).mean(1) * scale\n"
    )
    out = tmp_path / "panel"
    level = f"{tmp_path}/judge.py:level"
    options = [
        "--adapter",
        tmp_path / "lora",
        "--reward",
        level,
        "--reward",
        "colorfulness",
        "--option",
        f"{level}.scale=2",
    ]
    succeed("eval", "panel", *tiny, *options, "--output", out)
    with (out / "panel.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert list(cells[0]) == ["model", "guidance", "index", "prompt", "level", "colorfulness"]
    assert [(c["model"], c["guidance"]) for c in cells[::6]] == [
        ("base", "2"),
        ("base", "1"),
        ("tuned", "2"),
        ("tuned", "1"),
    ]
    scores = np.array([float(cell["level"]) for cell in cells]).reshape(2, 2, 6)
    pictures = listed(out / "base_guidance_2", 2)
    first = np.mean([np.asarray(Image.open(picture.path)) for picture in pictures[:2]]) / 255
    assert scores[0, 0, 0] == pytest.approx(2 * first, rel=1e-4)
    summary = json.loads((out / "summary.json").read_text())
    differences = {(row["guidance"], row["reward"]): row for row in summary["differences"]}
    found = differences[1.0, "level"]
    assert found["mean"] == pytest.approx(np.mean(scores[1, 1] - scores[0, 1])) and found["mean"] != 0
    prompts = [cell["prompt"] for cell in cells[:6]]  # rows that are alike are one prompt
    differences_of = [
        (scores[1, 1] - scores[0, 1])[[own == prompt for own in prompts]] for prompt in dict.fromkeys(prompts)
    ]
    assert found["interval"] == pytest.approx(mean_interval(differences_of)) and found["prompts"] == 2


def test_a_panel_counts_equal_rows_as_one_prompt_and_ignores_images_that_are_left_out() -> None:
    scores = {"base": np.array([[0.1, 0.3], [0.5, 0.9], [0.4, 0.2]]), "tuned": np.array([[0.2, 0.3], [0.6, 1], [1, 0]])}
    missing = np.array([[0, 1], [0, 0], [0, 0]]) == 1
    parts = [
        panel.Part(name, 1.0, {"level": own, "some": np.where(missing, np.nan, own)}) for name, own in scores.items()
    ]
    parts[0].scores["some"][2, 0] = np.nan
    bounds = dict.fromkeys(("level", "some"), (0.0, 1.0))
    found = panel.summarise(parts, bounds, ["a", "b", "a"])
    means = {(row["model"], row["reward"]): row for row in found["means"]}
    groups = [[0.1, 0.3, 0.4, 0.2], [0.5, 0.9]]
    expected = {"mean": pytest.approx(0.4), "interval": mean_interval(groups, (0, 1)), "prompts": 2}
    assert {key: means["base", "level"][key] for key in expected} == expected
    assert means["base", "some"]["mean"] == pytest.approx((0.1 + 0.5 + 0.9 + 0.2) / 4)
    level, some = found["differences"]
    assert level["mean"] == pytest.approx((0.1 + 0.1 + 0.1 + 0.6 - 0.2) / 6) and level["prompts"] == 2
    assert some["mean"] == pytest.approx((0.1 + 0.1 + 0.1 - 0.2) / 4)  # of the pictures that both models have


# How a model is drawn, and where that goes


@pytest.fixture
def run_folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A run of the tiny model with its adapter, evaluated in a way of its own."""
    folder = tmp_path / "runs" / "own"
    folder.mkdir(parents=True)
    policy = load_policy(model_settings(str(tiny_model), size=64, max_sequence_length=0))
    policy.export(folder / "lora")
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "A  photo of a\u00a0STAR"}) + "\n")
    recipe = {
        "name": "own",
        "model": {"path": str(tiny_model), "height": 64, "width": 64, "max_sequence_length": 0, "dtype": "fp32"},
        "prompts": str(tmp_path / "train.jsonl"),
        "rewards": {"colorfulness": 1.0},
        "algorithm": {"name": "flow_grpo", "clip_range": 0.01},
        "evaluation": {"prompts": "test.txt", "steps": 3, "guidance": 1.5, "schedule": "uniform", "solver": "dpm++"}
        | {"seed": 7},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def test_a_run_is_drawn_as_its_evaluation_draws_and_options_override(run_folder: Path) -> None:
    own = drawing_of(str(run_folder), device="cpu")
    assert own.sampler == Sampler(steps=3, guidance=1.5, schedule="uniform", solver="dpm++") and own.seed == 7
    assert own.words == (
        "drawn with 3 steps, guidance 1.5, uniform schedule, dpm++, 64 x 64 pixels, seed 7 (the run's own settings)"
    )
    other = drawing_of(str(run_folder), device="cpu", steps=5, schedule="model", seed=0, size=32)
    assert other.sampler == Sampler(steps=5, guidance=1.5, schedule="model", solver="dpm++") and other.seed == 0
    assert "32 x 32 pixels, seed 0 (the run's own settings except the given steps, schedule, seed, size)" in other.words


def test_a_run_without_evaluations_is_drawn_with_its_models_settings(run_folder: Path) -> None:
    recipe = json.loads((run_folder / "recipe.yaml").read_text())
    del recipe["evaluation"]
    (run_folder / "recipe.yaml").write_text(json.dumps(recipe))
    own = drawing_of(str(run_folder), device="cpu")
    assert own.sampler == Sampler(steps=50, guidance=4.5) and own.origin == "the model's family's settings"


def test_a_model_is_drawn_with_its_familys_settings(tiny_model: Path, tiny_flux: Callable[[bool], Path]) -> None:
    samplers = [drawing_of(str(path), device="cpu").sampler for path in ("toyworld", tiny_model, tiny_flux(True))]
    assert [(one.steps, one.guidance) for one in samplers] == [(12, 3.0), (50, 4.5), (28, 1.0)]


def test_every_model_and_setting_has_its_own_folder_and_the_same_command_continues(
    tiny, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["eval", "geneval", "--detector", f"{tmp_path}/eyes.py:Eyes", "--images-per-prompt", 1, "--prompts"]
    command += [f"{tmp_path}/stars.jsonl", "--no-check-detector"]
    succeed(*command, run_folder)
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 steps, guidance 1.5, uniform schedule, dpm++, 64 x 64 pixels, seed 7 (the run's own settings)" in shown
    assert "not held out: 1 of 2 prompts is trained on" in shown and "few: fewer than 20 prompts" in shown
    (first,) = (tmp_path / "runs" / "geneval").iterdir()
    assert first.name.startswith("tiny-own-lora-3steps-g1.5-")
    summary = json.loads((first / "summary.json").read_text())
    assert summary["trained_prompts"] == 1 and "the run's own settings" in summary["drawn"]
    assert json.loads((first / "drawing.json").read_text())["steps"] == 3
    times = {path: path.stat().st_mtime_ns for path in first.glob("*/samples/*.png")}
    before = everything(first)
    succeed(*command, run_folder)
    assert list((tmp_path / "runs" / "geneval").iterdir()) == [first] and everything(first) == before
    assert {path: path.stat().st_mtime_ns for path in first.glob("*/samples/*.png")} == times
    succeed(*command, run_folder, "--steps", 2)
    succeed(*command, *tiny[:1], "--size", 64, "--max-sequence-length", 0, "--steps", 2)
    names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "runs" / "geneval").iterdir())
    assert names == ["tiny-2steps-g4.5", "tiny-own-lora-2steps-g1.5", "tiny-own-lora-3steps-g1.5"]


def test_given_images_have_their_own_folder_and_changed_images_are_judged_again(
    shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, _ = shapes
    command = ("eval", "geneval", "--images", folder, "--images-per-prompt", 2, "--detector", EXACT)
    succeed(*command)
    Image.new("RGB", (64, 64), "white").save(folder / "00003" / "samples" / "0001.png")
    succeed(*command)
    found = [json.loads((out / "summary.json").read_text()) for out in (tmp_path / "runs" / "geneval").iterdir()]
    assert sorted(one["image_mean"]["score"] for one in found) == pytest.approx([59 / 60, 1])


def test_samples_of_other_settings_go_elsewhere(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("sample", tiny_model, "a star", "--size", 64, "--max-sequence-length", 0, "--steps", 2)
    for others in ((), ("--guidance", 2), ()):
        succeed(*command, *others)
    folders = sorted((tmp_path / "samples").iterdir())
    assert [folder.name.rpartition("-")[0] for folder in folders] == ["tiny-2steps-g2", "tiny-2steps-g4.5"]
    assert all((folder / "00.png").is_file() for folder in folders)
