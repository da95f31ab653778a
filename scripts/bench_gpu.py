"""A training step of Stable Diffusion 3.5 Medium on a GPU: `python scripts/bench_gpu.py [key=value ...]`.

The script uses the published architecture with random weights: it downloads nothing, and a step costs the same as with
real weights. The setting is 512 pixels, bf16, LoRA of rank 32 and Flow-GRPO's recipe with guidance 4.5 and 32 images
per step. There is one row for each attention backend that runs here, and one for the fastest of them with compiled
blocks. The script prints a Markdown table with these columns:

    attention, compiled   the case
    images/s, items/s     speed of the rollout, decoding included, and of training; an item is an image at one
                          denoising step
    rollout, decode, train, step, floor
                          milliseconds; decode is a part of rollout; the floor is the same passes of the models alone
    step / floor          the median over the steps
    TFLOP/s, share        the transformer's rate in the floor, by PyTorch's count; its share of the rate that a large
                          matrix product reaches here in the same dtype
    GiB                   the peak of the GPU's memory

Arguments change the recipe, such as train.micro_batch=16. `--check` runs the script with a tiny model on any device: it
shows that the script works, but its numbers mean nothing.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.utils.flop_counter import FlopCounterMode

from flowalign.cli.console import quiet_libraries
from flowalign.config import Recipe, load_recipe
from flowalign.config.base import UserError
from flowalign.disk.about import versions
from flowalign.disk.files import replace_text
from flowalign.policies.attention import CANDIDATES, use_attention
from flowalign.policies.base import Condition, forward_dtype
from flowalign.policies.compiling import compile_blocks
from flowalign.policies.sd3 import SD3Policy
from flowalign.preflight.step_time import Decoding, play, recorded, seconds_of, time_steps
from flowalign.sampling import counted_generator
from flowalign.terminal import markdown, markdown_row
from flowalign.trainer import Trainer
from flowalign.training.display import Display
from rewards.devices import chosen_device

TEXT = 77  # CLIP's tokens, which come before T5's
MEDIUM: dict[str, Any] = {
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "dual_attention_layers": tuple(range(13)),
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "sample_size": 128,
}
TINY = MEDIUM | {
    "num_layers": 2,
    "num_attention_heads": 2,
    "caption_projection_dim": 128,
    "dual_attention_layers": (0,),
}
CHANNELS = (128, 256, 512, 512)
SETTINGS = ("evaluation.prompts=null", "guard=null", "train.prompts_per_step=4", "train.group_size=8")
CHECKED = ("model.height=64", "model.width=64", "train.group_size=2", "rollout.steps=3", "rollout.window=[0, 2]")


class RandomWeights(SD3Policy):
    """The architecture with random weights, and with random numbers instead of encoded prompts."""

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Random conditions of the published shapes, different for different prompts."""
        config = self.pipeline.transformer.config
        rows = [counted_generator(*prompt.encode()) for prompt in prompts]
        shape = (TEXT + self.max_sequence_length, config.joint_attention_dim)
        embeds = torch.stack([torch.randn(shape, generator=generator) for generator in rows])
        pooled = torch.stack([torch.randn(config.pooled_projection_dim, generator=generator) for generator in rows])
        return Condition({"embeds": embeds.to(self.device, self.dtype), "pooled": pooled.to(self.device, self.dtype)})


def random_policy(recipe: Recipe, device: torch.device, check: bool) -> RandomWeights:
    """The policy with weights from N(0, 0.02^2), drawn on the device."""
    torch.manual_seed(0)
    dtype = forward_dtype(recipe.model.dtype, device)
    with device:
        transformer = SD3Transformer2DModel(**(TINY if check else MEDIUM)).to(dtype)
        for weight in transformer.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32) if check else CHANNELS,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=16,
            layers_per_block=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        )
    texts = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = StableDiffusion3Pipeline(transformer, scheduler, vae, **dict.fromkeys(texts))
    return RandomWeights(pipeline, recipe.model.model_copy(update={"attention": "native"}), device, seed=0)


