"""The command line: what its commands do, and what they answer to a user's mistake."""

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flowalign
from flowalign.cli.app import main
from flowalign.cli.console import disk_mistake, memory_mistake
from flowalign.cli.scoring import read_images
from flowalign.disk.media import save_images
from flowalign.rollout.prompts import Row
from flowalign.terminal import plain_console
from flowalign.training.display import Display, summary_table
from flowalign.training.selftest import Check


@pytest.fixture
def failing(capsys: pytest.CaptureFixture[str]):
    """Run a command that must fail; returns its one sentence."""

    def run(*arguments: str, code: int = 2) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == code
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ")
        assert "\n" not in error
        return error

    return run


def succeed(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code in (0, None)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(np.full((16, 16, 3), 80 * index, dtype=np.uint8)).save(folder / f"{index}.png")
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "judge.py").write_text(
        "def level(media, prompts, metadata, scale=1.0):\n    return media.flatten(1).mean(1) * scale\n"
    )
    return folder


def test_recipes_are_listed_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str], failing) -> None:
    succeed("recipes")
    assert "toyworld_ocr" in capsys.readouterr().out
    succeed("recipes", "copy", "toyworld_ocr", str(tmp_path))
    assert (tmp_path / "toyworld_ocr.yaml").read_text().startswith("# Flow-GRPO")
    assert "exists; choose another name" in failing("recipes", "copy", "toyworld_ocr", str(tmp_path))
    assert "did you mean 'toyworld_ocr'" in failing("recipes", "copy", "toyworld_orc", str(tmp_path))


def test_a_dry_run_prints_recipe_and_arithmetic_and_loads_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    succeed("train", "sd35_medium_ocr", "--dry-run", "train.steps=7")
    output = capsys.readouterr().out
    assert "steps: 7" in output
    assert "48 prompts x 24 = 1152" in output
    assert "1152 x 9 = 10368" in output


def test_score_prints_and_writes(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], failing) -> None:
    base = ["score", f"{tmp_path / 'judge.py'}:level", "--images", str(pictures), "--prompts"]
    succeed(*base, str(tmp_path / "prompts.txt"), "--option", "scale=2", "--output", str(tmp_path / "scores.jsonl"))
    assert "mean 0.6275 of 3 images" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["one", "two", "three"]
    assert rows[1]["score"] == pytest.approx(2 * 80 / 255, rel=1e-4)
    succeed(*base, str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "scores.csv"))
    assert (tmp_path / "scores.csv").read_text().startswith("image,prompt,score\n0.png,one,0.0\n")
    (tmp_path / "fewer.txt").write_text("one\n")
    assert "holds 3 images" in failing(*base, str(tmp_path / "fewer.txt"))
    assert "use a .csv or .jsonl" in failing(*base, str(tmp_path / "prompts.txt"), "--output", "scores.xls")
    (pictures / "1.png").write_bytes(b"no picture")
    assert "1.png cannot be read as an image" in failing(*base, str(tmp_path / "prompts.txt"))


def test_an_ocr_prompt_without_quotes_is_named(tmp_path: Path, pictures: Path, failing) -> None:
    error = failing("score", "ocr", "--images", str(pictures), "--prompts", str(tmp_path / "prompts.txt"))
    assert "prompt 1 ('one') cannot be judged by ocr" in error


def test_samples_are_drawn_into_an_empty_folder(tiny_model: Path, tmp_path: Path, failing) -> None:
    command = ["sample", str(tiny_model), "a red star", "a ring", "--steps", "2", "--size", "64", "--images", "2"]
    command += ["--max-sequence-length", "0", "--output", str(tmp_path / "drawn")]
    succeed(*command)
    written = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert written == ["00.png", "01.png", "02.png", "03.png", "metadata.jsonl"]
    assert "is not an empty folder" in failing(*command)
    succeed("score", "colorfulness", "--images", str(tmp_path / "drawn"), "--output", str(tmp_path / "scores.csv"))
    lines = (tmp_path / "scores.csv").read_text().splitlines()[1:]
    assert [line.rpartition(",")[0] for line in lines] == [
        *("00.png,a red star", "01.png,a red star", "02.png,a ring", "03.png,a ring")
    ]


