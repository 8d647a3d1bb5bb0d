# SPDX-License-Identifier: Apache-2.0
"""Ranks that afford different sizes settle on the smallest one, together, and come back when they can."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_moetion.schedule.planner import LEVELS, Rung, vote
from megatron_moetion.schedule.sizes import Sizes

DENSE_BYTES, EXPERT_BYTES = 1000, 100.0


def room_for(experts: float, every: int = 1) -> float:
    """What an iteration has to carry for that."""
    return (DENSE_BYTES + experts * EXPERT_BYTES) / every


def settle(sizes: Sequence[Sizes], carried_bytes: Sequence[float], rounds: int = 20) -> None:
    for _ in range(rounds):
        votes = -1
        for one, carried in zip(sizes, carried_bytes, strict=True):
            votes &= one.vote(carried, DENSE_BYTES, EXPERT_BYTES)[0]
        for one in sizes:
            one.agree(votes)


def test_all_ranks_settle_on_what_the_slowest_affords_and_come_back() -> None:
    sizes = [Sizes(2, 14), Sizes(0, 0), Sizes(4, 8)]  # stages with other numbers of experts
    settle(sizes, [room_for(9), math.inf, math.inf])
    assert [s.now for s in sizes] == [Rung(experts=9, every=1), Rung(experts=0, every=1), Rung(experts=6, every=1)]
    settle(sizes, [room_for(9), math.inf, room_for(4, every=4)])
    assert [s.now for s in sizes] == [Rung(experts=2, every=4), Rung(experts=0, every=4), Rung(experts=4, every=4)]
    settle(sizes, [math.inf] * 3)
    assert [s.now.experts for s in sizes] == [14, 0, 8]


def test_rarer_snapshots_are_left_out_on_all_ranks_at_once() -> None:
    sizes = [Sizes(1, 2), Sizes(0, 0)]
    settle(sizes, [room_for(1, every=4), math.inf])
    skipped = [[s.skips_next() for _ in range(8)] for s in sizes]
    assert skipped[0] == skipped[1] == [True, True, True, False] * 2


def test_a_vote_for_less_says_how_much_less_and_one_for_the_most_says_nothing() -> None:
    sizes = Sizes(2, 14)
    assert sizes.vote(math.inf, DENSE_BYTES, EXPERT_BYTES) == (vote(LEVELS - 1), "")
    assert sizes.largest == vote(LEVELS - 1)
    assert sizes.vote(room_for(4.5), DENSE_BYTES, EXPERT_BYTES) == (vote(5), "4 experts")
    assert sizes.vote(0.0, DENSE_BYTES, EXPERT_BYTES)[1] == "one in 8 snapshots"
    assert sizes.experts_text == "2 to 14"
    assert Sizes(3, 3).experts_text == "3"
