"""What a wheel holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("flowalign-*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.mark.slow
def test_a_wheel_holds_both_packages_and_every_file_they_read(wheel):
    held = set(wheel.namelist())
    packages = [path for name in ("flowalign", "rewards") for path in (ROOT / name).rglob("*") if path.is_file()]
    wanted = {path.relative_to(ROOT).as_posix() for path in packages if "__pycache__" not in path.parts}
    assert {"flowalign/toyworld/words.txt", "flowalign/evaluate/report.html.j2", "rewards/ocr.py"} <= wanted
    assert any(name.startswith("flowalign/recipes/") and name.endswith(".yaml") for name in wanted)
    assert wanted <= held


@pytest.mark.slow
def test_a_wheel_holds_the_embedded_model_and_its_prompts(wheel):
    held = set(wheel.namelist())
    for name in ("words_train.txt", "words_test.txt", "shapes_train.jsonl", "shapes_test.jsonl"):
        assert f"flowalign/assets/toyworld/prompts/{name}" in held
    assert {f"flowalign/assets/geneval/{name}" for name in ("prompts.jsonl", "object_names.txt", "LICENSE")} <= held
    assert "flowalign/assets/toyworld/model/model_index.json" in held
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert any(name.startswith(f"flowalign/assets/toyworld/model/{part}/") for name in held), part


@pytest.mark.slow
def test_a_wheel_installs_the_command_and_carries_the_licence(wheel):
    (entry_points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "flowalign = flowalign.cli:main" in wheel.read(entry_points).decode()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())