def scored(tmp_path: Path, *arguments: str) -> list[tuple[str, str, int]]:
    """File, prompt and grey level of every image of the folder `many`, as `score` finds them."""
    output = tmp_path / "scores.jsonl"
    succeed(
        "score",
        f"{tmp_path / 'judge.py'}:level",
        "--images",
        str(tmp_path / "many"),
        "--output",
        str(output),
        *arguments,
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return [(row["image"], row["prompt"], round(row["score"] * 255)) for row in rows]


def test_images_and_prompts_are_paired_in_natural_order(tmp_path: Path, pictures: Path, failing) -> None:
    (tmp_path / "many").mkdir()
    for number in range(1, 13):
        Image.new("RGB", (4, 4), (number, number, number)).save(tmp_path / "many" / f"{number}.png")
    (tmp_path / "many" / "._1.png").write_bytes(b"of a Mac")
    (tmp_path / "list.tsv").write_text("id\tPrompt\n" + "".join(f"{n}\tnumber {n}\n" for n in range(1, 13)))
    expected = [(f"{n}.png", f"number {n}", n) for n in range(1, 13)]
    assert scored(tmp_path, "--prompts", str(tmp_path / "list.tsv")) == expected
    assert [line[1] for line in scored(tmp_path, "--prompts", f"{tmp_path}/list.tsv#id")] == [
        str(n) for n in range(1, 13)
    ]
    rows = [{"file_name": f"{n}.png", "prompt": f"number {n}"} for n in reversed(range(1, 13))]
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert scored(tmp_path, "--prompts", str(tmp_path / "named.jsonl")) == expected[::-1]


@pytest.mark.parametrize("count", [100, 101, 1001])
def test_saved_images_have_names_that_sort_and_keep_their_prompts(tmp_path: Path, pictures: Path, count: int) -> None:
    rows = [Row(index, f"prompt {index}", {"tag": "colors", "file_name": "x"}) for index in range(count)]
    media = (torch.arange(count) % 256)[:, None, None, None].expand(-1, 3, 1, 1) / 255
    paths = save_images(tmp_path / "many", media, [row.about for row in rows])
    assert sorted(path.name for path in paths) == [path.name for path in paths]
    assert scored(tmp_path) == [(path.name, f"prompt {n}", n % 256) for n, path in enumerate(paths)]


def test_images_and_rows_that_do_not_match_are_one_sentence(tmp_path: Path, pictures: Path, failing) -> None:
    rows = [Row(index, prompt) for index, prompt in enumerate(("one", "two", "three"))]
    folder, command = tmp_path / "drawn", ["score", "colorfulness", "--images", str(tmp_path / "drawn")]
    save_images(folder, torch.zeros(3, 3, 8, 8), [row.about for row in rows])
    manifest = folder / "metadata.jsonl"
    succeed(*command)
    succeed(*command, "--prompts", str(tmp_path / "prompts.txt"))
    (tmp_path / "other.txt").write_text("one\nthree\ntwo\n")
    error = failing(*command, "--prompts", str(tmp_path / "other.txt"))
    assert f"{folder}/01.png has the prompt 'two' in {manifest}, but 'three' in {tmp_path}/other.txt" in error
    Image.new("RGB", (8, 8)).save(folder / "extra.png")
    assert f"no row of {manifest} names {folder}/extra.png" in failing(*command)
    (folder / "extra.png").unlink()
    (folder / "01.png").unlink()
    assert f"{manifest}: prompt 2 names 01.png, which {folder} does not hold" in failing(*command)
    manifest.write_text('{"file_name": "00.png", "text": "a"}\n{"file_name": "00.png", "text": "b"}\n')
    assert "two prompts name 00.png" in failing(*command)
    manifest.write_text('{"file_name": "00.png", "text": "a"}\n{"text": "b"}\n')
    assert "prompt 2 ('b') has no file_name" in failing(*command)
    manifest.unlink()
    assert f"--images {folder} has no metadata.jsonl with the prompts of its images; give --prompts" in failing(
        *command
    )
    table = folder / "metadata.csv"  # as other tools write it
    table.write_text('file_name,text\r\n02.png,"one, two"\r\n00.png,three\r\n', encoding="utf-8-sig")
    found, paths = read_images(folder, None)
    assert [row.prompt for row in found] == ["one, two", "three"] and [path.name for path in paths] == [
        "02.png",
        "00.png",
    ]
    manifest.write_text("{}")
    assert f"{folder} has a metadata.jsonl and a metadata.csv; remove the one that is out of date" in failing(*command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "toyworld_orc"], "did you mean 'toyworld_ocr'"),
        (["train", "toyworld_ocr", "train.stps=3"], "unknown key 'train.stps'; did you mean 'steps'"),
        (["train", "toyworld_ocr", "train.group_size=1"], "train.group_size should be greater than or equal to 2"),
        (["train", "toyworld_ocr", "model.path=/no/model"], "'/no/model' does not exist"),
        (["train", "toyworld_ocr", "prompts=/no/prompts.txt"], "'/no/prompts.txt' cannot be read"),
        (["train", "toyworld_ocr", "prompts=list.xls"], "use a file of .txt"),
        (["train", "toyworld_ocr", "rewards.ocr.options.mod=page"], "mod"),
        (["train", "toyworld_ocr", "rewards={orc: 1}"], "orc"),
        (["eval", "recipe", "toyworld_ocr", "evaluation.prompts=null"], "has no evaluation.prompts"),
        (["report", "/no/run"], "/no/run"),
        (["sample", "/no/model", "a star"], "'/no/model' does not exist"),
        (["sample", "toyworld", ""], "a prompt is empty"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], message: str, failing, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in failing(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_bad_prompt_line_is_named_by_number(failing, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a star"}\n{"prompt": \n')
    assert "bad.jsonl, line 2: not JSON" in failing("train", "toyworld_ocr", "prompts=bad.jsonl")


def test_a_full_disk_is_one_sentence(failing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "report.html"))

    monkeypatch.setattr("flowalign.evaluate.report.report.write_report", full)
    assert "No space left on device; fix that" in failing("report", str(tmp_path))


def test_an_unwritable_run_folder_is_named(failing, tmp_path: Path, tiny_model: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    error = failing("train", "toyworld_ocr", f"model.path={tiny_model}", "run.folder=file/run")
    assert "cannot write to run folder file/run" in error


def test_an_error_of_a_users_path_is_one_sentence_and_one_of_the_package_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "file" / "x", tmp_path / "nowhere" / "x", "/proc/x", tmp_path):
        with pytest.raises(OSError, match=r"Errno") as caught:
            Path(name).write_text("")
        assert disk_mistake(caught.value).startswith(f"{name}: ")
    with pytest.raises(FileNotFoundError) as caught:
        (Path(flowalign.__file__).parent / "nowhere.json").read_text()
    assert disk_mistake(caught.value) is None
    assert disk_mistake(ConnectionResetError(104, "Connection reset by peer")) is None


def test_running_out_of_memory_is_one_sentence_and_another_error_is_none() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert memory_mistake(caught.value).startswith("out of memory (")
    assert memory_mistake(RuntimeError("shapes differ")) is None


def test_an_option_that_is_no_yaml_is_one_sentence(pictures: Path, tmp_path: Path, failing) -> None:
    error = failing(
        "score", "ocr", "--images", str(pictures), "--prompts", f"{tmp_path}/prompts.txt", "--option", "a=["
    )
    assert "--option 'a=['" in error and "is not YAML" in error


def test_a_seed_that_does_not_fit_is_one_sentence(failing) -> None:
    assert "run.seed should be less than or equal to" in failing("train", "toyworld_ocr", f"run.seed={2**70}")


def test_a_number_that_is_too_large_is_one_sentence(failing, tmp_path: Path) -> None:
    for key in ("train.group_size", "train.micro_batch", "rollout.steps", "evaluation.images_per_prompt"):
        for value in (2**31, 2**62, 10**20):
            assert f"{key} should be less than or equal to {2**31 - 1}" in failing(
                "train", "toyworld_ocr", f"{key}={value}"
            )
    assert "--vram 1e+300 must be a number from .001 to 1e9" in failing("plan", "toyworld_ocr", "--vram", "1e300")
    new = str(tmp_path / "new.jsonl")
    assert "from 0 to 1e9, not 1e+308" in failing("data", "geneval", new, "--mix", "counting=1e308,position=1e308")


@pytest.mark.parametrize(
    "words",
    [
        *(("sample", "toyworld", "a", f"--{name}") for name in ("images", "steps", "max-sequence-length", "best-of")),
        *(("eval", "ocr", "toyworld", f"--{name}") for name in ("images-per-prompt", "count", "batch", "size")),
        *(("model", "check", "toyworld", f"--{name}") for name in ("steps", "guidance")),
        ("plan", "toyworld_ocr", "--gpus"),
    ],
    ids=" ".join,
)
def test_an_option_that_is_too_large_is_refused_at_once(words: tuple[str, ...], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*words, str(10**20)])
    assert stopped.value.code == 2
    assert f"Invalid value for '{words[-1]}'" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_scoring(failing, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "no_reward.py").write_text("raise SystemExit('it was loaded')")
    for name, sentence in (
        ("nowhere/s.csv", "is not a folder that can be written to"),
        ("s.txt", "use a .csv or .jsonl"),
    ):
        command = ("score", f"{tmp_path / 'no_reward.py'}:never_loaded", "--images", str(pictures))
        assert sentence in failing(*command, "--output", str(tmp_path / name))


