"""Image statistics: numbers that change when a policy draws for its reward instead of for the prompt.

None of them is good or bad by itself. Each is computed per image (for a video it is the mean over the frames) and does
not depend on the batch.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_BINS = 8  # levels of each colour channel in the histogram
DARK = 0.2
EDGE = 0.1


def luma(images: torch.Tensor) -> torch.Tensor:
    """Brightness (B, H, W) of images (B, 3, H, W) in [0, 1]."""
    return (images * torch.tensor(_LUMA, device=images.device).view(3, 1, 1)).sum(1)


def dark_fraction(images: torch.Tensor) -> torch.Tensor:
    """Share (B,) of pixels darker than DARK."""
    return (luma(images) < DARK).float().flatten(1).mean(1)


def color_entropy(images: torch.Tensor) -> torch.Tensor:
    """Entropy (B,) of the colours in bits, with 8 levels per channel: 0 for a single colour, at most 9."""
    levels = (images.clamp(0, 1) * _BINS).long().clamp(max=_BINS - 1)
    index = ((levels[:, 0] * _BINS + levels[:, 1]) * _BINS + levels[:, 2]).flatten(1)
    counts = torch.zeros(len(images), _BINS**3, device=images.device)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=counts.dtype))
    share = counts / index.shape[1]
    return -torch.special.xlogy(share, share).sum(1) / torch.log(torch.tensor(2.0))


def edge_density(images: torch.Tensor) -> torch.Tensor:
    """Share (B,) of pixels where the Sobel gradient of the brightness, per pixel, exceeds EDGE."""
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=images.device) / 8
    weight = torch.stack([kernel, kernel.T])[:, None]
    padded = F.pad(luma(images)[:, None], (1, 1, 1, 1), mode="replicate")
    return (F.conv2d(padded, weight).norm(dim=1) > EDGE).float().flatten(1).mean(1)


def saturation(images: torch.Tensor) -> torch.Tensor:
    """Mean (B,) of HSV's saturation: (max - min) / max over the channels, 0 for black."""
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / high.clamp(min=1e-6)).flatten(1).mean(1)


def grid_energy(images: torch.Tensor) -> torch.Tensor:
    """Share (B,) of the brightness's power, without its mean, in patterns with a period below four pixels."""
    power = _spectrum(images).abs().square()
    height, width = power.shape[-2:]
    fine = torch.maximum(torch.fft.fftfreq(height)[:, None].abs(), torch.fft.fftfreq(width)[None, :].abs()) > 0.25
    total = power.flatten(1).sum(1)
    share = (power * fine.to(power)).flatten(1).sum(1) / total.clamp(min=1e-12)
    return torch.where(total > 1e-6, share, torch.zeros_like(share))


def repetition(images: torch.Tensor) -> torch.Tensor:
    """The highest correlation (B,) of an image with itself shifted, with wrapping, by at least an eighth of a side."""
    spectrum = _spectrum(images)
    correlation = torch.fft.ifft2(spectrum.abs().square()).real
    total = correlation[:, :1, :1].clamp(min=1e-6)
    height, width = correlation.shape[-2:]
    down, across = (torch.fft.fftfreq(side).abs() for side in (height, width))
    far = torch.maximum(down[:, None], across[None, :]) >= 1 / 8
    return (correlation / total).masked_fill(~far.to(correlation.device), -1.0).flatten(1).amax(1)


def _spectrum(images: torch.Tensor) -> torch.Tensor:
    gray = luma(images)
    return torch.fft.fft2(gray - gray.mean((1, 2), keepdim=True))


STATISTICS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dark_fraction": dark_fraction,
    "color_entropy": color_entropy,
    "edge_density": edge_density,
    "saturation": saturation,
    "grid_energy": grid_energy,
    "repetition": repetition,
}


@torch.no_grad()
def image_statistics(media: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every statistic (B,) of media in [0, 1]: images (B, 3, H, W), or videos (B, F, 3, H, W), averaged over frames."""
    frames = media.float().flatten(0, -4)
    return {name: measure(frames).view(len(media), -1).mean(1).cpu() for name, measure in STATISTICS.items()}


def group_diversity(features: torch.Tensor) -> float:
    """Mean Euclidean distance between pairs of the features (G, D) of G >= 2 images."""
    return float(torch.pdist(features.double()).mean())
