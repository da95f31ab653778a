"""The sections of a recipe: typed settings with their defaults, each documented where it stands."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from flowalign.config.base import MOST, Section
from flowalign.config.paths import expanded
from flowalign.config.rewards import MeasuredRewards
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
    """Low-rank adapters (LoRA). They are the only trained weights, unless `model.lora` is null."""

    rank: Positive = 32
    """Rank of every adapter. Raise it for more capacity; memory and files grow in proportion."""
    alpha: Rate = 64
    """The adapters' output is multiplied by alpha / rank. The usual choice is once or twice the rank."""
    targets: tuple[str, ...] = ("attention",)
    """The modules that get an adapter: groups such as attention and feed_forward, or endings of module names, in
    which * stands for any text."""


class Model(Section):
    """The model to align."""

    path: str = "toyworld"
    """A diffusers pipeline folder, a hub id, or toyworld, the embedded model."""
    adapter: str | None = None
    """A LoRA to start from: a file, a folder or a hub id, as diffusers, PEFT, kohya or ComfyUI write it. It is
    merged into the weights."""
    height: Positive | None = None
    """Height of an image in pixels; null: the size that the model was made for."""
    width: Positive | None = None
    """Width of an image in pixels; null: the size that the model was made for."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the forward passes; auto is bf16 where the device has instructions for it, else fp32. Trained
    weights and all probabilities stay float32."""
    attention: str = "native"
    """Attention backend: native, xformers or another name that diffusers knows. `flowalign doctor` times some of
    them."""
    max_sequence_length: NotNegative | None = None
    """Tokens that the T5 encoder reads of a prompt; null: the pipeline's own number, and none for toyworld. A pipeline
    without a T5 gets so many zero tokens in its place."""
    embedded_guidance: Annotated[float, Field(ge=0)] | None = None
    """The guidance that a distilled model (FLUX.1-dev) takes as an input, in rollouts and losses alike; null: 3.5
    for such a model."""
    compile: bool = False
    """Compile the transformer's blocks with torch.compile. The first steps take minutes, all later ones less time."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more training
    time."""
    cache_conditions: str | None = None
    """A folder in which every prompt's condition is kept once, for other runs too; the text encoders are then released.
    Null: the text encoders stay in memory and encode at every step."""
    lora: Lora | None = Lora()
    """The adapters to train; null trains all weights of the transformer."""

    @field_validator("attention")
    @classmethod
    def _chosen_as_ever(cls, backend: str) -> str:
        """Earlier versions wrote auto into every recipe of a run; on every processor it meant native."""
        return "native" if backend == "auto" else backend

    @field_validator("path", "adapter", "cache_conditions")
    @classmethod
    def _home(cls, path: str | None) -> str | None:
        return path and expanded(path)


class Sampler(Section):
    """How samples are drawn."""

    steps: Positive = 10
    """Denoising steps of a sample. More steps cost as much more time and follow the model more exactly."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Scale of classifier-free guidance; 1 draws without guidance, at half the cost."""
    schedule: Literal["model", "uniform"] = "model"
    """The sigma schedule. model: the values of the model's own scheduler. uniform: values that are even before the
    model's shift, without the nearly empty last step of the scheduler's own."""
    solver: Literal["euler", "dpm++"] = "euler"
    """Solver of the ODE: Euler, or DPM-Solver++ (2M), which needs fewer steps for the same quality."""


