# SPDX-License-Identifier: Apache-2.0
"""Holders that stay away: patience, substitutes, fewer copies, the way back, and what redundancy is worth."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from mirrors import LONG_S, TIMING, Ranks, eventually, running
from world import Left, World, plan_world

from megatron_moetion.arrays import Bytes
from megatron_moetion.errors import CorruptArena
from megatron_moetion.recover.plan import choose_newest_experts, choose_same_iteration
from megatron_moetion.recover.report import ArenaReport, History
from megatron_moetion.replicate.placement import place
from megatron_moetion.replicate.substitutes import ASKED_MAX, substitutes_of
from megatron_moetion.replicate.worker import SystemThreads, ThreadWorker
from megatron_moetion.store.sharedfile import peek_arena
from megatron_moetion.units import UnitKind

PATIENCE = 5


def go_on(ranks: Ranks, iteration: int, *, but: int = -1) -> None:
    """Every rank takes a snapshot, and settles it when it is whole; one may have no room, and is not awaited."""
    for rank in range(len(ranks.states)):
        if rank != but:
            assert eventually(lambda r=rank: ranks.replications[r].pending == 0)  # type: ignore[misc]
            ranks.settle(rank, max(ranks.replications[rank].whole))
        ranks.states[rank].step(iteration)
        assert ranks.take(rank, iteration) or rank == but
    for rank in range(len(ranks.states)):
        if rank != but:
            assert ranks.becomes_whole(rank, iteration), ranks.replications[rank].states()
            ranks.settle(rank, iteration)


def go_on_alone(ranks: Ranks, iteration: int) -> None:
    """Every rank takes a snapshot, if it has room, and settles what is whole by then."""
    for rank in range(len(ranks.states)):
        ranks.states[rank].step(iteration)
        ranks.take(rank, iteration)
        if whole := ranks.replications[rank].whole:
            ranks.settle(rank, max(whole))


def go_on_until(ranks: Ranks, first: int, what: Callable[[], bool], every_s: float = 0.005) -> int:
    """Snapshots come until this is so; the number of the next one."""
    for iteration in range(first, first + int(20 / every_s)):
        if what():
            return iteration
        go_on_alone(ranks, iteration)
        time.sleep(every_s)
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


def test_substitutes_in_other_failure_domains_are_asked_first() -> None:
    racks = [f"s{r // 8}/r{r // 4}" for r in range(16)]  # two nodes a rack, two racks a switch
    placement = place([f"node{r // 2}" for r in range(16)], 1, racks)
    assert placement.groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert placement.holders[0] == (8,)
    assert substitutes_of(0, placement) == (4, 6, 12), "racks 0 and 2 have a copy already"


class Busy(SystemThreads):
    """Threads that come to what they are for when there is time."""

    def __init__(self) -> None:
        self.has_time = threading.Event()
        self.workers: list[ThreadWorker] = []

    def worker(self, name: str) -> ThreadWorker:
        self.workers.append(ThreadWorker(name))
        self.workers[-1].submit(self.has_time.wait)
        return self.workers[-1]


def test_links_that_have_not_begun_when_all_ends_are_no_bug(tmp_path: Path) -> None:
    busy = Busy()
    with running(tmp_path, 2, threads=busy) as ranks:
        for replication in ranks.replications:
            replication.abandon()
        busy.has_time.set()
        for worker in busy.workers:
            worker.close()
        for replication in ranks.replications:
            replication.wait(0)


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
        go_on(ranks, 5001)


def test_a_holder_on_a_slow_link_is_taken_back(tmp_path: Path) -> None:
    """Each snapshot takes longer to send than the next one takes to come."""

    def slowly(rank: int, peer: int, parts: Sequence[Bytes]) -> Sequence[Bytes]:
        if rank == 0 and sum(part.nbytes for part in parts) > 1000:
            time.sleep(0.06)
        return parts

    with running(tmp_path, 2, patience=PATIENCE) as ranks:
        ranks.step(1)
        ranks.faults.change = slowly
        with ranks.faults.cut([0], [1]):
            after = go_on_until(ranks, 2, lambda: active(ranks) == [])
        after = go_on_until(ranks, after, lambda: active(ranks) == [1], every_s=0.04)
        ranks.faults.change = lambda rank, peer, parts: parts
        go_on(ranks, after)
        assert ranks.replications[0].redundancy(after) == 1


@pytest.mark.parametrize("every", [1, 2])
def test_a_holder_that_does_not_answer_takes_no_other_holders_seat(tmp_path: Path, every: int) -> None:
    """Holder 1 takes an update's header and does not answer; holder 2 is in perfect health.

    Of every second snapshot that has no room the arena lists one only, which is all that holder 1 seems to lack.
    """
    goes_on = threading.Event()

    def say_nothing(rank: int, peer: int, parts: Sequence[Bytes]) -> Sequence[Bytes]:
        if (rank, peer) == (1, 0):
            goes_on.wait(LONG_S)
        return parts

    with running(tmp_path, 3, 2, patience=PATIENCE, timing=replace(TIMING, answer_s=LONG_S)) as ranks:
        ranks.step(1)
        ranks.faults.change = say_nothing
        try:
            after = go_on_until(ranks, 2, lambda: active(ranks) == [2])
            said = texts(ranks)
            for iteration in range(after, after + 20 * PATIENCE, every):
                go_on_alone(ranks, iteration)
                assert eventually(lambda i=iteration: i in ranks.replications[0].whole)  # type: ignore[misc]
                for dropped in range(iteration + 1, iteration + every):
                    ranks.settle(0, iteration)
                    ranks.replications[0].offer(dropped, is_there=False)
                assert active(ranks) == [2]
            assert "rank 2" not in said + texts(ranks)
            assert "rank 1 (node 1) has all" not in said + texts(ranks)
        finally:
            goes_on.set()


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
        assert eventually(lambda: not (ranks.folders[1] / "rank00000.arena").exists())
        assert eventually(lambda: [s.rank for s in ranks.replications[0].states()] == [3])
        go_on(ranks, 5001)
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
        go_on(ranks, 10001)


def test_the_first_holder_that_is_back_before_a_substitute_has_everything_stays(tmp_path: Path) -> None:
    with running(tmp_path, 3, patience=PATIENCE, room=(2,)) as ranks:
        ranks.step(1)
        with ranks.faults.cut([0], [2], "hold"):
            with ranks.faults.cut([0], [1], "hold"):
                go_on_until(ranks, 2, lambda: active(ranks) == [])
            assert eventually(lambda: active(ranks) == [1])
            after = go_on_until(ranks, 5000, lambda: max(ranks.replications[0].whole) >= 5000)
        go_on_until(ranks, after, lambda: [s.rank for s in ranks.replications[0].states()] == [1])
        assert 0 not in ranks.arenas[2].held


def test_a_copy_that_is_being_given_up_counts_for_nothing_even_if_it_is_wanted_again(tmp_path: Path) -> None:
    """Substitute 2 drops its copy, and has not answered yet, when holder 1 stays away once more. Nothing is settled."""
    sends, answers = threading.Event(), threading.Event()
    sent = 0

    def hold_back(rank: int, peer: int, parts: Sequence[Bytes]) -> Sequence[Bytes]:
        """Iteration 1 goes to substitute 2; what comes next waits, and so does its word that it has dropped that."""
        nonlocal sent
        if (rank, peer) == (0, 2):
            sent += 1
            if sent > 3:
                sends.wait(LONG_S)
        if (rank, peer) == (2, 0) and sends.is_set() and 0 not in ranks.arenas[2].held:
            answers.wait(LONG_S)
        return parts

    def pass_over(until: Callable[[], bool]) -> None:
        for iteration in range(5, 4000):
            if until():
                return
            ranks.replications[0].offer(iteration, is_there=False)
            time.sleep(0.005)
        raise AssertionError("it never came about")

    timing = replace(TIMING, answer_s=LONG_S)
    with running(tmp_path, 3, patience=PATIENCE, copies=4, room=(2,), timing=timing) as ranks:
        ranks.step(1)
        ranks.faults.change = hold_back
        replication = ranks.replications[0]
        try:
            with ranks.faults.cut([0], [1], "hold"):
                for iteration in (2, 3):
                    assert ranks.take(0, iteration)
                pass_over(lambda: sent > 3)
                assert replication.redundancy(1) == 1, "substitute 2 has it"
            pass_over(lambda: active(ranks) == [1] and 3 in replication.whole)
            sends.set()
            with ranks.faults.cut([0], [1], "hold"):
                assert eventually(lambda: 0 not in ranks.arenas[2].held)
                assert ranks.take(0, 4)
                pass_over(lambda: active(ranks) == [])
                assert replication.redundancy(1) == 0, "no other node has it"
                answers.set()
                pass_over(lambda: active(ranks) == [2])
                assert eventually(lambda: replication.redundancy(1) == 1)
                assert eventually(lambda: ranks.is_mirror(2, 0))
        finally:
            sends.set()
            answers.set()


class Job:
    """Ranks that take snapshots and agree on what is stable, each of them learning of it when it likes."""

    def __init__(self, ranks: Ranks, rng: random.Random, *, popular: bool) -> None:
        self.ranks, self.rng, self.popular = ranks, rng, popular
        self.iteration = self.stable = 1
        self.given_up: set[int] = set()
        self.ever_whole: list[set[int]] = [{1} for _ in ranks.states]

    def snapshot(self) -> None:
        self.iteration += 1
        units = [0, 1 + self.iteration % 2, 3] if self.popular else None
        for rank, state in enumerate(self.ranks.states):
            state.step(self.iteration)
            if not self.ranks.take(rank, self.iteration, units):
                self.given_up.add(self.iteration)
        time.sleep(self.rng.choice([0.0, 0.002, 0.01]))
        for rank, replication in enumerate(self.ranks.replications):
            self.ever_whole[rank] |= replication.whole.keys()
        self.stable = max(set.intersection(*self.ever_whole) - self.given_up | {self.stable})
        for rank in range(len(self.ranks.states)):
            if self.rng.random() < 0.8:
                self.ranks.settle(rank, self.stable, self.given_up)

    def check(self) -> int:
        """Losing any nodes that redundancy says may be lost leaves an iteration as new as the stable one."""
        stable = self.stable
        redundancy = min(r.redundancy(stable) for r in self.ranks.replications)
        nodes = range(len(self.ranks.states))
        left = self.left()
        for lost in itertools.combinations(nodes, redundancy):
            found = recovered([each for each in left if each.node not in lost], self.ranks, popular=self.popular)
            assert (found or -1) >= stable, f"{lost} lost, {stable} was stable with {redundancy}"
        return redundancy

    def left(self) -> list[Left]:
        """What surveys would find, if all processes ended now."""
        found = []
        for node, folder in enumerate(self.ranks.folders):
            for path in sorted(folder.glob("*.arena")):
                try:
                    spec, page = peek_arena(path)
                except CorruptArena:
                    assert not path.exists(), "given up between the two looks"
                    continue
                report = ArenaReport(
                    path=str(path), owner=spec.identity.owner, history=History.of(page), records=page.records
                )
                found.append(Left(node=node, report=report))
        return found


def recovered(left: list[Left], ranks: Ranks, *, popular: bool) -> int | None:
    """The iteration that a recovery from these arenas goes back to."""
    units = [tuple((u.name, UnitKind(u.kind)) for u in state.inventory().units) for state in ranks.states]
    choose = choose_newest_experts if popular else choose_same_iteration
    world = plan_world(units, left, ranks.placement, choose)
    return world.iteration if isinstance(world, World) else None


@pytest.mark.parametrize("seed", range(6))
def test_redundancy_is_never_said_to_be_more_than_it_is(tmp_path: Path, seed: int) -> None:
    """Faults at random; at random moments all arenas are looked at, and nodes are lost on paper."""
    rng = random.Random(seed)
    replicas, popular = 1 + seed % 2, seed % 3 == 0
    room = [r for r in range(4) if rng.random() < 0.7]
    seen: Counter[int] = Counter()
    with running(tmp_path, 4, replicas, patience=3, room=room, copies=4, timing=replace(TIMING, away_s=0.05)) as ranks:
        for rank in range(4):
            ranks.commit(rank, 1)
        for rank in range(4):
            assert ranks.becomes_whole(rank, 1)
            ranks.settle(rank, 1)
        job = Job(ranks, rng, popular=popular)
        for _ in range(12):
            with ExitStack() as faults:
                for _ in range(rng.randrange(3)):
                    a, b = rng.sample(range(4), 2)
                    faults.enter_context(ranks.faults.cut([a], [b], "hold"))
                for _ in range(rng.randrange(4)):
                    ranks.faults.reset(1, rng.randrange(4), None, "hold")
                for _ in range(rng.randrange(1, 12)):
                    job.snapshot()
                    if rng.random() < 0.5:
                        seen[job.check()] += 1
        healed = job.iteration
        for _ in range(2000):
            job.snapshot()
            if job.stable > healed and job.check() == replicas:
                break
        else:
            states = [r.states() for r in ranks.replications]
            raise AssertionError(f"stable {job.stable} of {job.iteration}, redundancy {seen}: {states}")
    assert seen[replicas], "it is never less than it is either"
