"""Checks that a model's adapter does what its pipeline does: one line with a number for each fact that training needs.

After the policy is freed, the plain pipeline is loaded a second time and draws from the same noise.
"""

import inspect
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowalign.config import Lora, Model, Rollout, Sampler
from flowalign.config.base import UserError
from flowalign.policies.adapters import further_adapters, merge_adapter
from flowalign.policies.base import Condition, Conditioning
from flowalign.policies.diffusers_pipeline import PipelinePolicy
from flowalign.policies.loading import find_family
from flowalign.policies.request import MediaRequest, Row
from flowalign.policies.schedules import euler_scheduler
from flowalign.policies.weights import target_modules
from flowalign.rollout.generate import rollout
from flowalign.rollout.stages import RolloutRequest
from flowalign.sampling import counted_generator, counted_noise
from flowalign.sampling.noise import EVALUATION
from flowalign.toyworld.render import Scene, render
from rewards.contract import Finding

PROMPTS = ("a photo of a red star", 'a sign that says "AB CD"', "two rings")
ROWS = [Row(place, prompt) for place, prompt in enumerate(PROMPTS)]
KEY = (EVALUATION, 0, 0)
CLOSE = 1e-4


class _Drawn(NamedTuple):
    """Images, their latents in the pipeline's layout, and the pipeline's arguments to draw the same images."""

    media: torch.Tensor
    latents: torch.Tensor
    arguments: dict[str, Any]


class _Traced(NamedTuple):
    """A rollout of the plain pipeline: images, the latents after every step, its sigma schedule."""

    media: torch.Tensor
    states: list[torch.Tensor]
    sigmas: torch.Tensor


class _Failed(NamedTuple):
    """Takes the place of a result that could not be computed."""

    reason: str


@torch.inference_mode(False)
def check_model(model: Model, device: torch.device | str, *, steps: int = 4, guidance: float = 4.0) -> list[Finding]:
    """Check a model in float32 at the size of its settings; `passed` is None for a number that is only reported.

    If the adapter raises an error, the lines that need the result fail and the others are still checked. Raises
    UserError for a model that does not load and for settings that it does not take.
    """
    family, path = find_family(model)
    device = torch.device(device)
    attempt = partial(_attempt, family)
    try:
        policy, groups = _policy(family, path, model, device)
    except UserError:
        raise
    except Exception as error:
        return [Finding("the adapter takes its pipeline", False, _failed(family, error).reason)]
    if not groups:
        return [Finding("targets name modules", False, f"none of {', '.join(family.targets)} names one of this model")]
    samplers = [Sampler(steps=steps), Sampler(steps=steps, guidance=guidance)]
    noise = attempt(_noise, policy)
    conditioning = attempt(policy.encode, ROWS)
    sigmas = attempt(policy.sigmas, steps)
    first = attempt(_first, policy, noise, sigmas, conditioning)
    drawn = [attempt(_draw, policy, sampler, noise) for sampler in samplers]
    own = {
        "zero SDE noise is the ODE": attempt(_zero_noise, policy, samplers[1]),
        "a row of a batch is the row alone": attempt(_rows, policy, noise, conditioning),
        "one guidance batch is two passes": attempt(_guidance, policy, noise, conditioning, guidance),
    }
    reported = {
        "VAE round trip": attempt(_round_trip, policy),
        "one step to x0": attempt(_one_step, policy, noise, conditioning),
    }
    gradients = attempt(_gradients, policy, noise, conditioning, groups)
    if isinstance(gradients, _Failed):
        gradients = dict.fromkeys((f"a gradient reaches {group}" for group in groups), gradients)
    with tempfile.TemporaryDirectory() as folder:
        trained = attempt(_draw, policy, samplers[0], noise)
        written = attempt(policy.export, Path(folder))
        request = policy.request
        del policy
        plain = attempt(_plain, family, path, model, device)
        arguments = [attempt(lambda one: one.arguments, one) for one in drawn]
        traces = [attempt(_trace, plain, one, request, steps) for one in arguments]
        exported = attempt(_exported, plain, folder, trained, drawn[0], request, steps, written)
    lines = {
        "ODE rollout is the pipeline's": attempt(_same, drawn[0], traces[0]),
        f"ODE rollout with guidance {guidance:g} is the pipeline's": attempt(_same, drawn[1], traces[1]),
        "sigmas are the pipeline's": attempt(_schedule, sigmas, traces[0]),
        "velocity has the pipeline's sign": attempt(_direction, first, drawn[0], traces[0]),
        **own,
        **gradients,
        "the exported LoRA draws the same in the pipeline": exported,
        **reported,
    }
    return [
        Finding(name, *((False, found.reason) if isinstance(found, _Failed) else found))
        for name, found in lines.items()
    ]


