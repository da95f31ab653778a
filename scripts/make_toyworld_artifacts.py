"""Render two folders of toyworld images, clean and damaged, as training data of the artifact judge.

    python scripts/make_toyworld_artifacts.py --output runs/artifacts
    python scripts/train_artifact_reward.py --clean runs/artifacts/clean --artifacts runs/artifacts/artifacts \
        --model toyworld/judges/vit --output assets/toyworld/judges/artifact.safetensors
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from flowalign.disk.assets import asset
from flowalign.disk.files import make_folder
from flowalign.disk.media import save_image
from flowalign.toyworld.grammar import random_example, words
from flowalign.toyworld.making.artifacts import HELD_OUT, KINDS, damaged
from flowalign.toyworld.render import render


def main() -> None:
    """Parse the command line and write the images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for clean/ and artifacts/")
    parser.add_argument("--count", type=int, default=3000, help="number of images in each folder")
    parser.add_argument("--held-out", action="store_true", help="use the kinds of damage that are held out of training")
    parser.add_argument("--shapes", type=float, default=0.5, help="share of images with shapes; the rest are signs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images and of the damage")
    options = parser.parse_args()
    kinds = list((HELD_OUT if options.held_out else KINDS).values())
    rng, pool = np.random.default_rng(options.seed), words(held_out=options.held_out)
    for name in ("clean", "artifacts"):
        make_folder(options.output / name)
    autoencoder = AutoencoderKL.from_pretrained(asset("toyworld/model"), subfolder="vae", dtype=torch.float32)
    for index in range(options.count):
        for name in ("clean", "artifacts"):
            image = render(random_example(rng, pool, options.shapes)[1])
            if index % 2:  # half of them pass the model's decoder, whose traces are not artifacts
                image = decoded(autoencoder, image)
            if name == "artifacts":
                image = damaged(image, kinds[index // 2 % len(kinds)], rng)
            save_image(options.output / name / f"{index:05d}.png", image)
    print(f"wrote {options.count} clean and {options.count} damaged images into {options.output}")


@torch.no_grad()
def decoded(autoencoder: AutoencoderKL, image: np.ndarray) -> np.ndarray:
    """An image (H, W, 3), uint8, encoded and decoded by the autoencoder."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    back = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mean).sample[0]
    return ((back.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


if __name__ == "__main__":
    main()
