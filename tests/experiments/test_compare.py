"""Comparing recipes: the table agrees with the runs' own files, and recipes that cannot be compared are refused."""

import io
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from flowalign.cli.app import main
from flowalign.config import Sampler, dump_recipe, load_recipe, recipe_from_dict
from flowalign.config.base import UserError
from flowalign.evaluate.report.plots import Curve, mean_curve
from flowalign.experiments.campaign import is_done
from flowalign.experiments.compare import compare, matching_n, price
from flowalign.policies.loading import load_policy
from flowalign.rollout.generate import rollout
from flowalign.rollout.prompts import load_prompts
from flowalign.rollout.stages import RolloutRequest
from flowalign.sampling.noise import EVALUATION
from flowalign.training.display import Display

pytestmark = pytest.mark.slow  # trainings to their end

JUDGE = """
def brightness(media, prompts, metadata):
    return media.flatten(1).mean(1)
def contrast(media, prompts, metadata):
    return media.flatten(1).std(1)
"""
BUDGET = 0.01  # minutes


@pytest.fixture(scope="module", autouse=True)
def _few_threads() -> None:
    """One, in place of the two of other tests: they would wait for each other and use up the budget."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes steady.yaml and daring.yaml, which differ in how they train alone."""
    folder: Path = tmp_path_factory.mktemp("compare")
    (folder / "judge.py").write_text(JUDGE)
    (folder / "prompts.txt").write_text("".join(f"a photo of {n} stars\n" for n in ("two", "three", "four", "a")))
    measured = {name: {"load": f"{folder / 'judge.py'}:{name}"} for name in ("brightness", "contrast")}
    sampler = {"prompts": str(folder / "prompts.txt"), "steps": 2}
    for name, rate, pictures in (("steady", 1e-3, 2), ("daring", 1e-2, 3)):
        recipe = {
            "name": name,
            "model": {"path": str(tiny_model), "height": 64, "width": 64, "dtype": "fp32", "max_sequence_length": 0},
            "prompts": str(folder / "prompts.txt"),
            "rewards": {"brightness": measured["brightness"]},
            "algorithm": {"name": "flow_grpo", "clip_range": 1e-2},
            "rollout": {"steps": 3, "window": [0, 2]},
            "train": {"steps": 1, "prompts_per_step": 2, "group_size": 4, "learning_rate": rate},
            "evaluation": {**sampler, "every": 1, "keep_media": pictures, "rewards": measured},
            "guard": None,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def sources(place: Path) -> list[str]:
    return [str(place / "steady.yaml"), str(place / "daring.yaml")]


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    """The folder of a comparison of two recipes with two seeds each."""
    compare(sources(place), BUDGET, place / "made", seeds=(1, 2), target=-1.0, reward="contrast", best_of=3)
    return place / "made"


def comparison(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "comparison.json").read_text())


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(run.glob("evaluations/step_*.json"))]


