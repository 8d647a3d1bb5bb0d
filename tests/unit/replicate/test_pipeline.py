# SPDX-License-Identifier: Apache-2.0
"""Snapshots in pipeline: a failed one is dropped and counted, and the training thread sees no exception (G3)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from session_job import Job
from support import (
    ManualClock,
    ToyState,
    WatchedPool,
    is_whole,
    make_arena,
    make_packer,
    no_probe,
    on_device,
)

from megatron_moetion._C import DevicePool
from megatron_moetion.clock import SystemClock
from megatron_moetion.replicate.agreement import WINDOW
from megatron_moetion.replicate.pipeline import Pipeline, Skip
from megatron_moetion.replicate.worker import SystemThreads, Threads
from megatron_moetion.schedule.pace import EvenPace
from megatron_moetion.snapshot.capture import Contents
from megatron_moetion.snapshot.plan import Targets
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.open import OpenArenas
from megatron_moetion.store.retention import Newest, Settled
from megatron_moetion.units import Inventory


class FakeReplication:
    """Stands for a ``Replication`` whose holders have at once what the test says."""

    def __init__(self, answer: Callable[[int], bool]) -> None:
        self._answer = answer
        self.offers: list[tuple[int, bool]] = []
        self.whole: dict[int, float] = {}
        self.is_closed = False

    def offer(self, iteration: int, *, is_there: bool) -> None:
        self.offers.append((iteration, is_there))
        if is_there and self._answer(iteration):
            self.whole[iteration] = 0.0

    def drain(self) -> None: ...

    def wait(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        self.is_closed = True

    abandon = close


def alone(arena: Arena) -> OpenArenas:
    """The arenas of a rank that holds nobody's replica."""
    return OpenArenas(own=arena, held={}, retention=Newest())


class Rig:
    """One rank's pipeline over a small state."""

    def __init__(
        self,
        folder: Path,
        answer: Callable[[int], bool] | None,
        copies: int = 3,
        place: Callable[[Inventory], Inventory] = lambda inventory: inventory,
        threads: Threads | None = None,
        **packing: Any,
    ) -> None:
        self.state = ToyState(num_experts=2)
        self.clock = ManualClock()
        """Of the pace: it stands still."""
        inventory = place(self.state.inventory())
        self.arena: Arena = make_arena(folder, self.state, copies=copies)
        self.pool: Any = None
        self.calls: list[str] = []
        self.packer = make_packer(inventory, watch=self.watch, **packing)
        self.replication = FakeReplication(answer) if answer is not None else None
        self.pipeline = Pipeline(
            packer=self.packer,
            inventory=inventory,
            arenas=alone(self.arena),
            replication=self.replication,  # type: ignore[arg-type]
            epoch=0,
            probe=no_probe,
            packed=lambda begin_s, end_s, nbytes: self.packed.append((end_s - begin_s, nbytes)),
            pace=EvenPace(self.clock, (threads or SystemThreads()).event()),
            clock=SystemClock(),
            threads=threads or SystemThreads(),
        )
        self.packed: list[tuple[float, int]] = []
        self.everything = tuple(range(len(inventory.units)))

    def watch(self, pool: DevicePool) -> WatchedPool:
        self.pool = WatchedPool(pool, self.calls)
        return self.pool

    def take(self, iteration: int) -> None:
        self.packer.freeze(b"host")
        self.pipeline.submit(iteration, Contents(units=self.everything, tokens={1: 10 * iteration}))

    def iterations(self) -> set[int]:
        return {r.iteration for r in self.arena.page.records}


@pytest.mark.parametrize("answer", [None, lambda iteration: True])
def test_a_snapshot_is_committed_then_whole(tmp_path: Path, answer: Callable[[int], bool] | None) -> None:
    rig = Rig(tmp_path, answer)
    rig.take(1)
    rig.take(2)
    rig.pipeline.drain()
    assert rig.pipeline.whole == {1, 2}
    assert [n for _, n in rig.packed] == [rig.state.inventory().nbytes] * 2
    assert all(seconds > 0 for seconds, _ in rig.packed)
    assert rig.iterations() == {1, 2}
    assert {r.tokens for r in rig.arena.page.records if r.unit == 1} == {10, 20}
    counts = rig.pipeline.counts
    assert (counts.begun, counts.committed) == (2, 2)
    assert counts.bytes_committed == sum(r.nbytes for r in rig.arena.page.records)
    assert sum(counts.dropped.values()) == 0
    rig.pipeline.close()


def test_no_free_slot_drops_the_snapshot_and_holders_are_told_in_order(tmp_path: Path) -> None:
    rig = Rig(tmp_path, lambda iteration: True, copies=1)
    for iteration in (1, 2, 3):
        rig.take(iteration)
    rig.pipeline.drain()
    assert rig.replication is not None
    assert rig.replication.offers == [(1, True), (2, False), (3, False)]
    assert rig.pipeline.rounds == {1: True, 2: False, 3: False}
    assert rig.pipeline.whole == {1}
    assert rig.pipeline.counts.dropped["no-slot"] == 2
    rig.arena.edit(lambda page: {"records": ()})
    rig.take(4)
    rig.pipeline.drain()
    assert rig.pipeline.whole == {1, 4}
    rig.pipeline.close()


