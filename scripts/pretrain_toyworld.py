"""Train the toyworld's model from scratch and write its prompt lists: `python scripts/pretrain_toyworld.py`.

It takes about 75 minutes on two cores. A killed run continues when it is started again.
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
    work: Annotated[Path, typer.Option(help="folder for checkpoints and cached latents")] = Path(
        "runs/pretrain_toyworld"
    ),
    seed: Annotated[int, typer.Option(help="seed of weights, images and noise")] = 0,
    vae_steps: Annotated[int, typer.Option(help="autoencoder updates, with 32 images each")] = 1200,
    shards: Annotated[int, typer.Option(help="number of cached images, in units of 8,192")] = 32,
    shapes: Annotated[float, typer.Option(help="share of images with shapes; the rest are signs")] = 0.8,
    steps: Annotated[int, typer.Option(help="transformer updates")] = 9000,
    batch: Annotated[int, typer.Option(help="images per transformer update")] = 64,
    decay: Annotated[float, typer.Option(help="share of the updates, at the end, while the rate falls to 0")] = 0.4,
    start: Annotated[Path | None, typer.Option(help="a pipeline folder whose weights the training starts from")] = None,
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
