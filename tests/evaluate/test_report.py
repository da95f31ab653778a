"""The report of a run: how it states a gain, what it reads from the run folder, and that it needs no other file."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flowalign.config.base import UserError
from flowalign.evaluate.report.report import changes, overall_change, paired_change, write_report
from flowalign.experiments.compare import _outcome

PROMPTS = ("a red circle", 'a sign "CAT"', "a blue ring", "two stars")
TAGS = ("colors", None, "colors", "counting")
BEFORE, AFTER = (0.2, 0.5, 0.7, 0.4), (0.6, 0.7, 0.8, 0.7)


def rows_of(scores, reward="ocr", prompts=PROMPTS):
    """Evaluation rows; a score of None is a reward that does not apply."""
    return [
        {"prompt": prompt, **({"tag": tag} if tag else {}), "scores": {} if score is None else {reward: score}}
        for prompt, tag, score in zip(prompts, TAGS, scores, strict=True)
    ]


def summary_of(rows, reward="ocr"):
    def mean(of):
        error = float(np.std(of, ddof=1) / math.sqrt(len(of))) if len(of) > 1 else None
        return {"mean": float(np.mean(of)), "standard_error": error, "count": len(of)}

    tasks = {tag: mean([r["scores"][reward] for r in rows if r.get("tag") == tag]) for tag in ("colors", "counting")}
    overall = float(np.mean([task["mean"] for task in tasks.values()]))
    return {reward: {**mean([row["scores"][reward] for row in rows]), "tasks": tasks, "overall": overall}}


def add_evaluation(folder, step, scores, reward="ocr", prompts=PROMPTS, side=32):
    """An evaluation and its images, as a run writes them."""
    rows = rows_of(scores, reward, prompts)
    about = {"step": step, "minutes": 0.5 * step, "forwards": 100 * step, "guidance": 4.5, "sampler_steps": 10}
    samples = folder / "samples" / f"step_{step:06d}"
    for made in (folder / "evaluations", samples):
        made.mkdir(parents=True, exist_ok=True)
    contents = {**about, "rows": rows, "summary": summary_of(rows, reward)}
    (folder / "evaluations" / f"step_{step:06d}.json").write_text(json.dumps(contents))
    for index in range(len(prompts)):
        Image.new("RGB", (side, side), (60 * index, 10 * step, 90)).save(samples / f"{index:02d}.png")
    (samples / "prompts.json").write_text(json.dumps(prompts))


def add_metrics(folder, steps, reward="ocr"):
    lines = [
        {
            "step": step,
            "minutes": 0.5 * step,
            "forwards": 100 * step,
            "reward": {"total": 0.1 * step, reward: 0.1 * step},
            "reward_std": {"total": 0.2, reward: 0.2},
            "loss": 1 / step,
            "metrics": {"policy_loss": 1 / step, "clipped": 0.0},
            "grad_norm": 0.3,
            "learning_rate": 3e-4,
            "zero_spread": 0.0,
            "seconds": {"rollout": 3.0, "reward": 1.0, "train": 4.0},
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def begin_run(folder, name="made_up", reward="ocr"):
    folder.mkdir(exist_ok=True)
    recipe = {
        "name": name,
        "model": {"path": "toyworld"},
        "prompts": "signs",
        "rewards": {reward: {"weight": 1.0}},
        "algorithm": {"name": "flow_grpo"},
        "train": {"steps": 4, "prompts_per_step": 4},
    }
    self_test = [{"check": "the reward tells pictures apart", "passed": False, "detail": "std 0"}]
    run = {"name": name, "started": "2026-01-01T10:00:00+00:00", "device": "cpu", "versions": {"torch": "2.9"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "run.json").write_text(json.dumps(run | {"command": "flowalign train x", "self_test": self_test}))
    return folder


@pytest.fixture
def run(tmp_path):
    """A whole run of four steps and three evaluations."""
    folder = begin_run(tmp_path / "run")
    add_metrics(folder, 4)
    for step, scores in ((0, BEFORE), (2, BEFORE), (4, AFTER)):
        add_evaluation(folder, step, scores)
    return folder


class Page(HTMLParser):
    """The tags with their attributes and the text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def test_paired_error_is_that_of_the_differences():
    change = paired_change(rows_of(BEFORE), rows_of(AFTER), "ocr")
    # the differences are 0.4, 0.2, 0.1 and 0.3: mean 0.25, sum of squared deviations 0.05; t of 3 is 3.182
    assert change.gain == pytest.approx(0.25)
    assert change.standard_error == pytest.approx(math.sqrt(0.05 / 3 / 4))
    assert (change.before, change.after, change.count) == (pytest.approx(0.45), pytest.approx(0.7), 4)
    assert change.interval == pytest.approx((0.25 - 3.1824 * 0.06455, 0.25 + 3.1824 * 0.06455), abs=1e-4)
    error = "paired standard error; 95 %: +0.045 to +0.455; 4 images, same noise, few: under 20 prompts"
    assert change.words == f"better by 0.250 ± 0.065 ({error})"


