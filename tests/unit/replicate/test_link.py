# SPDX-License-Identifier: Apache-2.0
"""Mirrors over real sockets: bit-equal, and level again after whatever a network does to a connection."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mirrors import LONG_S, TIMING, Node, eventually, running
from support import POOL, capture, is_whole, node_folder

from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.frames import PURPOSE, Frame, Kind, Opening, receive_frame, send_frame
from megatron_moetion.store.manifest import MAX_BRANCHES, Branch, Page
from megatron_moetion.store.sharedfile import open_arena, peek_arena
from megatron_moetion.store.spec import arena_name


@pytest.mark.parametrize(("num_ranks", "replicas"), [(2, 1), (3, 1), (3, 2)])
def test_replicas_are_bit_equal_and_listed(tmp_path: Path, num_ranks: int, replicas: int) -> None:
    with running(tmp_path, num_ranks, replicas) as ranks:
        for iteration in range(1, 5):
            ranks.step(iteration)
        for owner in range(num_ranks):
            ranks.replications[owner].offer(5, is_there=False)
            for holder in ranks.placement.holders[owner]:
                assert eventually(lambda h=holder, o=owner: ranks.is_mirror(h, o))  # type: ignore[misc]
                assert eventually(lambda h=holder, o=owner: ranks.held(h, o).page.stable == 4)  # type: ignore[misc]
            assert ranks.replications[owner].redundancy(4) == replicas


@pytest.mark.parametrize("resets", [1, 10])
def test_resets_of_one_pair_cost_nothing_and_no_other_pair(tmp_path: Path, resets: int) -> None:
    with running(tmp_path, 3) as ranks:
        ranks.step(1)
        failures = [r.states()[0].failures for r in ranks.replications]
        ranks.faults.reset(resets, 0, ranks.placement.holders[0][0], "hold")
        for iteration in range(2, 6):
            ranks.step(iteration)
        assert ranks.replications[0].states()[0].failures == failures[0] + resets
        assert [r.states()[0].failures for r in ranks.replications[1:]] == failures[1:]


def test_connections_that_are_lost_at_random_all_the_time_carry_every_snapshot(tmp_path: Path) -> None:
    rng = random.Random(1)
    with running(tmp_path, 2) as ranks:
        for iteration in range(1, 30):
            if rng.random() < 0.7:
                ranks.faults.reset(1, rng.randrange(2), None, "hold")
            ranks.step(iteration)
        for owner in range(2):
            assert eventually(lambda o=owner: ranks.is_mirror(1 - o, o))  # type: ignore[misc]


@pytest.mark.parametrize("position", [0, 9, 17, 33, 45, 60, 64, 70, -1])
@pytest.mark.parametrize(("sender", "number"), [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)])
def test_damage_anywhere_costs_a_connection_and_lists_nothing_wrong(
    tmp_path: Path, sender: int, number: int, position: int
) -> None:
    """Of owner 0 its opening, its update and its payload are damaged, of holder 1 its table and its two answers."""
    with running(tmp_path, 2, 1) as ranks:
        ranks.step(1)
        ranks.commit(1, 2)
        assert ranks.becomes_whole(1, 2)
        with ranks.faults.cut([0], [1], "hold"):
            ranks.commit(0, 2)
            assert eventually(lambda: not ranks.replications[0].states()[0].is_up)
            failures = ranks.replications[0].states()[0].failures
            ranks.faults.damage(sender, number, position)
        assert ranks.becomes_whole(0, 2)
        assert ranks.faults.met
        assert ranks.replications[0].states()[0].failures > failures
        assert eventually(lambda: ranks.is_mirror(1, 0))


def test_nothing_is_heard_of_a_holder_that_stands_still_and_it_is_level_when_it_goes_on(tmp_path: Path) -> None:
    """A stopped process: the kernel takes bytes for it for a while, and nobody answers."""
    goes_on = threading.Event()
    stops = threading.Event()

    def stand_still(point: str, iteration: int) -> None:
        if stops.is_set() and point == "held-received":
            goes_on.wait(LONG_S)

    with running(tmp_path, 3, held_probe=stand_still, timing=replace(TIMING, answer_s=0.2)) as ranks:
        ranks.step(1)
        stops.set()
        for rank in range(3):
            ranks.commit(rank, 2)
        assert eventually(lambda: all(r.states()[0].failures > 1 for r in ranks.replications))
        assert not any(2 in r.whole for r in ranks.replications)
        stops.clear()
        goes_on.set()
        for rank in range(3):
            assert ranks.becomes_whole(rank, 2)
        ranks.settle(0, 2)
        ranks.step(3)


def test_snapshots_that_came_during_a_partition_arrive_late_the_oldest_first_and_other_pairs_go_on(
    tmp_path: Path,
) -> None:
    with running(tmp_path, 4) as ranks:
        ranks.step(1)
        with ranks.faults.cut([0], [1]):
            for iteration in range(2, 12):
                for rank in range(4):
                    ranks.states[rank].step(iteration)
                    is_there = ranks.take(rank, iteration)
                    assert is_there == (rank > 1 or iteration <= 3), "three slots: two are free"
                for rank in (2, 3):
                    assert ranks.becomes_whole(rank, iteration)
                    ranks.settle(rank, iteration)
            assert not any({2, 3} & set(ranks.replications[r].whole) for r in (0, 1))
            assert ranks.replications[0].pending == 2
            assert ranks.replications[0].redundancy(1) == 0, "nobody knows whether node 1 is still there"
        for rank in (0, 1):
            assert ranks.becomes_whole(rank, 3)
            moments = ranks.replications[rank].whole
            assert moments[2] <= moments[3]
            assert ranks.replications[rank].redundancy(3) == 1
            ranks.settle(rank, 3)
        ranks.step(12)


def test_a_snapshot_whose_slots_were_reused_while_it_was_sent_is_no_fault(tmp_path: Path) -> None:
    def reuse(point: str, iteration: int) -> None:
        if iteration == 2 and not reused:
            reused.append(iteration)
            ranks.own(0).edit(lambda page: {"records": page.records.where(page.records.table["iteration"] != 2)})
            capture(ranks.packers[0], ranks.own(0), 3)

    reused: list[int] = []
    with running(tmp_path, 2, copies=2, probe=reuse) as ranks:
        ranks.step(1)
        ranks.states[0].step(2)
        ranks.commit(0, 2)
        assert eventually(lambda: bool(reused))
        ranks.replications[0].offer(3, is_there=True)
        assert ranks.becomes_whole(0, 3)
        assert eventually(lambda: ranks.is_mirror(1, 0))
        assert ranks.listed(1, 0) == {1, 3}
        assert ranks.replications[0].states()[0].failures == 0
        assert 2 not in ranks.replications[0].whole


def test_an_update_of_a_history_that_has_ended_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, 2) as ranks:
        ranks.step(1)
        ranks.held(1, 0).edit(lambda page: {"epoch": 1, "branches": (Branch(epoch=1, iteration=1),)})
        ranks.commit(0, 2)
        assert eventually(lambda: "epoch" in (ranks.replications[0].states()[0].problem or ""))
        assert ranks.listed(1, 0) == {1}


def test_an_arena_that_was_made_for_an_owner_is_of_its_history_after_any_number_of_recoveries(tmp_path: Path) -> None:
    with running(tmp_path, 2) as ranks:
        spec = ranks.own(0).spec
        for count in (0, MAX_BRANCHES, MAX_BRANCHES + 1):
            branches = tuple(Branch(epoch=e, iteration=0) for e in range(1, count + 1))
            page = Page(epoch=count, branches=branches)
            made = node_folder(tmp_path).create_arena("made.arena", spec, page)
            _, page_there = peek_arena(tmp_path / "made.arena")
            made.close()
            opening = Opening(spec=spec, page=page)
            assert opening.is_history_of(page_there)
            if count:
                assert not opening.is_history_of(replace(page_there, branches=branches[:-1]))


def test_nobody_gives_up_the_arena_of_a_later_epoch(tmp_path: Path) -> None:
    with running(tmp_path, 3) as ranks:
        ranks.step(1)
        ranks.held(1, 0).edit(lambda page: {"epoch": 1, "branches": (Branch(epoch=1, iteration=1),)})
        for epoch, answer in ((0, Kind.NO), (1, Kind.YES)):
            connection = ranks.fabrics[0].mesh.dial(1, PURPOSE, 2.0)
            send_frame(connection, POOL, Frame(kind=Kind.DROP, epoch=epoch))
            assert receive_frame(connection, POOL, body_bytes_max=1000).kind is answer
            connection.close()
            assert (0 in ranks.arenas[1].held) == (answer is Kind.NO)


def test_a_node_promises_its_room_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two owners ask at once; there is room for one."""

    def spare_bytes(node: Node) -> int:
        free = room - node.bytes_here()
        time.sleep(0.3)  # the other one looks too, if it may
        return free

    def ask(owner: int) -> None:
        connection = ranks.fabrics[owner].mesh.dial(4, PURPOSE, 2.0)
        opening = Opening(spec=ranks.own(owner).spec, page=ranks.own(owner).page).encode()
        send_frame(connection, POOL, Frame(kind=Kind.OPEN, epoch=0, body=opening))
        answers.append(receive_frame(connection, POOL, body_bytes_max=1 << 20, timeout_s=LONG_S).kind)
        connection.close()

    answers: list[Kind] = []
    with running(tmp_path, 5) as ranks:
        room = node_folder(ranks.folders[4]).bytes_here() + 3 * ranks.own(0).nbytes // 2
        monkeypatch.setattr(Node, "spare_bytes", spare_bytes)
        threads = [threading.Thread(target=ask, args=(owner,)) for owner in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_S)
        assert sorted(answers) == [Kind.TABLE, Kind.NO]
        assert len({0, 1} & set(ranks.arenas[4].held)) == 1
        assert (ranks.folders[4] / "room.lock").exists(), "other ranks of the node are kept out too"


