# SPDX-License-Identifier: Apache-2.0
"""The comparison of choices over ranks that share experts."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.busiest_rank import EXPERT_BYTES, groups_of, show, spans


def test_spans_tile_the_experts() -> None:
    table = spans(6, 4)
    assert (table.sum(axis=1) == EXPERT_BYTES).all()
    assert (table.sum(axis=0) == 6 * EXPERT_BYTES // 4).all()
    assert np.count_nonzero(table[1]) == 2, "this one lies on two ranks"


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_spread_choice_keeps_the_busiest_rank_at_the_mean(ranks: int) -> None:
    by_value, spread = (show(spans(16, ranks), 100, is_spread=is_spread) for is_spread in (False, True))
    assert spread.busiest == spread.mean == by_value.mean == 0.25
    assert by_value.busiest > 0.3


def test_groups_come_from_what_ranks_found() -> None:
    ranks = [
        {"peers": [0, 2], "experts": ["a", "b"], "nbytes": {"a": 3}},
        {"peers": [1, 3], "experts": ["c"], "nbytes": {"c": 5}},
        {"peers": [0, 2], "experts": ["a", "b"], "nbytes": {"a": 1, "b": 4}},
        {"peers": [1, 3], "experts": ["c"], "nbytes": {}},
    ]
    assert groups_of(ranks) == [[[3, 1], [0, 4]], [[5, 0]]]
