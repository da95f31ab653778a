"""Make the embedded world's judges from nothing: `python scripts/pretrain_judges.py`.

A vision transformer, a CLIP and an aesthetic head, in about twenty minutes; then prints how well they judge. The
artifact head is made by scripts/train_artifact_reward.py from the pictures of scripts/make_toyworld_artifacts.py.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from flowalign.toyworld import judges
from rewards.vit import load_vit


def main(
    output: Annotated[Path, typer.Option(help="the folder to write")] = Path("assets/toyworld/judges"),
    seed: Annotated[int, typer.Option(help="of weights, pictures and noise")] = 0,
    vit_steps: Annotated[int, typer.Option(help="updates of the vision transformer, of 32 pictures")] = 1000,
    clip_steps: Annotated[int, typer.Option(help="updates of the CLIP, of 128 pictures")] = 600,
    detail_steps: Annotated[int, typer.Option(help="more updates of the vision transformer, for damage")] = 1200,
    start: Annotated[Path | None, typer.Option(help="go on from a vision transformer's folder")] = None,
    threads: Annotated[int, typer.Option(help="processor threads")] = 2,
) -> None:
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    if start is None:
        vit = judges.train_vit(seed, vit_steps, 32, print)
    else:
        vit = load_vit(str(start))[0]
    clip = judges.train_clip(vit, seed, clip_steps, 128, print)
    judges.save_clip(clip, output / "clip")
    judges.save_aesthetic(judges.fit_aesthetic(clip, seed, 16, print), output / "aesthetic.safetensors")
    judges.measure(output, print)
    judges.save_vit(judges.sharpen_vit(vit, seed, detail_steps, 48, print), output / "vit")  # the CLIP began from it


if __name__ == "__main__":
    typer.run(main)
