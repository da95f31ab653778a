"""Both sides of guidance: taken apart by rows without spending memory, and joined by the family's form."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from flowalign.policies.base import Condition, Conditioning, Schedule, TextPolicy
from flowalign.policies.conditioning import Rows
from flowalign.policies.request import MediaRequest, Row
from flowalign.sampling import guided


class Tokens(TextPolicy):
    """Latents of three tokens of four channels; its velocity is the prompt's length times the state, plus 1."""

    device, dtype, request = torch.device("cpu"), torch.float32, MediaRequest(1, 1)

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Linear(1, 1)
        self.encoded: list[list[str]] = []

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        self.encoded.append(list(prompts))
        return Condition({"length": torch.tensor([float(len(prompt)) for prompt in prompts])})

    def _forward(self, module: nn.Module, x: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        return condition.tensors["length"][:, None, None] * x + 1

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def latent_shape(self, request: MediaRequest) -> tuple[int, ...]:
        return (3, 4)

    def sigmas(self, steps: int, schedule: Schedule = "model") -> torch.Tensor:
        raise NotImplementedError

    def export(self, folder: Path) -> None:
        raise NotImplementedError


class Rescaled(Tokens):
    guidance_form = "rescaled"


ROWS = [Row(index, prompt) for index, prompt in enumerate(("a", "bb", "ccc"))]


@pytest.mark.parametrize("family", [Tokens, Rescaled])
def test_the_guided_velocity_is_between_the_prompt_and_the_empty_one(family: type[Tokens]) -> None:
    policy, x = family(), torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0))
    conditioning = policy.encode(ROWS)
    velocity = policy.guided_velocity(x, torch.full((3,), 0.5), conditioning, 2.5)
    positive = torch.tensor([1.0, 2.0, 3.0])[:, None, None] * x + 1
    expected = guided(positive, torch.ones_like(x), 2.5, family.guidance_form)
    torch.testing.assert_close(velocity, expected)
    assert policy.forwards == 6
    policy.guided_velocity(x, torch.full((3,), 0.5), conditioning, 1.0)
    assert policy.forwards == 9


def test_the_empty_prompt_is_encoded_once() -> None:
    policy = Tokens()
    policy.encode(ROWS)
    policy.encode(ROWS[:1])
    assert policy.encoded == [[""], ["a", "bb", "ccc"], ["a"]]


@pytest.mark.parametrize(
    "rows", [slice(1, 4), [3, 1], torch.tensor([0, 0, 4]), torch.tensor([True, False, True, True, False]), []]
)
def test_rows_of_a_condition_are_those_of_its_tensors_and_a_repeated_row_stays_in_the_memory_of_one(rows: Rows) -> None:
    own = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    repeated = Condition({"text": own[:1], "count": torch.ones(1)}).expand(5)
    conditioning = Conditioning(Condition({"text": own}), repeated)[rows]
    assert torch.equal(conditioning.positive.tensors["text"], own[rows])
    taken = conditioning.negative.tensors
    assert torch.equal(taken["text"], own[:1].expand(5, 2, 3)[rows]) and len(taken["count"]) == len(conditioning)
    assert taken["text"].untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
    joined = Conditioning.cat([conditioning, conditioning])
    assert len(joined.negative) == len(joined) == 2 * len(conditioning)