Judged = tuple[bool | None, str]  # whether it passed, and the detail of a line


def _attempt(family: type[PipelinePolicy], function: Callable[..., Any], *inputs: Any) -> Any:
    """The result of a function; _Failed if it raises an error or if one of its inputs has failed."""
    for given in inputs:
        if isinstance(given, _Failed):
            return given
    try:
        return function(*inputs)
    except Exception as error:  # an adapter is a user's code and may raise anything
        return _failed(family, error)


def _failed(family: type[PipelinePolicy], error: Exception) -> _Failed:
    file = inspect.getsourcefile(family)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" ({Path(str(file)).name}, line {lines[-1]})" if lines else ""
    return _Failed(f"raises {type(error).__name__}{where}: {' '.join(str(error).split())[:200]}")


def _policy(
    family: type[PipelinePolicy], path: Path | str, model: Model, device: torch.device
) -> tuple[PipelinePolicy, list[str]]:
    """The policy with adapters on all target groups that name modules of this model, and these groups."""
    pipeline = family.load_pipeline(path, torch.float32)
    names = [name for module in family.modules_of(pipeline).values() for name, _ in module.named_modules()]
    groups = [group for group in family.targets if target_modules(names, group, family.targets)]
    lora = Lora(rank=4, alpha=8, targets=tuple(groups)) if groups else None
    return family(pipeline, model.model_copy(update={"dtype": "fp32", "lora": lora}), device, 0), groups


def _plain(family: type[PipelinePolicy], path: Path | str, model: Model, device: torch.device) -> Any:
    plain = family.load_pipeline(path, torch.float32).to(device)
    plain.scheduler = euler_scheduler(plain.scheduler)
    if model.adapter:
        merge_adapter(plain, model.adapter, family.native)
    return plain


def _noise(policy: PipelinePolicy) -> torch.Tensor:
    keys = [(*KEY, place, 0, 0) for place in range(len(PROMPTS))]
    return counted_noise(keys, policy.latent_shape(policy.request), policy.device)


