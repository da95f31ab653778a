"""Runs recipes in several processes that share one import: `python process_worker.py JOBS.json`.

Jobs run one after another. A job has a `world`, the number of processes that are forked from this one, and `cases` that
they train in turn; with `sharded` they shard the frozen weights. Each process writes its samples, weights and counts
of scores beside the case's run folder. The keys of a case:

    dtype       trains a small network of this precision; without it the recipe's own model
    adapters    the small network has adapters
    of          goes on from a copy of this run folder
    asked       the second process is asked to stop in its first step
    refused     the run is refused at its start
    idle        the run ends itself, since its steps teach nothing
    clocks      every process has a clock of its own speed
"""

import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from flowalign import trainer as training
from flowalign.config import recipe_from_dict
from flowalign.config.base import UserError
from flowalign.policies.base import Condition, TextPolicy
from flowalign.policies.request import MediaRequest
from flowalign.rollout.dataset import collect
from flowalign.rollout.prompts import load_prompts
from flowalign.rollout.stages import Drawn
from flowalign.sampling import counted_generator
from flowalign.training.display import Display
from flowalign.training.interrupt import Interrupted
from rewards import TrainableReward

SIDE = 4  # of a latent; its image has four times as many pixels a side


class Brightness(TrainableReward):
    """The mean of one channel, by a factor that grows with the images of each update; 0.5 for `flat` prompts.

    With `limited` it judges only the flat prompts.
    """

    def __init__(self, channel, learns, flat, limited=False):
        self.channel, self.learns, self.flat, self.limited = channel, learns, flat, limited
        self.level, self.scored = torch.zeros(()), 0

    def applies_to(self, row):
        return row["prompt"] in self.flat or not self.limited

    def __call__(self, media, prompts, metadata):
        self.scored += len(media)
        seen = media[:, self.channel].flatten(1).mean(1) * (1 + self.level)
        return torch.where(torch.tensor([prompt in self.flat for prompt in prompts]), 0.5, seen)

    def update(self, media, prompts, metadata, step):
        self.level = self.level + media.mean() / (step + 1)
        return {"level": self.level.item()}

    def state_dict(self):
        return {"level": self.level}

    def load_state_dict(self, state):
        self.level = state["level"]


class Adapted(nn.Module):
    """A frozen layer with a trained low-rank layer beside it."""

    def __init__(self, size_in, size_out, dtype):
        super().__init__()
        self.frozen = nn.Linear(size_in, size_out, dtype=dtype).requires_grad_(False)
        self.down, self.up = (nn.Linear(*sizes, False, dtype=dtype) for sizes in ((size_in, 3), (3, size_out)))

    def forward(self, x):
        return self.frozen(x) + self.up(self.down(x))


class Velocity(nn.Module):
    _no_split_modules = (Adapted.__name__,)

    def __init__(self, dtype, layer):
        super().__init__()
        sizes = (2 * SIDE**2 + 1, 24, 24, SIDE**2)
        self.layers = nn.ModuleList(layer(a, b, dtype=dtype) for a, b in pairwise(sizes))
        generator = counted_generator(0)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))

    def forward(self, x, sigma, text):
        hidden = torch.cat([x.flatten(1), text, sigma[:, None]], dim=1)
        for layer in self.layers[:-1]:
            hidden = torch.tanh(layer(hidden))
        return self.layers[-1](hidden).view_as(x).clone()  # FSDP warns of views, which may be changed in place


class SmallPolicy(TextPolicy):
    """A network of three layers that computes in a given precision."""

    request = MediaRequest(64, 64)

    def __init__(self, dtype, layer=nn.Linear):
        super().__init__()
        self.device, self.dtype, self.transformer = torch.device("cpu"), dtype, Velocity(dtype, layer)
        self.snapshot("reference")

    def encode_prompts(self, prompts):
        rows = [torch.randn(SIDE**2, generator=counted_generator(*prompt.encode())) for prompt in prompts]
        return Condition({"text": torch.stack(rows).to(self.dtype)})

    def velocity(self, x, sigma, condition):
        self.forwards += len(x)
        return self._forward(self.transformer, x.to(self.dtype), sigma.to(self.dtype), condition)

    def _forward(self, module, x, sigma, condition):
        return module(x, sigma, condition.tensors["text"])

    def decode(self, latents):
        images = (0.5 + latents.float() / 6).clamp(0, 1).repeat_interleave(4, -1).repeat_interleave(4, -2)
        return images * torch.tensor([1.0, 0.8, 0.6]).view(3, 1, 1)

    def latent_shape(self, request):
        return (1, SIDE, SIDE)

    def sigmas(self, steps, schedule="model"):
        return torch.linspace(1, 0, steps + 1)

    def export(self, folder):
        folder.mkdir(exist_ok=True)
        save_file(self.trainable_state(), folder / "weights.safetensors")


