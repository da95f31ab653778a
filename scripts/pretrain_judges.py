"""Train the toyworld's judges from scratch: `python scripts/pretrain_judges.py`.

The judges are a vision transformer, a CLIP, an aesthetic head and a preference model. The script ends by printing how
well they judge. Each stage starts from the models in the output folder, so `--stages` can train later stages alone:

    vit         the vision transformer: what covers each patch, what is in the image
    clip        the CLIP, whose image tower starts as the vision transformer
    damage      the vision transformer, trained further to see damage
    alike       the CLIP, trained further on prompts that differ in a word or two
    aesthetic   the head on the CLIP
    preference  the CLIP, tuned on choices between two images

The artifact head on the vision transformer is trained by scripts/train_artifact_reward.py, on the images of
scripts/make_toyworld_artifacts.py.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import CLIPModel

from flowalign.disk.files import make_folder
from flowalign.disk.tensors import save_tensors
from flowalign.toyworld.making import clip as clips
from flowalign.toyworld.making import preference, vision
from flowalign.toyworld.making.measuring import measure
from rewards.backbones.vit import load_vit

STAGES = ("vit", "clip", "damage", "alike", "aesthetic", "preference")


def main(
    output: Annotated[Path, typer.Option(help="the folder to write")] = Path("assets/toyworld/judges"),
    stages: Annotated[str, typer.Option(help="the stages to train; other models come from the folder")] = ",".join(
        STAGES
    ),
    seed: Annotated[int, typer.Option(help="seed of weights, images and noise")] = 0,
    vit_steps: Annotated[int, typer.Option(help="updates in stage vit, with 32 images each")] = 1000,
    clip_steps: Annotated[int, typer.Option(help="updates in stage clip, with 128 images each")] = 600,
    damage_steps: Annotated[int, typer.Option(help="updates in stage damage, with 48 images each")] = 1200,
    alike_steps: Annotated[int, typer.Option(help="updates in stage alike, with 96 images each")] = 300,
    preference_steps: Annotated[int, typer.Option(help="updates in stage preference, with 48 pairs each")] = 150,
    rounds: Annotated[int, typer.Option(help="rounds of the final measurement, with 64 held-out images each")] = 16,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    chosen = stages.split(",")
    if unknown := [stage for stage in chosen if stage not in STAGES]:
        raise typer.BadParameter(f"{unknown[0]!r} is not a stage; the stages are {', '.join(STAGES)}")
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
        save_tensors(output / "aesthetic.safetensors", clips.fit_aesthetic(_read_clip(output), seed, 16, print))
    if "preference" in chosen:
        tuned = preference.train_preference(_read_clip(output), seed, preference_steps, 48, print)
        clips.save_clip(tuned, output / "preference")
    measure(output, print, rounds)


def _read_vit(output: Path) -> Any:
    return load_vit(str(output / "vit"))


def _read_clip(output: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(output / "clip", dtype=torch.float32)


if __name__ == "__main__":
    typer.run(main)
