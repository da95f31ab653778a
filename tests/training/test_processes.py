"""Several processes equal one: the same samples, the same updates, the same evaluations and audits, one end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from flowalign.sampling import counted_generator
from flowalign.training.processes import shares_of_updates

HERE = Path(__file__).parent


@given(st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 99))
def test_an_update_has_the_same_units_however_many_processes_divide_them(counts, updates, seed):
    whole = shares_of_updates([sum(counts)], 0, updates, counted_generator(seed))
    assert torch.cat([share.places for share in whole]).sort().values.tolist() == list(range(sum(counts)))
    parts = [shares_of_updates(counts, rank, updates, counted_generator(seed)) for rank in range(len(counts))]
    for update, (places, total, _) in enumerate(whole):
        shares = [part[update].places + sum(counts[:rank]) for rank, part in enumerate(parts)]
        assert torch.cat(shares).sort().values.tolist() == places.sort().values.tolist()
        assert [part[update].total for part in parts] == [total] * len(counts) == [len(places)] * len(counts)
        assert [part[update].most for part in parts] == [max(map(len, shares))] * len(counts)


# The same recipes in one, two and three processes

ALGORITHMS: dict[str, dict[str, Any]] = {
    "flow_grpo": {"algorithm": {"name": "flow_grpo", "clip_range": 1e-2, "kl_weight": 0.1}},
    "nft": {"algorithm": {"name": "nft", "kl_weight": 1e-2}},
    "crd": {"algorithm": {"name": "crd", "kl_weight": 1e-2}},
    "prdp": {"algorithm": {"name": "prdp", "beta": 0.1}},
    "marble": {"algorithm": {"name": "marble", "kl_weight": 1e-2, "every": 3}},
    "gdro": {"algorithm": {"name": "gdro", "beta": 10}},
}
LONE = ("flow_grpo", "nft", "crd", "marble", "prdp")
SKIPS = {"algorithm": {"name": "marble", "equal_groups": "skip"}}
WORLDS = (1, 2, 3)
SHARDED = ("flow_grpo", "nft", "marble")
ONE_DEVICE = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
JUDGES = """
def darkness(media, prompts, metadata):
    return 1 - media.flatten(1).mean(1)
