# SPDX-License-Identifier: Apache-2.0
"""A recovery of 16,384 ranks with 2,000 captures each: what one of them has to hear, to keep and to do."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from benchmarks.plan_at_scale import CASES, NEWEST, measure

RANKS, CAPTURES = 16384, 2000
ORDERS = {"in place": 2, "a node lost": 2, "all moved": 4}
"""A rank's own, those of the owners that it is a holder of, and those of the owners whose arenas it keeps."""


@pytest.mark.parametrize("case", CASES)
def test_a_rank_keeps_little_and_hears_a_few_bytes_of_each_other_rank(tmp_path: Path, case: str) -> None:
    found = measure(RANKS, CAPTURES, case, tmp_path, tracemalloc.start)
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found.plan.iteration, found.plan.fruitless) == (NEWEST, 0)
    assert found.fetched == (CAPTURES // 2 if case == "all moved" else 0)
    assert found.orders == ORDERS[case]
    assert most_bytes < 100e6
    assert found.heard_bytes < 200 * RANKS
    assert found.told_bytes < 10 * 64 * CAPTURES
