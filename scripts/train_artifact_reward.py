"""Train the head of the artifact reward from two folders, images without and with artifacts, in minutes.

    python scripts/train_artifact_reward.py --clean good/ --artifacts bad/ --output artifact.safetensors

A share of both folders is held out; the script prints how well the head tells those images apart (area under the ROC
curve). With --init it trains an earlier head further, for example on images that a policy has drawn since.
"""

import argparse
from pathlib import Path

import torch
from scipy.stats import rankdata

from rewards import RewardError
from rewards.artifact import Head, fit, head_logits, image_patches, load_head, save_head
from rewards.backbones.vit import VisionBackbone
from rewards.media import folder_images


def area_under_curve(clean: torch.Tensor, artifacts: torch.Tensor) -> float:
    """The probability that an image with artifacts has the higher logit, from logits (N,) and (M,)."""
    ranks = rankdata(torch.cat([clean, artifacts]).numpy())[len(clean) :]
    pairs = len(clean) * len(artifacts)
    return float((ranks.sum() - len(artifacts) * (len(artifacts) + 1) / 2) / pairs)


def main() -> None:
    """Parse the command line, train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", required=True, help="folder of images without artifacts")
    parser.add_argument("--artifacts", required=True, help="folder of images with artifacts")
    parser.add_argument("--output", type=Path, required=True, help="the head's file, .safetensors")
    parser.add_argument("--model", default="vit_base_patch14_dinov2.lvd142m", help="timm name, hub id or folder")
    parser.add_argument("--init", help="a head to train further, with its own model instead of --model")
    parser.add_argument("--hidden", type=int, default=256, help="width of the head")
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="learning rate of the head")
    parser.add_argument("--held-out", type=float, default=0.2, help="share of both folders that is not trained on")
    parser.add_argument("--seed", type=int, default=0, help="seed of the head's weights and of the held-out share")
    options = parser.parse_args()
    if not 0 < options.held_out < 1:
        parser.error(f"--held-out must lie between 0 and 1, not {options.held_out}")
    if options.output.suffix != ".safetensors":
        parser.error(f"--output {options.output} must end in .safetensors")
    try:
        train(options)
    except RewardError as error:
        parser.exit(1, f"error: {error}\n")


def train(options: argparse.Namespace) -> None:
    """Compute the features, train the head, measure it on the held-out images, save it."""
    files = [
        folder_images(folder, "artifact", option)
        for option, folder in (("--clean", options.clean), ("--artifacts", options.artifacts))
    ]
    if min(len(paths) for paths in files) < 5:
        raise RewardError("both folders need at least 5 images, since some of them are held out")
    head, model = load_head(options.init) if options.init else (None, options.model)
    backbone = VisionBackbone(model)
    kept, held = [], []
    for place, paths in enumerate(files):
        patches = image_patches(backbone, paths)
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(options.seed + place)).tolist()
        count = max(1, round(options.held_out * len(paths)))
        held.append([patches[index] for index in order[:count]])
        kept.append([patches[index] for index in order[count:]])
    head = (head or Head(backbone.dim, options.hidden, options.seed)).to(backbone.device)
    losses = fit(head, kept[0], kept[1], steps=options.steps, learning_rate=options.learning_rate)
    with torch.no_grad():
        logits = [head_logits(head, part).cpu() for part in held]
    save_head(head.cpu(), model, options.output)
    counts = f"{len(held[0])} clean and {len(held[1])} other held-out images"
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; area under the curve {area_under_curve(*logits):.4f} on {counts}")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