"""


def recipe_of(folder: Path, name: str, world: int | str, sections: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": name,
        "prompts": str(folder / "train.txt"),
        "rewards": {"red": {"weight": 1.0}, "green": {"weight": 2.0}},
        "rollout": {"steps": 3, "batch": 4},
        "train": {
            "steps": 2,
            "prompts_per_step": 6,
            "group_size": 4,
            "updates_per_step": 3,
            "micro_batch": 8,
            "learning_rate": 1e-2,
        },
        "collect": {"group_size": 4, "shard_prompts": 4},
        "evaluation": {"prompts": None},
        "guard": None,
        "run": {"folder": str(folder / f"{name}_{world}"), "checkpoint_every": 1},
    }
    return values | {key: {**(values.get(key) or {}), **value} for key, value in sections.items()}


def cases(folder: Path, world: int) -> list[dict[str, Any]]:
    """The worker's cases: every algorithm in both precisions, and all else that processes could do differently."""
    found: list[dict[str, Any]] = []

    def add(name: str, algorithm: str, dtype: str = "float64", more: dict[str, Any] | None = None, **case: Any) -> None:
        values = recipe_of(folder, name, world, {**ALGORITHMS[algorithm], **(more or {})})
        if algorithm == "gdro":
            values["dataset"] = str(folder / f"store_{dtype}")
        found.append({"values": values, "dtype": dtype, **case})

    for name in ALGORITHMS:
        add(f"{name}_float32", name, "float32")
        add(f"{name}_float64", name)
    add("learning", "nft", more={"train": {"ema_decay": 0.9}}, learns=True)
    add("uneven", "flow_grpo", flat=["prompt 0", "prompt 2", "prompt 3", "prompt 5"])
    # The second reward judges only the flat prompts, so it never teaches.
    add("uneven_marble", "marble", flat=[f"prompt {index}" for index in (0, 2, 3, 5, 6)], limited=True, more=SKIPS)
    measured = {"prompts": str(folder / "test.txt"), "steps": 2, "every": 1, "images_per_prompt": 2, "keep_media": 3}
    guard = {"rewards": {"darkness": {"load": f"{folder / 'judges.py'}:darkness"}}, "seeds": 2, "kl_samples": 2}
    add("guarded", "nft", more={"evaluation": measured, "guard": guard})
    # At most one process has a group that teaches; all other groups have equal rewards, and are skipped or kept.
    alone = [f"prompt {index}" for index in range(7) if index != 4]
    for name in LONE:
        more = {"algorithm": {**ALGORITHMS[name]["algorithm"], "equal_groups": "keep"}, "train": {"steps": 4}}
        add(f"lone_{name}", name, more=more, flat=alone)
    add("lone_skip", "flow_grpo", more={"train": {"steps": 4}}, flat=alone)
    add("none", "nft", more={"train": {"idle_steps": 1}}, flat=[*alone, "prompt 4"], idle=True)
    # With three processes one has no prompt to evaluate.
    add("few", "nft", more={"evaluation": {**measured, "count": 2}, "guard": guard})
    add("asked", "nft", asked=True)
    add("clocks", "nft", clocks=True, more={"train": {"steps": 5}, "run": {"max_minutes": 15}})
    if world == 1:
        add("resumed", "crd", more={"train": {"steps": 1}})
        add("lone_resumed", "flow_grpo", more={"train": {"steps": 2}}, flat=alone)
    else:
        add("resumed", "crd", of=str(folder / "resumed_1"))
        more = {"train": {"steps": 6}}
        add("lone_resumed", "flow_grpo", more=more, flat=alone, of=str(folder / "lone_resumed_1"))
        add("refused", "nft", refused=True, more={"train": {"prompts_per_step": 5}})
    return found


