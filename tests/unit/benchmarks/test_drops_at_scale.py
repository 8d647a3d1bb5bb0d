# SPDX-License-Identifier: Apache-2.0
"""Where some rank drops a snapshot in nearly every iteration, iterations become stable all the same."""

from __future__ import annotations

import pytest

from benchmarks.drops_at_scale import simulate


@pytest.mark.parametrize("mode", ["full", "exact"])
def test_many_ranks_that_drop_now_and_then_do_not_stop_each_other_for_good(mode: str) -> None:
    found = simulate(mode, 16384, 1e-4, 200)
    assert found.share > 0.08
    assert found.lag < 30


def test_a_drop_of_one_rank_costs_no_other_a_snapshot() -> None:
    found = simulate("exact", 1024, 1e-4, 200)
    assert found.share > 0.8
    assert found.consequences == 0
