"""Options that several commands share: each is defined once, and the options of drawing form one object."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flowalign.config.base import MOST

DEFAULT = "default: a run's evaluation setting, or the model's usual value"
Schedule = Literal["model", "uniform"]  # the values of `flowalign.config.sections.Sampler.schedule`
Solver = Literal["euler", "dpm++"]

MODEL_NAMES = "toyworld, a pipeline folder, a hub id or a run folder"
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_NAMES)]
OptionalModel = Annotated[
    str | None, typer.Argument(metavar="MODEL", help=f"{MODEL_NAMES}; required unless --images is given")
]
Adapter = Annotated[
    str | None, typer.Option(help="a LoRA for MODEL: a file, a folder such as a run's lora/, or a hub id")
]
Images = Annotated[
    Path | None,
    typer.Option(
        help="judge the images of this folder instead of drawing with MODEL; its layout is GenEval's "
        "(00000/samples/0000.png) or that of `flowalign sample`"
    ),
]
ImagesPerPrompt = Annotated[
    int, typer.Option(min=1, max=MOST, help="images of each prompt; more images narrow the intervals")
]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE[#COLUMN]",
        help="a prompt list; default: the prompts beside --images, or the benchmark's own list if the model has one",
    ),
]
Count = Annotated[int | None, typer.Option(min=1, max=MOST, help="use only the first COUNT prompts of the list")]
Steps = Annotated[int | None, typer.Option(min=1, max=MOST, help=f"denoising steps; {DEFAULT}")]
Guidance = Annotated[
    float | None,
    typer.Option(
        min=1,
        max=1e6,
        help=f"classifier-free guidance, 1 is none; {DEFAULT} (GenEval's script uses 9, for older models)",
    ),
]
ScheduleOption = Annotated[
    Schedule | None,
    typer.Option(help=f"sigma schedule: the scheduler's own, or evenly spaced before the scheduler's shift; {DEFAULT}"),
]
SolverOption = Annotated[Solver | None, typer.Option(help=f"ODE solver; {DEFAULT}")]
Size = Annotated[
    int | None, typer.Option(min=8, max=MOST, help="image height and width in pixels; default: the model's own size")
]
SequenceLength = Annotated[
    int | None, typer.Option(min=0, max=MOST, help="T5 tokens of a prompt; default: the model's own number")
]
Batch = Annotated[
    int | None, typer.Option(min=1, max=MOST, help="images drawn at once, by default 16; lower it to save memory")
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=-(2**62),
        max=2**62,
        help=f"seed of the noise, which also depends on the positions of prompt and image; {DEFAULT}",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        help="folder for images and results; default: a folder under runs/ named after the model and the settings"
    ),
]


@dataclass(frozen=True)
class DrawingOptions:
    """How images are drawn; an option that is not given takes the run's or the model's default."""

    steps: Steps = None
    guidance: Guidance = None
    schedule: ScheduleOption = None
    solver: SolverOption = None
    size: Size = None
    max_sequence_length: SequenceLength = None
    seed: Seed = None

    def given(self) -> dict[str, Any]:
        """The options by name; None for an option that was not given."""
        return {field.name: getattr(self, field.name) for field in fields(DrawingOptions)}


@dataclass(frozen=True)
class BenchmarkOptions(DrawingOptions):
    """How a benchmark draws its images, how many, and where it writes them."""

    batch: Batch = None
    adapter: Adapter = None
    count: Count = None
    images_per_prompt: ImagesPerPrompt = 4
    output: Output = None

    def given(self) -> dict[str, Any]:
        return super().given() | {"batch": self.batch}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose dataclass parameters become one command-line option per field."""
    signature = inspect.signature(command)
    parts = signature.parameters
    groups: dict[str, Any] = {name: one.annotation for name, one in parts.items() if is_dataclass(one.annotation)}

    @wraps(command)
    def run(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        command(**given)

    taken: list[inspect.Parameter] = []
    for name, one in parts.items():
        if name in groups:
            known = inspect.signature(groups[name]).parameters.values()
            taken += [part.replace(kind=inspect.Parameter.KEYWORD_ONLY) for part in known]
        else:
            taken.append(one.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    run.__signature__ = signature.replace(parameters=taken)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in taken}
    return run
