"""What every part of a recipe is built on, and the one error that a person's mistake raises."""

from pydantic import BaseModel, ConfigDict


class UserError(Exception):
    """A person's mistake in one sentence: what is wrong, where, and what would be right."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values never change, a field's docstring is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


def counted(number: int, noun: str) -> str:
    """`1 prompt`, `2 prompts`, `1,000 pictures`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
