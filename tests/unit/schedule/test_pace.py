# SPDX-License-Identifier: Apache-2.0
"""The bytes of a snapshot leave a device evenly, and at once when somebody waits for them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ManualClock, ToyState, WatchedPool, make_arena, make_packer, no_probe, on_device

from megatron_moetion._C import DevicePool
from megatron_moetion.schedule.pace import REMEMBERED, SPREAD_SHARE, EvenPace, due_s, spread_s
from megatron_moetion.schedule.recorder import HostStopwatch
from megatron_moetion.schedule.scheduler import Scheduler, no_drawing
from megatron_moetion.snapshot.capture import Capturer, Contents

LINK_BYTES_PER_S = 1e9
MIB = 1 << 20


def test_bytes_are_spread_over_most_of_the_shortest_time_that_the_optimizer_left() -> None:
    assert spread_s([3.0, 2.0, 9.0]) == pytest.approx(2.0 * SPREAD_SHARE)
    assert spread_s([]) == 0.0, "nothing is known: link speed"


def test_they_are_due_evenly() -> None:
    assert [due_s(n, 4, 10.0, 18.0) for n in range(5)] == [10.0, 12.0, 14.0, 16.0, 18.0]
    assert due_s(9, 4, 10.0, 18.0) == 18.0, "more than was planned is due at the end"
    assert due_s(3, 4, 10.0, 5.0) == 10.0, "where the time is over all is due at once"
    assert due_s(0, 0, 10.0, 18.0) == 10.0


class ManualEvent(threading.Event):
    """Nobody else runs: a wait ends with its timeout, which passes at once on ``clock``; or at ``set_at_s``."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock = clock
        self.set_at_s = float("inf")

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        if not self.is_set():
            self._clock.sleep(min(timeout, max(0.0, self.set_at_s - self._clock.now_s)))
            if self._clock.now_s >= self.set_at_s:
                self.set()
        return self.is_set()


def make() -> tuple[EvenPace, ManualClock, ManualEvent]:
    clock = ManualClock()
    event = ManualEvent(clock)
    return EvenPace(clock, event), clock, event


def train(pace: EvenPace, clock: ManualClock, seconds: float, nbytes: int = 0, batch: int = 1) -> list[float]:
    """An iteration that leaves so much time; when each batch of its snapshot left, in seconds since its beginning."""
    pace.begin()
    began, left = clock.now_s, list[float]()
    pace.plan(nbytes)
    for _ in range(0, nbytes, batch):
        pace.admit(batch)
        left.append(clock.now_s - began)
    clock.now_s = max(clock.now_s, began + seconds)
    pace.asked()
    return left


def test_the_first_snapshot_leaves_at_once_and_later_ones_evenly() -> None:
    pace, clock, _ = make()
    assert train(pace, clock, 10.0, 100, 25) == [0.0] * 4
    assert train(pace, clock, 10.0, 100, 25) == pytest.approx([0.0, 2.0, 4.0, 6.0])
    train(pace, clock, 5.0)
    assert train(pace, clock, 10.0, 100, 25) == pytest.approx([0.0, 1.0, 2.0, 3.0]), "the shortest of the last ones"
    for _ in range(REMEMBERED):
        train(pace, clock, 10.0)
    assert train(pace, clock, 10.0, 100, 25) == pytest.approx([0.0, 2.0, 4.0, 6.0]), "which is forgotten"


def test_when_the_optimizer_asks_all_that_is_left_goes_at_once() -> None:
    pace, clock, event = make()
    train(pace, clock, 10.0)
    event.set_at_s = clock.now_s + 3.0
    assert train(pace, clock, 10.0, 100, 25) == pytest.approx([0.0, 2.0, 3.0, 3.0])
    assert not pace.is_early()
    event.set_at_s = float("inf")
    assert train(pace, clock, 10.0, 100, 25) == pytest.approx([0.0, 2.0, 4.0, 6.0]), "and the next ones wait again"


def test_only_the_first_question_of_the_optimizer_teaches_anything() -> None:
    pace, clock, _ = make()
    train(pace, clock, 10.0)
    pace.begin()
    pace.hurry()  # a session that drains
    pace.begin()
    clock.sleep(10.0)
    for _ in range(2):  # optimizers in a chain ask one after the other
        pace.asked()
        clock.sleep(-9.0)
    assert train(pace, clock, 10.0, 100, 25) == pytest.approx([0.0, 2.0, 4.0, 6.0])


def test_a_snapshot_that_begins_late_has_the_time_that_is_left() -> None:
    pace, clock, _ = make()
    train(pace, clock, 10.0)
    pace.begin()
    clock.sleep(4.0)  # a device that is behind the host
    pace.plan(100)
    began = clock.now_s
    left = []
    for _ in range(4):
        pace.admit(25)
        left.append(clock.now_s - began)
    assert left == pytest.approx([0.0, 1.0, 2.0, 3.0])