def adapter_cases(folder: Path, label: str, tiny: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases with sharded frozen weights, which one process trains with whole weights too.

    tiny: the values of a recipe of a real pipeline.
    """
    found: list[dict[str, Any]] = []

    def add(name: str, algorithm: str, more: dict[str, Any], base: dict[str, Any], **case: Any) -> None:
        sections = {**ALGORITHMS[algorithm], **more, "run": {"folder": str(folder / f"{name}_{label}")}}
        found.append({"values": base | {k: {**(base.get(k) or {}), **v} for k, v in sections.items()}, **case})

    def small(name: str, algorithm: str, dtype: str = "float64", **more: Any) -> None:
        flat = more.pop("flat", ())
        add(name, algorithm, more, recipe_of(folder, name, label, {}), dtype=dtype, flat=flat, adapters=True)

    for name in SHARDED:
        small(f"adapters_{name}_float32", name, "float32")
        small(f"adapters_{name}_float64", name)
    small("adapters_parts", "prdp", train={"micro_batch": 3})  # a loss needs the 8 samples of a unit together
    small("adapters_uneven", "flow_grpo", flat=["prompt 0", "prompt 2", "prompt 3", "prompt 5"])
    measured = {"prompts": str(folder / "test.txt"), "steps": 2, "every": 1, "images_per_prompt": 2, "keep_media": 3}
    guard = {"rewards": {"darkness": {"load": f"{folder / 'judges.py'}:darkness"}}, "seeds": 2, "kl_samples": 2}
    small("adapters_guarded", "nft", evaluation=measured, guard=guard, train={"ema_decay": 0.9})
    small("adapters_few", "nft", evaluation={**measured, "count": 2}, guard=guard)
    if label != "3s":  # the pipeline's own recipe has two prompts a step
        base = {**tiny, "algorithm": {}, "evaluation": {**tiny["evaluation"], "count": 3}}
        base |= {"rewards": {"red": {"weight": 1.0}, "green": {"weight": 2.0}}, "prompts": str(folder / "train.txt")}
        base |= {"train": {**tiny["train"], "steps": 2}, "rollout": {**tiny["rollout"], "window": None, "batch": 4}}
        add("pipeline_flow_grpo", "flow_grpo", {}, base)
        kept = {"cache_conditions": str(folder / "conditions")}
        add("pipeline_nft", "nft", {"model": {"gradient_checkpointing": True, **kept}}, base)
        add("pipeline_marble", "marble", {}, base)
        # The KL's gradient, 0 in the first update, overflows in the next: no process takes it.
        half = {"model": {"dtype": "fp16"}, "algorithm": {"name": "nft", "kl_weight": 1e5}, "train": {"steps": 4}}
        add("pipeline_half", "nft", half, base)
        add("half", "nft", {"train": {"steps": 1}, "model": kept}, base)
    return found


def resumed(cases: list[dict[str, Any]], folder: Path, label: str, of: str) -> dict[str, Any]:
    """The case in which `label` goes on with the pipeline's NFT run, of which `of` has run the first half."""
    values = next(case["values"] for case in cases if Path(case["values"]["run"]["folder"]).name == f"half_{of}")
    changes = {
        "train": {**values["train"], "steps": 2},
        "run": {**values["run"], "folder": str(folder / f"on_{label}")},
    }
    return {"values": {**values, **changes}, "of": str(folder / f"half_{of}")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_values: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder of the runs of all cases, named CASE_WORLD, or CASE_WORLDs for sharded weights."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "train.txt").write_text("".join(f"prompt {index}\n" for index in range(7)))
    (folder / "test.txt").write_text("".join(f"other {index}\n" for index in range(5)))
    (folder / "judges.py").write_text(JUDGES)
    jobs: list[dict[str, Any]] = [{"world": world, "cases": cases(folder, world)} for world in WORLDS]
    tiny = tiny_values(folder)
    whole, shared = adapter_cases(folder, "1", tiny), adapter_cases(folder, "2s", tiny)
    jobs[0]["cases"] += whole
    jobs.append({"world": 2, "sharded": True, "cases": [*shared, resumed(whole, folder, "2s", "1")]})
    jobs.append({"world": 3, "sharded": True, "cases": adapter_cases(folder, "3s", tiny)})
    jobs.append({"world": 1, "cases": [resumed(shared, folder, "1", "2s")]})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    worker = [sys.executable, str(HERE / "process_worker.py"), str(folder / "jobs.json")]
    subprocess.run(worker, check=True, timeout=1800, env={**os.environ, **ONE_DEVICE})
    return folder


def weights(runs: Path, name: str, world: int | str, rank: int = 0) -> torch.Tensor:
    tensors = load_file(runs / f"{name}_{world}_seen" / f"weights_{rank}.safetensors")
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


def moved_apart(runs: Path, name: str, world: int | str, alone: str | None = None) -> float:
    """The distance between the weights of `world` processes and of one, relative to how far those of one moved."""
    one, several = weights(runs, alone or name, 1), weights(runs, name, world)
    started = load_file(runs / f"{alone or name}_1_seen" / "start_0.safetensors")
    start = torch.cat([started[key].flatten() for key in sorted(started)])
    return float((several - one).norm() / (one - start).norm())


def lines(runs: Path, name: str, world: int | str) -> list[dict[str, Any]]:
    text = (runs / f"{name}_{world}" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


several = pytest.mark.parametrize("world", WORLDS[1:])


@pytest.mark.slow
@several
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_samples_equal_those_of_one_process_bit_for_bit(runs: Path, name: str, world: int) -> None:
    for dtype in ("float32", "float64"):
        one = load_file(runs / f"{name}_{dtype}_1_seen" / "drawn_0.safetensors")
        shares = [
            load_file(runs / f"{name}_{dtype}_{world}_seen" / f"drawn_{rank}.safetensors") for rank in range(world)
        ]
        first = [key for key in one if key.startswith("0/")]  # later ones follow updates, which round differently
        assert first
        for key in first:
            assert torch.equal(torch.cat([share[key] for share in shares]), one[key]), key


@pytest.mark.slow
@several
@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-6), ("float32", 1e-4)])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_updates_equal_those_of_one_process(runs: Path, name: str, dtype: str, limit: float, world: int) -> None:
    case = f"{name}_{dtype}"
    assert moved_apart(runs, case, world) < limit
    for rank in range(1, world):
        assert torch.equal(weights(runs, case, world, rank), weights(runs, case, world))
    one, many = lines(runs, case, 1), lines(runs, case, world)
    assert [line["reward"]["total"] for line in many] == pytest.approx([line["reward"]["total"] for line in one])
    assert [line["loss"] for line in many] == pytest.approx([line["loss"] for line in one], rel=1e-3, abs=1e-6)
    assert [line["grad_norm"] for line in many] == pytest.approx([line["grad_norm"] for line in one], rel=1e-3)


