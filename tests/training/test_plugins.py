"""Algorithms, commands and benchmarks that installed packages add by entry points, with no change to this package.

Rewards are in tests/rewards/test_reward_loading.py, policies in tests/preflight/test_model_check.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flowalign.algorithms.base import algorithm_of
from flowalign.cli.app import main
from flowalign.config import recipe_from_dict
from flowalign.config.algorithm import AlgorithmSettings, algorithm_class, algorithm_names
from flowalign.config.base import UserError
from flowalign.trainer import Trainer
from flowalign.training.display import Display

SOURCE = '''
from pathlib import Path
from typing import Literal

import torch

from flowalign.algorithms.base import Algorithm
from flowalign.algorithms.nft import NFT, NFTSettings
from flowalign.config.algorithm import AlgorithmSettings
from flowalign.config.base import UserError
from flowalign.evaluate.benchmark import Benchmark
from flowalign.evaluate.results import write_summary


class PluggedSettings(NFTSettings):
    """NFT by another name."""

    name: Literal["plugged"] = "plugged"
    push: float = 1.0
    """A setting of its own."""


class Plugged(NFT):
    """Counts its losses."""

    Settings = PluggedSettings

    def loss(self, policy, batch):
        self.state["asked"] = self.state.get("asked", torch.zeros(())) + 1
        return super().loss(policy, batch)


class NoLossSettings(AlgorithmSettings):
    needs = "final"
    name: Literal["no_loss"] = "no_loss"


class NoLoss(Algorithm):
    Settings = NoLossSettings


def hello(name: str, loud: bool = False) -> None:
    """Greet."""
    if name == "nobody":
        raise UserError("nobody cannot be greeted; give a name")
    print(f"hello {name}{'!' * loud}")


def brightness_benchmark(images: Path, output: Path) -> None:
    """Judge how bright images are."""
    benchmark = Benchmark(images, 1, output, None)

    def line_of(sample, brightness):
        return {"image": sample.name, "brightness": float(brightness)}

    about = {"benchmark": "brightness"}
    lines = benchmark.judged(benchmark.rows(), about, lambda media: media.mean((1, 2, 3)), line_of)
    write_summary(benchmark.folder, {"mean": sum(line["brightness"] for line in lines) / len(lines)})


nothing = 3
'''


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with an algorithm and a command, and with some that are broken."""
    folder = tmp_path / "site"
    info = folder / "plugged-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "plugged_package.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[flowalign.algorithms]\nplugged = plugged_package:Plugged\nlost = plugged_package:Nowhere\n"
        "three = plugged_package:nothing\nno_loss = plugged_package:NoLoss\n"
        "[flowalign.commands]\nhello = plugged_package:hello\nlost = plugged_package:nowhere\n"
        "brightness = plugged_package:brightness_benchmark\n"
    )
    monkeypatch.syspath_prepend(folder)
    yield
    algorithm_class.cache_clear()


def test_a_recipe_names_an_installed_algorithm_and_trains_with_it(plugged: None, values: dict[str, Any]) -> None:
    assert algorithm_names()[-3:] == ["no_loss", "plugged", "three"]
    small = {"train": values["train"] | {"steps": 1}, "evaluation": {"prompts": None}, "guard": None}
    small["rollout"] = {key: values["rollout"][key] for key in ("steps", "batch") if key in values["rollout"]}
    recipe = recipe_from_dict({**values, **small, "algorithm": {"name": "plugged", "push": 2}})
    assert recipe.algorithm.push == 2 and recipe.rollout.dynamics == "ode"
    trainer = Trainer.from_recipe(recipe, display=Display(quiet=True))
    trainer.run()
    assert trainer.algorithm.state_dict()["asked"] > 0


def test_an_installed_algorithm_that_cannot_be_used_is_reported(plugged: None, values: dict[str, Any]) -> None:
    def refused(name: str, **more: Any) -> str:
        with pytest.raises(UserError) as caught:
            recipe_from_dict({**values, "algorithm": {"name": name, **more}})
        return str(caught.value)

    assert "unknown key 'algorithm.pushh'; did you mean 'push'?" in refused("plugged", pushh=1)
    assert "algorithm 'lost' cannot be imported (plugged_package:Nowhere)" in refused("lost")
    assert "algorithm 'three': plugged_package:nothing is no class of an Algorithm that has a loss" in refused("three")
    assert "plugged_package:NoLoss is no class of an Algorithm that has a loss" in refused("no_loss")
    assert "unknown algorithm 'pluged'; did you mean 'plugged'?" in refused("pluged")
    with pytest.raises(UserError, match=r"dataset: flow_grpo learns from its own rollouts; from a dataset learns \w+"):
        recipe_from_dict({**values, "algorithm": "flow_grpo", "dataset": "groups"})  # says so whatever is broken


def test_settings_without_an_algorithm_are_refused(values: dict[str, Any]) -> None:
    class Bare(AlgorithmSettings):
        needs = "final"
        name: str = "bare"

    recipe = recipe_from_dict({**values, "algorithm": Bare(), "rollout": {"steps": 3}})
    with pytest.raises(UserError, match="unknown algorithm 'bare'"):
        algorithm_of(recipe.algorithm)


def test_an_installed_command_works_like_a_built_in_one(plugged: None, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        out, err = capsys.readouterr()
        return caught.value.code, out + err

    assert said("hello", "you", "--loud") == (0, "hello you!\n")
    assert said("hello", "nobody") == (2, "error: nobody cannot be greeted; give a name\n")
    assert "Greet." in said("--help")[1]
    code, text = said("lost")
    assert code == 2 and text.startswith("error: command 'lost' cannot be imported (plugged_package:nowhere)")


def test_an_installed_benchmark_judges_images_and_goes_on_where_it_stopped(plugged: None, tmp_path: Path) -> None:
    for index, level in enumerate((0, 51)):
        place = tmp_path / "images" / f"{index:05d}" / "samples"
        place.mkdir(parents=True)
        Image.new("RGB", (8, 8), (level,) * 3).save(place / "0000.png")
        (place.parent / "metadata.jsonl").write_text(json.dumps({"prompt": f"prompt {index}"}) + "\n")
    folder = tmp_path / "judged"
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            main(("brightness", str(tmp_path / "images"), str(folder)))
        assert caught.value.code == 0
        lines = (folder / "results.jsonl").read_text().splitlines()
        assert [json.loads(line)["brightness"] for line in lines] == pytest.approx([0, 0.2])
    assert json.loads((folder / "summary.json").read_text())["mean"] == pytest.approx(0.1)
