"""Make the embedded world's judges from nothing: `python scripts/pretrain_judges.py`.

A vision transformer, a CLIP, an aesthetic head and a preference, then prints how well they judge. A stage starts from
what is in the output folder, so `--stages` can make the later ones alone:

    vit         the vision transformer: what covers each patch, what is in the picture
    clip        the CLIP, whose image tower starts as the vision transformer
    damage      the vision transformer, trained on to see damage
    alike       the CLIP, trained on among prompts that differ in a word or two
    aesthetic   the head on the CLIP
    preference  the CLIP tuned on choices between two pictures

The artifact head, on the vision transformer, is made by scripts/train_artifact_reward.py from the pictures of
scripts/make_toyworld_artifacts.py.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import CLIPModel

from flowalign.disk.files import make_folder
from flowalign.toyworld.making import clip as clips
from flowalign.toyworld.making import preference, vision
from flowalign.toyworld.making.measuring import measure
from rewards.backbones.vit import load_vit

STAGES = ("vit", "clip", "damage", "alike", "aesthetic", "preference")


def main(
    output: Annotated[Path, typer.Option(help="the folder to write")] = Path("assets/toyworld/judges"),
    stages: Annotated[str, typer.Option(help="what to make; the rest is taken from the folder")] = ",".join(STAGES),
    seed: Annotated[int, typer.Option(help="of weights, pictures and noise")] = 0,
    vit_steps: Annotated[int, typer.Option(help="updates of vit, of 32 pictures")] = 1000,
    clip_steps: Annotated[int, typer.Option(help="updates of clip, of 128 pictures")] = 600,
    damage_steps: Annotated[int, typer.Option(help="updates of damage, of 48 pictures")] = 1200,
    alike_steps: Annotated[int, typer.Option(help="updates of alike, of 96 pictures")] = 300,
    preference_steps: Annotated[int, typer.Option(help="updates of preference, of 48 pairs")] = 150,
    rounds: Annotated[int, typer.Option(help="how often 64 held-out pictures are judged to measure")] = 16,
    threads: Annotated[int, typer.Option(help="processor threads")] = 2,
) -> None:
    chosen = stages.split(",")
    if unknown := [stage for stage in chosen if stage not in STAGES]:
        raise typer.BadParameter(f"{unknown[0]!r} is no stage; the stages are {', '.join(STAGES)}")
    torch.set_num_threads(threads)
    make_folder(output)
    if "vit" in chosen:
        vision.save_vit(vision.train_vit(seed, vit_steps, 32, print), output / "vit")
    if "clip" in chosen:
        clips.save_clip(clips.train_clip(_read_vit(output), seed, clip_steps, 128, print), output / "clip")
    if "damage" in chosen:
        vision.save_vit(vision.sharpen_vit(_read_vit(output), seed, damage_steps, 48, print), output / "vit")
    if "alike" in chosen:
        clips.save_clip(clips.sharpen_clip(_read_clip(output), seed, alike_steps, 96, print), output / "clip")
    if "aesthetic" in chosen:
        head = clips.fit_aesthetic(_read_clip(output), seed, 16, print)
        clips.save_aesthetic(head, output / "aesthetic.safetensors")
    if "preference" in chosen:
        tuned = preference.train_preference(_read_clip(output), seed, preference_steps, 48, print)
        clips.save_clip(tuned, output / "preference")
    measure(output, print, rounds)


def _read_vit(output: Path) -> Any:
    return load_vit(str(output / "vit"))[0]


def _read_clip(output: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(output / "clip", dtype=torch.float32)


if __name__ == "__main__":
    typer.run(main)
