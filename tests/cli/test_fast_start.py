"""A command that needs no model answers before a heavy library is imported."""

import subprocess
import sys

import pytest

_HEAVY = ("torch", "numpy", "scipy", "diffusers", "transformers", "matplotlib", "clarabel", "PIL")

_SCRIPT = """
import sys
from flowalign.cli.app import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print("code", code, "imported", [name for name in {heavy!r} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("arguments", "fails"),
    [
        (["--help"], False),
        (["train", "--help"], False),
        (["recipes"], False),
        (["rewards"], False),
        (["train", "toyworld_ocr", "--dry-run"], False),
        (["train", "toyworld_ocr_marble", "train.stepz=3"], True),
        (["train", "toyworld_ocr", "algorithm.clip_rangee=1"], True),
        (["train", "no_such_recipe"], True),
        (["train", "toyworld_ocr", "run.folder=tests"], True),
        (["train", "toyworld_ocr", "prompts=no_such_list.txt"], True),
        (["train", "toyworld_ocr", "model.path=./no_such_model"], True),
        (["train", "toyworld_ocr", "rewards.orc=1"], True),
        (["train", "toyworld_ocr", "guard.rewards={a: {load: no_such_file.py:A}}"], True),
        (["collect", "toyworld_ocr"], True),
        (["compare", "no_such_recipe", "--budget", "1"], True),
        (["score", "ocr", "--images", "no_such_folder"], True),
        (["sample", "toyworld", "a sign", "--output", "tests"], True),
        (["eval", "recipe", "tests"], True),
        (["eval", "geneval", "./no_such_model"], True),
        (["eval", "ocr", "--images", "no_such_folder"], True),
        (["eval", "panel", "toyworld", "--prompts", "toyworld/words_test", "--reward", "orc"], True),
        (["serve", "orc"], True),
        (["rewards", "check", "no_such_file.py:A"], True),
        (["model", "check", "./no_such_model"], True),
        (["plan", "no_such_recipe"], True),
    ],
)
def test_no_heavy_library_is_imported(arguments: list[str], fails: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(heavy=_HEAVY), *arguments], capture_output=True, text=True, check=True
    )
    *_, last = done.stdout.splitlines()
    assert last.endswith("imported []")
    assert last.startswith("code 0 ") is not fails


def test_a_lazy_module_has_the_attributes_of_the_module() -> None:
    import torch

    from flowalign import lazy

    assert lazy.torch.Tensor is torch.Tensor
    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        lazy.torch.no_such_thing  # noqa: B018
