"""What a model makes where its settings do not say: the size and the text length of its own pipeline."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from flowalign.config import Model, recipe_from_dict
from flowalign.config.base import UserError
from flowalign.evaluate.drawing import drawing_of
from flowalign.policies.diffusers_pipeline import PipelinePolicy
from flowalign.policies.loading import load_policy, sizes_of
from flowalign.policies.request import MediaRequest, Sizes
from flowalign.preflight.model_size import meta_policy
from flowalign.trainer import Trainer
from flowalign.training.display import Display

Flux = Callable[[bool], Path]


def of_policy(policy: PipelinePolicy) -> Sizes:
    return Sizes(policy.request, policy.max_sequence_length)


@pytest.mark.parametrize("kind", ["sd35", "flux"])
def test_they_are_those_that_the_pipeline_draws_by_itself(tiny_sd35: Path, tiny_flux: Flux, kind: str) -> None:
    family: Any = StableDiffusion3Pipeline if kind == "sd35" else FluxPipeline
    model = Model(path=str(tiny_sd35 if kind == "sd35" else tiny_flux(True)), dtype="fp32", lora=None)
    pipeline = family.from_pretrained(model.path)
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    length = inspect.signature(pipeline.__call__).parameters["max_sequence_length"].default
    assert side == (64 if kind == "sd35" else 512) and length == (256 if kind == "sd35" else 512)
    expected = Sizes(MediaRequest(side, side), length)
    assert sizes_of(model) == of_policy(load_policy(model)) == of_policy(meta_policy(model)) == expected
    assert of_policy(load_policy(model, text_encoders=False)) == expected


def test_toyworld_makes_64_pixels_and_reads_no_t5() -> None:
    assert sizes_of(Model()) == of_policy(load_policy(Model(lora=None))) == Sizes(MediaRequest(64, 64), 0)


def test_what_is_given_stays_and_the_rest_is_the_model_s_own(tiny_sd35: Path) -> None:
    given = Model(path=str(tiny_sd35), height=32, max_sequence_length=12)
    assert sizes_of(given) == of_policy(load_policy(given)) == Sizes(MediaRequest(32, 64), 12)


def test_a_model_that_says_no_size_is_one_sentence(tiny_sd35: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd35, tmp_path / "model")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": None}))
    with pytest.raises(UserError, match=r"model\.height, model\.width: the configuration of \S+ says no size; give"):
        sizes_of(Model(path=str(folder)))
    assert sizes_of(Model(path=str(folder), height=32, width=48)).request == MediaRequest(32, 48)


def test_a_drawing_says_the_size_that_it_has(tiny_sd35: Path) -> None:
    own = drawing_of(str(tiny_sd35), device="cpu")
    settings = own.settings([])
    assert (settings["height"], settings["width"], settings["max_sequence_length"]) == (64, 64, 256)
    assert "64 x 64 pixels" in own.words
    assert drawing_of(str(tiny_sd35), device="cpu", size=64, max_sequence_length=256).settings([]) == settings


def test_a_run_records_its_size_and_a_script_s_policy_keeps_its_own(values: dict[str, Any]) -> None:
    values["train"]["steps"] = 1
    del values["model"]["height"], values["model"]["width"]
    recipe = recipe_from_dict(values)
    folder = Trainer.from_recipe(recipe, display=Display(quiet=True)).run()
    assert json.loads((folder / "run.json").read_text())["media"] == {
        "height": 64, "width": 64, "frames": None, "fps": None,
    }  # fmt: skip
    small = load_policy(recipe.model.model_copy(update={"height": 32, "width": 32}))
    values["model"]["height"] = 64
    with pytest.raises(UserError, match=r"model\.height 64: the policy that the script gives makes 32; leave it out"):
        Trainer.from_recipe(recipe_from_dict(values), policy=small, display=Display(quiet=True), overwrite=True)