def times(folder: Path) -> dict[Path, int]:
    """When every file of the runs was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/**/*") if path.is_file()}


def test_numbers_come_from_the_runs_own_evaluations(made: Path) -> None:
    result = comparison(made)
    assert {(run["recipe"], run["seed"]) for run in result["runs"]} == {
        (recipe, seed) for recipe in ("steady", "daring") for seed in (1, 2)
    }
    for run in result["runs"]:
        files = evaluations(made / f"{run['recipe']}-seed{run['seed']}")
        assert [point["step"] for point in run["curve"]] == list(range(len(files)))
        last = json.loads((made / run["folder"] / "metrics.jsonl").read_text().splitlines()[-1])
        assert (run["steps"], run["minutes"], run["forwards"]) == (last["step"], last["minutes"], last["forwards"])
        for name, ends in run["rewards"].items():
            before, after = (files[end]["summary"][name]["mean"] for end in (0, -1))
            assert ends == {"before": before, "after": after, "gain": after - before}
            assert [point["rewards"][name] for point in run["curve"]] == [of["summary"][name]["mean"] for of in files]


def test_a_recipe_has_mean_and_deviation_over_seeds_and_the_best_is_first(made: Path) -> None:
    result = comparison(made)
    for of in result["recipes"]:
        runs = [run for run in result["runs"] if run["recipe"] == of["name"]]
        after = [run["rewards"]["contrast"]["after"] for run in runs]
        shown = of["rewards"]["contrast"]["after"]
        assert shown["mean"] == pytest.approx(statistics.mean(after))
        assert shown["std"] == pytest.approx(statistics.stdev(after))
        assert of["forwards"]["mean"] == statistics.mean(run["forwards"] for run in runs)
        assert of["to_target"]["minutes"] == {"mean": 0, "std": 0, "count": 2}  # the target is met from the start
    after = [of["rewards"]["contrast"]["after"]["mean"] for of in result["recipes"]]
    assert after == sorted(after, reverse=True)


def test_the_budget_ends_a_run_and_not_the_steps_of_its_recipe(made: Path) -> None:
    for run in comparison(made)["runs"]:
        trained = load_recipe(made / run["folder"] / "recipe.yaml")
        assert trained.train.steps > 1 and trained.run.max_minutes == BUDGET  # the recipe itself asks for one step
        *before, last = (point["minutes"] for point in run["curve"])
        assert max(before) < BUDGET <= last == run["minutes"]


def test_all_runs_start_from_the_same_images(made: Path) -> None:
    scores = [evaluations(run)[0]["rows"] for run in made.iterdir() if run.is_dir()]
    assert len(scores) == 4
    assert all(rows == scores[0] for rows in scores)


def test_the_leaderboard_begins_with_the_command_and_agrees_with_the_numbers(made: Path, place: Path) -> None:
    lines = (made / "comparison.md").read_text().splitlines()
    paths = " ".join(sources(place))
    options = "--seeds 1,2 --target -1 --reward contrast --best-of 3"
    assert lines[0] == f"    flowalign compare {paths} --budget 0.01 {options} --output {made}"
    columns, _, *rows = table(lines[2 : lines.index("", 2)])
    best = comparison(made)["recipes"][0]
    cells = dict(zip(columns, rows[0], strict=True))
    ends = best["rewards"]["contrast"]
    assert cells["recipe"] == best["name"]
    assert cells["after"] == f"{ends['after']['mean']:.3f}" + f" ± {ends['after']['std']:.3f}"
    assert cells["before"] == f"{ends['before']['mean']:.3f}"  # no spread: one model, one noise
    assert float(cells["gain"].split()[0]) == pytest.approx(ends["gain"]["mean"], abs=6e-4)
    assert cells["forwards"].split()[0] == f"{best['forwards']['mean']:,.0f}"
    assert cells["minutes to -1"] == "0.00"
    assert len(rows) == 2


def table(lines: list[str]) -> list[list[str]]:
    """The cells of a markdown table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_best_of_n_without_training_is_compared_with_the_trained_recipes(made: Path, place: Path) -> None:
    result = comparison(made)
    points = result["best_of"]["points"]
    assert [(point["n"], point["forwards"]) for point in points] == [(1, 2), (2, 4), (3, 6)]
    policy = load_policy(load_recipe(str(place / "steady.yaml")).model)
    rows = load_prompts(str(place / "prompts.txt"))
    drawn = rollout(policy, RolloutRequest(rows, 3, Sampler(steps=2), policy.request, (EVALUATION, 0, 0), batch=12))
    media = drawn.media.view(4, 3, -1)
    contrast, brightness = media.std(2), media.mean(2)
    best = contrast.argmax(1, keepdim=True)
    for point, values in ((points[0], contrast), (points[2], contrast.gather(1, best))):
        means = values.mean(1)
        assert point["rewards"]["contrast"]["mean"] == pytest.approx(means.mean().item(), abs=1e-5)
        assert point["rewards"]["contrast"]["standard_error"] == pytest.approx(means.std().item() / 2, abs=1e-5)
    assert points[2]["rewards"]["brightness"]["mean"] == pytest.approx(
        brightness.gather(1, best).mean().item(), abs=1e-5
    )
    for of in result["recipes"]:
        after = of["rewards"]["contrast"]["after"]["mean"]
        reached = [point["n"] for point in points if point["rewards"]["contrast"]["mean"] >= after]
        assert of["matched_by"] == (reached[0] if reached else None)