@pytest.mark.slow
@several
@pytest.mark.parametrize("name", ["learning", "uneven", "uneven_marble"])
def test_rewards_learn_alike_in_all_processes_even_if_only_one_has_groups_that_teach(
    runs: Path, name: str, world: int
) -> None:
    assert moved_apart(runs, name, world) < 1e-6
    assert [line["zero_spread"] for line in lines(runs, name, world)] == [
        line["zero_spread"] for line in lines(runs, name, 1)
    ]
    if name == "learning":
        learnt = [[line["rewards_learnt"] for line in lines(runs, name, count)] for count in (1, world)]
        assert learnt[0][0] == learnt[1][0]
    else:
        assert any(0 < line["zero_spread"] < 1 for line in lines(runs, name, 1))


@pytest.mark.slow
@several
@pytest.mark.parametrize("name", [*(f"lone_{name}" for name in LONE), "lone_skip", "lone_resumed"])
def test_the_self_test_passes_if_only_one_process_has_groups_that_teach(runs: Path, name: str, world: int) -> None:
    for count in (1, world) if name != "lone_resumed" else (world,):
        spread = [line["zero_spread"] for line in lines(runs, name, count)]
        assert pytest.approx(5 / 6) in spread  # in one of a step's six groups the rewards differ
        checks = json.loads((runs / f"{name}_{count}" / "run.json").read_text())["self_test"]
        assert all(check["passed"] for check in checks)
        assert checks[-1] == {
            "check": "rewards differ within prompts",
            "passed": True,
            "detail": "in 17% of the groups",
        }
    if name != "lone_resumed":
        assert moved_apart(runs, name, world) < 1e-6


@pytest.mark.slow
@several
def test_all_processes_end_a_run_that_teaches_nothing(runs: Path, world: int) -> None:
    said = {(runs / f"none_{world}_seen" / f"idle_{rank}").read_text() for rank in range(world)}
    (sentence,) = said
    assert "stopped after step 1, the last 1 steps taught nothing: reward 'red' is 0.5 for every sample" in sentence


@pytest.mark.slow
@several
def test_every_process_scores_its_own_samples(runs: Path, world: int) -> None:
    for rank in range(world):
        scored = json.loads((runs / f"nft_float64_{world}_seen" / f"scored_{rank}.json").read_text())
        assert scored == dict.fromkeys(("red", "green"), 2 * 6 * 4 // world)


EVALUATED: list[tuple[str, int | str]] = [(name, world) for name in ("guarded", "few") for world in (2, 3)]
EVALUATED += [(f"adapters_{name}", f"{world}s") for name, world in EVALUATED]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), EVALUATED)
def test_evaluations_and_audits_equal_those_of_one_process(runs: Path, name: str, world: int | str) -> None:
    for step in range(3):
        one, many = (
            json.loads((runs / f"{name}_{count}" / "evaluations" / f"step_{step:06d}.json").read_text())
            for count in (1, world)
        )
        assert [row["prompt"] for row in many["rows"]] == [row["prompt"] for row in one["rows"]]
        for a, b in zip(one["rows"], many["rows"], strict=True):
            assert b["scores"] == (a["scores"] if step == 0 else pytest.approx(a["scores"], rel=1e-5))
        assert many["audit"]["alarms"] == one["audit"]["alarms"]
        assert many["audit"]["measures"].keys() == one["audit"]["measures"].keys()
        for key, found in one["audit"]["measures"].items():
            assert many["audit"]["measures"][key]["value"] == pytest.approx(found["value"], rel=1e-4, abs=1e-7), key
        folders = [runs / f"{name}_{count}" / "samples" / f"step_{step:06d}" for count in (1, world)]
        assert (folders[0] / "prompts.json").read_text() == (folders[1] / "prompts.json").read_text()
        assert [file.name for file in sorted(folders[0].iterdir())] == [
            file.name for file in sorted(folders[1].iterdir())
        ]
    assert (runs / f"{name}_{world}" / "best" / "evaluation.json").is_file()


