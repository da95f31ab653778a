"""Where a run may begin or go on: in a free folder or its own, with no other process there, with unchanged inputs."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from flowalign.config import load_recipe, recipe_from_dict
from flowalign.config.base import UserError
from flowalign.disk.run_folder import RunFolder
from flowalign.disk.starting import FolderLock, check_start
from flowalign.trainer import Trainer
from flowalign.training.checkpoint import checkpoints
from flowalign.training.display import Display
from flowalign.training.inputs import check_inputs, inputs_of

JUDGE = """
def brightness(media, prompts, metadata, head=None, heads=()):
    return media.flatten(1).mean(1)
def raises(media, prompts, metadata):
    raise RuntimeError("the judge is asleep")
"""


def small(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe of two steps with every kind of file that a recipe can name."""
    (folder / "judge.py").write_text(JUDGE)
    (folder / "test.txt").write_text("a photo of nine stars\n")
    (folder / "heads").mkdir()
    for name in ("one.bin", "two.bin"):
        (folder / "heads" / name).write_bytes(name.encode())
    save_file({"weight": torch.zeros(2**23 + 1)}, folder / "head.safetensors")  # too large to be read whole
    options = {"head": str(folder / "head.safetensors"), "heads": [str(folder / "heads")]}
    return {
        **values,
        "rewards": {"brightness": {"load": f"{folder / 'judge.py'}:brightness", "options": options}},
        "rollout": {"steps": 2, "batch": 4},
        "train": {"steps": 2, "prompts_per_step": 2, "group_size": 2, "updates_per_step": 1, "micro_batch": 4},
        "evaluation": {"prompts": str(folder / "test.txt"), "steps": 2, "every": 0},
        "run": {"folder": str(folder / "run"), "checkpoint_every": 1},
    }


