# SPDX-License-Identifier: Apache-2.0
"""Mirrors of fragments: what holders list is of what was captured, whatever happens on the way."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
from mirrors import LONG_S, eventually, running
from support import capture

from megatron_moetion.coding import Part

FOUR = {"coding_nodes": 4}
"""Each of three holders has a fragment, and two of them are enough."""


def test_each_holder_has_its_fragment_of_everything(tmp_path: Path) -> None:
    with running(tmp_path, 4, 2, **FOUR) as ranks:
        for iteration in range(1, 5):
            ranks.step(iteration)
        for owner in range(4):
            holders = ranks.placement.holders[owner]
            assert len(holders) == 3
            assert {ranks.held(h, owner).spec.part.number for h in holders} == {1, 2, 3}
            for holder in holders:
                assert eventually(lambda h=holder, o=owner: ranks.is_mirror(h, o))  # type: ignore[misc]
            assert ranks.replications[owner].redundancy(4) == 2


def test_a_holder_that_is_away_costs_one_loss_and_two_cost_all(tmp_path: Path) -> None:
    with running(tmp_path, 4, 2, **FOUR) as ranks:
        ranks.step(1)
        holders, replication = ranks.placement.holders[0], ranks.replications[0]
        for iteration, (away, left) in enumerate(((holders[:1], 1), (holders[:2], 0), (holders, 0)), 2):
            with ranks.faults.cut([0], away, "hold"):
                ranks.states[0].step(iteration)
                ranks.commit(0, iteration)
                assert eventually(lambda i=iteration, n=left: replication.redundancy(i - 1) == n)  # type: ignore[misc]
                assert iteration not in replication.whole
            assert ranks.becomes_whole(0, iteration)
            assert replication.redundancy(iteration) == 2
            ranks.settle(0, iteration)


def test_a_substitute_keeps_the_fragment_of_the_holder_that_it_stands_in_for(tmp_path: Path) -> None:
    def goes_on_with_rank_4() -> bool:
        iteration = next(iterations)
        ranks.states[0].step(iteration)
        if ranks.take(0, iteration) and ranks.becomes_whole(0, iteration, 0.05):
            ranks.settle(0, iteration)
        return any(s.rank == 4 and s.is_active for s in ranks.replications[0].states())

    iterations = itertools.count(2)
    with running(tmp_path, 8, 2, patience=3, room=(4,), **FOUR) as ranks:
        ranks.step(1)
        with ranks.faults.cut([0], [2], "hold"):
            assert eventually(goes_on_with_rank_4, LONG_S)
            assert ranks.held(4, 0).spec.part == ranks.placement.part_at(2, 0) == Part(number=2, data=2, parity=1)
            assert eventually(lambda: ranks.is_mirror(4, 0))
            assert eventually(lambda: ranks.replications[0].redundancy(max(ranks.replications[0].whole)) == 2)
        assert eventually(lambda: 0 not in ranks.arenas[2].held)


@pytest.mark.parametrize("position", [0, 9, 17, 33, 45, 60, 64, 70, -1])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_damage_on_the_way_lists_nothing_wrong(tmp_path: Path, number: int, position: int) -> None:
    """Of owner 0 its opening, its update, its fragments or their digests are damaged."""
    with running(tmp_path, 4, 2, **FOUR) as ranks:
        ranks.step(1)
        with ranks.faults.cut([0], [1, 2, 3], "hold"):
            ranks.commit(0, 2)
            assert eventually(lambda: not any(s.is_up for s in ranks.replications[0].states()))
            ranks.faults.damage(0, number, position)
        assert ranks.becomes_whole(0, 2)
        assert ranks.faults.met
        assert all(eventually(lambda h=h: ranks.is_mirror(h, 0)) for h in (1, 2, 3))  # type: ignore[misc]


def test_fragments_of_slots_that_were_reused_while_they_were_made_are_not_listed(tmp_path: Path) -> None:
    def reuse(point: str, iteration: int) -> None:
        if iteration == 2 and point == "mid-replication":
            with lock:
                if not reused:
                    reused.append(iteration)
                    page = ranks.own(0).page.records
                    ranks.own(0).edit(lambda _: {"records": page.where(page.table["iteration"] != 2)})
                    ranks.states[0].step(3)
                    capture(ranks.packers[0], ranks.own(0), 3)

    lock = threading.Lock()
    reused: list[int] = []
    with running(tmp_path, 4, 2, copies=2, probe=reuse, **FOUR) as ranks:
        ranks.step(1)
        ranks.states[0].step(2)
        ranks.commit(0, 2)
        assert eventually(lambda: bool(reused))
        ranks.replications[0].offer(3, is_there=True)
        assert ranks.becomes_whole(0, 3)
        for holder in (1, 2, 3):
            assert eventually(lambda h=holder: ranks.is_mirror(h, 0))  # type: ignore[misc]
            assert ranks.listed(holder, 0) == {1, 3}
        assert 2 not in ranks.replications[0].whole


def test_memory_that_was_damaged_since_it_was_captured_becomes_no_fragment(tmp_path: Path) -> None:
    """Row 1 is wrong: its own fragment and the parity are not listed, the other one is."""
    damage = threading.Event()

    def flip(point: str, iteration: int) -> None:
        if iteration == 2 and point == "mid-replication" and not damage.is_set():
            damage.set()
            for record in ranks.own(0).page.records:
                if record.iteration == 2:
                    ranks.own(0).payload(record.slot)[3] ^= 1

    with running(tmp_path, 4, 2, probe=flip, **FOUR) as ranks:
        ranks.step(1)
        ranks.states[0].step(2)
        ranks.commit(0, 2)
        parts = {h: ranks.placement.part_at(h, 0).number for h in ranks.placement.holders[0]}
        wrong = [h for h, number in parts.items() if number != 2]
        states = ranks.replications[0].states
        assert eventually(lambda: all(s.failures > 1 for s in states() if s.rank in wrong), LONG_S)
        assert all(ranks.listed(h, 0) == {1} for h in wrong)
        assert 2 not in ranks.replications[0].whole
