"""The tutorials work as they stand: their files are written and their code is run, block after block."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from flowalign.config.base import UserError
from flowalign.policies.loading import load_policy
from flowalign.preflight.model_size import condition_rows, meta_policy

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(python|yaml|toml)(?: file=(\S+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Language, file name (or nothing) and text of every code block of a page."""
    return BLOCK.findall((DOCS / page).read_text())


def run(page: str) -> dict[str, Any]:
    """Write the page's files and run its code in the working directory; returns the names that the code has left."""
    names: dict[str, Any] = {"__name__": "tutorial"}
    ran = 0
    for language, file, text in blocks(page):
        if file:
            Path(file).write_text(text)
            if file == "pyproject.toml":
                install(Path.cwd())
        else:
            assert language == "python", "a block that is neither a file nor code would go untested"
            exec(compile(text, page, "exec"), names)
            ran += 1
    assert ran >= 3
    return names


def install(project: Path) -> None:
    """What `pip install -e .` leaves beside the modules, for a project folder that is on the path already."""
    about = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    folder = project / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    groups = about["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups]
    (folder / "entry_points.txt").write_text("".join(lines))


def test_the_custom_reward_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("custom_reward.md")
    assert (tmp_path / "runs" / "darker" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert names["folder"] == Path("runs/darker")


@pytest.mark.slow
def test_the_model_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        names = run("adding_a_model.md")
    finally:
        sys.modules.pop("auraflow", None)
    passed = [finding.check for finding in names["findings"] if finding.passed]
    assert {"ODE rollout is the pipeline's", "a gradient reaches feed_forward"} <= set(passed) and len(passed) >= 10
    assert len((tmp_path / "runs" / "small" / "metrics.jsonl").read_text().splitlines()) == 2
    real = load_policy(names["model"]).encode_prompts(["a sign"]).tensors
    planned = condition_rows(meta_policy(names["model"]), 1).tensors
    assert {name: tensor.shape for name, tensor in planned.items()} == {"embeds": real["embeds"].shape}
    with pytest.raises(UserError, match="attention of AuraFlowTransformer2DModel is not exchangeable; use native"):
        load_policy(names["model"].model_copy(update={"attention": "_native_math"}))
