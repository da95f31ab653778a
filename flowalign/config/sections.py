"""The sections of a recipe: typed settings with their defaults, each documented where it stands."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from flowalign.config.base import MOST, Section
from flowalign.config.paths import expanded
from flowalign.config.rewards import Rewards, RewardSettings, unshaped
from flowalign.lazy import torch
from flowalign.sampling.noise import WINDOW, counted_generator
from flowalign.sampling.steps import Dynamics

Positive = Annotated[int, Field(gt=0, le=MOST)]
NotNegative = Annotated[int, Field(ge=0, le=MOST)]
Several = Annotated[int, Field(ge=2, le=MOST)]
Seed = Annotated[int, Field(ge=-(2**62), le=2**62)]  # what is added to one must fit into 64 bits
Rate = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(gt=0, lt=1)]


class Lora(Section):
    """Low-rank adapters, the trainable weights unless `model.lora` is null."""

    rank: Positive = 32
    """Rank of every adapter."""
    alpha: Rate = 64
    """Scale: the adapters' output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("attention",)
    """What is adapted: groups such as attention and feed_forward, or endings of module names; * stands for any part."""


class Model(Section):
    """The model to align."""

    path: str = "toyworld"
    """A diffusers pipeline folder, a hub id, or toyworld, the embedded model."""
    adapter: str | None = None
    """A LoRA's file, folder or hub id to start from, of diffusers, PEFT, kohya or ComfyUI; merged into the weights."""
    height: Positive | None = None
    """Pixels; null: the model's own."""
    width: Positive | None = None
    """Pixels; null: the model's own."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the forward passes; auto is bf16 where the device multiplies it itself. Trainable weights and all
    probabilities stay float32."""
    attention: str = "native"
    """Attention backend: native, xformers, any other of diffusers' dispatcher; `flowalign doctor` times some."""
    max_sequence_length: NotNegative | None = None
    """Tokens of the T5 encoder; null: the pipeline's own, of toyworld none. A pipeline without T5 gets as many zero
    tokens."""
    embedded_guidance: Annotated[float, Field(ge=0)] | None = None
    """The guidance that a distilled model (FLUX.1-dev) has as an input, in rollouts and losses; null: 3.5 there."""
    compile: bool = False
    """Compile the transformer's blocks with torch.compile: the first steps take minutes, all others less time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    cache_conditions: str | None = None
    """A folder: every prompt is encoded once, kept there for other runs too, and the text encoders are then released;
    null: they stay, and encode at every step."""
    lora: Lora | None = Lora()
    """The adapters to train; null trains all weights of the transformer."""

    @field_validator("attention")
    @classmethod
    def _chosen_as_ever(cls, backend: str) -> str:
        """Earlier versions wrote auto into every recipe of a run; it is native on every processor."""
        return "native" if backend == "auto" else backend

    @field_validator("path", "adapter", "cache_conditions")
    @classmethod
    def _home(cls, path: str | None) -> str | None:
        return path and expanded(path)


class Sampler(Section):
    """How pictures are drawn."""

    steps: Positive = 10
    """Denoising steps."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance; 1 is without, and costs half."""
    grid: Literal["model", "uniform"] = "model"
    """The scheduler's own sigmas, or evenly spaced ones (before its shift) that skip its nearly empty last step."""
    solver: Literal["euler", "dpm++"] = "euler"
    """Of the ODE: Euler, or DPM-Solver++ (2M) for good pictures in few steps."""