def brightness(media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> torch.Tensor:
    """A reward that costs nothing."""
    return media.mean((1, 2, 3))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a product of two large matrices, the best of twelve tries."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: left @ right) for _ in range(12))


def operations(trainer: Trainer) -> int:
    """The transformer's operations in a step, uncompiled and with PyTorch's own attention, so that they are counted."""
    trainer.tested = True
    with recorded(trainer) as passes:
        trainer._train_step()
    with FlopCounterMode(display=False) as counter:
        play(trainer, [one for one in passes if not isinstance(one, Decoding)])
    return counter.get_total_flops()


def row(recipe: Recipe, case: tuple[str, bool], found: dict[str, float], flops: int, rate: float) -> dict[str, str]:
    """A row of the table."""
    speed = flops / (found["floor"] - found["decode"])
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if torch.cuda.is_available() else "-"
    milliseconds = {name: f"{1000 * found[name]:.0f}" for name in ("rollout", "decode", "train", "step", "floor")}
    return {
        "attention": case[0],
        "compiled": "yes" if case[1] else "no",
        "images/s": f"{recipe.samples_per_step / found['rollout']:.2f}",
        "items/s": f"{recipe.items_per_step / found['train']:.2f}",
        **milliseconds,
        "step / floor": f"{found['ratio']:.3f}",
        "TFLOP/s": f"{speed / 1e12:.2f}",
        "share": f"{speed / rate:.1%}",
        "GiB": peak,
    }


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes to the recipe")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="number of measured steps in each case")] = 3,
    backends: Annotated[str, typer.Option(help="the attention backends to try")] = ",".join(CANDIDATES),
    compiled: Annotated[bool, typer.Option(help="also measure compiled blocks, with the fastest backend")] = True,
    check: Annotated[bool, typer.Option("--check", help="only test that the script works, with a tiny model")] = False,
) -> None:
    """Measure a step of Stable Diffusion 3.5 Medium with random weights."""
    if not torch.cuda.is_available() and not check:
        sys.exit("error: PyTorch finds no GPU on this machine; --check tests the script with a tiny model")
    quiet_libraries()
    device = chosen_device()
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        replace_text(prompts, "".join(f"a picture of {count} things\n" for count in range(64)))
        changes = [f"prompts={prompts}", f"run.folder={folder}/run", *SETTINGS, *(CHECKED if check else ())]
        try:
            recipe = load_recipe("sd35_medium_ocr", [*changes, *(overrides or [])])
            measure(recipe, device, repeats, backends.split(","), compiled, check)
        except UserError as error:
            sys.exit(f"error: {error}")


def measure(
    recipe: Recipe, device: torch.device, repeats: int, backends: Sequence[str], compiled: bool, check: bool
) -> None:
    """Measure every case and print the table line by line."""
    policy = random_policy(recipe, device, check)
    rate = matrix_rate(device, policy.dtype)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    what = "a tiny model, whose numbers mean nothing" if check else "Stable Diffusion 3.5 Medium, random weights"
    print(f"{what}: {policy.request.height} x {policy.request.width} pixels, LoRA of rank {recipe.model.lora.rank}")
    print(f"{where}, {str(policy.dtype).removeprefix('torch.')}, matrix product {rate / 1e12:.1f} TFLOP/s")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print("; ".join(f"{name}: {how}" for name, how in recipe.arithmetic()))

    def trainer() -> Trainer:
        folder = tempfile.mkdtemp(dir=recipe.folder.parent)
        run = recipe.run.model_copy(update={"folder": f"{folder}/run"})
        own = recipe.model_copy(update={"run": run})
        return Trainer.from_recipe(own, policy=policy, rewards={"ocr": brightness}, display=Display(quiet=True))

    flops = operations(trainer())
    steps: dict[str, float] = {}

    def measured(backend: str, is_compiled: bool) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = time_steps(
            trainer(), repeats, warm_ups=2 if is_compiled else 1
        )  # compiling for batches of any size takes one more step
        line = row(recipe, (backend, is_compiled), found, flops, rate)
        if not steps:
            print(markdown(line, ()), end="")
        print(markdown_row(line.values()), flush=True)
        steps[backend] = found["step"]

    for backend in backends:
        try:
            use_attention(policy.transformer, backend, device, policy.dtype)
        except UserError as error:
            print(f"{backend}: {error}", file=sys.stderr)
            continue
        measured(backend, is_compiled=False)
    if compiled and steps:
        fastest = min(steps, key=lambda name: steps[name])
        use_attention(policy.transformer, fastest, device, policy.dtype)
        compile_blocks(policy.transformer, device)
        measured(fastest, is_compiled=True)


if __name__ == "__main__":
    typer.run(main)
