# SPDX-License-Identifier: Apache-2.0
"""Ranks that afford different sizes settle on the smallest one, together, and come back when they can."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.schedule.sizes import LEVELS, Rung, Sizes, affordable, ladder, level_of, next_level, vote

DENSE_BYTES, EXPERT_BYTES = 1000, 100.0


def room_for(experts: float, every: int = 1) -> float:
    """What an iteration has to carry for that."""
    return snapshot_bytes(experts) / every


def snapshot_bytes(experts: float) -> float:
    return DENSE_BYTES + experts * EXPERT_BYTES


def settle(sizes: Sequence[Sizes], carried_bytes: Sequence[float], rounds: int = 20) -> None:
    for _ in range(rounds):
        votes = -1
        for one, carried in zip(sizes, carried_bytes, strict=True):
            votes &= one.vote(carried, snapshot_bytes)[0]
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
    skipped = [[s.skips(snapshot) for snapshot in range(100, 108)] for s in sizes]
    assert skipped[0] == skipped[1] == [False, True, True, True] * 2


def test_ranks_that_make_snapshots_rarer_at_different_moments_leave_out_the_same_ones() -> None:
    early, late = Sizes(1, 2), Sizes(1, 2)
    settle([early], [room_for(1, every=4)])
    left_out = [(early.skips(n), late.skips(n)) for n in range(5)]
    settle([late], [room_for(1, every=4)])
    left_out += [(early.skips(n), late.skips(n)) for n in range(5, 13)]
    assert [a for a, _ in left_out] == [n % 4 != 0 for n in range(13)]
    assert all(b == (a and n > 4) for n, (a, b) in enumerate(left_out))


def test_a_vote_for_less_says_how_much_less_and_one_for_the_most_says_nothing() -> None:
    sizes = Sizes(2, 14)
    assert sizes.vote(math.inf, snapshot_bytes) == (vote(LEVELS - 1), None)
    assert sizes.vote(room_for(4.5), snapshot_bytes) == (vote(5), "4 experts")
    assert sizes.vote(0.0, snapshot_bytes)[1] == "one in 8 snapshots"
    assert sizes.experts_text == "2 to 14"
    assert Sizes(3, 3).experts_text == "3"


def test_ladders_go_from_rare_to_large() -> None:
    rungs = ladder(2, 14)
    assert rungs[:4] == tuple(Rung(experts=2, every=e) for e in (8, 4, 2, 1))
    assert [r.experts for r in rungs[3:]] == list(range(2, 15))
    assert {r.every for r in rungs[3:]} == {1}
    assert [r.every for r in ladder(0, 0)] == [r.every for r in rungs]


@given(st.integers(0, 300), st.integers(0, 300))
def test_ladders_reach_both_ends_and_never_fall(low: int, more: int) -> None:
    rungs = ladder(low, low + more)
    assert len(rungs) == LEVELS
    assert rungs[3] == Rung(experts=low, every=1)
    assert rungs[-1] == Rung(experts=low + more, every=1)
    costs = [r.bytes_an_iteration(snapshot_bytes) for r in rungs]
    assert costs == sorted(costs)


def test_what_does_not_fit_gets_smaller_first_then_rarer() -> None:
    rungs = ladder(2, 6)
    wanted = [
        affordable(rungs, capacity, lambda experts: 100 + 10 * experts)
        for capacity in (1000, 160, 145, 120, 119, 60, 15, 0)
    ]
    assert [(rungs[i].experts, rungs[i].every) for i in wanted] == [
        (6, 1), (6, 1), (4, 1), (2, 1), (2, 2), (2, 2), (2, 8), (2, 8),
    ]  # fmt: skip


def test_sizes_move_smoothly_and_arrive() -> None:
    assert [next_level(3, wanted) for wanted in (0, 2, 3, 4, 9, 15)] == [2, 2, 3, 4, 4, 6]
    for start in range(LEVELS):
        for wanted in range(LEVELS):
            level, steps = start, 0
            while level != wanted:
                following = next_level(level, wanted)
                assert 0 < abs(following - level) <= 3
                level, steps = following, steps + 1
            assert steps <= 10


@given(st.lists(st.integers(0, LEVELS - 1), min_size=1, max_size=9))
def test_the_and_of_votes_is_the_lowest_level(levels: list[int]) -> None:
    votes = vote(levels[0])
    for level in levels[1:]:
        votes &= vote(level)
    assert level_of(votes) == min(levels)
