"""A process chooses its device before anything loads, and everything loads on that device."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import rewards
from flowalign.config import recipe_from_dict
from flowalign.rollout.prompts import Row
from flowalign.score import Scorer
from flowalign.trainer import Trainer
from flowalign.training.display import Display
from rewards.backbones.features import unit_features
from rewards.devices import chosen_device, given_device, on_device

SECOND = torch.device("meta", 1)  # a device with an index that needs no card

JUDGES = """
import os
from accelerate.state import PartialState
from rewards import Reward
from rewards.devices import chosen_device
class Placed(Reward):
    def __init__(self, device=None, name="placed"):
        self.device, self.inside, self.name = device, str(chosen_device()), name
        known = PartialState._shared_state  # what accelerate has chosen
        if name.endswith(".txt"):
            with open(name, "a") as file:
                file.write(f"{device} in process {known['process_index']} of {known['num_processes']}\\n")
    def __call__(self, media, prompts, metadata):
        return media.flatten(1).mean(1)
def function(media, prompts, metadata, device="none"):
    return [len(device)] * len(media)
def without(media, prompts, metadata):
    return media.flatten(1).mean(1)
"""


@pytest.fixture
def judges(tmp_path: Path) -> str:
    (tmp_path / "judges.py").write_text(JUDGES)
    return str(tmp_path / "judges.py")


def test_a_reward_gets_the_device_that_it_is_loaded_for(judges: str) -> None:
    placed: Any = rewards.load_on(SECOND, f"{judges}:Placed")
    assert (placed.device, placed.inside) == ("meta:1", "meta:1")
    told: Any = rewards.load_on(SECOND, f"{judges}:Placed", device="cpu")
    assert told.device == "cpu"
    assert rewards.load_on(SECOND, f"{judges}:function")(torch.zeros(1, 3, 1, 1), [""], [{}]).tolist() == [6]
    assert rewards.load_on(SECOND, f"{judges}:without").name == "without"
    alone: Any = rewards.load(f"{judges}:Placed")
    assert alone.device is None and given_device() is None


def test_models_are_cached_by_the_index_of_their_device() -> None:
    clips: list[Any] = [rewards.load_on(f"meta:{n}", "clipscore", model="toyworld/judges/clip") for n in (1, 0, 1)]
    assert clips[0].clip is clips[2].clip and clips[0].clip is not clips[1].clip
    assert [one.device for one in clips] == [SECOND, torch.device("meta", 0), SECOND]


def test_accelerators_have_an_index_and_the_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_device("cpu:0") == chosen_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    assert chosen_device() == chosen_device("cuda") == torch.device("cuda", 3)
    assert chosen_device("cuda:1") == torch.device("cuda", 1)
    with on_device("cuda:2"):
        assert chosen_device() == torch.device("cuda", 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert (chosen_device(), chosen_device("mps")) == (torch.device("cpu"), torch.device("mps", 3))


def test_the_scoring_thread_works_on_the_device(
    values: dict[str, Any], judges: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_current: list[tuple[torch.device, str]] = []

    def set_device(device: torch.device) -> None:
        made_current.append((device, threading.current_thread().name))

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    values["rewards"] = {"without": {"load": f"{judges}:without"}}
    judging = Scorer(recipe_from_dict(values), None, torch.device("cuda", 1))
    judging.judge(torch.zeros(1, 3, 2, 2), [Row(0, "a star")])
    (found,) = (future.result() for parts in judging._pending.values() for future in parts)
    assert list(found) == ["without"]
    assert made_current == [(torch.device("cuda", 1), "rewards_0")]


class Enough(Exception):
    """The model is about to be loaded."""


def test_a_run_loads_everything_on_its_own_device(
    values: dict[str, Any], judges: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trained, evaluated and held-out rewards, the audit's features, and then the model."""
    loaded: list[str] = []

    def features(model: str, backbone: str, batch: int, device: torch.device, reward: str) -> Any:
        loaded.append(str(device))
        return unit_features(model, backbone, batch, device, reward)

    def model(*given: Any, **_: Any) -> None:
        loaded.append(str(given[2]))
        raise Enough

    placed = {"load": f"{judges}:Placed"}
    values["rewards"] = {"trained": placed}
    held_out = values["evaluation"]["prompts"].replace("prompts", "others")
    Path(held_out).write_text("a photo of six stars\n")
    values["evaluation"] |= {"prompts": held_out, "images_per_prompt": 2}
    values["evaluation"]["rewards"] = {"measured": placed | {"options": {"name": "measured"}}}
    values["guard"] = {"rewards": {"held_out": {"load": "clipscore", "options": {"model": "toyworld/judges/clip"}}}}
    values["guard"]["features"] = {"model": "toyworld/judges/vit"}
    monkeypatch.setattr("flowalign.training.parts.chosen_device", lambda device: SECOND)
    monkeypatch.setattr("flowalign.evaluate.audit.audit.unit_features", features)
    monkeypatch.setattr("flowalign.training.parts.cached_policy", model)
    found: list[Any] = []
    for module in ("training.parts", "training.measuring"):
        monkeypatch.setattr(
            f"flowalign.{module}.check_prompts", lambda rows, judged, source: found.extend(judged.values())
        )
    with pytest.raises(Enough):
        Trainer.from_recipe(recipe_from_dict(values), display=Display(quiet=True))
    assert len(found) >= 3 and {str(one.device) for one in found} == {"meta:1"}
    assert loaded == ["meta:1", "meta:1"]


@pytest.mark.slow
def test_rewards_load_after_each_of_several_processes_has_its_device(
    values: dict[str, Any], judges: str, tmp_path: Path
) -> None:
    seen = tmp_path / "seen.txt"
    values["rewards"] = {"placed": {"load": f"{judges}:Placed", "options": {"name": str(seen)}}}
    values["train"]["steps"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command = [*launch, str(Path(__file__).parents[2] / "scripts" / "train.py"), str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=600, env=environment)
    assert sorted(seen.read_text().splitlines()) == [f"cpu in process {rank} of 2" for rank in range(2)]