def test_a_late_pack_is_cancelled_dropped_and_its_slots_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, lambda iteration: True, copies=1)
    pack = rig.packer.pack

    def slow(targets: Targets, between: Callable[[], None], *rest: Any) -> Any:
        deadline = time.monotonic() + 10
        while not rig.packer.is_cancelled and time.monotonic() < deadline:
            time.sleep(0.002)
        return pack(targets, between, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(rig.packer, "pack", slow)
        rig.take(1)
        began = time.monotonic()
        rig.pipeline.finish_packing(0.05)
        assert time.monotonic() - began < 5
    # The state may change from here on; what was begun is never committed.
    rig.state.step(1)
    rig.pipeline.drain()
    assert rig.iterations() == set()
    assert rig.pipeline.counts.dropped["late"] == 1
    rig.take(2)
    rig.pipeline.finish_packing(5)
    rig.pipeline.drain()
    assert rig.pipeline.whole == {2}
    rig.pipeline.close()


def test_training_waits_for_a_device_on_the_device_and_not_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, lambda iteration: True, place=on_device)
    rig.packer.adopt(rig.arena.memory)
    rig.packer.freeze(b"host")
    assert rig.packer.settle()
    rig.calls.clear()
    has_landed, finish = threading.Event(), rig.pool.finish

    def finish_late(*arguments: Any) -> None:
        assert has_landed.wait(10)
        finish(*arguments)

    monkeypatch.setattr(rig.pool, "finish", finish_late, raising=False)
    rig.pipeline.submit(1, Contents(units=rig.everything))
    rig.pipeline.finish_packing(10)
    tickets = [c.split()[1] for c in rig.calls if c.startswith("pack_uploaded")]
    assert rig.calls[-1] == f"order_after (0, {tickets[-1]})", "the optimizer's stream waits for the last batch"
    assert not any(c.startswith("finish") for c in rig.calls), "which is still under way"
    assert rig.iterations() == set()
    has_landed.set()
    rig.pipeline.drain()
    assert rig.pipeline.whole == {1}
    assert sum(rig.pipeline.counts.dropped.values()) == 0
    rig.pipeline.close()
    rig.packer.close()


def test_training_waits_for_a_late_device_as_long_as_it_is_told_and_the_next_snapshot_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Batches of one capture: two are in flight and more are to come.
    rig = Rig(tmp_path, lambda iteration: True, place=on_device, copies=1, batch_bytes=1)
    rig.packer.adopt(rig.arena.memory)
    rig.packer.freeze(b"host")
    assert rig.packer.settle()
    has_landed, wait = threading.Event(), rig.pool.wait
    monkeypatch.setattr(rig.pool, "wait", lambda *a, **o: has_landed.wait(0.001) and wait(*a, **o), raising=False)
    for iteration in (1, 2):  # the second one finds the device still busy with the first
        rig.pipeline.submit(iteration, Contents(units=rig.everything))
        for _ in range(2):  # optimizers in a chain ask one after the other
            rig.pipeline.finish_packing(0.01)  # returns, although nothing has landed
        rig.state.step(iteration)
        rig.pipeline.finish()
        assert rig.pipeline.counts.dropped == {"late": iteration}
        rig.packer.freeze(b"host")  # refused: the device may still write what it was told to
    has_landed.set()
    rig.packer.freeze(b"host")
    rig.pipeline.submit(3, Contents(units=rig.everything))
    rig.pipeline.finish_packing(10)
    rig.pipeline.drain()
    assert rig.pipeline.whole == {3}
    assert rig.pipeline.counts.dropped == {"late": 2}
    for record in rig.arena.page.records:
        assert is_whole(rig.arena, record)
    rig.pipeline.close()
    rig.packer.close()


