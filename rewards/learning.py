"""Common parts of the rewards that learn: a head on frozen features, its state, and minibatches of counted seeds."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

_SEPARATOR = "|"  # no parameter's name contains it


class Head(nn.Module):
    """Logits (...) of features (..., D); the features are scaled to length sqrt(D). An untrained head gives 0."""

    def __init__(self, width: int, hidden: int, seed: int = 0):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, 1)
        nn.init.kaiming_uniform_(self.inner.weight, a=5**0.5, generator=torch.Generator().manual_seed(seed))
        for parameter in (self.inner.bias, *self.outer.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See the class."""
        unit = F.normalize(features, dim=-1) * features.shape[-1] ** 0.5
        return self.outer(F.gelu(self.inner(unit))).squeeze(-1)


def counted(*key: int) -> torch.Generator:
    """A generator whose draws depend on the numbers alone, so that a resumed run draws the same."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step of the optimizer along the gradient of the loss, a scalar, alone."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def training_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The module's parameters and the optimizer's state of each, by name."""
    state = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state[parameter].items():
            state[f"{name}{_SEPARATOR}{key}"] = value.detach().clone()
    return state


def load_training_state(state: Mapping[str, torch.Tensor], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores a state of `training_state`; KeyError or RuntimeError when it belongs to another module."""
    for name, parameter in module.named_parameters():
        parameter.data.copy_(state[name])
        prefix = f"{name}{_SEPARATOR}"
        kept = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        optimizer.state[parameter] = {
            key: value.clone() if key == "step" else value.clone().to(parameter) for key, value in kept.items()
        }
        if not kept:
            del optimizer.state[parameter]
