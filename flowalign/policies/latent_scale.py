"""Between an autoencoder's latents and those that its transformer was trained on, of a variance near 1.

Shape legend: B rows, C channels, h and w latent pixels, ... one dimension more in videos, of frames.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from flowalign.config.base import UserError


@dataclass(frozen=True, eq=False)
class LatentScale:
    """The model's latents are (autoencoder's - shift) * scale, after each square of `patch` pixels became channels."""

    shift: float | torch.Tensor  # for all channels, or (C,)
    scale: float | torch.Tensor
    patch: int = 1

    @classmethod
    def of(cls, autoencoder: Any) -> "LatentScale":
        """As diffusers' pipelines read it from an autoencoder, whichever of their three ways it has.

        Statistics of patches (FLUX.2), a mean and a standard deviation of each channel
        (Wan, Qwen-Image), or one scale and perhaps a shift (Stable Diffusion 3, FLUX.1). Raises UserError without any.
        """
        config = autoencoder.config
        if (statistics := getattr(autoencoder, "bn", None)) is not None:
            std = (statistics.running_var + config["batch_norm_eps"]).sqrt()
            return cls(statistics.running_mean, 1 / std, config["patch_size"][0])
        if config.get("latents_std") is not None:
            return cls(torch.tensor(config["latents_mean"]), 1 / torch.tensor(config["latents_std"]))
        if config.get("scaling_factor") is None:
            raise UserError(
                f"model.path: the configuration of its {type(autoencoder).__name__} says no scale of latents"
            )
        return cls(config.get("shift_factor") or 0, config["scaling_factor"])

    def to_model(self, latents: torch.Tensor) -> torch.Tensor:
        """The autoencoder's latents (B, C, ..., h, w) as the model has them; of patches (B, C p^2, h / p, w / p)."""
        patches = pixel_unshuffle(latents, self.patch) if self.patch > 1 else latents
        return (patches - _along(self.shift, patches)) * _along(self.scale, patches)

    def to_autoencoder(self, latents: torch.Tensor) -> torch.Tensor:
        """The way back."""
        patches = latents / _along(self.scale, latents) + _along(self.shift, latents)
        return pixel_shuffle(patches, self.patch) if self.patch > 1 else patches


def _along(numbers: float | torch.Tensor, latents: torch.Tensor) -> float | torch.Tensor:
    """Numbers of channels (C,) beside latents (B, C, ...)."""
    if not isinstance(numbers, torch.Tensor):
        return numbers
    return numbers.to(latents).view(-1, *[1] * (latents.ndim - 2))