@pytest.fixture(scope="module")
def begun(tiny_values: Callable[[Path], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, run/, and the inputs of the run."""
    folder = tmp_path_factory.mktemp("begun")
    values = small(tiny_values(folder), folder)
    (folder / "values.json").write_text(json.dumps(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowalign.trainer.write_report", lambda folder: folder / "report.html")
        Trainer.from_recipe(recipe_from_dict(values), display=Display(quiet=True)).run()
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    """A copy of `begun`."""
    return Path(shutil.copytree(begun, tmp_path / "copy"))


def values_of(run: Path, begun: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "values.json").read_text().replace(str(begun), str(run)))
    (run / "run" / "recipe.yaml").write_text((run / "run" / "recipe.yaml").read_text().replace(str(begun), str(run)))
    return values


def append(path: Path) -> None:
    path.write_text(path.read_text() + "a photo of ten stars\n")


def rewrite(path: Path) -> None:
    save_file({"weight": torch.ones(2**23 + 1)}, path)


CHANGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a prompt list": ("prompts.txt", append, r"prompts: prompts\.txt is not what it was"),
    "an evaluation list": ("test.txt", append, r"evaluation\.prompts: test\.txt is not"),
    "a reward's file": (
        "judge.py",
        lambda path: path.write_text(JUDGE.replace("mean(1)", "std(1)")),
        r"rewards\.brightness: judge\.py is not",
    ),
    "an option's file": ("head.safetensors", rewrite, r"rewards\.brightness\.options\.head: head\.safetensors is not"),
    "a folder's file": ("heads/two.bin", Path.unlink, r"rewards\.brightness\.options\.heads\.0: two\.bin is not"),
    "a file more": (
        "heads/three.bin",
        lambda path: path.write_bytes(b"3"),
        r"rewards\.brightness\.options\.heads\.0: three\.bin is not",
    ),
}


@pytest.mark.parametrize(("file", "change", "sentence"), CHANGES.values(), ids=CHANGES)
def test_a_run_does_not_resume_when_an_input_file_has_changed(
    run: Path, begun: Path, file: str, change: Callable[[Path], Any], sentence: str
) -> None:
    recipe = recipe_from_dict(values_of(run, begun))
    check_inputs(recipe.folder, inputs_of(recipe), resume=True)
    change(run / file)
    with pytest.raises(UserError, match=rf"{sentence} .*when the run in {recipe.folder} began; put it back"):
        Trainer.from_recipe(recipe, resume=True, display=Display(quiet=True))


def test_a_changed_model_or_reference_dataset_is_named(run: Path, begun: Path, tmp_path: Path) -> None:
    values = values_of(run, begun)
    model = Path(shutil.copytree(values["model"]["path"], tmp_path / "model"))
    dataset = tmp_path / "store"
    (dataset / "shard_000000" / "rewards").mkdir(parents=True)
    (dataset / "manifest.json").write_text(json.dumps({"shards": [{"checksum": "a"}], "rewards": ["brightness"]}))
    (dataset / "shard_000000" / "rewards" / "brightness.json").write_text("[[0.1, 0.2]]")
    values["model"]["path"] = str(model)
    values["rewards"]["brightness"]["shaping"] = {"form": "sigmoid", "reference": str(dataset)}
    recipe = recipe_from_dict(values)
    (tmp_path / "inputs.json").write_text(json.dumps(inputs_of(recipe)))
    (dataset / "manifest.json").write_text(
        json.dumps({"shards": [{"checksum": "a"}], "rewards": ["brightness", "ocr"]})
    )
    check_inputs(tmp_path, inputs_of(recipe), resume=True)  # another reward's scores do not concern this run
    (dataset / "shard_000000" / "rewards" / "brightness.json").write_text("[[0.1, 0.3]]")
    with pytest.raises(UserError, match=r"rewards\.brightness\.shaping\.reference: shard_000000/rewards/brightness"):
        check_inputs(tmp_path, inputs_of(recipe), resume=True)
    (dataset / "shard_000000" / "rewards" / "brightness.json").write_text("[[0.1, 0.2]]")
    (model / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.path: scheduler/scheduler_config\.json is not what it was"):
        check_inputs(tmp_path, inputs_of(recipe), resume=True)


def test_a_changed_reward_of_a_script_is_named(run: Path, begun: Path, tmp_path: Path) -> None:
    recipe = recipe_from_dict(values_of(run, begun))

    def judge(media: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        return media.mean((1, 2, 3))

    (tmp_path / "inputs.json").write_text(json.dumps(inputs_of(recipe, rewards={"brightness": judge})))
    check_inputs(tmp_path, inputs_of(recipe, rewards={"brightness": judge}), resume=True)
    with pytest.raises(UserError, match=r"rewards\.brightness: judge\.py is not what it was"):
        check_inputs(tmp_path, inputs_of(recipe), resume=True)


# One process at a time


def holder(folder: Path) -> "subprocess.Popen[str]":
    """Another process that trains in the folder until it is killed."""
    code = (
        "import sys; from pathlib import Path; from flowalign.disk.starting import FolderLock; "
        "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_two_processes_do_not_train_in_one_folder(run: Path, begun: Path) -> None:
    recipe = recipe_from_dict(values_of(run, begun))
    other = holder(recipe.folder)
    try:
        said = rf"{recipe.folder} is in use by process {other.pid} on .* since .*wait until that ends"
        for how in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(UserError, match=said):
                check_start(recipe, **how)
        with pytest.raises(UserError, match=said):
            RunFolder.create(recipe, {}, resume=True)
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    check_start(recipe, resume=True)


def test_a_forked_child_holds_no_lock_and_a_later_run_of_the_process_takes_it_over(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.release()
    child = os.fork()
    if child == 0:  # as a reward's worker that outlives a killed run
        try:
            FolderLock(tmp_path)
        except UserError:
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    second.release()
    other = holder(tmp_path)
    other.kill()
    other.wait()


def test_a_run_that_has_ended_releases_its_folder(run: Path, begun: Path) -> None:
    folder = RunFolder.create(recipe_from_dict(values_of(run, begun)), {}, resume=True)
    with folder.held():
        pass
    other = holder(folder.path)
    other.kill()
    other.wait()


# What a folder holds


def test_a_run_whose_checkpoints_are_gone_is_not_trained_over(run: Path, begun: Path) -> None:
    recipe = recipe_from_dict(values_of(run, begun))
    shutil.rmtree(recipe.folder / "checkpoints")
    before = (recipe.folder / "metrics.jsonl").read_text()
    for info in ("finished", "checkpoint"):  # also of a run that had not ended
        with pytest.raises(UserError, match=r"has lost its checkpoints/ and cannot go on; .*--overwrite"):
            Trainer.from_recipe(recipe, resume=True)
        kept = json.loads((recipe.folder / "run.json").read_text())
        kept.pop(info)
        (recipe.folder / "run.json").write_text(json.dumps(kept))
    assert (recipe.folder / "metrics.jsonl").read_text() == before
    check_start(recipe, resume=True)  # a run killed before its first checkpoint begins again


def test_a_run_goes_on_with_its_own_recipe_where_it_was_moved(run: Path, begun: Path) -> None:
    values_of(run, begun)
    moved = (run / "run").rename(run / "elsewhere")
    recipe = load_recipe(moved, ["train.steps=3", "train.micro_batch=2"])
    assert recipe.folder == moved
    assert check_start(recipe, resume=True) == ["train.micro_batch (4 -> 2)", "train.steps (2 -> 3)"]
    other = load_recipe(moved, ["train.learning_rate=0.5", "algorithm.clip_range=0.1"])
    with pytest.raises(
        UserError,
        match=r"differing: algorithm.clip_range \(0.01 -> 0.1\), train.learning_rate \(0.0003 -> 0.5\); "
        rf"`flowalign train {moved} --resume` keeps its recipe",
    ):
        check_start(other, resume=True)


def test_a_failed_start_does_not_block_the_next_one(run: Path, begun: Path) -> None:
    values = values_of(run, begun)
    values["run"]["folder"] = str(run / "new")
    failing = {**values, "rewards": {"raises": {"load": f"{run / 'judge.py'}:raises"}}, "evaluation": {"prompts": None}}
    with pytest.raises(ValueError, match="the judge is asleep"):
        Trainer.from_recipe(recipe_from_dict(failing), display=Display(quiet=True)).run()
    assert (run / "new" / "recipe.yaml").exists()
    recipe = recipe_from_dict(values)
    check_start(recipe)
    RunFolder.create(recipe, {})
    assert load_recipe(run / "new" / "recipe.yaml").rewards.keys() == {"brightness"}


def test_only_overwrite_begins_a_run_anew_and_it_touches_nothing_else(run: Path, begun: Path) -> None:
    recipe = recipe_from_dict(values_of(run, begun))
    (recipe.folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"already holds a run; go on with --resume, begin it anew with --overwrite"):
        check_start(recipe)
    with pytest.raises(UserError, match=r"--resume goes on .* --overwrite begins it anew; give only one"):
        check_start(recipe, resume=True, overwrite=True)
    folder = RunFolder.create(recipe, {}, overwrite=True)
    left = sorted(path.name for path in recipe.folder.iterdir())
    assert left == [".lock", "inputs.json", "notes.txt", "recipe.yaml", "run.json"]
    assert "finished" not in json.loads((recipe.folder / "run.json").read_text())
    assert folder.path == recipe.folder


@pytest.mark.parametrize("name", ["recipe.yaml", "run.json", "photo.png"])
def test_a_folder_of_the_user_is_left_alone(run: Path, begun: Path, name: str) -> None:
    values = values_of(run, begun)
    own = run / "mine"
    own.mkdir()
    (own / name).write_text('{"name": "mine"}')
    recipe = recipe_from_dict({**values, "run": {"folder": str(own)}})
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"{own} exists and is not a run folder; set run.folder to another place"):
            RunFolder.create(recipe, {}, overwrite=overwrite)
    assert [path.name for path in own.iterdir()] == [name]
    assert (own / name).read_text() == '{"name": "mine"}'


@pytest.mark.parametrize("place", ["file", "file/run", "broken", "/proc/run"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_place_that_cannot_hold_a_folder_is_reported_before_anything_loads(
    run: Path, begun: Path, place: str, resume: bool
) -> None:
    (run / "file").write_text("")
    (run / "broken").symlink_to("nowhere")
    recipe = recipe_from_dict({**values_of(run, begun), "run": {"folder": str(run / place)}})
    with pytest.raises(UserError, match=rf"^cannot write to run folder {run / place}: .*: (Not a|No such)"):
        check_start(recipe, resume=resume)
    assert (run / "file").read_text() == "" and (run / "broken").is_symlink()


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("recipe.yaml", None, "has lost its recipe.yaml; put the run's recipe back there to go on"),
        ("recipe.yaml", "", "recipe.yaml: a recipe is a mapping of keys to values"),
        ("run.json", '{"name": "ti', "run.json is damaged .*; remove it and the run writes it anew"),
        ("run.json", "[]", "run.json is damaged .*; remove it and the run writes it anew"),
        ("inputs.json", "", "inputs.json is damaged .*; remove it to go on without comparing"),
        ("evaluations/step_000000.json", "", "step_000000.json is damaged .*; remove it to go on without that"),
    ],
)
def test_a_half_written_file_is_named(run: Path, begun: Path, file: str, content: str | None, sentence: str) -> None:
    recipe = recipe_from_dict(values_of(run, begun))
    damaged = recipe.folder / file
    damaged.unlink() if content is None else damaged.write_text(content)
    with pytest.raises(UserError, match=sentence) as caught:
        Trainer.from_recipe(recipe, resume=True, display=Display(quiet=True))
    assert "\n" not in str(caught.value)
    if file != "recipe.yaml":
        damaged.unlink()
        check_start(recipe, resume=True)


def test_damaged_lines_of_metrics_are_dropped(run: Path) -> None:
    folder = RunFolder(run / "run")
    whole = folder.metrics.read_text()
    folder.metrics.write_bytes(whole.encode() + b'7\n{"step": null}\n\xd0\xff\n{"step": 3, "rew')
    (folder.path / "samples" / "step_mine").mkdir()
    (folder.checkpoints / "step_000001 (copy)").mkdir()
    folder.forget_after(2)
    assert folder.metrics.read_text() == whole
    assert [path.name for path in checkpoints(folder.checkpoints)] == ["step_000001", "step_000002"]


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for step in (1_000_000, 999_999):
        (tmp_path / f"step_{step}").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_999999", "step_1000000"]


def test_the_command_accepts_a_run_folder_and_checks_it_before_it_loads(run: Path, begun: Path) -> None:
    values_of(run, begun)
    code = "from flowalign.cli.app import main; import sys\ntry: main()\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "train", str(run / "run")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode
    assert found.stderr.startswith(f"error: {run / 'run'} already holds a run; go on with --resume")
    assert found.stdout == "False\n"
    (run / "own.yaml").write_text(yaml.safe_dump({"base": "toyworld_ocr", "run": {"folder": str(run / "run")}}))
    command[-1] = str(run / "own.yaml")
    found = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert "differing: " in found.stderr and "train.learning_rate (0.0003 -> " in found.stderr
