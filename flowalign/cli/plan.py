"""`flowalign plan`: memory, batches, forwards and hours of a recipe, before any weights are loaded."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flowalign.cli.console import Overrides, console, quiet_libraries
from flowalign.config.base import MOST, UserError
from flowalign.terminal import titled

if TYPE_CHECKING:
    from flowalign.preflight.plan import Plan


def plan(
    recipe: Annotated[str, typer.Argument(help="a bundled recipe's name or a YAML file")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, max=MOST, help="number of GPUs, each with one process")] = 1,
    vram: Annotated[float, typer.Option(metavar="GIB", help="memory of each GPU in GiB")] = 80.0,
    sharded: Annotated[bool, typer.Option(help="plan with the frozen weights sharded over the GPUs (FSDP2)")] = False,
    tflops: Annotated[
        float | None,
        typer.Option(metavar="TFLOP/S", help="the speed that each GPU sustains; the default is an assumption"),
    ] = None,
) -> None:
    """Estimate a recipe's memory, batches, forwards and hours from its model's configuration files alone.

    Exit code 1 if the recipe cannot run on these GPUs.
    """
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
        raise UserError("--sharded shards the weights over several GPUs; give --gpus 2 or more with it")
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
    table.add_row("rewards", "?", "not known before they load; `flowalign serve` can run them elsewhere")
    return table


def _sentences(found: "Plan", *, assumed: bool) -> list[str]:
    train, counts = found.recipe.train, found.forwards
    assumption = ", an assumption; set --tflops to what your GPU sustains" if assumed else ""
    rate = f"{found.tflops:g} TFLOP/s per GPU{assumption}"
    measured = "" if found.evaluation_flops is not None else " and evaluations (their prompts do not exist yet)"
    shares = (
        f"{counts.rollout:,} in rollouts, {counts.trained:,} with a backward pass, {counts.fixed:,} of snapshots and "
        "the reference"
    )
    return [
        f"largest micro-batch that fits: {found.largest_micro_batch} items per process (the recipe has "
        f"{train.micro_batch}); a larger one makes the same step in fewer forward and backward passes",
        f"transformer forwards per step: {counts.total:,} rows, if no group is skipped ({shares})",
        f"floating point operations per step: {found.step_flops / 1e15:,.3g} PFLOP",
        f"time: {found.step_seconds:,.1f} s per step, {found.hours:,.1f} h in all without rewards{measured}, at {rate}",
    ]
