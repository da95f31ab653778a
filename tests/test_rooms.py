"""The rooms of the code: few of them, imports that point down, no circle anywhere."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up; a room imports those before it alone. `rewards` never imports `flowalign`.
ROOMS = (
    "rewards",
    *("flowalign/lazy.py", "flowalign/sampling", "flowalign/advantages.py", "flowalign/config", "flowalign/disk"),
    *("flowalign/terminal.py", "flowalign/toyworld", "flowalign/policies", "flowalign/rollout", "flowalign/score.py"),
    *("flowalign/algorithms", "flowalign/evaluate", "flowalign/training", "flowalign/trainer.py"),
    *("flowalign/experiments", "flowalign/preflight", "flowalign/cli"),
)
OTHERS = ("scripts", "tests")
# What writes, moves or removes files; a library that fills a folder or a buffer is given one that disk/ made.
WRITERS = {
    *("write_text", "write_bytes", "writelines", "mkdir", "makedirs", "touch", "unlink", "rmdir", "rename", "truncate"),
    *("rmtree", "copyfile", "copytree", "save_file", "os.replace", "os.remove", "json.dump", "torch.save", "np.save"),
}


def modules() -> dict[str, Path]:
    found = {}
    for path in (*(ROOT / "flowalign").rglob("*.py"), *(ROOT / "rewards").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules that a file imports, also within functions and for types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{one.name}" for one in node.names]
            names = [one if one in known else node.module for one in inside]
        else:
            continue
        yield from (name for name in names if name in known and known[name] != path)


def room_of(path: Path) -> str:
    return next(room for room in ROOMS if path.relative_to(ROOT).is_relative_to(room))


def test_there_are_at_most_twenty_rooms() -> None:
    assert len(ROOMS) + len(OTHERS) <= 20
    outside = {"__init__.py", "__main__.py", "recipes"}  # the version, the entry point, YAML
    there = {
        path.name for path in (ROOT / "flowalign").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert there - outside == {room.removeprefix("flowalign/") for room in ROOMS if room != "rewards"}


def test_no_import_points_up() -> None:
    known = modules()
    up = [
        f"{path.relative_to(ROOT)} imports {name}"
        for module, path in known.items()
        if module not in ("flowalign", "flowalign.__main__", "flowalign.recipes")
        for name in imported(path, known)
        if name not in ("flowalign", "flowalign.recipes")
        and ROOMS.index(room_of(known[name])) > ROOMS.index(room_of(path))
    ]
    assert not up


def test_no_import_goes_in_a_circle() -> None:
    known = modules()
    try:
        TopologicalSorter({module: set(imported(path, known)) for module, path in known.items()}).prepare()
    except CycleError as circle:
        raise AssertionError(f"a circle: {' <- '.join(circle.args[1])}") from None


def test_the_rewards_package_stands_alone() -> None:
    known = modules()
    assert not [
        f"{path} imports {name}"
        for module, path in known.items()
        if module.startswith("rewards")
        for name in imported(path, known)
        if name.startswith("flowalign")
    ]


def writes(call: ast.Call) -> bool:
    whole = ast.unparse(call.func)
    if whole.rpartition(".")[2] == "open":
        said = [
            one.value for one in (*call.args, *(word.value for word in call.keywords)) if isinstance(one, ast.Constant)
        ]
        return any(re.fullmatch("[rwaxbt+]+", str(mode)) and not set(str(mode)) <= set("rbt") for mode in said)
    return whole in WRITERS or whole.rpartition(".")[2] in WRITERS


def test_only_disk_writes_files() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)[:60]}"
        for path in (ROOT / "flowalign").rglob("*.py")
        if not path.is_relative_to(ROOT / "flowalign" / "disk")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and writes(node)
    ]
    assert not found


@pytest.mark.parametrize(
    "written", ["path.open('a')", "open(path, mode='wb')", "path.write_text('')", "os.replace(a, b)", "save_file(a, b)"]
)
def test_a_call_that_writes_is_seen(written: str) -> None:
    assert [writes(node) for node in ast.walk(ast.parse(written)) if isinstance(node, ast.Call)] == [True]
    read = "path.open('rb'), open(path), text.replace('a', 'b'), json.dumps(a), GroupStore.open(path)"
    assert not any(writes(node) for node in ast.walk(ast.parse(read)) if isinstance(node, ast.Call))