@torch.no_grad()
def _first(
    policy: PipelinePolicy, noise: torch.Tensor, sigmas: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    level = torch.full((len(PROMPTS),), sigmas[0].item(), device=noise.device)
    return _packed(policy, policy.velocity(noise, level, conditioning.positive))


def _packed(policy: PipelinePolicy, latents: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = policy.pipeline_arguments(latents, 1.0)["latents"]
    return packed.cpu()


def _draw(policy: PipelinePolicy, sampler: Sampler, noise: torch.Tensor) -> _Drawn:
    samples = rollout(policy, RolloutRequest(ROWS, 1, sampler, policy.request, KEY, batch=len(ROWS)))
    arguments = policy.pipeline_arguments(noise, sampler.guidance)
    return _Drawn(samples.media.cpu(), _packed(policy, samples.latents), arguments)


def _trace(pipeline: Any, arguments: dict[str, Any], request: MediaRequest, steps: int) -> _Traced:
    states: list[torch.Tensor] = []

    def keep(_pipeline: Any, _step: int, _time: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        states.append(tensors["latents"].cpu())
        return {}

    pipeline.set_progress_bar_config(disable=True)
    media = pipeline(
        list(PROMPTS),
        height=request.height,
        width=request.width,
        num_inference_steps=steps,
        output_type="pt",
        callback_on_step_end=keep,
        **arguments,
    ).images
    return _Traced(media.float().cpu(), states, pipeline.scheduler.sigmas.float().cpu())


def _same(ours: _Drawn, theirs: _Traced) -> Judged:
    """Compare images and latents: images are clamped to [0, 1], which hides differences."""
    images, latents = _distance(ours.media, theirs.media), _distance(ours.latents, theirs.states[-1])
    scale = max(1.0, theirs.states[-1].abs().max().item())
    detail = f"largest difference {images:.1e} in images, {latents:.1e} in latents"
    return images <= CLOSE and latents <= CLOSE * scale, detail


def _exported(
    plain: Any, folder: str, trained: _Drawn, untrained: _Drawn, request: MediaRequest, steps: int, _written: None
) -> Judged:
    """Compare the trained policy with the pipeline under its exported LoRA, which stays in the pipeline."""
    plain.load_lora_weights(folder)
    for name, further in further_adapters(folder).items():
        plain.load_lora_weights(further, **{f"load_into_{name}": True})
    passed, detail = _same(trained, _trace(plain, trained.arguments, request, steps))
    moved = _distance(trained.latents, untrained.latents)
    return passed if moved > 10 * CLOSE else None, f"{detail}; the LoRA moves the latents by {moved:.1e}"


def _schedule(sigmas: torch.Tensor, theirs: _Traced) -> Judged:
    same = sigmas.shape == theirs.sigmas.shape
    distance = _distance(sigmas, theirs.sigmas) if same else float("inf")
    return distance <= CLOSE, f"largest difference {distance:.1e}"


def _direction(velocity: torch.Tensor, ours: _Drawn, theirs: _Traced) -> Judged:
    """Compare the velocity with the pipeline's own, computed from the pipeline's first step."""
    start = ours.arguments["latents"].cpu()
    true = (theirs.states[0] - start) / (theirs.sigmas[1] - theirs.sigmas[0])
    cosine = torch.cosine_similarity(velocity.flatten(), true.flatten(), dim=0).item()
    return cosine > 0.999, f"cosine {cosine:+.4f} with the pipeline's first step"


def _zero_noise(policy: PipelinePolicy, sampler: Sampler) -> Judged:
    last = max(1, sampler.steps - 1)
    still = Rollout(steps=sampler.steps, guidance=sampler.guidance, noise_level=1e-6, window=(0, last))
    with_sde, with_ode = (
        rollout(policy, RolloutRequest(ROWS, 1, one, policy.request, KEY, batch=len(ROWS))).latents
        for one in (still, sampler)
    )
    distance = _distance(with_sde, with_ode)
    scale = max(1.0, with_ode.abs().max().item())
    return distance <= CLOSE * scale, f"largest difference {distance:.1e} in latents"


@torch.no_grad()
def _rows(policy: PipelinePolicy, noise: torch.Tensor, conditioning: Conditioning) -> Judged:
    """Compare each row's text and velocity, at its own noise level, with the same row computed alone."""
    sigma = torch.linspace(0.9, 0.3, len(noise), device=noise.device)
    condition = conditioning.positive
    together = policy.velocity(noise, sigma, condition)
    text, velocities = [], []
    for place, asked in enumerate(ROWS):
        row, alone = slice(place, place + 1), policy.encode([asked]).positive
        for name, tensor in alone.tensors.items():
            text.append(_distance(condition[row].tensors[name], tensor))
        velocities.append(_distance(together[row], policy.velocity(noise[row], sigma[row], alone)))
    close = all(distance <= 10 * CLOSE for distance in (*text, *velocities))
    detail = f"largest difference {max(text):.1e} in text, {max(velocities):.1e} in velocities"
    return close, detail


@torch.no_grad()
def _guidance(policy: PipelinePolicy, noise: torch.Tensor, conditioning: Conditioning, guidance: float) -> Judged:
    sigma = torch.full((len(noise),), 0.6, device=noise.device)
    positive = policy.velocity(noise, sigma, conditioning.positive)
    negative = policy.velocity(noise, sigma, conditioning.negative)
    together = policy.guided_velocity(noise, sigma, conditioning, guidance)
    distance = _distance(together, policy.guided(positive, negative, guidance))
    return distance <= 10 * CLOSE, f"largest difference {distance:.1e}"


def _gradients(
    policy: PipelinePolicy, noise: torch.Tensor, conditioning: Conditioning, groups: Sequence[str]
) -> dict[str, Judged]:
    """A line for each group of target modules: whether a gradient reaches them. Leaves the weights changed.

    A module without a gradient is a mistake only if the velocity depends on it. In Stable Diffusion 3, for example, the
    velocity does not depend on the text queries of the last block.
    """
    weights = policy.trainable_parameters()
    generator = counted_generator(0)
    with torch.no_grad():  # one factor of an adapter starts at zero, and the gradient of the other is then zero too
        for weight in weights.values():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator).to(weight))
    levels = {policy.module_at(level): level for level in (*torch.linspace(1, 0.02, 50).tolist(), 0.6)}  # one a module
    sigma, condition = torch.tensor([*levels.values()], device=noise.device), conditioning.positive[[0] * len(levels)]
    x = noise[[0] * len(levels)]
    velocity = policy.velocity(x, sigma, condition)
    loss = velocity.square().mean()
    found: Sequence[torch.Tensor | None] = [None] * len(weights)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    adapted = list(dict.fromkeys(name.split(".lora_")[0] for name in weights))
    without = {
        name.split(".lora_")[0]
        for name, gradient in zip(weights, found, strict=True)
        if gradient is None or not gradient.isfinite().all() or not gradient.any()
    }
    lines: dict[str, Judged] = {}
    for group in groups:
        modules = target_modules(adapted, group, policy.targets)
        idle = [name for name in modules if name in without]
        missed = [name for name in idle if _matters(policy, name, x, sigma, condition, velocity)]
        unused = len(idle) - len(missed)
        detail = f"{len(modules) - len(idle)} of {len(modules)} modules"
        detail += f"; the velocity does not depend on {unused} more" if unused else ""
        detail += f"; no gradient reaches {missed[0]}" if missed else ""
        passed = None if unused == len(modules) else not missed
        lines[f"a gradient reaches {group}"] = passed, detail
    return lines


@torch.no_grad()
def _matters(
    policy: PipelinePolicy,
    module: str,
    x: torch.Tensor,
    sigma: torch.Tensor,
    condition: Condition,
    velocity: torch.Tensor,
) -> bool:
    """Whether a change of the adapters on this module changes the velocity."""
    parts = [weight for name, weight in policy.trainable_parameters().items() if name.startswith(f"{module}.lora_")]
    kept = [part.clone() for part in parts]
    for part in parts:
        part.add_(1.0)
    changed = _distance(policy.velocity(x, sigma, condition), velocity) != 0  # not > 0, which is false for NaN
    for part, before in zip(parts, kept, strict=True):
        part.copy_(before)
    return changed


@torch.no_grad()
def _round_trip(policy: PipelinePolicy) -> Judged:
    image = _image(policy)
    error = (policy.decode(policy.encode_media(image)) - image).square().mean()
    detail = f"PSNR {-10 * error.log10().item():.1f} dB for a rendered sign; above 25 with a trained autoencoder"
    return None, detail


@torch.no_grad()
def _one_step(policy: PipelinePolicy, noise: torch.Tensor, conditioning: Conditioning) -> Judged:
    x0, half = policy.encode_media(_image(policy)), torch.full((1,), 0.5, device=noise.device)
    x = (x0 + noise[:1]) / 2
    empty = conditioning.negative[[0]]
    error = (x - 0.5 * policy.velocity(x, half, empty) - x0).norm() / (x - x0).norm()
    detail = f"leaves {error.item():.2f} of a half-noised image's error; below 1 with a trained model"
    return None, detail


def _image(policy: PipelinePolicy) -> torch.Tensor:
    drawn = torch.from_numpy(render(Scene(lines=("HELLO",)))).permute(2, 0, 1)[None].float() / 255
    size = policy.request.height, policy.request.width
    return torch.nn.functional.interpolate(drawn, size, mode="bilinear").to(policy.device)


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().max().item()