def test_the_images_of_one_prompt_count_as_one_in_the_error_of_a_gain():
    before = [{"prompt": f"{n % 4}", "scores": {"r": 0.0}} for n in range(40)]
    after = [{"prompt": f"{n % 4}", "scores": {"r": [0.1, 0.2, 0.4, 0.5][n % 4]}} for n in range(40)]
    change = paired_change(before, after, "r")
    assert (change.count, change.prompts) == (40, 4)
    assert change.standard_error == pytest.approx(np.std([0.1, 0.2, 0.4, 0.5], ddof=1) / 2)


@pytest.mark.parametrize(("prompts", "verdict"), [(2, "same"), (6, "better")])
def test_two_prompts_that_became_correct_are_no_significant_gain(prompts, verdict):
    before, after = ([{"prompt": f"{n}", "scores": {"ok": value}} for n in range(prompts)] for value in (0.0, 1.0))
    change = paired_change(before, after, "ok")
    assert change.verdict == verdict and change.interval[0] < change.gain == 1 >= change.interval[1]


def test_rows_without_the_reward_are_left_out():
    change = paired_change(rows_of((0.2, None, 0.9, 0.4)), rows_of((0.6, 0.1, 1.0, None)), "ocr")
    assert (change.count, change.before, change.after) == (2, pytest.approx(0.55), pytest.approx(0.8))
    assert paired_change(rows_of(BEFORE), rows_of(AFTER), "pickscore") is None


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=4, max_size=4), st.floats(-5, 5))
def test_hard_and_easy_prompts_do_not_widen_the_error(scores, spread):
    before, after = zip(*scores, strict=True)
    shifted = [[score + spread * index for index, score in enumerate(part)] for part in (before, after)]
    error = paired_change(rows_of(before), rows_of(after), "ocr").standard_error
    assert paired_change(*map(rows_of, shifted), "ocr").standard_error == pytest.approx(error, abs=1e-9)


def test_overall_weighs_all_tasks_equally():
    before, after = rows_of(BEFORE), rows_of(AFTER)
    colors = paired_change(before, after, "ocr", "colors")
    assert (colors.count, colors.gain) == (2, pytest.approx(0.25))
    assert colors.standard_error == pytest.approx(0.15)
    overall = overall_change([colors, colors, colors, colors])
    assert (overall.gain, overall.standard_error) == (pytest.approx(0.25), pytest.approx(0.15 / 2))
    assert overall.interval == pytest.approx((0.25 - 12.706 * 0.15 / 2, 0.25 + 12.706 * 0.15 / 2), abs=1e-3)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ((0.1, 0.4, 0.6, 0.2), "worse by 0.125 ± 0.025 (paired"),
        ((0.3, 0.4, 0.8, 0.3), "no significant change: +0.000 ± 0.058 (paired"),
        (BEFORE, "changed by +0.000; too few prompts for an interval (4 images"),
        ((0.5, None, None, None), "changed by +0.300; too few prompts for an interval (1 image,"),
    ],
)
def test_words_claim_only_what_the_interval_allows(after, words):
    assert paired_change(rows_of(BEFORE), rows_of(after), "ocr").words.startswith(words)