class Waits(SystemThreads):
    """Threads whose waits with a certain limit are written down, with what is so when they begin."""

    def __init__(self, limit_s: float, what: Callable[[], bool]) -> None:
        self.limit_s = limit_s
        self.what = what
        self.found: list[bool] = []

    def event(self) -> threading.Event:
        outer = self

        class Written(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                if timeout == outer.limit_s:
                    outer.found.append(outer.what())
                return super().wait(timeout)

        return Written()


def test_the_stall_of_an_optimizer_counts_from_when_the_device_is_where_the_last_step_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that is far ahead of its device would lose every snapshot otherwise."""
    has_reached = threading.Event()
    threads = Waits(9.5, has_reached.is_set)
    rig = Rig(tmp_path, lambda iteration: True, place=on_device, threads=threads)
    rig.packer.adopt(rig.arena.memory)
    wait = rig.pool.wait
    monkeypatch.setattr(rig.pool, "wait", lambda *a, **o: has_reached.wait(0.001) and wait(*a, **o), raising=False)
    rig.take(1)  # returns, although training's stream has not come to the copies
    timer = threading.Timer(0.2, has_reached.set)
    timer.start()
    rig.pipeline.finish_packing(9.5)
    timer.join()
    assert all(threads.found), "nobody was impatient before"
    rig.pipeline.drain()
    assert rig.pipeline.whole == {1}
    assert rig.pipeline.counts.waited_for_device_s > 0
    rig.pipeline.close()
    rig.packer.close()


@pytest.mark.parametrize("who", ["optimizer", "drain", "close", "abandon"])
def test_whoever_waits_for_a_snapshot_ends_its_pauses(tmp_path: Path, who: str) -> None:
    """Bytes are spread over 800 s by what the first iteration has taught; this test would wait for them."""
    rig = Rig(tmp_path, lambda iteration: True, place=on_device, batch_bytes=4096)
    rig.packer.adopt(rig.arena.memory)
    rig.take(1)
    rig.clock.now_s += 1000.0
    rig.pipeline.finish_packing(10)
    rig.pipeline.finish()
    rig.calls.clear()
    rig.take(2)
    while "pack_uploaded" not in " ".join(rig.calls):
        time.sleep(0.001)
    assert " ".join(rig.calls).count("pack_uploaded") == 1, "the second batch is not due"
    if who == "close":
        rig.pipeline.close()
        rig.packer.close()
        return
    if who == "abandon":
        assert rig.pipeline.abandon(10)
    else:
        if who == "optimizer":
            rig.pipeline.finish_packing(10)
        rig.pipeline.drain()
    assert rig.pipeline.whole == {1, 2}
    rig.pipeline.close()
    rig.packer.close()


def test_an_iteration_without_a_snapshot_leaves_nothing_under_way_on_the_device(tmp_path: Path) -> None:
    """Else the next copies would be refused as late, although the host is only ahead."""
    rig = Rig(tmp_path, lambda iteration: True, place=on_device)
    rig.packer.adopt(rig.arena.memory)
    rig.packer.freeze(b"host")
    rig.calls.clear()
    rig.pipeline.submit(1, Skip(reason="gap"))
    rig.pipeline.finish()
    assert [c.split()[0] for c in rig.calls if c.startswith("finish")] == ["finish"]
    rig.take(2)
    rig.pipeline.drain()
    assert rig.pipeline.whole == {2}
    rig.pipeline.close()
    rig.packer.close()


def test_a_snapshot_that_holders_lack_has_no_fate_yet(tmp_path: Path) -> None:
    rig = Rig(tmp_path, lambda iteration: iteration != 1)
    rig.take(1)
    rig.take(2)
    rig.pipeline.submit(3, Skip(reason="moved"))
    rig.pipeline.drain()
    assert rig.pipeline.rounds == {2: True, 3: False}
    assert rig.pipeline.counts.dropped == {"moved": 1}
    rig.pipeline.close()
    assert rig.replication is not None
    assert rig.replication.is_closed


def test_a_bug_in_replication_does_not_pass_in_silence(tmp_path: Path) -> None:
    def bug(iteration: int) -> bool:
        raise AssertionError("a link does what it must not")

    rig = Rig(tmp_path, bug)
    rig.take(1)
    with pytest.raises(AssertionError, match="must not"):
        rig.pipeline.drain()


def test_a_skipped_iteration_has_a_fate_too(tmp_path: Path) -> None:
    rig = Rig(tmp_path, lambda iteration: True)
    rig.take(1)
    rig.pipeline.submit(2, Skip(reason="moved"))
    rig.take(3)
    rig.pipeline.drain()
    assert rig.replication is not None
    assert rig.replication.offers == [(1, True), (2, False), (3, True)]
    assert rig.pipeline.rounds == {1: True, 2: False, 3: True}
    assert rig.pipeline.counts.dropped["moved"] == 1
    rig.pipeline.close()


def test_a_gap_on_purpose_counts_under_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path)
    job.start()
    for session in job.sessions:
        monkeypatch.setattr(session.running.mode, "contents", lambda *_: (Skip(reason="gap"), None))
    job.train(2)
    assert [session.running.pipeline.counts.dropped for session in job.sessions] == [{"gap": 2}] * 2
    job.crash()


def test_what_is_settled_is_released_before_a_snapshot_looks_for_room(tmp_path: Path) -> None:
    rig = Rig(tmp_path, lambda iteration: True, copies=1)
    rig.take(1)
    rig.packer.freeze(b"host")
    settled = Settled(stable=0, whole={1: False})  # iteration 1 was not whole elsewhere
    rig.pipeline.submit(2, Contents(units=rig.everything), settled)
    rig.pipeline.drain()
    assert rig.iterations() == {2}
    assert rig.arena.page.stable == 0
    assert not rig.pipeline.counts.dropped
    rig.pipeline.close()


def test_only_recent_iterations_are_remembered(tmp_path: Path) -> None:
    rig = Rig(tmp_path, None)
    for iteration in range(1, WINDOW + 20):
        rig.take(iteration)
        rig.pipeline.drain()
        rig.arena.edit(lambda page: {"records": ()})
    assert rig.pipeline.whole == set(range(20, WINDOW + 20))
    rig.pipeline.close()
