"""`flowalign sample`: draw images, or choose the best of many candidates."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowalign.cli.console import RewardOptions, console, device, quiet_libraries
from flowalign.cli.options import Adapter, DrawingOptions, ModelArgument, with_options
from flowalign.config.base import MOST, UserError
from flowalign.terminal import Terminal

if TYPE_CHECKING:
    from flowalign.evaluate.drawing import Drawing
    from flowalign.experiments.scaling import Prune
    from flowalign.policies.base import Policy
    from flowalign.rollout.prompts import Row
    from rewards import Reward


Output = Annotated[
    Path | None,
    typer.Option(
        help="an empty folder for the PNG files; default: one under samples/ named after the model and settings"
    ),
]
BestOf = Annotated[
    int | None,
    typer.Option(
        max=MOST, metavar="N", help="draw N candidates per prompt, keep the best, and write the scores of all"
    ),
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        help="the reward that chooses among the candidates; repeatable: several choose by the sum of their ranks"
    ),
]
Pruning = Annotated[
    list[str] | None,
    typer.Option(
        metavar="STEP:FRACTION",
        help="after denoising step STEP, score the predicted images and draw on with only the best FRACTION of "
        "the candidates; repeatable",
    ),
]


@with_options
def sample(
    *,
    model: ModelArgument,
    prompts: Annotated[list[str], typer.Argument(help="one or more prompts")],
    adapter: Adapter = None,
    output: Output = None,
    how: DrawingOptions,
    images: Annotated[int, typer.Option(min=1, max=MOST, help="images per prompt")] = 1,
    best_of: BestOf = None,
    reward: Judges = None,
    option: RewardOptions = None,
    prune: Pruning = None,
) -> None:
    """Draw images from prompts, or the best of many candidates."""
    _check(model, prompts, output, reward or [])
    if best_of is None and (reward or option or prune):
        raise UserError("--reward, --option and --prune need --best-of; give it the number of candidates")
    quiet_libraries()
    from flowalign.config.options import parse_options
    from flowalign.evaluate.drawing import drawing_of
    from flowalign.experiments import scaling
    from flowalign.policies.cutting import cut_prompts
    from flowalign.policies.loading import load_policy
    from flowalign.rollout.prompts import Row
    from flowalign.score import check_prompts

    rows = [Row(index, prompt) for index, prompt in enumerate(prompts)]
    drawing = drawing_of(model, adapter, device=device(), images=images, **how.given())
    judges, schedule = {}, scaling.parse_schedule(prune or [])
    if best_of is not None:
        scaling.check_search(best_of, schedule, drawing.sampler, images)
        judges = scaling.load_judges(reward or [], option or [], device())
        check_prompts(rows, judges, "given")
    about = {"best_of": best_of, "reward": reward, "option": parse_options(reward or [], option or []), "prune": prune}
    output = output or Path("samples") / drawing.name(rows, about)
    console.print(drawing.words, soft_wrap=True)
    policy = load_policy(drawing.model, drawing.device)
    Terminal().say(*cut_prompts(policy, prompts))
    if best_of is None:
        written, costs = _drawn(policy, rows, drawing, output), None
    else:
        written, costs = _chosen(policy, rows, drawing, output, judges, best_of, schedule)
    for path, prompt in written:
        console.print(f"{path}  {prompt}", soft_wrap=True)
    if costs:
        console.print(f"{costs}; all scores are in {output / 'scores.jsonl'}", soft_wrap=True)


def _check(model: str, prompts: Sequence[str], output: Path | None, rewards: Sequence[str]) -> None:
    """The checks that need no heavy import; raises UserError or RewardError."""
    from flowalign.cli.existing import check_model, check_rewards
    from flowalign.rollout.prompt_files import check_characters

    if not all(prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty; write what to draw")
    for prompt in prompts:
        check_characters(prompt, f"the prompt {prompt!r}")
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is not an empty folder; choose another")
    check_model(model)
    check_rewards(rewards)


def _drawn(policy: "Policy", rows: "list[Row]", drawing: "Drawing", output: Path) -> list[tuple[Path, str]]:
    """Draw and save the images of every prompt; returns each image's path and prompt."""
    from flowalign.disk.media import save_images
    from flowalign.rollout.generate import rollout

    drawn = rollout(policy, drawing.request(rows, policy.request))
    paths = save_images(output, drawn.media, [row.about for row in drawn.rows])
    return list(zip(paths, drawn.prompts, strict=True))


def _chosen(
    policy: "Policy",
    rows: "list[Row]",
    drawing: "Drawing",
    output: Path,
    judges: "dict[str, Reward]",
    candidates: int,
    schedule: "tuple[Prune, ...]",
) -> tuple[list[tuple[Path, str]], str]:
    """Draw candidates and save the best images of every prompt.

    Returns each image's path and prompt, and the search's cost in words.
    """
    from flowalign.experiments import scaling
    from flowalign.sampling.noise import EVALUATION

    key = (EVALUATION, drawing.seed, 0)
    search = partial(scaling.best_of, batch=drawing.batch, kept=drawing.images, schedule=schedule)
    found = search(policy, rows, judges, candidates, drawing.sampler, policy.request, key)
    forwards, decodes = found.forwards // len(rows), found.decodes // len(rows)
    costs = f"{forwards:,} transformer forwards and {decodes:,} scored images per prompt"
    return scaling.save_best_of(output, found), costs
