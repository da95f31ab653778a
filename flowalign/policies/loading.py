"""From a model's path to a policy."""

import os
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import torch

from flowalign.config import Model, Sampler, load_recipe
from flowalign.config.base import UserError
from flowalign.config.paths import expanded
from flowalign.disk.assets import EMBEDDED as EMBEDDED
from flowalign.disk.assets import asset
from flowalign.policies.adapters import adapter_files
from flowalign.policies.diffusers_pipeline import PipelinePolicy
from flowalign.policies.flux import FluxPolicy
from flowalign.policies.folders import part_config, pipeline_index
from flowalign.policies.request import Sizes
from flowalign.policies.sd3 import SD3Policy

# By the pipeline's class in model_index.json; installed packages add theirs as entry points of the same name.
FAMILIES: dict[str, type[PipelinePolicy]] = {
    "StableDiffusion3Pipeline": SD3Policy,
    "FluxPipeline": FluxPolicy,
}
ENTRY_POINT_GROUP = "flowalign.policies"


@torch.inference_mode(False)  # with gradients, too: weights are there to be trained, and backends are tried with them
def load_policy(
    model: Model | str,
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    whole: bool = True,
    text_encoders: bool = True,
) -> PipelinePolicy:
    """The policy of a model's settings, or of its path with default settings.

    Without `text_encoders` it cannot encode: `flowalign.policies.conditions.cached_policy` has its conditions on disk.
    Without `whole` its transformer waits on the processor for `flowalign.training.processes.prepare` to share it out.
    Raises UserError for a missing folder, one that is no diffusers pipeline, or a class without an adapter.
    """
    if isinstance(model, str):
        model = model_settings(model)
    family, path = find_family(model)
    return family.load(path, model, torch.device(device), seed, whole=whole, text_encoders=text_encoders)


def find_family(model: Model) -> tuple[type[PipelinePolicy], Path | str]:
    """The adapter for a model's settings, and the pipeline's folder or hub id; UserError as load_policy says."""
    path: Path | str = asset("toyworld/model") if model.path == EMBEDDED else model.path
    name = pipeline_index(path)["_class_name"]
    plugins = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in FAMILIES | plugins:
        raise UserError(f"model.path {model.path!r} is a {name}; supported are {', '.join(FAMILIES | plugins)}")
    if model.adapter:
        adapter_files(model.adapter)
    return FAMILIES.get(name) or _plugin(plugins[name]), path


def _plugin(entry: EntryPoint) -> type[PipelinePolicy]:
    """The adapter of an installed package."""
    try:
        adapter = entry.load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"the adapter {entry.value} for {entry.name} cannot be imported: {error}") from error
    if not (isinstance(adapter, type) and issubclass(adapter, PipelinePolicy)):
        raise UserError(f"the adapter {entry.value} for {entry.name} is no subclass of PipelinePolicy")
    return adapter


def sizes_of(model: Model) -> Sizes:
    """What a model's settings come to, as its policy will have it, by its configuration files alone.

    Raises UserError as `load_policy` does, and where a size is said nowhere.
    """
    family, path = find_family(model)
    return family.sizes(model, part_config(path, "transformer"), part_config(path, "vae"))


def model_settings(
    model: str, adapter: str | Path | None = None, size: int | None = None, max_sequence_length: int | None = None
) -> Model:
    """The settings of a model by what a person calls it: toyworld, a pipeline folder, a hub id or a run folder.

    A run folder stands for its recipe's model with its lora/. size: pixels of a side; None keeps the model's defaults.
    Raises UserError for a run folder whose trained weights are no single adapter, or with an `adapter` beside it.
    """
    model = expanded(model)
    if os.path.isfile(Path(model) / "recipe.yaml"):
        settings = _run_model(Path(model), adapter)
    else:
        settings = Model(path=model, adapter=str(adapter) if adapter else None)
    changes: dict[str, int] = {} if size is None else {"height": size, "width": size}
    if max_sequence_length is not None:
        changes["max_sequence_length"] = max_sequence_length
    return settings.model_copy(update=changes)


def usual_sampling(model: str) -> tuple[Sampler, int, str]:
    """How a model is drawn where nobody says otherwise: sampler, seed of the noise, and in words whose they are.

    A run folder has those of its recipe's evaluation, where it has one, since other steps or guidance would measure
    another model; toyworld and the families of pipelines have their own.
    """
    model = expanded(model)
    if os.path.isfile(Path(model) / "recipe.yaml"):
        recipe = load_recipe(Path(model) / "recipe.yaml")
        evaluation, model = recipe.evaluation, recipe.model.path
        if evaluation.prompts is not None:
            return Sampler(**evaluation.model_dump(include=set(Sampler.model_fields))), evaluation.seed, "the run's own"
    steps, guidance = (12, 3.0) if model == EMBEDDED else find_family(Model(path=model))[0].usual
    return Sampler(steps=steps, guidance=guidance), 0, f"{model}'s own" if model == EMBEDDED else "the model's family's"


def _run_model(run: Path, adapter: str | Path | None) -> Model:
    settings = load_recipe(run / "recipe.yaml").model
    if adapter is not None:
        raise UserError(
            f"{run} is a run folder, whose own lora/ is used; leave --adapter out, or name its model instead"
        )
    if settings.lora is None or settings.adapter is not None:
        how = "trained all weights" if settings.lora is None else "started from an adapter"
        raise UserError(f"the run in {run} {how}, so lora/ alone is not its model; use `flowalign eval recipe {run}`")
    if not (run / "lora").is_dir():
        raise UserError(f"{run} has no lora/ yet; it appears when the run ends")
    return settings.model_copy(update={"adapter": str(run / "lora")})
