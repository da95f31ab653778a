"""What all adapters of diffusers' pipelines share: loading, the schedule, the autoencoder, the trained weights on disk.

An adapter names its pipeline class and LoRA targets and fills in `patch`, `encode_prompts`, `_forward`
and `pipeline_arguments`; docs/adding_a_model.md shows how. Latents have the autoencoder's layout (B, C, h, w).
"""

import inspect
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn

from flowalign.config import Model
from flowalign.config.base import UserError
from flowalign.disk.assets import EMBEDDED
from flowalign.policies.adapters import Native, export_lora, merge_adapter
from flowalign.policies.attention import use_attention
from flowalign.policies.base import Schedule, TextPolicy, forward_dtype
from flowalign.policies.compiling import compile_blocks
from flowalign.policies.folders import load_part, loading, part_class, pipeline_index
from flowalign.policies.latent_scale import LatentScale
from flowalign.policies.request import MediaRequest, Sizes
from flowalign.policies.schedules import EvenEuler, euler_scheduler
from flowalign.policies.weights import train_lora_or_all
from flowalign.sampling.schedule import shifted, sigma_schedule


class PipelinePolicy(TextPolicy):
    """A diffusers pipeline as a policy."""

    pipeline_class: ClassVar[Any]
    targets: ClassVar[Mapping[str, Sequence[str]]]  # named groups of endings of module names, for model.lora.targets
    native: ClassVar[Native] = {}  # the original code's names of weights, as the LoRA files of other trainers have them
    trained: ClassVar[Sequence[str]] = ("transformer",)  # components that carry what is trained, where a model has them
    optional_parts: ClassVar[Sequence[str]] = ()  # components that a saved pipeline may lack
    usual: ClassVar[tuple[int, float]] = (50, 4.5)  # steps and guidance, where nobody says others
    t5: ClassVar[str]  # the component that max_sequence_length is for
    sample_size: ClassVar[int | None] = None  # latent pixels of a side, where no configuration has them
    even_sigmas: ClassVar[bool] = False  # the pipeline hands its scheduler evenly spaced sigmas

    def __init__(self, pipeline: Any, model: Model, device: torch.device, seed: int, *, whole: bool = True):
        """Raises UserError for settings that the pipeline cannot work with.

        Without `whole` the trained modules stay where they were loaded, for `processes.prepare` to share out.
        """
        super().__init__()
        self.device, self.dtype = device, forward_dtype(model.dtype, device)
        self.pipeline, self.transformer = pipeline, pipeline.transformer
        pipeline.scheduler = euler_scheduler(pipeline.scheduler)
        self.latent_scale = LatentScale.of(pipeline.vae)
        self._base = None if Path(model.path).exists() else model.path
        configurations = pipeline.transformer.config, pipeline.vae.config
        self.request, self.max_sequence_length = self.sizes(model, *configurations)
        self._check(model)
        if model.adapter:
            merge_adapter(pipeline, model.adapter, self.native)
        modules: Mapping[str, Any] = self.modules
        for name, part in (pipeline.components | modules).items():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
                if whole or name not in modules:
                    part.to(device)
        pipeline.vae.to(memory_format=torch.channels_last)
        for module in modules.values():
            use_attention(module, model.attention, device, self.dtype)
            if model.gradient_checkpointing:
                module.enable_gradient_checkpointing()
        train_lora_or_all(self, model.lora, self.targets, seed)
        if model.compile:
            for module in modules.values():
                compile_blocks(module, device)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Those of the `trained` components that the pipeline has."""
        return self.modules_of(self.pipeline)

    @classmethod
    def modules_of(cls, pipeline: Any) -> dict[str, nn.Module]:
        """The modules of a pipeline that no policy was made of yet."""
        found = {name: getattr(pipeline, name, None) for name in cls.trained}
        return {name: module for name, module in found.items() if module is not None}

    @classmethod
    def load(
        cls,
        path: Path | str,
        model: Model,
        device: torch.device,
        seed: int,
        *,
        whole: bool = True,
        text_encoders: bool = True,
    ) -> "PipelinePolicy":
        """From a pipeline folder or hub id; without text encoders it cannot encode."""
        pipeline = cls.load_pipeline(path, forward_dtype(model.dtype, device), text_encoders=text_encoders)
        return cls(pipeline, model, device, seed, whole=whole)

    @classmethod
    def load_pipeline(cls, path: Path | str, dtype: torch.dtype, *, text_encoders: bool = True) -> Any:
        """The plain pipeline; its autoencoder is float32, since half precision shows in the images.

        Raises UserError, with the part, for files that are missing, damaged, or not all of a network.
        """
        index, known = pipeline_index(path), inspect.signature(cls.pipeline_class).parameters
        named = {name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
        parts: dict[str, Any] = {name: None for name in cls.optional_parts if name not in named}
        if not text_encoders:
            parts |= {name: None for name in known if name.startswith("text_encoder")}
        for name, parameter in known.items():
            if parameter.default is parameter.empty and name not in (*named, *parts):
                raise UserError(f"model.path: the model_index.json of {str(path)!r} names no {name}; fetch it again")
        if not Path(path).exists():
            with loading(path, "files"):
                path = cls.pipeline_class.download(path, **parts)
        for name in sorted(named & set(known) - set(parts)):
            if not (Path(path) / name).is_dir():
                without = ", or [null, null] there to go without" if name in cls.optional_parts else ""
                raise UserError(
                    f"model.path: {Path(path) / name} is missing, which model_index.json names; fetch it again{without}"
                )
            kind = part_class(name, *index[name])
            if isinstance(kind, type) and issubclass(kind, nn.Module):
                parts[name] = load_part(Path(path), name, kind, torch.float32 if name == "vae" else dtype)
        with loading(path, "scheduler or tokenizer"):
            return cls.pipeline_class.from_pretrained(path, **parts)

    @classmethod
    def sizes(cls, model: Model, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Sizes:
        """What the settings come to, by the configurations of the model's parts.

        Raises UserError where neither say a size.
        """
        own = cls.sample_size or transformer.get("sample_size")
        if own is None and None in (model.height, model.width):
            raise UserError(f"model.height, model.width: the configuration of {model.path} says no size; give them")
        side = (own or 0) * 2 ** (len(vae["block_out_channels"]) - 1)
        call = inspect.signature(cls.pipeline_class.__call__).parameters
        # The embedded model has never seen the zero tokens that stand for a T5 which is left out.
        length = 0 if model.path == EMBEDDED else call["max_sequence_length"].default
        if model.max_sequence_length is not None:
            length = model.max_sequence_length
        return Sizes(MediaRequest(model.height or side, model.width or side), length)

    @property
    @abstractmethod
    def patch(self) -> int:
        """Sides of the squares of latent pixels that are the transformer's tokens."""

    @abstractmethod
    def pipeline_arguments(self, latents: torch.Tensor, guidance: float) -> dict[str, Any]:
        """What the plain pipeline is called with, beside prompts, size and steps, to draw the same from this noise."""

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of a condition's row, for `flowalign plan`, which has no text encoder to ask.

        Raises UserError for an adapter that does not say.
        """
        raise UserError(f"{type(self).__name__} has no condition_shapes, which flowalign plan needs")

    def text_limits(self) -> dict[str, tuple[Any, int]]:
        """Of T5, as long as the settings say, and of CLIP; a second CLIP reads as the first."""
        limits: dict[str, tuple[Any, int]] = {}
        for name, part in self.pipeline.components.items():
            if name.startswith("tokenizer") and part is not None:
                if name == self.t5.replace("text_encoder", "tokenizer"):
                    limits["T5"] = part, self.max_sequence_length
                else:
                    limits.setdefault("CLIP", (part, part.model_max_length))
        return limits

    def _check(self, model: Model) -> None:
        unit = self.pipeline.vae_scale_factor * self.patch
        for name, pixels in (("height", self.request.height), ("width", self.request.width)):
            if pixels % unit:
                near = max(unit, round(pixels / unit) * unit)
                raise UserError(f"model.{name} {pixels}: this model's sides are multiples of {unit}; give {near}")
        if self._has_t5() and not 0 < self.max_sequence_length <= 512:
            raise UserError(
                f"model.max_sequence_length {self.max_sequence_length}: this model has a T5 encoder; give 1 to 512"
            )

    def _has_t5(self) -> bool:
        """Also where its weights were left out, since every prompt is encoded already."""
        parts = self.pipeline.components
        return any(parts.get(name) is not None for name in (self.t5, self.t5.replace("text_encoder", "tokenizer")))

    def decode(self, latents: torch.Tensor, *, gradients: bool = False) -> torch.Tensor:
        """Images (B, 3, H, W), a few at a time: activations that fit the cache are three times as fast."""
        with torch.set_grad_enabled(gradients):
            scaled = self.latent_scale.to_autoencoder(latents.float())
            pixels = scaled[0, 0].numel() * self.pipeline.vae_scale_factor**2
            at_once = max(1, (16 * 64**2 if self.device.type == "cpu" else 8 * 512**2) // pixels)
            parts = scaled.split(at_once)
            images = torch.cat([self.pipeline.vae.decode(part, return_dict=False)[0] for part in parts])
            return (images / 2 + 0.5).clamp(0, 1).contiguous()

    @torch.no_grad()
    def encode_media(self, media: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [0, 1], the mode of the autoencoder's posterior."""
        posterior = self.pipeline.vae.encode(media.to(self.device, torch.float32) * 2 - 1).latent_dist
        return self.latent_scale.to_model(posterior.mode())

    def latent_shape(self, request: MediaRequest) -> tuple[int, ...]:
        """(16, height / 8, width / 8) of the published models; ValueError for what the schedule or model is not for."""
        if request.frames is not None:
            raise ValueError(f"{type(self).__name__} makes images, not {request.frames} frames")
        if request != self.request and self.pipeline.scheduler.config.use_dynamic_shifting:
            known, asked = (f"{one.height} x {one.width}" for one in (self.request, request))
            raise ValueError(f"the schedule is that of {known} images; load the policy for {asked}")
        patch = self.latent_scale.patch
        channels, factor = self.pipeline.vae.config.latent_channels, self.pipeline.vae_scale_factor * patch
        return (int(channels) * patch**2, request.height // factor, request.width // factor)

    def sigmas(self, steps: int, schedule: Schedule = "model") -> torch.Tensor:
        """The pipeline's schedule for images of the policy's size, or its shift of evenly spaced values.

        A schedule that shifts with the resolution does so as in Esser et al. (2024), section 5.3.2, by token count.
        """
        config = self.pipeline.scheduler.config
        shift = self._resolution_shift() if config.use_dynamic_shifting else config.shift
        lowest = None
        if schedule == "model" and not self.even_sigmas and not isinstance(self.pipeline.scheduler, EvenEuler):
            # As FlowMatchEulerDiscreteScheduler: its lowest value is shifted already, and is so again with the others.
            first = torch.tensor(1 / config.num_train_timesteps, dtype=torch.float64)
            lowest = float(first if config.use_dynamic_shifting else shifted(first, shift))
        return sigma_schedule(steps, shift, lowest=lowest, terminal=config.shift_terminal)

    def _resolution_shift(self) -> float:
        config = self.pipeline.scheduler.config
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(self._tokens(), *(config[name] for name in names))
        return math.exp(mu) if config.time_shift_type == "exponential" else mu

    def _tokens(self) -> int:
        """The number of tokens that an image is in the transformer."""
        _, height, width = self.latent_shape(self.request)
        return height * width // self.patch**2

    def export(self, folder: Path) -> None:
        """What `pipe.load_lora_weights(folder)` takes, or a folder of each module whole.

        A LoRA of a module after the first is in a folder of its name, which diffusers reads with
        `pipe.load_lora_weights(folder / "transformer_2", load_into_transformer_2=True)`.
        """
        state = self.trainable_state()  # its own state_dict() would have one process take shared-out weights apart
        modules: Mapping[str, Any] = self.modules
        for place, (name, module) in enumerate(modules.items()):
            prefix = self._prefix(name)
            own = {key.removeprefix(prefix): weight for key, weight in state.items() if key.startswith(prefix)}
            if own and "reference" in self.snapshots:
                module.save_pretrained(folder / name)
            elif own:
                export_lora(self.pipeline_class, module, own, self._base, folder / name if place else folder)
