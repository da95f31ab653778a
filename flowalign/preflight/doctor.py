"""`flowalign doctor`: what works on this machine, and in a sentence why the rest does not."""

import importlib.metadata
import os
import shutil
from functools import partial
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from huggingface_hub import constants as hub

import rewards
from flowalign.config.base import UserError
from flowalign.disk.about import versions
from flowalign.disk.assets import asset
from flowalign.policies.attention import CANDIDATES, attention_seconds, use_attention
from flowalign.policies.base import forward_dtype
from flowalign.policies.compiling import why_not_compiled
from flowalign.preflight.step_time import seconds_of
from flowalign.rollout.prompts import BUNDLED
from flowalign.toyworld.render import Scene, render
from rewards.devices import chosen_device

Row = tuple[str, bool, str]  # part, whether it works, and how or why not

NEEDED = ("packages", "CPU", "OCR", "embedded model", "bundled prompts")  # the quick start needs all of these
TOKENS, HEADS, HEAD_SIZE = 1024, 24, 64  # of an image of 512 pixels in Stable Diffusion 3.5 medium
EXTRAS = {  # each extra with the packages that it installs
    "xformers": ("xformers",),
    "bitsandbytes": ("bitsandbytes",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "serve": ("fastapi", "uvicorn"),
}
WORD = "HELLO"
ROOMY = 5  # GiB; a run with a few checkpoints of a large model's adapters may take as much
_GIB = 2**30


def diagnose() -> list[Row]:
    """(part, whether it works, detail) for everything that flowalign needs or can use; takes a few seconds."""
    device = chosen_device()
    return [
        _packages(),
        *_devices(),
        _bf16(device),
        *(_attention(backend, device) for backend in CANDIDATES),
        _compile(device),
        _ocr(),
        _assets("embedded model", ["toyworld/model"]),
        _assets("bundled prompts", list(BUNDLED.values())),
        _hub(),
        _disk(),
        *(_extra(name) for name in EXTRAS),
    ]


def _packages() -> Row:
    return "packages", True, ", ".join(f"{name} {version}" for name, version in versions().items())


def _devices() -> list[Row]:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB
    cpu = ("CPU", True, f"{allowed} cores, {memory:.1f} GiB of memory")
    if torch.cuda.is_available():
        cards = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
        return [cpu, ("CUDA", True, ", ".join(f"{card.name}, {card.total_memory / _GIB:.1f} GiB" for card in cards))]
    if torch.version.cuda is None:
        return [cpu, ("CUDA", False, "this PyTorch is built without CUDA")]
    return [
        cpu,
        ("CUDA", False, f"this PyTorch, built for CUDA {torch.version.cuda}, finds no graphics card or driver"),
    ]


def _bf16(device: torch.device) -> Row:
    """The speed of a matrix product in bf16 relative to fp32."""
    size = 4096 if device.type == "cuda" else 512
    try:
        ratio = _seconds(size, torch.float32, device) / _seconds(size, torch.bfloat16, device)
    except RuntimeError as error:
        return "bf16", False, f"a matrix product fails ({_first_line(error)}); use model.dtype=fp32"
    if ratio > 1:
        return "bf16", True, f"{ratio:.1f} times as fast as fp32 in a {size} x {size} product on {device.type}"
    return (
        "bf16",
        False,
        f"works, but {1 / ratio:.1f} times as slow as fp32 on {device.type}; model.dtype=fp32 is faster",
    )


def _seconds(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """The shortest time of a matrix product over six tries, without the first, a warm-up."""
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return min([seconds_of(partial(torch.matmul, left, right)) for _ in range(6)][1:])


def _attention(backend: str, device: torch.device) -> Row:
    """Set the backend on a transformer with one small block, as a policy does, then time it at a real model's shape."""
    dtype = forward_dtype("auto", device)
    transformer = SD3Transformer2DModel(
        sample_size=4, num_layers=1, num_attention_heads=1, attention_head_dim=32, caption_projection_dim=32
    )
    try:
        use_attention(transformer, backend, device, dtype)
    except UserError as error:
        return f"attention {backend}", False, str(error).removeprefix("model.attention: ")
    seconds = attention_seconds(backend, (TOKENS, HEADS, HEAD_SIZE), device, dtype, turns=3)
    where = f"on {device.type} in {str(dtype).removeprefix('torch.')}"
    detail = f"{1000 * seconds:.1f} ms {where}: forward and backward of two images of {TOKENS} tokens"
    return f"attention {backend}", True, detail


def _compile(device: torch.device) -> Row:
    why = why_not_compiled(device)
    return "torch.compile", why is None, why or f"model.compile can be used on {device.type}"


def _ocr() -> Row:
    """Find and read a word, in an image that is large enough for both."""
    image = torch.from_numpy(render(Scene(lines=(WORD,)))).permute(2, 0, 1).float() / 255
    image = image.repeat_interleave(4, 1).repeat_interleave(4, 2)
    try:
        score = rewards.score(rewards.load("ocr"), image[None], [f'a sign that says "{WORD}"']).item()
    except rewards.RewardError as error:
        return "OCR", False, str(error)
    return "OCR", score == 1, f"an image of the word {WORD} scores {score:.2f} of 1"


def _assets(part: str, names: list[str]) -> Row:
    """The folder of the assets, or the first asset that is missing."""
    try:
        places = [asset(name) for name in names]
    except UserError as error:
        return part, False, str(error)
    return part, True, str(places[0] if len(places) == 1 else places[0].parent)


def _hub() -> Row:
    """The hub's settings. The network is not tried: only loading a model shows whether it works."""
    cache = Path(hub.HF_HUB_CACHE)
    kept = f"the cache {cache} {'exists' if cache.is_dir() else 'does not exist yet'}"
    if hub.HF_HUB_OFFLINE:
        return "model hub", False, f"HF_HUB_OFFLINE is set: only cached models and local folders load; {kept}"
    return "model hub", True, f"HF_HUB_OFFLINE is not set: hub ids are downloaded where the network allows; {kept}"


def _disk() -> Row:
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    few = "" if free >= ROOMY else f"; less than {ROOMY} GiB may not hold a run's checkpoints"
    return "disk", free >= ROOMY, f"{free:.1f} GiB free in {Path.cwd()}{few}"


def _extra(name: str) -> Row:
    try:
        found = [f"{package} {importlib.metadata.version(package)}" for package in EXTRAS[name]]
    except importlib.metadata.PackageNotFoundError:
        return f"extra {name}", False, f"not installed; add it with pip install 'flowalign[{name}]'"
    return f"extra {name}", True, ", ".join(found)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
