"""The order of boxes of text, at every tilt and size."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.detectors.reading_order import reading_order

LINES = [[4, 7, 3], [9, 2], [3, 3, 3, 5]]  # letters of the words of each line


def page(lines, tilt=0.0, height=20.0, gap=1.0, pitch=1.6, at=(0.0, 0.0), rounded=True):
    """Corners (N, 4, 2) of the words of lines, in reading order, turned by `tilt` degrees."""
    boxes = []
    for row, words in enumerate(lines):
        left = 0.0
        for letters in words:
            right, top = left + 0.7 * letters * height, row * pitch * height
            boxes.append([(left, top), (right, top), (right, top + height), (left, top + height)])
            left = right + gap * height
    angle = math.radians(tilt)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = np.array(boxes) @ turn.T + at
    return corners.round() if rounded else corners


@pytest.mark.parametrize("tilt", [-20, -8, -4, -2, 0, 2, 4, 8, 20])
@pytest.mark.parametrize("height", [10, 30, 120])
@pytest.mark.parametrize("gap", [0.4, 1.5, 6.0])
def test_tilted_lines_are_read_in_order_at_every_size(tilt, height, gap):
    boxes = page(LINES, tilt, height, gap)
    shuffled = np.random.default_rng(0).permutation(len(boxes))
    assert [int(shuffled[place]) for place in reading_order(boxes[shuffled])] == list(range(len(boxes)))


@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=4),
    st.floats(-10, 10),
    st.floats(12, 200),
    st.randoms(use_true_random=False),
)
def test_any_page_is_read_in_order(lines, tilt, height, draw):
    # a wide box in every line, without which a tilt cannot be seen
    boxes = page([[4, *words] for words in lines], tilt, height)
    order = list(range(len(boxes)))
    draw.shuffle(order)
    assert [order[place] for place in reading_order(boxes[order])] == sorted(order)


def test_two_signs_of_opposite_tilt_are_each_read_in_order():
    one, other = page([[4, 4], [5, 3]], 8), page([[4, 4], [5, 3]], -8, at=(0, 400))
    assert reading_order(np.concatenate([other, one])) == [4, 5, 6, 7, 0, 1, 2, 3]


def test_small_lines_beside_a_large_word_are_read_after_it_and_from_the_top():
    large = page([[4]], height=100)
    small = page([[5], [3]], height=30, at=(320, 10))
    assert reading_order(np.concatenate([small[::-1], large])) == [2, 1, 0]


def test_words_of_two_sizes_on_one_line_are_one_row():
    only, price = page([[4]], height=25, at=(0, 70)), page([[3]], height=100, at=(90, 0))
    assert reading_order(np.concatenate([price, only])) == [1, 0]


def test_letters_that_stand_alone_are_read_in_order():
    boxes = page([[1, 1, 1], [1, 1]], height=40)
    assert reading_order(boxes[::-1]) == [4, 3, 2, 1, 0]


def test_no_box_and_one_box_have_an_order():
    assert reading_order(np.zeros((0, 4, 2))) == []
    assert reading_order(page([[3]])) == [0]
