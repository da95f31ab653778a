"""`flowalign score`: score images or a dataset of groups with a reward."""

from pathlib import Path
from typing import Annotated

import typer

from flowalign.cli.console import ImagePrompts, RewardOptions, console
from flowalign.config.base import UserError
from flowalign.terminal import table_of


def score(
    reward: Annotated[str, typer.Argument(help="a built-in name, file.py:Name or package.module:Name")],
    images: Annotated[
        Path | None, typer.Option(help="a folder of images; they are read in natural order of their names: 9 before 10")
    ] = None,
    prompts: ImagePrompts = None,
    dataset: Annotated[
        Path | None, typer.Option(help="score this dataset of groups instead of --images, and keep the scores in it")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="the name under which the dataset keeps the scores; default: the reward's name")
    ] = None,
    option: RewardOptions = None,
    output: Annotated[Path | None, typer.Option(help="write the scores to this .csv or .jsonl file")] = None,
) -> None:
    """Score a folder of images, or a dataset of groups, with a reward."""
    from flowalign.cli.existing import check_images, check_prompts, check_rewards, check_scores

    check_rewards([reward])
    check_images(images)
    check_prompts(prompts)
    check_scores(output)
    import numpy as np

    from flowalign.cli.scoring import read_images, rescore_dataset, score_images, write_scores

    if dataset is not None:
        if images or prompts or output:
            raise UserError(
                "--dataset names a dataset with images, prompts and scores; leave --images, --prompts and --output out"
            )
        values = rescore_dataset(dataset, reward, option or [], name)
        console.print(
            f"mean {np.nanmean(values):.4f} of {np.isfinite(values).sum()} images; the scores are in {dataset}"
        )
        return
    if images is None:
        raise UserError("give --images or --dataset")
    if name is not None:
        raise UserError("--name is the reward's name in a dataset of groups; give --dataset with it")
    rows, paths = read_images(images, prompts)
    scores = score_images(reward, option or [], rows, paths)
    shown = ["left out" if value is None else f"{value:.4f}" for value in scores]
    lines = [(path.name, row.prompt, text) for path, row, text in zip(paths, rows, shown, strict=True)]
    console.print(table_of(("image", "prompt", "score"), lines))
    known = [value for value in scores if value is not None]
    if not known:
        raise UserError(f"reward {reward} left out all {len(scores)} images")
    console.print(f"mean {sum(known) / len(known):.4f} of {len(known)} images")
    if output is not None:
        write_scores(output, paths, rows, scores)
