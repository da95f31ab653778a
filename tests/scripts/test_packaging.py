"""What a wheel holds, and that it is enough: its commands run where there is no source tree."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


# Whoever opens a file of the source tree is told so; the virtual environment may lie inside it.
WATCH = """
import sys
def refuse(event, arguments):
    if event in ("open", "import") and str(arguments[0]).startswith({places!r}):
        raise PermissionError(f"the installation reaches for {{arguments[0]}}")
sys.addaudithook(refuse)
"""
RUN = """
import sys
import flowalign, rewards
from flowalign.cli.app import main
for package in (flowalign, rewards):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
for line in sys.stdin.read().splitlines():
    try:
        main(line.split("\t"))
    except SystemExit as ended:
        assert not ended.code, f"{line}: {ended.code}"
"""
QUICK_START = [
    ["recipes"],
    ["recipes", "copy", "toyworld_ocr_crd", "mine.yaml"],
    ["rewards"],
    ["plan", "mine.yaml"],
    [
        *("train", "mine.yaml", "run.folder=runs/quick", "train.steps=1", "train.prompts_per_step=2"),
        *("train.group_size=4", "train.updates_per_step=1", "train.micro_batch=8", "evaluation.count=4"),
    ],
    ["report", "runs/quick"],
    ["sample", "toyworld", 'a sign that says "HELLO"', "--adapter", "runs/quick/lora"],
    ["data", "geneval", "train.jsonl", "--exclude", "geneval", "--count", "50"],
    ["eval", "ocr", "toyworld", "--count", "2", "--images-per-prompt", "1", "--steps", "4"],
    ["doctor"],
]


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("flowalign-*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(wheel_file):
    with zipfile.ZipFile(wheel_file) as archive:
        yield archive


@pytest.mark.slow
def test_a_wheel_holds_both_packages_and_every_file_they_read(wheel):
    held = set(wheel.namelist())
    packages = [path for name in ("flowalign", "rewards") for path in (ROOT / name).rglob("*") if path.is_file()]
    wanted = {path.relative_to(ROOT).as_posix() for path in packages if "__pycache__" not in path.parts}
    assert {"flowalign/toyworld/words.txt", "flowalign/evaluate/report/report.html.j2", "rewards/ocr.py"} <= wanted
    assert any(name.startswith("flowalign/recipes/") and name.endswith(".yaml") for name in wanted)
    assert wanted <= held


@pytest.mark.slow
def test_a_wheel_holds_the_embedded_model_and_its_prompts(wheel):
    held = set(wheel.namelist())
    lists = ("words_train.txt", "words_test.txt", "shapes_train.jsonl", "shapes_test.jsonl")
    for name in (*lists, "moving_train.jsonl", "moving_test.jsonl", "moving_unseen.jsonl"):
        assert f"flowalign/assets/toyworld/prompts/{name}" in held
    assert {f"flowalign/assets/geneval/{name}" for name in ("prompts.jsonl", "object_names.txt", "LICENSE")} <= held
    assert "flowalign/assets/toyworld/model/model_index.json" in held
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert any(name.startswith(f"flowalign/assets/toyworld/model/{part}/") for name in held), part


@pytest.mark.slow
def test_a_wheel_installs_the_command_and_carries_the_licence(wheel):
    (entry_points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "flowalign = flowalign.__main__:main" in wheel.read(entry_points).decode()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


@pytest.mark.slow
def test_an_installed_wheel_runs_the_quick_start_without_the_source_tree(wheel_file, tmp_path):
    installed, watch, work = (tmp_path / name for name in ("installed", "watch", "work"))
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(installed)]
    subprocess.run([*install, str(wheel_file)], check=True, capture_output=True)
    for folder in (watch, work):
        folder.mkdir()
    places = tuple(f"{ROOT / name}{os.sep}" for name in ("flowalign", "rewards", "assets", "scripts", "docs"))
    (watch / "sitecustomize.py").write_text(WATCH.format(places=places))
    environment = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{watch}", "HF_HUB_OFFLINE": "1"}
    options = {"cwd": work, "env": environment, "capture_output": True, "text": True, "check": False}
    lines = "\n".join("\t".join(words) for words in QUICK_START)
    ran = subprocess.run([sys.executable, "-c", RUN, str(installed)], input=lines, **options)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    for made in ("mine.yaml", "runs/quick/report.html", "runs/quick/lora/pytorch_lora_weights.safetensors"):
        assert (work / made).is_file(), made
    for made in ("samples/*/00.png", "train.jsonl", "runs/ocr/*/summary.json"):
        assert list(work.glob(made)), made
    command = subprocess.run([installed / "bin" / "flowalign", "recipes"], **options)
    assert command.returncode == 0 and "toyworld_ocr_crd" in command.stdout
    reached = subprocess.run([sys.executable, "-c", f"open({str(ROOT / 'docs' / 'memory.md')!r})"], **options)
    assert "the installation reaches for" in reached.stderr  # the watch can fail
