"""A diffusers pipeline seen as a policy: rows to conditions, states to velocities, latents to media.

Trainable weights are float32; the forward passes run in the policy's dtype. Snapshots are named copies of the
trainable weights alone, so that an old policy or an average costs no second model.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flowalign.config.base import UserError
from flowalign.policies.conditioning import Condition as Condition
from flowalign.policies.conditioning import Conditioning as Conditioning
from flowalign.policies.request import MediaRequest, Row
from flowalign.sampling.guidance import GuidanceForm, guided

Schedule = Literal["model", "uniform"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def forward_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The dtype that model.dtype asks for; auto is bfloat16 where the device has instructions for its products.

    A processor without them computes bfloat16 ten to forty times slower than float32. The variable
    FLOWALIGN_AUTO_DTYPE says what auto is on any machine, so that tests can run in either precision on each.
    Raises UserError where it holds none of bf16, fp16 and fp32.
    """
    if setting == "auto":
        setting = os.environ.get("FLOWALIGN_AUTO_DTYPE", setting)
    if setting in _DTYPES:
        return _DTYPES[setting]
    if setting != "auto":
        raise UserError(f"FLOWALIGN_AUTO_DTYPE is {setting!r}; it must be one of {', '.join(_DTYPES)}, or unset")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older versions of torch cannot say; float32 is right everywhere.
        able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = device.type == "cpu" and any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


