"""`flowalign model`: check that a model's adapter does what its pipeline does."""

from typing import Annotated

import typer

from flowalign.cli.console import device, quiet_libraries, show_findings
from flowalign.cli.options import ModelArgument, SequenceLength
from flowalign.config.base import MOST

model_app = typer.Typer(help="Check a model before it is trained.", no_args_is_help=True)


@model_app.callback()
def _group() -> None:
    """Typer would drop the name `check` of a group's only command; a callback keeps it."""


@model_app.command()
def check(
    path: ModelArgument,
    size: Annotated[
        int | None,
        typer.Option(min=8, max=MOST, help="image height and width in pixels; default: 64 for toyworld, otherwise 256"),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, max=MOST, help="denoising steps of each rollout")] = 4,
    guidance: Annotated[float, typer.Option(min=1, max=1e6, help="guidance of the rollout that has guidance")] = 4.0,
    max_sequence_length: SequenceLength = None,
) -> None:
    """Compare a model with its plain diffusers pipeline, in float32. Exit code 1 if a check fails."""
    from flowalign.cli.existing import check_model as check_there

    check_there(path)
    quiet_libraries()
    from flowalign.policies.loading import EMBEDDED, model_settings, sizes_of
    from flowalign.preflight.check_model import check_model

    settings = model_settings(path, None, size, max_sequence_length)
    if size is None and settings.path != EMBEDDED:
        settings = settings.model_copy(update={"height": 256, "width": 256})
    findings = check_model(settings, device(), steps=steps, guidance=guidance)
    request = sizes_of(settings).request
    sides = f"{request.height} x {request.width} pixels, {steps} steps, float32"
    show_findings(f"{path}: {sides}", findings)
