"""Options that several commands take: each is defined once, and those about drawing come as one object."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flowalign.config.base import MOST

OWN = "by default a run's evaluation's, else what its kind of model is drawn with"
Schedule = Literal["model", "uniform"]  # as `flowalign.config.sections.Sampler` has them
Solver = Literal["euler", "dpm++"]

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="toyworld, a pipeline folder, a hub id, a run folder")
]
OptionalModel = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="toyworld, a pipeline folder, a hub id, a run folder")
]
Adapter = Annotated[str | None, typer.Option(help="a LoRA's file, folder or hub id, such as a run's lora/")]
Images = Annotated[
    Path | None,
    typer.Option(
        help="in place of MODEL: pictures in GenEval's layout, 00000/samples/0000.png, or as sample writes them"
    ),
]
ImagesPerPrompt = Annotated[int, typer.Option(min=1, max=MOST, help="pictures of a prompt")]
Prompts = Annotated[str | None, typer.Option(metavar="FILE[#COLUMN]", help="a prompt list; the default fits the model")]
Count = Annotated[int | None, typer.Option(min=1, max=MOST, help="only the first prompts of the list")]
Steps = Annotated[int | None, typer.Option(min=1, max=MOST, help=f"denoising steps; {OWN}")]
Guidance = Annotated[
    float | None, typer.Option(min=1, max=1e6, help=f"{OWN}; GenEval's script has 9, for older models")
]
ScheduleOption = Annotated[Schedule | None, typer.Option(help=f"the sigmas; {OWN}")]
SolverOption = Annotated[Solver | None, typer.Option(help=f"of the ODE; {OWN}")]
Size = Annotated[int | None, typer.Option(min=8, max=MOST, help="pixels of a side; the default fits the model")]
SequenceLength = Annotated[int | None, typer.Option(min=0, max=MOST, help="T5 tokens; the default fits the model")]
Batch = Annotated[int | None, typer.Option(min=1, max=MOST, help="pictures drawn at once; 16")]
Seed = Annotated[
    int | None,
    typer.Option(min=-(2**62), max=2**62, help=f"of the noise, beside the prompt's place and the picture's; {OWN}"),
]
Output = Annotated[
    Path | None,
    typer.Option(help="folder of pictures and results; by default one under runs/ of this model and these settings"),
]


@dataclass(frozen=True)
class DrawingOptions:
    """How pictures are drawn; what is not given is a run's own or its model's."""

    steps: Steps = None
    guidance: Guidance = None
    schedule: ScheduleOption = None
    solver: SolverOption = None
    size: Size = None
    max_sequence_length: SequenceLength = None
    seed: Seed = None

    def given(self) -> dict[str, Any]:
        """The options by name, None for those that were not given."""
        return {field.name: getattr(self, field.name) for field in fields(DrawingOptions)}


@dataclass(frozen=True)
class BenchmarkOptions(DrawingOptions):
    """How many pictures of which prompts a benchmark draws, how, and where they go."""

    batch: Batch = None
    adapter: Adapter = None
    count: Count = None
    images_per_prompt: ImagesPerPrompt = 4
    output: Output = None

    def given(self) -> dict[str, Any]:
        return super().given() | {"batch": self.batch}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters that are dataclasses are given option by option."""
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