class Rollout(Sampler):
    """How the samples to learn from are drawn."""

    dynamics: Literal[Dynamics, "ode"] = "flow_sde"
    """The rule of a stochastic step: flow_sde, dance_sde, cps, memoryless or linear_sde. ode takes no stochastic step;
    it is the default of algorithms that need no trajectory."""
    noise_level: Annotated[float, Field(gt=0)] | None = 0.7
    """Amount of noise in a stochastic step: a of flow_sde, eta of dance_sde, a in (0, 1) of cps, a factor of linear_sde
    (1 unless it is given); memoryless and ode take none. Raise it for more exploration; too much shows as grain."""
    window: tuple[NotNegative, NotNegative] | None = None
    """The stochastic steps, as the first and the one after the last; all others are ODE steps. Null: all steps but the
    last."""
    window_size: Positive | None = None
    """How many steps of the window are stochastic at a time; null: all of them. Lower it to train fewer steps a
    sample."""
    window_moves: Literal["random", "sliding"] = "random"
    """Where those steps lie: drawn anew for every training step, or sliding through the window (MixGRPO)."""
    window_interval: Positive = 25
    """Training steps after which a sliding window moves on by one denoising step."""
    shared_noise: bool = False
    """Let all samples of a group start from the same noise, so that they differ by their stochastic steps alone."""
    batch: Positive = 64
    """Samples drawn at once. Lower it when memory runs out; the numbers do not depend on it."""

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
        elif self.dynamics == "linear_sde" and "noise_level" not in self.model_fields_set:
            object.__setattr__(self, "noise_level", 1.0)
        elif self.noise_level is None:
            raise ValueError(f"dynamics {self.dynamics} needs a noise_level")
        if self.shared_noise and self.dynamics == "ode":
            raise ValueError("shared_noise makes all samples of a group alike with dynamics ode; leave it out")
        if self.solver != "euler" and self.dynamics != "ode":
            raise ValueError(
                f"solver {self.solver} follows the ODE and cannot take the stochastic steps of {self.dynamics}"
            )
        return self

    @model_validator(mode="after")
    def _window_is_used(self) -> Rollout:
        if self.dynamics == "ode" and (
            name := self.changed("window", "window_size", "window_moves", "window_interval")
        ):
            raise ValueError(f"{name} is a setting of stochastic steps, and dynamics ode takes none; leave it out")
        if not self.window_size and (name := self.changed("window_moves", "window_interval")):
            raise ValueError(f"{name} says how a window_size moves within the window; give a window_size too")
        if self.window_moves == "random" and self.changed("window_interval"):
            raise ValueError("window_interval belongs to window_moves sliding; a random window moves at every step")
        return self

    @property
    def sde_window(self) -> tuple[int, int]:
        """The denoising steps that may be stochastic, as [first, end)."""
        return self.window or (0, max(self.steps - 1, 1))

    @property
    def window_length(self) -> int:
        """How many denoising steps are stochastic at a time."""
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
    """How much is learnt and how fast. `flowalign plan` shows the batch arithmetic that follows."""

    steps: Positive = 100
    """Training steps. Each draws one batch of samples and takes its updates."""
    prompts_per_step: Positive = 48
    """Prompts in a training step, over all processes."""
    group_size: Several = 24
    """Samples of each prompt, whose rewards are compared with one another. Raise it for less noise in the
    advantages."""
    updates_per_step: Positive = 2
    """Optimizer updates of an inner epoch; each learns from its own part of the step's items."""
    inner_epochs: Positive = 1
    """How often a training step learns from each of its items. Above 1 fewer samples are drawn for as many updates, and
    the policy moves further from the one that drew them."""
    micro_batch: Positive = 32
    """Items (a sample at one noise level) in a forward and backward pass. Lower it when memory runs out."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW with its two averages in float32, or in 8 bits (bitsandbytes) for a quarter of their memory."""
    learning_rate: Rate = 3e-4
    """AdamW's learning rate. Lower it where the reward rises and falls again; raise it where nothing moves."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """AdamW's weight decay: every update multiplies the weights by 1 - learning_rate x this value."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """AdamW's decays of its averages of the gradient and of the squared gradient."""
    warmup_updates: NotNegative = 0
    """Updates over which the learning rate rises linearly from 0."""
    max_grad_norm: Rate = 1.0
    """Gradients with a larger norm are scaled down to this one."""
    guidance: Annotated[float, Field(ge=1)] | None = None
    """Guidance of the trained policy in the loss; null: that of the rollout."""
    reference_guidance: Annotated[float, Field(ge=1)] | None = None
    """Guidance of the reference model in the KL; null: that of the trained policy."""
    idle_steps: NotNegative = 10
    """End the run after so many steps in a row that teach nothing, because rewards do not differ or the gradient is 0.
    0: go on."""
    ema_decay: Decay | None = None
    """Decay d of an average of the weights, which is then evaluated and exported: average <- d average + (1 - d)
    weights. Null: no average is kept."""
    ema_interval: Positive = 1
    """Updates after which the average takes a step (Flow-GRPO: 8)."""
    ema_warmup: bool = False
    """Keep the decay after update u, counted from 0, at most (1 + u) / (10 + u), so that the average forgets its start
    (Flow-GRPO)."""

    @model_validator(mode="after")
    def _average_is_kept(self) -> Train:
        if self.ema_decay is None and (name := self.changed("ema_interval", "ema_warmup")):
            raise ValueError(f"{name}: without ema_decay no average is kept; give ema_decay, or leave {name} out")
        return self

    def ema_decay_at(self, update: int) -> float | None:
        """The average's decay after update number `update`, counted from 0; None where the average stays.

        Source: Flow-GRPO's ema.py.
        """
        if self.ema_decay is None or (update + 1) % self.ema_interval:
            return None
        return min((1 + update) / (10 + update), self.ema_decay) if self.ema_warmup else self.ema_decay


class Evaluation(Sampler):
    """How progress is measured. Every evaluation has the same prompts and the same noise."""

    prompts: str | tuple[str, ...] | None = None
    """Prompt list(s) that are held out from training; null: no evaluation."""
    count: Positive | None = None
    """How many prompts of each list are used, from the first on; null: all."""
    images_per_prompt: Positive = 1
    """Samples drawn of each prompt. Raise it for narrower intervals."""
    every: NotNegative = 10
    """Training steps between evaluations. There is always one before and one after training; 0: only those two."""
    batch: Positive = 64
    """Samples drawn at once. Lower it when memory runs out; the numbers do not depend on it."""
    rewards: MeasuredRewards | None = None
    """The rewards to measure; null: the training rewards."""
    keep_media: NotNegative = 12
    """How many prompts have their media kept at every evaluation, for the report; always the same ones."""
    seed: Seed = 0
    """Seed of the noise."""


class Run(Section):
    """Where the run lives and when it ends."""

    folder: Annotated[str, Field(min_length=1)] | None = None
    """The run folder; null: runs/ and the recipe's name."""
    seed: Seed = 0
    """Seed of the order of prompts, of the noise and of the adapters' first weights."""
    checkpoint_every: Positive = 10
    """Training steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """How many checkpoints are kept: the last ones."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes of training; the run ends after the step in which they have passed. Null: no limit."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers that get the metrics too."""


class Collect(Section):
    """How `flowalign collect` fills the dataset of groups; it draws as `rollout` says."""

    prompts: Positive | None = None
    """How many prompts of the list are used, from the first on; null: all."""
    group_size: Several = 16
    """Samples of each prompt."""
    shard_prompts: Positive = 32
    """Prompts that are drawn and written together. A killed collection loses no more than those."""


class Corrected(Section):
    """GDRO's corrected score, reward (quality - 3) + 0.2, with a quality from 1 to 5 (GDRO, section on evaluation)."""

    reward: str
    """The training reward, whose scores lie between 0 and 1."""
    quality: str
    """The held-out reward that says how good the media are."""
    low: float = 1.0
    """The worst score of `quality`; it counts as 1."""
    high: float = 5.0
    """The best score of `quality`; it counts as 5."""

    @model_validator(mode="after")
    def _low_is_below_high(self) -> Corrected:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