SHARED_RUNS = [f"adapters_{name}_{dtype}" for name in SHARDED for dtype in ("float32", "float64")]
PIPELINE_RUNS = ["pipeline_flow_grpo", "pipeline_nft", "pipeline_marble"]
SHARED_CASES = [(name, f"{world}s") for name in (*SHARED_RUNS, "adapters_uneven") for world in (2, 3)]
SHARED_CASES += [(name, "2s") for name in (*PIPELINE_RUNS, "adapters_parts")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "label"), SHARED_CASES)
def test_a_run_with_sharded_weights_equals_that_of_one_process(runs: Path, name: str, label: str) -> None:
    world = int(label[0])
    one = load_file(runs / f"{name}_1_seen" / "drawn_0.safetensors")
    shares = [load_file(runs / f"{name}_{label}_seen" / f"drawn_{rank}.safetensors") for rank in range(world)]
    first = [key for key in one if key.startswith("0/")]
    assert first
    for key in first:
        assert torch.equal(torch.cat([share[key] for share in shares]), one[key]), key
    assert moved_apart(runs, name, label) < (1e-4 if name.endswith("32") or "pipeline" in name else 1e-6)
    for rank in range(1, world):
        assert torch.equal(weights(runs, name, label, rank), weights(runs, name, label))
    norms = [[line["grad_norm"] for line in lines(runs, name, count)] for count in ("1", label)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    passes = [[line["forwards"] for line in lines(runs, name, count)] for count in ("1", label)]
    assert all(alone <= several < 1.2 * alone for alone, several in zip(*passes, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "label"), [("adapters_nft_float64", "3s"), *((name, "2s") for name in PIPELINE_RUNS)])
def test_a_process_holds_its_shard_of_the_frozen_weights(runs: Path, name: str, label: str) -> None:
    world = int(label[0])
    alone = json.loads((runs / f"{name}_1_seen" / "frozen_0.json").read_text())
    shares = [json.loads((runs / f"{name}_{label}_seen" / f"frozen_{rank}.json").read_text()) for rank in range(world)]
    for key, (held, whole) in alone.items():
        assert held == whole
        assert sum(share[key][0] for share in shares) == whole
        assert [share[key][1] for share in shares] == [whole] * world
    total = sum(whole for _, whole in alone.values())
    for share in shares:
        assert sum(held for held, _ in share.values()) == pytest.approx(total / world, rel=0.1)


@pytest.mark.slow
def test_all_processes_skip_the_same_updates_in_half_precision(runs: Path) -> None:
    for label in ("1", "2s"):
        found = lines(runs, "pipeline_half", label)
        skipped = [line["skipped_updates"] for line in found]
        assert 0 < sum(skipped) < 4 * 2
        assert found[-1]["gradient_scale"] == 2.0 ** (16 - sum(skipped))
    assert torch.equal(weights(runs, "pipeline_half", "2s", 0), weights(runs, "pipeline_half", "2s", 1))


@pytest.mark.slow
@pytest.mark.parametrize("label", ["1", "2s"])
def test_a_checkpoint_of_whole_weights_resumes_sharded_and_the_other_way_round(runs: Path, label: str) -> None:
    assert moved_apart(runs, "on", label, "pipeline_nft") < 1e-4
    assert [line["step"] for line in lines(runs, "on", label)] == [1, 2]


@pytest.mark.slow
def test_adapters_are_exported_alike_with_sharded_weights(runs: Path) -> None:
    one, shared = (
        runs / f"pipeline_nft_{label}" / "lora" / "pytorch_lora_weights.safetensors" for label in ("1", "2s")
    )
    found, expected = load_file(shared), load_file(one)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5)
    with safe_open(shared, "pt") as opened, safe_open(one, "pt") as alone:
        assert opened.metadata() == alone.metadata()


