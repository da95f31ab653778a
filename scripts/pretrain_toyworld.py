"""Make the embedded world's model and prompt lists from nothing: `python scripts/pretrain_toyworld.py`.

Takes about an hour and a quarter on two cores; a killed run goes on where it was when started again.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL

from flowalign.disk.files import make_folder
from flowalign.toyworld.making import pretraining


def main(
    output: Annotated[Path, typer.Option(help="the pipeline folder to write")] = Path("assets/toyworld/model"),
    work: Annotated[Path, typer.Option(help="checkpoints and cached latents")] = Path("runs/pretrain_toyworld"),
    seed: Annotated[int, typer.Option(help="of weights, pictures and noise")] = 0,
    vae_steps: Annotated[int, typer.Option(help="autoencoder updates of 32 pictures")] = 1200,
    shards: Annotated[int, typer.Option(help="cached pictures, in units of 8,192")] = 32,
    shapes: Annotated[float, typer.Option(help="share of shape pictures; the rest are signs")] = 0.8,
    steps: Annotated[int, typer.Option(help="transformer updates")] = 9000,
    batch: Annotated[int, typer.Option(help="pictures per transformer update")] = 64,
    decay: Annotated[float, typer.Option(help="last part of the updates over which the rate falls to 0")] = 0.4,
    start: Annotated[Path | None, typer.Option(help="a pipeline folder whose weights are gone on from")] = None,
) -> None:
    make_folder(work)
    tokenizer = pretraining.make_tokenizer()
    pretraining.write_prompts(output.parent / "prompts")
    if start is None:
        vae = pretraining.train_autoencoder(work, seed, vae_steps, batch=32, log=print)
    else:
        vae = AutoencoderKL.from_pretrained(start, subfolder="vae", dtype=torch.float32)
    data = pretraining.cache_latents(work, vae, tokenizer, seed, shards, shapes, log=print)
    transformer, text = pretraining.train_transformer(work, data, tokenizer, seed, steps, batch, decay, print, start)
    pretraining.assemble(output, vae, transformer, text, tokenizer)
    print(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
