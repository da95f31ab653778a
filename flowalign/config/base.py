"""What every part of a recipe is built on, and the one error that a person's mistake raises."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

MOST = 2**31 - 1  # of whole numbers: the product of any two fits into 64 bits


class UserError(Exception):
    """A person's mistake in one sentence: what is wrong, where, and what would be right."""


class CheckFailed(UserError):
    """What was checked does not hold: no mistake in the command, whose exit code is 1 and not 2."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values never change, each field has a docstring.

    Numbers are finite, and true and false are no numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read true as 1, and 1 or "yes" as true."""
        kinds = set(_leaves(cls.model_fields[info.field_name or ""].annotation))
        if bool in kinds:
            if not isinstance(value, bool) and not (value is None and type(None) in kinds):
                raise PydanticCustomError("no_truth", "Input should be true or false")
        elif kinds & {int, float} and any(
            isinstance(part, bool) for part in (value if isinstance(value, list | tuple) else [value])
        ):
            raise PydanticCustomError("no_number", "Input should be a number")
        return value

    def changed(self, *names: str) -> str | None:
        """The first of these settings that is not at its default; None where all are."""
        fields = type(self).model_fields
        return next((name for name in names if getattr(self, name) != fields[name].default), None)


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types in an annotation such as tuple[Annotated[int, ...], ...] | None."""
    parts = get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from _leaves(part)


def counted(number: int, noun: str) -> str:
    """`1 prompt`, `2 prompts`, `1,000 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
