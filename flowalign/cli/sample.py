"""The command line's `flowalign sample`: pictures, or the best of many."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flowalign.cli.console import RewardOptions, console, device, quiet_libraries
from flowalign.cli.evaluate import GridOption, Guidance, Seed, SequenceLength, Size, SolverOption, Steps
from flowalign.config.base import MOST, UserError


def sample(
    model: Annotated[str, typer.Argument(help="toyworld, a pipeline folder, a hub id or a run folder")],
    prompts: Annotated[list[str], typer.Argument(help="one or more prompts")],
    adapter: Annotated[str | None, typer.Option(help="a LoRA's file, folder or hub id, such as a run's lora/")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="an empty folder for the PNG files; by default one under samples/ of what is drawn"),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    grid: GridOption = None,
    solver: SolverOption = None,
    images: Annotated[int, typer.Option(min=1, max=MOST, help="pictures per prompt")] = 1,
    size: Size = None,
    max_sequence_length: SequenceLength = None,
    seed: Seed = None,
    best_of: Annotated[
        int | None,
        typer.Option(max=MOST, metavar="N", help="draw N candidates of each, keep the best and all scores"),
    ] = None,
    reward: Annotated[list[str] | None, typer.Option(help="chooses; repeatable, then ranks are added up")] = None,
    option: RewardOptions = None,
    prune: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP:FRACTION", help="judge predictions after a step, the best go on; repeatable"),
    ] = None,
) -> None:
    """Draw pictures."""
    from flowalign.cli.existing import check_model, check_rewards
    from flowalign.rollout.prompt_files import check_characters

    if not all(prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty; write what to draw")
    for prompt in prompts:
        check_characters(prompt, f"the prompt {prompt!r}")
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is not an empty folder; choose another")
    check_model(model)
    check_rewards(reward or [])
    quiet_libraries()
    from flowalign.config.options import parse_options
    from flowalign.disk.media import save_pictures
    from flowalign.evaluate.drawing import drawing_of
    from flowalign.experiments import scaling
    from flowalign.policies.cutting import cut_prompts
    from flowalign.policies.loading import load_policy
    from flowalign.rollout.generate import rollout
    from flowalign.rollout.prompts import Row
    from flowalign.sampling.noise import EVALUATION
    from flowalign.score import check_prompts

    rows = [Row(index, prompt) for index, prompt in enumerate(prompts)]
    given: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "grid": grid,
        "solver": solver,
        "size": size,
        "seed": seed,
    }
    drawing = drawing_of(
        model, adapter, device=device(), images=images, max_sequence_length=max_sequence_length, **given
    )
    judges, schedule = {}, scaling.parse_schedule(prune or [])
    if best_of is not None:
        scaling.check_search(best_of, schedule, drawing.sampler, images)
        judges = scaling.load_judges(reward or [], option or [], device())
        check_prompts(rows, judges, "given")
    elif reward or option or prune:
        raise UserError("--reward, --option and --prune belong to --best-of; give it a number of candidates")
    about = {"best_of": best_of, "reward": reward, "option": parse_options(reward or [], option or []), "prune": prune}
    output = output or Path("samples") / drawing.name(rows, about)
    console.print(drawing.words, soft_wrap=True)
    policy, pixels = load_policy(drawing.model, drawing.device), (drawing.model.height, drawing.model.width)
    for sentence in cut_prompts(policy, prompts):
        console.print(sentence, soft_wrap=True)
    key, batch = (EVALUATION, drawing.seed, 0), drawing.batch
    if best_of is None:
        drawn = rollout(policy, rows, images, drawing.sampler, pixels, key, batch=batch)
        written = list(
            zip(save_pictures(output, drawn.media, [row.about for row in drawn.rows]), drawn.prompts, strict=True)
        )
    else:
        found = scaling.best_of(
            policy, rows, judges, best_of, drawing.sampler, pixels, key, batch=batch, schedule=schedule, kept=images
        )
        written = scaling.save_best_of(output, found)
    for path, prompt in written:
        console.print(f"{path}  {prompt}", soft_wrap=True)
    if best_of is not None:
        forwards, decodes = found.forwards // len(rows), found.decodes // len(rows)
        costs = f"{forwards:,} transformer forwards a prompt and {decodes:,} pictures judged"
        console.print(f"{costs}; all scores are in {output / 'scores.jsonl'}", soft_wrap=True)
