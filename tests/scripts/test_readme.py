"""What the README shows is what works."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_the_python_example_runs_and_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) < 20
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "example"})
    assert (tmp_path / "runs" / "script" / "report.html").is_file()
    assert len((tmp_path / "runs" / "script" / "metrics.jsonl").read_text().splitlines()) == 3


def test_every_recipe_that_is_named_exists() -> None:
    from flowalign.config import bundled_recipes

    named = set(re.findall(r"\b(?:toyworld|sd35_medium)_\w+", README.read_text()))
    assert named <= set(bundled_recipes())
