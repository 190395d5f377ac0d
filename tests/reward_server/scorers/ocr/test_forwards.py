"""Which lines share a forward of the recogniser; with a runner that shows what it was given."""

import random

import numpy as np
import pytest

from reward_server.scorers.ocr.models import Recogniser, _together, padded_width


def resize_op(rec_image_shape):
    """Keeps a line's first pixel and the width that it is padded to."""
    return lambda lines: [np.full((1, 1, 2), [line[0, 0, 2], rec_image_shape[2]]) for line in lines]


class Runner:
    def __init__(self):
        self.batches = []

    def __call__(self, x):
        self.batches.append(len(x[0]))
        return [x[0][:, 0]]  # [B, 1, 2]


def recogniser(runner: Runner, together: int) -> Recogniser:
    return Recogniser(runner, None, resize_op, together, {})


def lines(widths: list[int]) -> list[np.ndarray]:
    """Lines that can be told apart by their red."""
    return [np.full((36, width, 3), place, dtype=np.uint8) for place, width in enumerate(widths)]


@pytest.mark.parametrize(
    ("widths", "batches"),
    [
        ([100] * 8, [8]),
        ([100] * 9, [4, 5]),
        ([100] * 17, [5, 6, 6]),
        ([100], [2]),
        ([100, 300, 100, 300, 100], [2, 3]),
        ([100, 200, 300], [2, 2, 2]),
        ([], []),
    ],
)
def test_lines_of_one_width_share_forwards_and_none_is_ever_alone_in_one(widths, batches):
    runner = Runner()
    asked = lines(widths)
    order = random.Random(len(widths)).sample(range(len(asked)), len(asked))
    found = recogniser(runner, 8).probs([asked[place] for place in order])
    assert [probs.tolist() for probs in found] == [
        [[place, padded_width(widths[place], 36)]] for place in order
    ]
    assert sorted(runner.batches) == batches


def test_where_rows_are_not_steady_every_line_has_a_forward_of_its_own():
    runner = Runner()
    found = recogniser(runner, 1).probs(lines([100, 300, 100]))
    assert [probs[0, 0] for probs in found] == [0, 1, 2]
    assert runner.batches == [1, 1, 1]


def test_it_is_tried_out_whether_rows_are_steady():
    assert _together(lambda x: [x[0] * 2]) == 8
    assert _together(lambda x: [x[0] * len(x[0])]) == 1
