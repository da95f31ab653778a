"""The command line's `flowalign plan`: memory, batches, forwards and hours of a recipe, before anything loads."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flowalign.cli.console import console, quiet_libraries
from flowalign.config.base import MOST, UserError
from flowalign.terminal import titled

if TYPE_CHECKING:
    from flowalign.preflight.plan import Plan


def plan(
    recipe: Annotated[str, typer.Argument(help="a bundled recipe's name or a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes to it")] = None,
    gpus: Annotated[int, typer.Option(min=1, max=MOST, help="processes, one a GPU")] = 1,
    vram: Annotated[float, typer.Option(metavar="GIB", help="memory of each GPU in GiB")] = 80.0,
    sharded: Annotated[bool, typer.Option(help="the frozen weights are shared out among the GPUs (FSDP2)")] = False,
    tflops: Annotated[
        float | None, typer.Option(metavar="TFLOP/S", help="what a GPU sustains; the default is an assumption")
    ] = None,
) -> None:
    """Estimate memory, batches, forwards and hours from the configuration files. Exit code 1 if it cannot work."""
    from flowalign.config import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    quiet_libraries()
    from flowalign.preflight.model_size import meta_policy
    from flowalign.preflight.plan import GIB, TFLOPS, Costs
    from flowalign.preflight.plan import plan as planned
    from flowalign.training.display import arithmetic_table

    for name, value in (("--vram", vram), ("--tflops", tflops)):
        if value is not None and not 1e-3 <= value <= 1e9:
            raise UserError(f"{name} {value:g} must be a number from .001 to 1e9")
    if sharded and gpus == 1:
        raise UserError("--sharded shares weights out among several GPUs; give --gpus 2 or more with it")
    costs = Costs(meta_policy(resolved.model), gpus) if sharded else None
    found = planned(resolved, gpus, vram * GIB, tflops or TFLOPS, costs)
    console.print(_memory_table(found))
    console.print(arithmetic_table(found.recipe, gpus))
    console.print("\n".join(_sentences(found, assumed=tflops is None)), soft_wrap=True)


def _memory_table(found: "Plan") -> Table:
    from flowalign.preflight.plan import GIB

    title = f"{found.recipe.name}: memory of each of {found.gpus} GPU(s) of {found.vram / GIB:g} GiB"
    table = titled(title, "part", "GiB", "how", left=("part", "how"))
    for part in found.parts:
        table.add_row(part.name, f"{part.bytes / GIB:.3g}", part.how)
    for phase, needed in found.phases.items():
        table.add_row(f"peak of the {phase} phase", f"{needed / GIB:.3g}", f"{needed / found.vram:.0%} of the memory")
    table.add_row("rewards", "?", "not known before they load; `flowalign serve` takes them elsewhere")
    return table


def _sentences(found: "Plan", *, assumed: bool) -> list[str]:
    train, counts = found.recipe.train, found.forwards
    rate = f"{found.tflops:g} TFLOP/s a GPU" + (", an assumption; give --tflops what yours sustains" if assumed else "")
    measured = "" if found.evaluation_flops is not None else ", evaluations apart (their prompts are not here yet)"
    shares = f"{counts.rollout:,} in rollouts, {counts.trained:,} trained, {counts.fixed:,} of snapshots and reference"
    return [
        f"largest micro-batch that fits: {found.largest_micro_batch} items a process (the recipe has "
        f"{train.micro_batch}); the step stays the same, only its passes become fewer",
        f"transformer forwards a step: {counts.total:,} rows, if every group teaches ({shares})",
        f"floating point operations a step: {found.step_flops / 1e15:,.3g} PFLOP",
        f"time: {found.step_seconds:,.1f} s a step, {found.hours:,.1f} h in all, rewards apart{measured}, at {rate}",
    ]