class Policy(ABC):
    """What the loop, the rollout and the algorithms see of a model. An adapter fills in the abstract methods."""

    transformer: nn.Module  # of a policy whose only module it is; others override `modules`
    device: torch.device
    dtype: torch.dtype
    request: MediaRequest  # what it makes
    guidance_form: ClassVar[GuidanceForm] = "plain"
    inputs: ClassVar[Sequence[str]] = ("prompt",)  # what of a row its condition depends on, beside files
    input_files: ClassVar[Sequence[str]] = ()  # keys of a row's metadata that name files which it depends on
    forwards: int = 0  # rows that the modules have seen, the unit of compute budgets

    def __init__(self) -> None:
        self.snapshots: dict[str, dict[str, torch.Tensor]] = {}
        self._current: set[str] = set()
        self._beginning: dict[str, torch.Tensor] | None = None
        self._has_begun = False
        self._adapters_off = False

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> Conditioning:
        """Both sides of guidance, of every row; a policy that takes text alone is a `TextPolicy`.

        It reads the rows' `inputs` and `input_files`, and the negative side all of them but the prompt, so that a cache
        (`flowalign.policies.conditions`) knows rows that have a condition in common.
        """

    @abstractmethod
    def _forward(self, module: nn.Module, x: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The prediction (B, ...) of one of the `modules`, of inputs already in the policy's dtype."""

    @abstractmethod
    def decode(self, latents: torch.Tensor, *, gradients: bool = False) -> torch.Tensor:
        """Latents (B, ...) to media in [0, 1], float32; with `gradients` a loss of the media has one in the latents."""

    @abstractmethod
    def latent_shape(self, request: MediaRequest) -> tuple[int, ...]:
        """Shape of one latent of what is asked for."""

    @abstractmethod
    def sigmas(self, steps: int, schedule: Schedule = "model") -> torch.Tensor:
        """The denoising schedule (steps + 1,), from 1 down to 0."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the trained weights as diffusers loads them: LoRAs, or whole modules."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The networks that carry what is trained, by their names in the pipeline; some may be frozen."""
        return {"transformer": self.transformer}

    def module_at(self, sigma: float) -> str:
        """The name of the module that predicts the velocity at a noise level; a family of several says which."""
        (name,) = self.modules
        return name

    @property
    def in_lockstep(self) -> bool:
        """Whether its passes wait for the same passes of other processes, with which it shares weights out."""
        return any(isinstance(module, FSDPModule) for module in self.modules.values())

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        """v = eps - x0 at states x (B, ...) and noise levels sigma (B,), float32, of one side of guidance.

        In half precision its gradients are: who trains with it scales losses, as the learner does.
        """
        self.forwards += len(x)
        autocast = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=autocast):
            return self._predicted(x.to(self.dtype), sigma, condition).float()

    def _predicted(self, x: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Of each row (B, ...) by the module of its noise level."""
        modules = self.modules
        if len(modules) == 1:  # asks nothing of sigma, which the device may still be computing
            return self._forward(next(iter(modules.values())), x, sigma, condition)
        own = [self.module_at(level) for level in sigma.tolist()]
        parts: list[torch.Tensor] = []
        places: list[int] = []  # the row that each row of the parts is of
        for name in self._asked(own):
            rows = [row for row, its in enumerate(own) if its == name]
            places += rows or [len(own)]
            taken = rows or [0]  # a pass that another process waits for, whose answer is nobody's
            parts.append(self._forward(modules[name], x[taken], sigma[taken], condition[taken]))
        return torch.cat(parts)[[places.index(row) for row in range(len(own))]]

    def _asked(self, own: Collection[str]) -> list[str]:
        """The modules to call: where weights are shared out, those that any process needs, in one order."""
        if not self.in_lockstep:
            return [name for name in self.modules if name in own]
        needed = torch.tensor([name in own for name in self.modules], dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(needed, torch.distributed.ReduceOp.MAX)
        return [name for name, asked in zip(self.modules, needed.tolist(), strict=True) if asked]

    def guided_velocity(
        self, x: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning, guidance: float
    ) -> torch.Tensor:
        """The velocity (B, ...) between both sides, in one batch; guidance 1 needs the pass of the positive one alone.

        See `flowalign.sampling.guidance` for the formula.
        """
        if guidance == 1:
            return self.velocity(x, sigma, conditioning.positive)
        both = Condition.cat([conditioning.negative, conditioning.positive])
        negative, positive = self.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return self.guided(positive, negative, guidance)

    def guided(self, positive: torch.Tensor, negative: torch.Tensor, guidance: float) -> torch.Tensor:
        """Both sides' velocities (B, ...) as one, in the form of the family.

        A "rescaled" family whose latents do not have a token's channels last packs them around this.
        """
        return guided(positive, negative, guidance, self.guidance_form)

    def free_text_encoders(self) -> None:
        """Release the pipeline's text encoders: from here on `encode` needs a cache (`flowalign.policies.conditions`).

        A model without a diffusers `pipeline` releases its encoders by its own method of this name.
        """
        pipeline: Any = getattr(self, "pipeline", None)
        if pipeline is None:
            raise NotImplementedError(f"{type(self).__name__} does not say how its text encoders are released")
        for name in [name for name in pipeline.components if name.startswith("text_encoder")]:
            setattr(pipeline, name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def text_limits(self) -> dict[str, tuple[Any, int]]:
        """Each kind of text encoder's tokenizer (Hugging Face's), and how many tokens it reads; nothing if unknown."""
        return {}

    def named_weights(self) -> dict[str, nn.Parameter]:
        """All weights of the modules by name, in several modules with the module's own before it."""
        named = {self._prefix(name): module for name, module in self.modules.items()}
        return {prefix + key: p for prefix, module in named.items() for key, p in module.named_parameters()}

    def _prefix(self, module: str) -> str:
        return "" if len(self.modules) == 1 else f"{module}."

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The weights that learn, by name."""
        return {name: p for name, p in self.named_weights().items() if p.requires_grad}

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """Copies of the weights that learn."""
        return {name: p.detach().clone() for name, p in self.trainable_parameters().items()}

    @torch.no_grad()
    def load_trainable_state(self, state: dict[str, torch.Tensor], *, begins: bool = True) -> None:
        """Put weights in place of the trained ones; the policy's next run then `begins` with them.

        Raises KeyError when a weight is missing from `state`.
        """
        for name, parameter in self.trainable_parameters().items():
            parameter.copy_(state[name])
        self.find_current()
        self._has_begun = self._has_begun and not begins

    def begin(self) -> bool:
        """Make it as it was before its first run, for another: its weights, and no snapshot but the reference.

        Returns whether there was an earlier run since its weights were loaded.
        """
        self.snapshots = {name: kept for name, kept in self.snapshots.items() if name == "reference"}
        for parameter in self.trainable_parameters().values():
            parameter.grad = None  # of a run that ended within a step
        self.find_current()
        earlier, self._has_begun = self._has_begun, True
        if earlier:
            self.load_trainable_state(self._beginning or self.snapshots["reference"], begins=False)
        else:  # with all weights trained the reference is a copy already
            self._beginning = None if self.is_current("reference") else self.trainable_state()
        return earlier

    def weights_changed(self) -> None:
        """To be said after every change of the trained weights: no snapshot equals them any more."""
        self._current.clear()

    def is_current(self, name: str) -> bool:
        """Whether a snapshot is known to equal the trained weights, so that its forward pass can be saved."""
        return name in self._current

    def find_current(self) -> None:
        """Compare all snapshots with the trained weights, after either was loaded."""
        weights = self.trainable_parameters()
        self._current = {
            name
            for name, kept in self.snapshots.items()
            if all(torch.equal(kept[key], parameter) for key, parameter in weights.items())
        }

    def snapshot(self, name: str) -> None:
        """Keep a copy of the weights as they are now."""
        self.snapshots[name] = self.trainable_state()
        self._current.add(name)

    @torch.no_grad()
    def blend(self, name: str, decay: float) -> None:
        """snapshot <- decay * snapshot + (1 - decay) * weights; a decay of 0 copies."""
        for key, parameter in self.trainable_parameters().items():
            self.snapshots[name][key].lerp_(parameter.detach(), 1 - decay)
        if decay == 0:
            self._current.add(name)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """The snapshot's weights in place of the trained ones, for forward passes only.

        Weights that FSDP shares out are copied: it gathers them from buffers of its own, and would not see others put
        in their place.
        """
        parameters = self.trainable_parameters()
        sharded = any(isinstance(parameter, DTensor) for parameter in parameters.values())
        kept = self.trainable_state() if sharded else {key: weight.data for key, weight in parameters.items()}

        def put(state: dict[str, torch.Tensor]) -> None:
            with torch.no_grad():
                for key, parameter in parameters.items():
                    if sharded:
                        parameter.copy_(state[key])
                    else:
                        parameter.data = state[key]

        try:
            put(self.snapshots[name])
            yield
        finally:
            put(kept)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The model as it was before training: adapters off, or the frozen copy in full fine-tuning."""
        if "reference" in self.snapshots:
            with self.using("reference"):
                yield
            return
        if self._adapters_off:  # inside another such block, which turns them on again
            yield
            return
        every: Iterable[Any] = self.modules.values()  # found now, since adapters that are off do not learn
        adapted = [module for module in every if any(weight.requires_grad for weight in module.parameters())]
        for module in adapted:
            module.disable_adapters()
        self._adapters_off = True
        try:
            yield
        finally:
            for module in adapted:
                module.enable_adapters()
            self._adapters_off = False


class TextPolicy(Policy):
    """A policy whose rows are their prompts; the negative side is the empty prompt."""

    def __init__(self) -> None:
        super().__init__()
        self._empty: Condition | None = None

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The condition of texts, one row each."""

    def encode(self, rows: Sequence[Row]) -> Conditioning:
        """The prompts, and for each the empty one, which is encoded once."""
        if self._empty is None:
            with torch.inference_mode(False), torch.no_grad():  # it outlives the mode that it is first asked for in
                self._empty = self.encode_prompts([""])
        return Conditioning(self.encode_prompts([row.prompt for row in rows]), self._empty.expand(len(rows)))
