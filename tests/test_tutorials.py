"""The tutorials work as they stand: their files are written and their code is run, block after block."""

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(python|yaml)(?: file=(\S+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Language, file name (or nothing) and text of every code block of a page."""
    return BLOCK.findall((DOCS / page).read_text())


def test_the_custom_reward_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "tutorial"}
    ran = 0
    for language, file, text in blocks("custom_reward.md"):
        if file:
            Path(file).write_text(text)
        else:
            assert language == "python", "a block that is neither a file nor code would go untested"
            exec(compile(text, "custom_reward.md", "exec"), names)
            ran += 1
    assert ran >= 3
    assert (tmp_path / "runs" / "darker" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert names["folder"] == Path("runs/darker")
