# SPDX-License-Identifier: Apache-2.0
"""Ranks that afford different sizes settle on the smallest one, together, and come back when they can."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_moetion.schedule.planner import LEVELS, Rung, vote
from megatron_moetion.schedule.sizes import Sizes


class Links:
    """A scheduler that affords one level."""

    def __init__(self, level: int) -> None:
        self.level = level

    def affordable(
        self, rungs: Sequence[Rung], dense_bytes: int, expert_bytes: float, replicas: int
    ) -> tuple[int, str]:
        return self.level, "the network is slow"


def settle(sizes: Sequence[Sizes], links: Sequence[Links], rounds: int = 20) -> None:
    for _ in range(rounds):
        votes = -1
        for one, link in zip(sizes, links, strict=True):
            votes &= one.vote(link, 1, 1.0, 1)[0]  # type: ignore[arg-type]
        for one in sizes:
            one.agree(votes)


def test_all_ranks_settle_on_what_the_slowest_affords_and_come_back() -> None:
    sizes = [Sizes(2, 14), Sizes(0, 0), Sizes(4, 8)]  # stages with other numbers of experts
    links = [Links(LEVELS - 1), Links(9), Links(LEVELS - 1)]
    settle(sizes, links)
    assert [s.now for s in sizes] == [Rung(experts=8, every=1), Rung(experts=0, every=1), Rung(experts=6, every=1)]
    links[2].level = 1
    settle(sizes, links)
    assert {s.now.every for s in sizes} == {4}
    links[1].level = links[2].level = LEVELS - 1
    settle(sizes, links)
    assert [s.now.experts for s in sizes] == [14, 0, 8]


def test_rarer_snapshots_are_left_out_on_all_ranks_at_once() -> None:
    sizes = [Sizes(1, 2), Sizes(0, 0)]
    settle(sizes, [Links(1), Links(1)])
    skipped = [[s.skips_next() for _ in range(8)] for s in sizes]
    assert skipped[0] == skipped[1] == [True, True, True, False] * 2


def test_a_vote_for_less_says_why_and_one_for_the_most_says_nothing() -> None:
    sizes = Sizes(2, 14)
    assert sizes.vote(Links(LEVELS - 1), 1, 1.0, 1) == (vote(LEVELS - 1), "")  # type: ignore[arg-type]
    assert sizes.vote(Links(5), 1, 1.0, 1) == (  # type: ignore[arg-type]
        vote(5), "snapshots are made to fit (4 experts here): the network is slow",
    )  # fmt: skip
    assert "one in 8 snapshots" in sizes.vote(Links(0), 1, 1.0, 1)[1]  # type: ignore[arg-type]
    assert sizes.experts_text == "2 to 14"
    assert Sizes(3, 3).experts_text == "3"