def test_best_of_n_is_in_the_leaderboard_and_on_the_page(made: Path) -> None:
    result = comparison(made)
    lines = (made / "comparison.md").read_text().splitlines()
    start = lines.index("Best-of-n without training:") + 2
    columns, _, *rows = table(lines[start : lines.index("", start)])
    assert columns == ["n", "forwards per image", "contrast (chooses)", "brightness"]
    of_all = result["best_of"]["points"][2]["rewards"]["contrast"]
    assert [row[:2] for row in rows] == [["1", "2"], ["2", "4"], ["3", "6"]]
    assert rows[2][2] == f"{of_all['mean']:.3f} ± {of_all['standard_error']:.3f}"
    page = Page(made / "comparison.html")
    assert "Best-of-n without training" in page.text and rows[2][2] in page.text
    panels = [attributes["aria-label"] for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert "contrast evaluation against transformer forwards per image" in panels


def test_matching_n_is_the_least_n_that_reaches_a_value() -> None:
    points = [{"n": n, "rewards": {"ocr": {"mean": mean}}} for n, mean in ((1, 0.4), (2, 0.5), (3, 0.55))]
    yardstick = {"reward": "ocr", "points": points}
    assert [matching_n(yardstick, value) for value in (0.3, 0.4, 0.45, 0.55, 0.6)] == [1, 1, 2, 3, None]


def test_pages_written_again_from_disk_are_the_same(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = [made / "comparison.html", made / "daring-seed2" / "report.html"]
    before = [page.read_text() for page in pages]
    for page in pages:
        page.unlink()
    with pytest.raises(SystemExit) as stopped:
        main(["report", *(str(page.parent) for page in pages)])
    assert stopped.value.code in (0, None)
    assert [page.read_text() for page in pages] == before
    assert capsys.readouterr().out.count("wrote ") == 2


class Page(HTMLParser):
    """The tags with their attributes and the text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_shows_images_side_by_side_and_curves_by_both_budgets_and_needs_no_other_file(made: Path) -> None:
    page = Page(made / "comparison.html")
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"].split(", ")[1] for image in images[:3]] == [
        "before",
        *(of["name"] for of in comparison(made)["recipes"]),
    ]
    assert len(images) == 2 * 3  # the two prompts that both recipes keep, before and after each
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    panels = [attributes["aria-label"] for tag, attributes in page.tags if attributes.get("role") == "img"]
    budgets = [
        f"{name} {kind} against {budget}"
        for name, kind in (("brightness", "evaluation"), ("contrast", "evaluation"), ("brightness", "training"))
        for budget in ("training minutes", "transformer forwards")
    ]
    assert sorted(panels) == sorted([*budgets, "contrast evaluation against transformer forwards per image"])
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(links) == 4 and all((made / link).is_file() for link in links)
    assert not re.search(r"https?://|<script|<link|@import|url\((?!#)", (made / "comparison.html").read_text())
    best, other = comparison(made)["recipes"]
    assert f"{best['name']} ends highest" in page.text and f"above {other['name']}" in page.text


@pytest.mark.slow
def test_resuming_keeps_finished_runs_and_continues_the_others(place: Path) -> None:
    output = place / "parts"
    first = compare(sources(place), BUDGET, output, seeds=(1,))
    before = times(output)
    info = output / "daring-seed1" / "run.json"
    info.write_text(json.dumps({k: v for k, v in json.loads(info.read_text()).items() if k != "finished"}))
    second = compare(sources(place), BUDGET, output, seeds=(1,), resume=True, target=9.0)
    rewritten = {path.relative_to(output).parts[0] for path, time in times(output).items() if before.get(path) != time}
    assert rewritten == {"daring-seed1"}
    assert "finished" in json.loads(info.read_text())
    assert [run["curve"] for run in second["runs"]] == [run["curve"] for run in first["runs"]]
    assert [of["to_target"] for of in second["recipes"]] == [{"minutes": None, "forwards": None}] * 2
    assert (output / "comparison.md").read_text().count("| not reached | not reached |") == 2

    more = 1.01 * max(run["minutes"] for run in first["runs"])
    third = compare(sources(place), more, output, seeds=(1,), resume=True)
    for run, short in zip(third["runs"], first["runs"], strict=True):
        assert run["minutes"] >= more
        assert run["steps"] > short["steps"]  # the recipes themselves ask for one
        lines = (output / run["folder"] / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, run["steps"] + 1))


def test_the_progress_bar_ends_at_the_step_when_the_time_ends() -> None:
    recipe = load_recipe("sd35_medium_ocr", ["run.max_minutes=1"])
    display = Display(console=Console(file=io.StringIO(), force_terminal=True, width=120))
    display.begin(recipe, recipe.folder, {"trainable": 1, "all": 1}, 1)
    with display.training(1_000_000, 0):
        display.step({"step": 3, "minutes": 0.45, "reward": {}, "metrics": {}, "seconds": {}})
    assert "3/7" in display.console.file.getvalue()


def point(minutes: float, forwards: int, value: float) -> dict[str, Any]:
    return {"minutes": minutes, "forwards": forwards, "rewards": {"ocr": value}}


def test_the_price_of_a_target_is_interpolated_where_it_is_first_reached() -> None:
    curve = [point(0, 0, 0.2), point(1, 100, 0.6), point(3, 500, 0.5), point(4, 600, 0.9)]
    assert price(curve, "ocr", 0.4) == {"minutes": pytest.approx(0.5), "forwards": pytest.approx(50)}
    assert price(curve, "ocr", 0.6) == {"minutes": pytest.approx(1), "forwards": pytest.approx(100)}
    assert price(curve, "ocr", 0.7) == {"minutes": pytest.approx(3.5), "forwards": pytest.approx(550)}
    assert price(curve, "ocr", 0.1) == {"minutes": 0, "forwards": 0}
    assert price(curve, "ocr", 0.91) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_target_never_costs_less(values: list[float], one: float, other: float) -> None:
    curve = [point(2.0 * step, 7 * step, value) for step, value in enumerate(values)]
    low, high = (price(curve, "ocr", target) for target in sorted((one, other)))
    assert high is None or (low is not None and low["forwards"] <= high["forwards"] <= 7 * len(values))


def test_the_mean_of_curves_ends_where_the_shortest_ends() -> None:
    spent, mean = mean_curve([Curve(0, (0, 2, 4), (0.0, 1.0, 3.0)), Curve(0, (0, 3), (1.0, 4.0))])
    assert spent.tolist() == [0, 2, 3]
    assert mean.tolist() == pytest.approx([0.5, 2.0, 3.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{steady}"], "needs at least two recipes or two --seeds"),
        (["{steady}", "{steady}"], "two of the recipes are named steady"),
        (["{steady}", "{daring}", "--seeds", "1,1"], "--seeds 1,1 names a seed twice"),
        (["{steady}", "{daring}", "--seeds", "1;2"], "must be whole numbers"),
        (["{steady}", "{daring}", "--budget", "0"], "--budget 0 must be a number of minutes above 0"),
        (["{steady}", "{daring}", "--budget", "nan"], "--budget nan must be a number of minutes above 0"),
        (["{steady}", "{daring}", "--reward", "contrst"], "did you mean 'contrast'"),
        (["{steady}", "{daring}", "--best-of", "-1"], "--best-of -1 must be at least 1, or 0 for none"),
        (["{steady}", "{daring}", "--set", "run.seed=3"], "a comparison sets run.seed itself; use --seeds"),
        (["{steady}", "{daring}", "--set", "train.stps=3"], "did you mean 'steps'"),
        (["{steady}", "{daring}", "--set", "evaluation.prompts=null"], "steady has no evaluation.prompts"),
        (["{steady}", "{daring}", "--output", "{taken}"], "is not an empty folder; continue with --resume"),
        (["{steady}", "{daring}", "--resume"], "holds none of these runs"),
        (
            [
                *("{steady}", "sd35_medium_ocr", "--set", "prompts=toyworld/words_train"),
                *("--set", "evaluation.prompts=toyworld/words_test"),
            ],
            "steady (tiny) and sd35_medium_ocr (stabilityai/stable-diffusion-3.5-medium) differ in model.path",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    arguments: list[str], message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    words = {name: place / f"{name}.yaml" for name in ("steady", "daring")} | {"taken": tmp_path / "taken"}
    given = [word.format(**words) for word in arguments]
    budget = [] if "--budget" in given else ["--budget", "1"]
    output = [] if "--output" in given else ["--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *given, *budget, *output])
    assert stopped.value.code == 2
    error = re.sub(r"/\S*/tiny\b", "tiny", capsys.readouterr().err.strip())
    assert error.startswith("error: ") and "\n" not in error
    assert message in error
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "thesis.txt"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.height", 32),
        ("model.max_sequence_length", 5),
        ("prompts", ["other.txt"]),
        ("evaluation.prompts", "other.txt"),
        ("evaluation.count", 3),
        ("evaluation.steps", 3),
        ("evaluation.guidance", 2.0),
        ("evaluation.schedule", "uniform"),
        ("evaluation.seed", 1),
        ("evaluation.images_per_prompt", 2),
        ("evaluation.rewards", {"ocr": 1.0}),
    ],
)
def test_recipes_that_are_measured_differently_are_refused(key: str, value: Any, place: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((place / "daring.yaml").read_text())
    section, _, name = key.rpartition(".")
    (recipe[section] if section else recipe)[name] = value
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(recipe))
    message = rf"recipes steady \(.*\) and daring \(.*\) differ in {re.escape(key)}; "
    with pytest.raises(UserError, match=message):
        compare([str(place / "steady.yaml"), str(tmp_path / "other.yaml")], 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_finished_run_of_another_recipe_or_a_larger_budget_is_refused(made: Path, place: Path) -> None:
    before = times(made)
    again = {"seeds": (1, 2), "resume": True}
    with pytest.raises(UserError, match=r"differing: train\.group_size \(4 -> 2\)"):
        compare(sources(place), BUDGET, made, overrides=["train.group_size=2"], **again)
    with pytest.raises(UserError, match=r"had 0\.01 minutes; with --resume the --budget may only grow"):
        compare(sources(place), BUDGET / 2, made, **again)
    assert times(made) == before


@pytest.mark.parametrize(
    ("info", "done"),
    [
        ({"finished": "now", "minutes": 1.0, "checkpoint": 3}, True),  # all steps before the time was over
        ({"finished": "now", "minutes": 5.0, "checkpoint": 2}, True),  # all its minutes
        ({"finished": "now", "minutes": 1.0, "checkpoint": 2, "stopped": "sustained alarm"}, True),
        ({"finished": "now", "minutes": 1.0, "checkpoint": 2}, False),  # there is more time now
        ({"minutes": 5.0, "checkpoint": 3}, False),
    ],
)
def test_a_run_is_done_by_its_steps_its_minutes_or_its_guard(info: dict[str, Any], done: bool, tmp_path: Path) -> None:
    run = {"folder": str(tmp_path / "run"), "max_minutes": 5}
    values = {"name": "demo", "prompts": "a.txt", "rewards": {"ocr": 1}, "algorithm": "nft", "run": run}
    recipe = recipe_from_dict({**values, "train": {"steps": 3}})
    assert not is_done(recipe)
    recipe.folder.mkdir()
    (recipe.folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (recipe.folder / "run.json").write_text(json.dumps(info))
    assert is_done(recipe) == done