def test_report_is_one_file_that_needs_no_other(run):
    path = write_report(run)
    assert path == run / "report.html"
    assert not [other for other in run.iterdir() if "report" in other.name and other != path]
    page = Page(path)
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert len(sources) == 4 * 2 + 4 * 3  # pairs, and three evaluations of the first four prompts
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script|<link|@import|url\((?!#)", path.read_text())


def test_report_answers_whether_training_helped(run):
    page = Page(write_report(run))
    # overall of colors (+0.25 ± 0.15) and counting (one picture): no standard error, so no claim
    assert "Too few prompts to say whether training helped" in page.text
    assert "0.450 → 0.700, better by 0.250 ± 0.065" in page.text
    assert "1 of the start-up self-tests failed" in page.text
    for prompt in PROMPTS:
        assert prompt in page.text


def test_time_is_split_into_phases_and_evaluation(run):
    path = run / "evaluations" / "step_000002.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 16.0}))
    text = Page(write_report(run)).text
    assert "rollout 0.2 3.00 25 %" in text  # 4 steps of 3 + 1 + 4 seconds, and 16 seconds
    assert "evaluate 0.3 4.00 33 %" in text
    assert "0.8 minutes with evaluations; 2.0 of them count as training; 400 transformer forwards" in text


def test_mixed_outcome_warns_of_reward_hacking(run):
    for step, other in ((0, (1.0, 2.0, 3.0, 4.0)), (4, (0.5, 1.4, 2.5, 3.5))):
        path = run / "evaluations" / f"step_{step:06d}.json"
        evaluation = json.loads(path.read_text())
        for row, score in zip(evaluation["rows"], other, strict=True):
            row["scores"]["aesthetic"] = score
        plain = {"mean": 0.0, "standard_error": 0.1, "count": 4}
        path.write_text(json.dumps(evaluation | {"summary": {"ocr": plain, "aesthetic": plain}}))
    text = Page(write_report(run)).text
    assert "Mixed: ocr rose, but aesthetic fell" in text
    assert "aesthetic not trained on" in text


def test_names_and_prompts_are_text_never_markup(tmp_path):
    evil = '<script>alert("x")</script> & \'y\' "><img src=x onerror=z> $\\frac{'
    folder = begin_run(tmp_path / "run", name=evil, reward=evil)
    add_metrics(folder, 3, reward=evil)
    for step, scores in ((0, BEFORE), (3, AFTER)):
        add_evaluation(folder, step, scores, reward=evil, prompts=(evil, *PROMPTS[1:]))
    page = Page(write_report(folder))
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(attributes["src"].startswith("data:") for tag, attributes in page.tags if tag == "img")
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert evil in page.text


def test_run_with_its_first_evaluation_only(tmp_path):
    folder = begin_run(tmp_path / "run")
    (folder / "run.json").unlink()
    add_evaluation(folder, 0, BEFORE)
    page = Page(write_report(folder))
    assert "there is only the evaluation of step 0 so far" in page.text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == len(PROMPTS)


def test_a_run_that_lost_its_first_evaluation_has_no_gain_to_show(run):
    assert changes(run) is not None
    (run / "evaluations" / "step_000000.json").unlink()
    add_evaluation(run, 5, [0.1] * 4)
    assert changes(run) is None
    assert "unknown: the evaluation of step 0 is missing" in Page(write_report(run)).text
    with pytest.raises(UserError, match="no evaluation of step 0, so its gain is unknown"):
        _outcome("made_up", 0, run, "ocr", None)


def test_run_without_evaluations_leaves_out_a_half_written_step(tmp_path):
    folder = begin_run(tmp_path / "run")
    add_metrics(folder, 3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "minu')
    text = Page(write_report(folder)).text
    assert "3 of 4 steps, 1.5 minutes" in text
    assert "there is no evaluation yet" in text


def test_large_images_are_shrunk(tmp_path):
    folder = begin_run(tmp_path / "run")
    add_evaluation(folder, 0, BEFORE, side=768)
    images = [attributes for tag, attributes in Page(write_report(folder)).tags if tag == "img"]
    assert all(image["src"].startswith("data:image/jpeg;") and image["width"] == "512" for image in images)


def test_same_folder_gives_the_same_page(run):
    assert write_report(run).read_text() == write_report(run).read_text()


def test_mistakes_are_one_sentence(run, tmp_path):
    with pytest.raises(UserError, match=r"is not a run folder: it has no recipe\.yaml"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither metrics nor evaluations"):
        write_report(begin_run(tmp_path / "bare"))
    add_evaluation(run, 4, AFTER, prompts=("another prompt", *PROMPTS[1:]))
    with pytest.raises(UserError, match="steps 0 and 4 differ in prompts"):
        write_report(run)
    (run / "evaluations" / "step_000004.json").write_text("{")
    with pytest.raises(UserError, match=r"step_000004\.json cannot be read"):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_phone_shows_every_image_and_never_scrolls_sideways(run, tmp_path):
    measure = """<body><script>addEventListener("load", () => { document.title = JSON.stringify({
        width: innerWidth, needed: document.documentElement.scrollWidth,
        broken: [...document.images].filter(image => !image.naturalWidth).length}) })</script>"""
    page = re.sub(r"<meta http-equiv=[^>]*>", "", write_report(run).read_text())  # the page itself forbids scripts
    copy = tmp_path / "measured.html"
    copy.write_text(page.replace("<body>", measure))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,800", "--dump-dom"]
    shown = subprocess.run([*command, Path(copy).as_uri()], capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(re.search(r"<title>(.*?)</title>", shown.stdout)[1])
    assert found["broken"] == 0
    assert found["needed"] <= found["width"] <= 500
