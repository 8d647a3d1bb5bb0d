# SPDX-License-Identifier: Apache-2.0
"""What benchmarks say about lost iterations."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks._common import lost_iterations


def block(whole: dict[str, float], arm: str = "ours") -> dict[str, Any]:
    """Iterations 5, 6 and 7 were over at 1, 2 and 3 s."""
    return {"arm": arm, "steps": [[5, 1.0], [6, 2.0], [7, 3.0]], "whole": whole}


def test_a_fault_costs_what_was_trained_since_the_newest_snapshot_that_all_ranks_have() -> None:
    ranks = [[block({"4": 0.5, "5": 1.5, "6": 2.2})], [block({"4": 0.9, "5": 1.6, "6": 2.9})]]
    lost = lost_iterations(ranks, "ours")
    share = {iterations: count / sum(lost.values()) for iterations, count in lost.items()}
    # 1 from 1.0 to 1.6 and from 2.0 to 2.9 s, none in between and until 3.0
    assert share == {1: pytest.approx(0.75, abs=0.02), 0: pytest.approx(0.25, abs=0.02)}


def test_moments_at_which_nothing_is_whole_do_not_count_and_neither_do_other_arms() -> None:
    ranks = [[block({"5": 2.5}), block({}, "theirs")], [block({"5": 2.0}), block({"6": 1.0}, "theirs")]]
    assert set(lost_iterations(ranks, "ours")) == {1, 2}
    assert not lost_iterations(ranks, "theirs")
