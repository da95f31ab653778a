"""Counted noise: a row depends on its key alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowalign.sampling import counted_generator, counted_noise

SHAPE = (2, 3)
integers = st.integers(-(2**63), 2**63 - 1)
keys = st.lists(st.tuples(integers, integers, integers), min_size=1, max_size=8)


def noise(rows):
    return counted_noise(rows, SHAPE, "cpu")


@given(keys, st.randoms())
def test_a_row_depends_on_its_key_alone_whatever_the_batch_and_its_order(rows, random):
    alone = {key: noise([key])[0] for key in rows}
    shuffled = random.sample(rows, len(rows))
    torch.manual_seed(random.getrandbits(32))  # what was drawn elsewhere before does not matter
    for key, row in zip(shuffled, noise(shuffled), strict=True):
        assert torch.equal(row, alone[key])


@given(st.lists(st.lists(integers, min_size=1, max_size=5).map(tuple), min_size=2, max_size=8, unique=True))
def test_different_keys_have_different_noise(rows):
    drawn = noise(rows)
    assert all(not torch.equal(drawn[i], drawn[j]) for i in range(len(rows)) for j in range(i))


@pytest.mark.parametrize("other", [(1, 2, 0), (0, 1, 2), (2, 1)])
def test_the_order_of_a_keys_numbers_matters(other):
    assert not torch.equal(noise([(1, 2)]), noise([other]))


def test_drawing_leaves_the_global_generator_unchanged():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    noise([(1, 2, 3)])
    assert torch.equal(torch.randn(3), expected)


def test_noise_of_many_keys_is_standard_normal():
    draws = counted_noise([(0, 7, step, 3, 1, 0) for step in range(4000)], (4, 4), "cpu")
    assert draws.dtype == torch.float32
    total = draws.numel()
    assert draws.mean().abs() < 5 / total**0.5
    assert (draws**2).mean().item() == pytest.approx(1, abs=5 * (2 / total) ** 0.5)
    assert (draws**4).mean().item() == pytest.approx(3, abs=5 * (96 / total) ** 0.5)
    # Rows of neighbouring keys are independent.
    products = (draws[1:] * draws[:-1]).flatten()
    assert products.mean().abs() < 5 / len(products) ** 0.5


def test_generators_with_the_same_key_draw_the_same_numbers():
    first, second = (torch.randperm(50, generator=counted_generator(2, 0, 5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.randperm(50, generator=counted_generator(2, 0, 6)))