class Features(Section):
    """The features by which the samples of a prompt are compared."""

    model: str
    """A timm vision transformer, or a CLIP model as the reward clipscore takes it."""
    backbone: Literal["timm", "clip"] = "timm"
    """Which of the two `model` is."""


class Guard(Section):
    """The audit of every evaluation: whether a reward rises at the cost of what it does not see."""

    rewards: MeasuredRewards | None = None
    """Held-out rewards, none of which is trained on; null: only image statistics and the KL are audited."""
    corrected: Corrected | None = None
    """Also audit GDRO's corrected score; null: do not."""
    features: Features | None = None
    """The features that measure the diversity of a prompt's samples, where evaluation.images_per_prompt is above 1;
    null: the images themselves, shrunk to 16 x 16 pixels."""
    count: Several = 64
    """How many of the evaluation prompts are audited, evenly spaced over the list."""
    seeds: Several = 3
    """How many sets of noise the base model is drawn from, to learn the bands in which its metrics lie."""
    false_alarm: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    """The largest share of evaluations of an unchanged model that may alarm. Lower it for wider bands."""
    patience: Positive = 2
    """How many evaluations in a row must alarm until the alarm counts as sustained."""
    stop: bool = False
    """End the run at a sustained alarm."""
    kl_samples: Positive = 16
    """Samples from whose trajectories the KL to the reference is measured. Raise it for less noise."""