def test_a_rank_opens_no_arena_but_its_own(tmp_path: Path) -> None:
    with running(tmp_path, 3, room=(0, 1, 2)) as ranks:
        ranks.step(1)
        connection = ranks.fabrics[2].mesh.dial(1, PURPOSE, 2.0)
        opening = Opening(spec=ranks.own(0).spec, page=ranks.own(0).page).encode()
        send_frame(connection, POOL, Frame(kind=Kind.OPEN, epoch=0, body=opening))
        answer = receive_frame(connection, POOL, body_bytes_max=1000)
        assert answer.kind is Kind.NO
        assert "rank 2 opens the arena of rank 0" in answer.reason


@pytest.mark.parametrize("point", ["held-dropped", "held-received", "held-listed"])
def test_a_holder_that_dies_in_an_update_leaves_what_was_stable(tmp_path: Path, point: str) -> None:
    died = threading.Event()

    def die(at: str, iteration: int) -> None:
        if at == point and iteration == 4:
            died.set()
            raise ChannelError("its process has ended")

    with running(tmp_path, 2, held_probe=die) as ranks:
        for iteration in range(1, 4):
            ranks.step(iteration)
        expected = {r.unit: ranks.own(0).payload(r.slot).tobytes() for r in ranks.own(0).page.records}
        ranks.commit(0, 4)
        assert died.wait(LONG_S)
        path = ranks.folders[1] / arena_name(0)
        _, page = peek_arena(path)
        left = open_arena(path)
        stable = [r for r in page.records if r.iteration == 3]
        assert {r.unit: left.payload(r.slot).tobytes() for r in stable} == expected
        assert all(is_whole(left, r) for r in page.records)
        left.close()
