"""The loop that trains each judge."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

WIDTH = 128
DEPTH = 4
HEADS = 4
PATCH = 8
MLP_RATIO = 3
EPSILON = 1e-6  # added in layer norms
MEAN = STD = (0.5, 0.5, 0.5)
PICTURE_NOISE = 0.02  # the judges will see a policy's images, which are never quite clean

Log = Callable[[str], None]


def train(
    name: str, module: nn.Module, loss_of: Callable[[int], torch.Tensor], steps: int, rate: float, log: Log
) -> None:
    """Trains with AdamW on `loss_of(step)`; the gradient's norm is at most 1, the rate warms up, then falls to 0."""
    learnt = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    started, total = time.process_time(), 0.0
    module.train()
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.param_groups[0]["lr"] = rate * _share_of_rate(step, steps)
        optimizer.step()
        total += loss.item()
        if (step + 1) % 25 == 0:
            log(f"{name} {step + 1}/{steps} loss {total / 25:.4f} {time.process_time() - started:.0f} s of a core")
            total = 0.0
    module.eval()


def _share_of_rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * step / steps))


def seen(clean: torch.Tensor, seed: int, stage: int, step: int) -> torch.Tensor:
    """The input (B, 3, 64, 64) in [-1, 1] of an image tower: clean images in [0, 1] with a little noise."""
    generator = torch.Generator().manual_seed(1_000_003 * (10 * seed + stage + 5) + step)
    noisy = (clean + PICTURE_NOISE * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
    return (noisy - MEAN[0]) / STD[0]