class Link(WatchedPool):
    """A pool whose batches take their time on a link, on a manual clock."""

    def __init__(self, pool: DevicePool, clock: ManualClock) -> None:
        super().__init__(pool, [])
        self._clock = clock
        self._done_s: dict[int, float] = {}
        self._free_s = 0.0
        self.left_s: list[float] = []

    def pack_uploaded(self, chunks: Any, **options: Any) -> int:
        ticket = self._pool.pack_uploaded(chunks, **options)
        self.left_s.append(self._clock.now_s)
        self._free_s = max(self._clock.now_s, self._free_s) + int(chunks[:, 1].sum()) / LINK_BYTES_PER_S
        self._done_s[ticket] = self._free_s
        return ticket

    def wait(self, ticket: int, *, timeout_s: float) -> bool:
        until = min(self._clock.now_s + timeout_s, self._done_s.get(ticket, 0.0))
        self._clock.now_s = max(self._clock.now_s, until)
        return self._done_s.get(ticket, 0.0) <= self._clock.now_s and self._pool.wait(ticket, timeout_s=timeout_s)


class Rig:
    """The packing thread's part of a run: a state on a device, a link, a scheduler, on one clock."""

    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        self.pace = EvenPace(self.clock, ManualEvent(self.clock))
        self.state = ToyState(num_experts=3, elements=MIB // 2)
        inventory = on_device(self.state.inventory())
        self.arena = make_arena(folder, self.state, copies=1)
        self.packer = make_packer(inventory, batch_bytes=MIB // 4, watch=self.watch)
        self.packer.adopt(self.arena.memory)
        self.drawn: list[tuple[float, float, int]] = []
        self.scheduler = Scheduler(
            "bubble",
            HostStopwatch(self.clock),
            clock=self.clock,
            condition=threading.Condition(),
            eager_slice_bytes=MIB,
            draw=no_drawing,
        )
        self.capturer = Capturer(
            packer=self.packer,
            arena=self.arena,
            epoch=0,
            probe=no_probe,
            packed=self.packed,
            pace=self.pace,
            clock=self.clock,
        )
        self.units = tuple(range(len(inventory.units)))
        self.nbytes = self.packer.bytes_on_device(np.array(self.units))

    def watch(self, pool: DevicePool) -> Link:
        self.link = Link(pool, self.clock)
        return self.link

    def packed(self, begin_s: float, end_s: float, nbytes: int) -> None:
        self.drawn.append((begin_s, end_s, nbytes))
        self.scheduler.packed(begin_s, end_s, nbytes)

    def iterate(self, iteration: int, seconds: float, contents: Contents | None = None) -> float:
        """One iteration; how long its snapshot took."""
        self.arena.edit(lambda page: {"records": ()})
        self.packer.freeze(b"host")
        self.pace.begin()
        began = self.clock.now_s
        assert self.capturer.capture(iteration, contents or Contents(units=self.units), lambda: None).is_there
        took = self.clock.now_s - began
        self.clock.now_s = max(self.clock.now_s, began + seconds)
        self.pace.asked()
        return took

    @property
    def reported_bytes_per_s(self) -> float:
        return 1e6 * self.scheduler.scalars()["moetion/device-to-host-mb-per-s"]


def test_over_a_run_with_pacing_the_reported_rate_stays_the_links(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    at_link_speed = rig.nbytes / LINK_BYTES_PER_S
    assert rig.iterate(1, 1.0) == pytest.approx(at_link_speed), "nothing is known of the first iteration"
    for iteration in range(2, 30):
        rig.link.left_s.clear()
        rig.drawn.clear()
        took = rig.iterate(iteration, 1.0)
        assert 0.7 < took < 0.9
        gaps = np.diff(rig.link.left_s)
        assert gaps.min() > 0.5 * gaps.max(), "evenly"
        assert sum(nbytes for _, _, nbytes in rig.drawn) == rig.nbytes
        assert sum(end - begin for begin, end, _ in rig.drawn) == pytest.approx(at_link_speed)
        assert rig.reported_bytes_per_s == pytest.approx(LINK_BYTES_PER_S)


def test_copies_of_gradients_are_spread_as_live_state_is(tmp_path: Path) -> None:
    """They may take longer than the optimizer waits, and have no other time: the next snapshot comes then."""
    rig = Rig(tmp_path)
    rig.iterate(1, 1.0)
    rig.link.left_s.clear()
    half = len(rig.units) // 2
    rig.iterate(2, 1.0, Contents(optional=rig.units[:half], staged=rig.units[half:]))
    gaps = np.diff(rig.link.left_s)
    assert gaps.min() > 0.5 * gaps.max()


def test_a_link_that_is_too_slow_for_the_pace_is_never_left_idle(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    at_link_speed = rig.nbytes / LINK_BYTES_PER_S
    for iteration in (1, 2, 3):
        assert rig.iterate(iteration, at_link_speed / 10) == pytest.approx(at_link_speed)
        assert rig.reported_bytes_per_s == pytest.approx(LINK_BYTES_PER_S)
