# SPDX-License-Identifier: Apache-2.0
"""Boxes hold what a stretch holds of a view, element for element, however the view lies in the flat tensor."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from megatron_moetion.mcore.boxes import View, missing

VIEWS = {
    "matrix": ((3, 5), (5, 1), 0),
    "second half of a gated layer": ((2, 5), (5, 1), 10),
    "transposed": ((5, 3), (1, 5), 0),
    "columns": ((3, 2), (5, 1), 3),
    "three dimensions": ((2, 3, 4), (12, 4, 1), 2),
    "middle first": ((3, 2, 4), (4, 12, 1), 0),
    "one row": ((1, 6), (99, 1), 1),
    "a number": ((), (), 4),
}


@pytest.mark.parametrize("numel_max", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", VIEWS)
def test_boxes_are_the_elements_of_a_stretch(name: str, numel_max: int) -> None:
    shape, strides, first = VIEWS[name]
    view = View(shape, strides, first)
    flat = np.arange(40)
    seen = np.lib.stride_tricks.as_strided(flat[first:], shape, [s * flat.itemsize for s in strides])
    for start, end in itertools.combinations(range(32), 2):
        begin, stop = view.before(start), view.before(end)
        found: list[int] = []
        place = begin
        for box in view.boxes(begin, stop, numel_max):
            part = seen[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))]
            assert 0 < part.size <= numel_max
            assert (box.start, box.end) == (place, place + part.size)
            place = box.end
            found.extend(sorted(part.reshape(-1).tolist()))
        assert found == [int(i) for i in np.sort(seen.reshape(-1)) if start <= i < end]
        assert place == stop


def test_a_stretch_of_whole_rows_has_no_more_boxes_than_it_needs() -> None:
    view = View((10, 6), (6, 1), 0)
    assert [(b.offset, b.shape) for b in view.boxes(0, 60, 1000)] == [((0, 0), (10, 6))]
    assert [(b.offset, b.shape) for b in view.boxes(4, 50, 1000)] == [
        ((0, 4), (1, 2)),
        ((1, 0), (7, 6)),
        ((8, 0), (1, 2)),
    ]


def test_views_whose_elements_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        View((4, 4), (3, 1), 0)


def test_what_is_missing_and_what_is_there_make_the_whole() -> None:
    source = random.Random(1)
    for _ in range(200):
        covered = sorted(sorted(source.sample(range(20), 2)) for _ in range(source.randrange(4)))
        start, end = sorted(source.sample(range(20), 2))
        parts = list(missing([(a, b) for a, b in covered], start, end))
        there = {i for a, b in covered for i in range(a, b)}
        assert [i for a, b in parts for i in range(a, b)] == [i for i in range(start, end) if i not in there]
