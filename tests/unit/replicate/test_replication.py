# SPDX-License-Identifier: Apache-2.0
"""Holders that stay away: patience, substitutes, fewer copies, the way back, and what redundancy is worth."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mirrors import Ranks, eventually, running
from support import no_probe

from megatron_moetion.recover.plan import RankFacts, RecoveryPlan, choose_same_iteration, plan_recovery
from megatron_moetion.recover.report import ArenaReport
from megatron_moetion.replicate.placement import place
from megatron_moetion.replicate.substitutes import ASKED_MAX, substitutes_of
from megatron_moetion.units import UnitKind

PATIENCE = 5


def go_on(ranks: Ranks, iteration: int, *, but: int = -1) -> None:
    """Every rank takes a snapshot, if it has room, and settles what is whole; one of them is waited for nowhere."""
    for rank in range(len(ranks.states)):
        ranks.states[rank].step(iteration)
        ranks.take(rank, iteration)
    for rank in range(len(ranks.states)):
        if rank != but:
            assert ranks.becomes_whole(rank, iteration), ranks.replications[rank].states()
        if whole := ranks.replications[rank].whole:
            ranks.settle(rank, max(whole))


def go_on_alone(ranks: Ranks, iteration: int) -> None:
    """Every rank takes a snapshot, if it has room, and settles what is whole by then."""
    for rank in range(len(ranks.states)):
        ranks.states[rank].step(iteration)
        ranks.take(rank, iteration)
        if whole := ranks.replications[rank].whole:
            ranks.settle(rank, max(whole))


def go_on_until(ranks: Ranks, first: int, what: Callable[[], bool]) -> int:
    """Snapshots come until this is so; the number of the next one."""
    for iteration in range(first, first + 4000):
        if what():
            return iteration
        go_on_alone(ranks, iteration)
        time.sleep(0.005)
    raise AssertionError("it never came about")


def texts(ranks: Ranks, rank: int = 0) -> str:
    return "\n".join(f"{kind}: {text}" for kind, text in ranks.replications[rank].remarks())


def active(ranks: Ranks, rank: int = 0) -> list[int]:
    return [s.rank for s in ranks.replications[rank].states() if s.is_active]


def test_substitutes_are_on_the_next_nodes_of_the_ring_at_the_same_place() -> None:
    placement = place([f"node{r // 2}" for r in range(16)], 1)
    assert placement.holders[3] == (1,)
    assert substitutes_of(3, placement) == (5, 7, 9)
    assert substitutes_of(14, placement) == (0, 2, 4)
    assert all(len(substitutes_of(r, placement)) == ASKED_MAX for r in range(16))
    assert substitutes_of(0, place(["a", "b"], 1)) == ()


def test_a_holder_that_stays_away_costs_a_copy_and_is_taken_back(tmp_path: Path) -> None:
    with running(tmp_path, 2, patience=PATIENCE) as ranks:
        ranks.step(1)
        with ranks.faults.cut([0], [1]):
            for iteration in range(2, 2 + PATIENCE - 1):
                go_on_alone(ranks, iteration)
                assert ranks.replications[0].whole.keys() == {1}, "patience lasts"
            go_on_until(ranks, 10, lambda: active(ranks) == [] and active(ranks, 1) == [])
            go_on(ranks, 5000)
            assert ranks.replications[0].redundancy(5000) == 0
            said = texts(ranks)
            assert "holder-away: rank 1 (node 1) has taken no snapshot of this rank for 5" in said
            assert "the loss of node 0 alone would cost all that is in memory" in said
            assert "no-substitute" in said
        assert eventually(lambda: active(ranks) == [1])
        assert eventually(lambda: ranks.replications[0].redundancy(5000) == 1)
        assert "holder: rank 1 (node 1) has all of this rank's snapshots from now on" in texts(ranks)
        ranks.step(5001)


def test_another_node_with_room_takes_over_and_the_first_holder_drops_its_copy_when_it_is_back(tmp_path: Path) -> None:
    with running(tmp_path, 4, patience=PATIENCE, room=(3,)) as ranks:
        ranks.step(1)
        assert ranks.placement.holders[0] == (1,)
        with ranks.faults.cut([0], [1], "hold"):
            go_on_until(ranks, 2, lambda: active(ranks) == [3])
            said = texts(ranks)
            assert "substitute: rank 2 (node 2) cannot hold this rank's snapshots: it says there is no room" in said
            assert "holder: rank 3 (node 3) has all of this rank's snapshots from now on" in said
            assert 0 in ranks.arenas[1].held
            go_on(ranks, 5000)
            assert ranks.replications[0].redundancy(5000) == 1
            assert 5000 in ranks.listed(3, 0)
        assert eventually(lambda: 0 not in ranks.arenas[1].held)
        assert not (ranks.folders[1] / "rank00000.arena").exists()
        assert eventually(lambda: [s.rank for s in ranks.replications[0].states()] == [3])
        ranks.step(5001)
        assert ranks.replications[0].redundancy(5001) == 1


def test_a_substitute_that_stays_away_too_gives_way_to_the_first_holder(tmp_path: Path) -> None:
    with running(tmp_path, 3, patience=PATIENCE, room=(1, 2)) as ranks:
        ranks.step(1)
        with ranks.faults.cut([0], [1], "hold"):
            go_on_until(ranks, 2, lambda: active(ranks) == [2])
        assert eventually(lambda: 0 not in ranks.arenas[1].held)
        with ranks.faults.cut([0], [2], "hold"):
            go_on_until(ranks, 5000, lambda: active(ranks) == [1])
            go_on(ranks, 10000, but=2)
            assert 10000 in ranks.listed(1, 0)
        assert eventually(lambda: 0 not in ranks.arenas[2].held)
        ranks.step(10001)


def test_the_first_holder_that_is_back_before_a_substitute_has_everything_stays(tmp_path: Path) -> None:
    with running(tmp_path, 3, patience=PATIENCE, room=(2,)) as ranks:
        ranks.step(1)
        with ranks.faults.cut([0], [2], "hold"):
            with ranks.faults.cut([0], [1], "hold"):
                go_on_until(ranks, 2, lambda: active(ranks) == [])
            assert eventually(lambda: active(ranks) == [1])
            ranks.step(5000)
        ranks.step(5001)
        assert eventually(lambda: [s.rank for s in ranks.replications[0].states()] == [1])
        assert 0 not in ranks.arenas[2].held