@pytest.mark.slow
@several
@pytest.mark.parametrize(("name", "steps"), [("asked", 1), ("clocks", 2)])
def test_all_processes_stop_after_the_same_step(runs: Path, name: str, steps: int, world: int) -> None:
    found = [(runs / f"{name}_{world}_seen" / f"step_{rank}").read_text() for rank in range(world)]
    assert found == [str(steps)] * world
    assert (runs / f"{name}_{world}" / "checkpoints" / f"step_{steps:06d}").is_dir()


@pytest.mark.slow
@several
def test_prompts_that_processes_cannot_divide_evenly_are_refused_in_every_process(runs: Path, world: int) -> None:
    said = {(runs / f"refused_{world}_seen" / f"refused_{rank}").read_text() for rank in range(world)}
    assert said == {f"train.prompts_per_step (5) must be a multiple of the {world} processes"}
    assert not (runs / f"refused_{world}").exists()


@pytest.mark.slow
@several
def test_a_run_of_one_process_goes_on_with_several(runs: Path, world: int) -> None:
    assert moved_apart(runs, "resumed", world, "crd_float64") < 1e-6
    one, several = (
        [line["forwards"] for line in lines(runs, *run)] for run in (("crd_float64", 1), ("resumed", world))
    )
    assert several[0] == one[0]
    assert one[1] <= several[1] < 1.2 * one[1]  # a process without units computes a spare one that counts for 0


# A launcher's processes end together

ENDS = """
import os
import signal
seen = []
def judge(media, prompts, metadata):
    seen.append(len(media))
    if os.environ["RANK"] == "1" and len(seen) == 2:
        {end}
    return media.flatten(1).mean(1)
"""


def launched(values: dict[str, Any], tmp_path: Path, end: str) -> subprocess.Popen[str]:
    """A run of two processes whose second process executes `end` as it scores its second step."""
    (tmp_path / "ends.py").write_text(ENDS.format(end=end))
    values["rewards"] = {"judged": {"load": f"{tmp_path / 'ends.py'}:judge"}}
    values["train"] |= {"steps": 1000}
    values["evaluation"] = {"prompts": None}
    values["run"] |= {"checkpoint_every": 1000}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command = [*launch, str(HERE.parents[1] / "scripts" / "train.py"), str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, **ONE_DEVICE}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "message"),
    [
        ('raise RuntimeError("the judge is asleep")', "the judge is asleep"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL)"),
    ],
)
def test_a_process_that_dies_ends_the_run_with_its_error(
    values: dict[str, Any], tmp_path: Path, end: str, message: str
) -> None:
    process = launched(values, tmp_path, end)
    output, _ = process.communicate(timeout=600)
    assert process.returncode not in (0, None)
    assert message in output


@pytest.mark.slow
def test_a_launcher_that_is_asked_to_stop_leaves_a_checkpoint(values: dict[str, Any], tmp_path: Path) -> None:
    process = launched(values, tmp_path, "pass")
    lines = tmp_path / "run" / "metrics.jsonl"
    while not lines.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    done = len(lines.read_text().splitlines())
    assert (tmp_path / "run" / "checkpoints" / f"step_{done:06d}").is_dir(), output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stopped"] == "asked to stop"