def run(case: dict[str, Any], rank: int) -> None:
    recipe = recipe_from_dict(case["values"])
    policy = None
    if "dtype" in case:
        policy = SmallPolicy(getattr(torch, case["dtype"]), Adapted if case.get("adapters") else nn.Linear)
    learns, flat = case.get("learns", False), case.get("flat", ())
    limited = case.get("limited", False)  # the second reward
    rewards = {
        name: Brightness(index, learns, flat, limited and index == 1) for index, name in enumerate(recipe.rewards)
    }
    if recipe.dataset and not Path(recipe.dataset).exists():
        collect(recipe, Path(recipe.dataset), load_prompts(recipe.prompts), rewards, policy, lambda count: None)
    ticks = itertools.count(step=60 * (1 + rank))
    training.time = SimpleNamespace(perf_counter=ticks.__next__) if case.get("clocks") else time
    training.write_report = lambda folder: folder  # type: ignore[assignment]  # its plots take longer than the runs
    folder = Path(f"{recipe.folder}_seen")
    folder.mkdir(exist_ok=True)
    begin = partial(training.Trainer.from_recipe, recipe, policy=policy, rewards=rewards, display=Display(quiet=True))
    if case.get("refused"):
        with pytest.raises(UserError) as caught:
            begin()
        (folder / f"refused_{rank}").write_text(str(caught.value))
        return
    trainer = begin(resume="of" in case)
    if case.get("idle"):
        with pytest.raises(UserError) as caught:
            trainer.run()
        (folder / f"idle_{rank}").write_text(str(caught.value))
        return
    drawn: dict[str, torch.Tensor] = {}
    learn = trainer.learner.learn

    def watched(weighted, step, *more):
        samples = weighted.generated
        drawn[f"{step}/latents"] = samples.latents
        drawn[f"{step}/advantages"] = weighted.advantages.contiguous()
        if case.get("asked") and rank == 1 and step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        if isinstance(samples, Drawn) and samples.trajectory:
            drawn[f"{step}/log_probs"] = samples.trajectory.log_probs
        return learn(weighted, step, *more)

    trainer.learner.learn = watched
    save_file(trainer.policy.trainable_state(), folder / f"start_{rank}.safetensors")
    with suppress(Interrupted):
        trainer.run()
    (folder / f"step_{rank}").write_text(str(trainer.step))
    (folder / f"frozen_{rank}.json").write_text(json.dumps(frozen(trainer.policy.transformer)))
    save_file(drawn, folder / f"drawn_{rank}.safetensors")
    save_file(trainer.policy.trainable_state(), folder / f"weights_{rank}.safetensors")
    scored = {name: reward.scored for name, reward in rewards.items()}
    (folder / f"scored_{rank}.json").write_text(json.dumps(scored))


def frozen(transformer: nn.Module) -> dict[str, list[int]]:
    """For each frozen weight, the count of its numbers in this process, and of all its numbers."""
    weights = {name: weight for name, weight in transformer.named_parameters() if not weight.requires_grad}
    return {
        name: [(weight.to_local() if isinstance(weight, DTensor) else weight).numel(), weight.numel()]
        for name, weight in weights.items()
    }


def process(job: dict[str, Any], rank: int, port: int) -> None:
    if job["world"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["world"])}
        os.environ |= {"LOCAL_WORLD_SIZE": str(job["world"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if job.get("sharded"):
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    torch.set_num_threads(1)
    for case in job["cases"]:
        run(case, rank)
    if job["world"] > 1:
        torch.distributed.destroy_process_group()


def start(job: dict[str, Any], rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        process(job, rank, port)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def main(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        for case in job["cases"]:
            if "of" in case:
                shutil.copytree(case["of"], case["values"]["run"]["folder"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = {start(job, rank, port) for rank in range(job["world"])}
        while children:
            child, status = os.wait()
            children.discard(child)
            if status:
                for other in children:
                    os.kill(other, 9)
                sys.exit(f"a process of {job['world']} ended with {status}")


if __name__ == "__main__":
    os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    main(json.loads(Path(sys.argv[1]).read_text()))
