"""Ctrl-C ends a command with one line and exit code 130, even during an import."""

import subprocess
import sys
from pathlib import Path

import pytest

AT = """
import os, signal, sys
left = [sys.argv.pop(1)]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in left:
            left.clear()
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from flowalign.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["flowalign.cli.app", "typer", "pydantic", "flowalign.config", "torch"])
def test_ctrl_c_while_a_module_is_imported_is_one_line(module: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cube\n", encoding="utf-8")
    given = ["--images", str(tmp_path), "--prompts", str(tmp_path / "prompts.txt")]
    command = [sys.executable, "-c", AT, module, "score", "colorfulness", *given]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout + found.stderr) == (130, "interrupted; what is done is kept\n")


def test_an_error_without_ctrl_c_keeps_its_traceback() -> None:
    broken = "import sys; sys.modules['flowalign.config.recipe'] = None\nfrom flowalign.__main__ import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", broken, "train", "toyworld_ocr"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2 and "Traceback" in found.stderr