def test_a_recipe_copy_that_does_not_fit_on_the_disk_leaves_nothing(failing, tmp_path: Path) -> None:
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, was[1]))
        assert "cannot write" in failing("recipes", "copy", "toyworld_ocr", str(tmp_path / "copy.yaml"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob("copy*"))


# Rewards


def test_rewards_are_listed_with_what_they_judge(capsys: pytest.CaptureFixture[str]) -> None:
    succeed("rewards")
    output = capsys.readouterr().out
    assert "compressibility" in output and "How small an image is as a JPEG file" in " ".join(output.split())


def test_a_reward_is_checked_on_drawn_images_and_on_a_users_images(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    succeed("rewards", "check", f"{tmp_path / 'judge.py'}:level", "--option", "scale=2")
    assert "another order, the same scores" in capsys.readouterr().out
    own = ("--images", str(pictures), "--prompts", str(tmp_path / "prompts.txt"))
    succeed("rewards", "check", "compressibility", *own)
    assert "3 items" in capsys.readouterr().out


def test_a_reward_that_breaks_the_contract_ends_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.py").write_text("def bad(media, prompts, metadata):\n    return list(range(len(media)))\n")
    with pytest.raises(SystemExit) as stopped:
        main(["rewards", "check", f"{tmp_path / 'bad.py'}:bad"])
    assert stopped.value.code == 1
    assert "FAIL" in capsys.readouterr().out


def test_mistakes_in_checking_and_serving_are_one_sentence(tmp_path: Path, pictures: Path, failing) -> None:
    assert "has no metadata.jsonl with the prompts" in failing("rewards", "check", "ocr", "--images", str(pictures))
    assert "--prompts belong to --images" in failing(
        "rewards", "check", "ocr", "--prompts", str(tmp_path / "prompts.txt")
    )
    assert "did you mean 'ocr'" in failing("rewards", "check", "orc")
    two = ("serve", "compressibility", "colorfulness", "--option")
    assert "must be written NAME.KEY=VALUE, with a name of compressibility, color" in failing(*two, "quality=3")
    assert "'colorfulnes' is no name given; did you mean 'colorfulness'" in failing(*two, "colorfulnes.x=3")
    assert "has no option 'qualty'" in failing("serve", "compressibility", "--option", "compressibility.qualty=3")
    assert "two rewards would be served as 'ocr'" in failing("serve", "ocr", "rewards.ocr:ocr")
    assert "FLOWALIGN_TOKEN" in failing("serve", "compressibility", "--host", "0.0.0.0")


def test_a_reward_that_compares_scores_all_images_of_a_prompt_together(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "rank.py").write_text(
        "from rewards import Reward\n"
        "class Rank(Reward):\n"
        "    scope = 'group'\n"
        "    def __call__(self, media, prompts, metadata):\n"
        "        assert len(set(prompts)) == 1\n"
        "        return media.flatten(1).mean(1).argsort().argsort().float()\n"
    )
    (tmp_path / "same.txt").write_text("one\ntwo\none\n")
    output = tmp_path / "scores.jsonl"
    arguments = ("--images", str(pictures), "--prompts", str(tmp_path / "same.txt"), "--output", str(output))
    succeed("score", f"{tmp_path / 'rank.py'}:Rank", *arguments)
    assert [json.loads(line)["score"] for line in output.read_text().splitlines()] == [0.0, 0.0, 1.0]


# A user's words

ODD = ["a [red]cat[/red] [/red]", ":smile: [b]日本 ±", "[/]"]


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command whose files, images and prompts have names that look like markup, in several alphabets."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "[red]im[b]"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (8, 8), (50 * index,) * 3).save(folder / f"{index}[bold].png")
    (tmp_path / "p.txt").write_text("\n".join(ODD), encoding="utf-8")
    (tmp_path / "[x].py").write_text(
        'def level(media, prompts, metadata):\n    """[/x] é"""\n    return media.sum((1, 2, 3))\n'
    )
    return ["score", "[x].py:level", "--images", folder.name, "--prompts", "p.txt"]


def test_prompts_and_paths_that_look_like_markup_are_shown_as_they_are(odd, tmp_path: Path, capsys, failing) -> None:
    succeed(*odd, "--output", "[s].csv")
    shown = capsys.readouterr().out
    assert all(f"{index}[bold].png" in shown and prompt in shown for index, prompt in enumerate(ODD))
    lines = (tmp_path / "[s].csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == ODD
    succeed("rewards", "check", odd[1])
    assert "[x].py:level" in capsys.readouterr().out
    assert "prompts '[/none].txt' cannot be read" in failing(*odd[:-1], "[/none].txt")
    assert "there is no file [/red].py" in failing("score", "[/red].py:x", *odd[2:])


def test_a_progress_bar_shows_names_as_they_are(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    display = Display()
    with display.training(2, 0):
        display.step({"step": 1, "minutes": 1.0, "reward": {"[/x]": 0.5}, "seconds": {}, "metrics": {}})
        with display.evaluating(3, "[/drawing] :smile:") as advance:
            advance(1)
    display.self_test([Check("[/a]", False, "[b] :smile:")])
    shown = capsys.readouterr().out
    assert "[/x] 0.500" in shown and "[/drawing] :smile:" in shown and "[/a]: [b] :smile:" in shown
    table = summary_table(
        "[/title]",
        {"[/r]": {"mean": 1.0, "standard_error": None, "count": 1, "prompts": 1, "interval": None}},
    )
    plain_console().print(table)
    shown = capsys.readouterr().out
    assert "[/title]" in shown and "[/r]" in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_with_another_encoding_stops_no_command(odd, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    out, error = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", error)
    succeed(*odd)
    with pytest.raises(SystemExit):
        main(["score", "日本.py:x", *odd[2:]])
    for stream in (out, error):
        stream.flush()
    assert b"\\u65e5\\u672c" in out.buffer.getvalue() and b"no file \\u65e5\\u672c.py" in error.buffer.getvalue()


@pytest.mark.slow
def test_files_are_utf8_where_the_locale_is_not(odd, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flowalign", *odd, "--output", "s.csv"]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env={**os.environ, **plain}, capture_output=True, check=False)
    assert done.returncode == 0 and b"\\u65e5\\u672c" in done.stdout
    assert ODD[1] in (tmp_path / "s.csv").read_text(encoding="utf-8")