class Rollout(Sampler):
    """How the pictures to learn from are drawn."""

    dynamics: Literal[Dynamics, "ode"] = "flow_sde"
    """The stochastic step: flow_sde, dance_sde, cps or memoryless; ode is the default where no trajectory is needed."""
    noise_level: Annotated[float, Field(gt=0)] | None = 0.7
    """Its noise: a of flow_sde, eta of dance_sde, a in (0, 1) of cps; none for memoryless and ode."""
    window: tuple[NotNegative, NotNegative] | None = None
    """First stochastic step and the one after the last; all others are ODE steps. Null: all but the last."""
    window_size: Positive | None = None
    """Only so many steps of the window are stochastic at a time; null: all of them."""
    window_moves: Literal["random", "sliding"] = "random"
    """Where these are: drawn anew for every training step, or sliding on by one (MixGRPO)."""
    window_interval: Positive = 25
    """Training steps after which a sliding window moves."""
    shared_noise: bool = False
    """All pictures of a prompt start from the same noise and differ by their stochastic steps alone."""
    batch: Positive = 64
    """Pictures drawn at once."""

    @model_validator(mode="after")
    def _window_fits(self) -> Rollout:
        first, end = self.sde_window
        if not first < end <= self.steps:
            raise ValueError(f"window [{first}, {end}] must lie within the {self.steps} steps and hold one at least")
        if self.window_size and self.window_size > end - first:
            raise ValueError(
                f"window_size {self.window_size} exceeds the {end - first} steps of window [{first}, {end}]"
            )
        if self.dynamics in ("cps", "memoryless") and end == self.steps:
            raise ValueError(f"window must end before step {self.steps}, where a {self.dynamics} step has no noise")
        if self.dynamics == "cps" and not (self.noise_level and self.noise_level < 1):
            raise ValueError("noise_level of cps must be below 1")
        if self.dynamics in ("memoryless", "ode"):
            if self.noise_level and "noise_level" in self.model_fields_set:
                raise ValueError(f"dynamics {self.dynamics} takes no noise_level; leave it out")
            object.__setattr__(self, "noise_level", None)
        elif self.noise_level is None:
            raise ValueError(f"dynamics {self.dynamics} needs a noise_level")
        if self.shared_noise and self.dynamics == "ode":
            raise ValueError("shared_noise makes the pictures of a prompt all alike with dynamics ode; leave it out")
        if self.solver != "euler" and self.dynamics != "ode":
            raise ValueError(f"solver {self.solver} follows the ODE; it cannot take stochastic steps ({self.dynamics})")
        return self

    @model_validator(mode="after")
    def _window_is_used(self) -> Rollout:
        if self.dynamics == "ode" and (
            name := self.changed("window", "window_size", "window_moves", "window_interval")
        ):
            raise ValueError(f"{name} is of stochastic steps, and dynamics ode takes none; leave it out")
        if not self.window_size and (name := self.changed("window_moves", "window_interval")):
            raise ValueError(f"{name} is of a window_size, which moves within the window; give one")
        if self.window_moves == "random" and self.changed("window_interval"):
            raise ValueError("window_interval belongs to window_moves sliding; a random window moves at every step")
        return self

    @property
    def sde_window(self) -> tuple[int, int]:
        """The steps that may be stochastic, as [first, end)."""
        return self.window or (0, max(self.steps - 1, 1))

    @property
    def window_length(self) -> int:
        """How many steps are stochastic at a time."""
        first, end = self.sde_window
        return self.window_size or end - first

    def window_at(self, seed: int, step: int) -> tuple[int, int]:
        """The stochastic steps [first, end) of a training step, the same for all its samples; none for the ODE."""
        first, end = self.sde_window
        if self.dynamics == "ode":
            return first, first
        places = end - first - self.window_length + 1
        if self.window_moves == "sliding":
            first += (step // self.window_interval) % places
        else:
            first += int(torch.randint(places, (), generator=counted_generator(WINDOW, seed, step)))
        return first, first + self.window_length


class Train(Section):
    """How much is learnt, how fast; the batch arithmetic follows from it."""

    steps: Positive = 100
    """Training steps: one rollout and its updates each."""
    prompts_per_step: Positive = 48
    """Different prompts in a step, over all processes."""
    group_size: Several = 24
    """Pictures of each prompt; their rewards are compared with one another."""
    updates_per_step: Positive = 2
    """Optimizer updates in a pass over a step's items; each sees its own part of them."""
    passes: Positive = 1
    """Times that every item of a step is learnt from."""
    micro_batch: Positive = 32
    """Items (a picture at one denoising step) in a forward and backward pass."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW with its two averages in float32, or in 8 bits by bitsandbytes: a quarter of their memory."""
    learning_rate: Rate = 3e-4
    """Of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Of AdamW."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Of AdamW."""
    warmup_updates: NotNegative = 0
    """Updates over which the learning rate rises linearly."""
    max_grad_norm: Rate = 1.0
    """Gradients are clipped to this norm."""
    guidance: Annotated[float, Field(ge=1)] | None = None
    """Guidance of the trained policy in the loss; null: the rollout's."""
    reference_guidance: Annotated[float, Field(ge=1)] | None = None
    """Guidance of the reference in the KL; null: as in training."""
    idle_steps: NotNegative = 10
    """End after so many steps in a row that teach nothing: rewards do not differ, or the gradient is 0. 0: never."""
    ema_decay: Decay | None = None
    """Keep an exponential average of the weights, for evaluation and export: average <- d average + (1 - d) weights."""
    ema_interval: Positive = 1
    """Updates from one step of the average to the next (Flow-GRPO: 8)."""
    ema_warmup: bool = False
    """After update u, from 0, the decay is at most (1 + u) / (10 + u), so that the start is forgotten (Flow-GRPO)."""

    @model_validator(mode="after")
    def _average_is_kept(self) -> Train:
        if self.ema_decay is None and (name := self.changed("ema_interval", "ema_warmup")):
            raise ValueError(f"{name}: no average is kept without ema_decay; give one or leave it out")
        return self

    def ema_decay_at(self, update: int) -> float | None:
        """The average's decay after update number `update`, from 0; None where it stays. Source: Flow-GRPO's ema.py."""
        if self.ema_decay is None or (update + 1) % self.ema_interval:
            return None
        return min((1 + update) / (10 + update), self.ema_decay) if self.ema_warmup else self.ema_decay


class Evaluation(Sampler):
    """How progress is measured: the same prompts and the same noise every time."""

    prompts: str | tuple[str, ...] | None = None
    """Prompt list(s), held out from training; null: no evaluation."""
    count: Positive | None = None
    """The first so many prompts of each list; null: all."""
    images_per_prompt: Positive = 1
    """Pictures drawn for each prompt."""
    every: NotNegative = 10
    """Training steps between evaluations; before and after training there is always one. 0: only those two."""
    batch: Positive = 64
    """Pictures drawn at once."""
    rewards: Rewards | None = None
    """What is measured; null: the training rewards."""
    pictures: NotNegative = 12
    """Fixed prompts whose pictures are kept at every evaluation."""
    seed: Seed = 0
    """Of the noise."""

    @field_validator("rewards")
    @classmethod
    def _measured_as_they_are(cls, rewards: dict[str, RewardSettings] | None) -> dict[str, RewardSettings] | None:
        return unshaped(rewards)


class Run(Section):
    """Where the run lives and when it ends."""

    folder: Annotated[str, Field(min_length=1)] | None = None
    """The run folder; null: runs/ and the recipe's name."""
    seed: Seed = 0
    """Of prompts, noise and initial weights."""
    checkpoint_every: Positive = 10
    """Training steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """The last so many are kept."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """End after the step in which this much training time has passed."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Accelerate trackers to log to as well."""


class Collect(Section):
    """How `flowalign collect` fills the store, with the rollout's sampler."""

    prompts: Positive | None = None
    """The first so many prompts of the list; null: all."""
    group_size: Several = 16
    """Pictures of each prompt."""
    shard_prompts: Positive = 32
    """Prompts drawn and written at once; what a kill can cost."""


class Corrected(Section):
    """GDRO's corrected score: reward (quality - 3) + 0.2, with a quality from 1 to 5 (GDRO, section on evaluation)."""

    reward: str
    """The training reward, from 0 to 1."""
    quality: str
    """The held-out reward that says how good the picture is."""
    low: float = 1.0
    """The worst score of that reward; mapped to 1."""
    high: float = 5.0
    """Its best; mapped to 5."""

    @model_validator(mode="after")
    def _low_is_below_high(self) -> Corrected:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


class Features(Section):
    """What pictures of a prompt are compared by."""

    model: str
    """A timm vision transformer, or a CLIP model as the reward clipscore takes it."""
    backbone: Literal["timm", "clip"] = "timm"
    """Which of the two."""


class Guard(Section):
    """The audit of every evaluation: whether a reward that rises is bought with what it does not see."""

    rewards: Rewards | None = None
    """Held-out rewards, none of which is trained on; null: only the pictures' statistics and the KL."""
    corrected: Corrected | None = None
    """Also audit GDRO's corrected score."""
    features: Features | None = None
    """For the diversity of a prompt's pictures, where evaluation.images_per_prompt gives it several; null: the pictures
    themselves, shrunk to 16 x 16 pixels."""
    count: Several = 64
    """So many of the evaluation prompts, evenly spaced, are audited."""
    seeds: Several = 3
    """Sets of noise from which the bands of the base model are learnt."""
    false_alarm: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    """How often, at most, an evaluation of an unchanged model alarms."""
    patience: Positive = 2
    """An alarm is sustained when so many evaluations in a row alarm."""
    stop: bool = False
    """End the run at a sustained alarm."""
    kl_samples: Positive = 16
    """Pictures from whose paths the KL to the reference is measured."""

    @field_validator("rewards")
    @classmethod
    def _measured_as_they_are(cls, rewards: dict[str, RewardSettings] | None) -> dict[str, RewardSettings] | None:
        return unshaped(rewards)
