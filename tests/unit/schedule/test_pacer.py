# SPDX-License-Identifier: Apache-2.0
"""The pacer keeps to its plan, yields to training, and never holds a byte beyond the deadline. Time is simulated."""

from __future__ import annotations

import threading

import pytest
from support import ManualClock, ManualCondition

from megatron_moetion.clock import SystemClock
from megatron_moetion.schedule.pacer import (
    CALM_FACTOR,
    PROBE_EVERY,
    PROBE_FACTOR,
    REMEMBERED,
    SLICE_MAX_BYTES,
    SLICE_MIN_BYTES,
    Eager,
    Pacer,
    Steady,
)
from megatron_moetion.schedule.planner import Rhythm, Window
from megatron_moetion.schedule.timeline import Lane

RATE = 1e6
KB100 = 100_000


class Simulated(Pacer):
    """A pacer whose waits advance the clock.

    At each moment of ``silences`` the network has accepted what training sent in a lane, of ``sends`` training sends so
    many bytes that are accepted at once, of ``beginnings`` an iteration begins.
    """

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.condition = Simulation(self)
        self.slices: list[tuple[float, float, int]] = []
        self.silences: list[tuple[float, Lane, int]] = []
        self.sends: list[tuple[float, int]] = []
        self.beginnings: list[tuple[float, Rhythm]] = []
        super().__init__(lambda *moved: self.slices.append(moved), self.clock, self.condition)

    def go(self, nbytes: int) -> float:
        """Admit, and say when it went, since the plan began."""
        self.admit(nbytes)
        return round(self.clock.now_s - 1000.0, 6)


class Simulation(ManualCondition):
    """What happens on the network while the sender waits."""

    def __init__(self, pacer: Simulated) -> None:
        super().__init__(pacer.clock)
        self.pacer = pacer

    def wait(self, timeout: float | None = None) -> bool:
        pacer, until = self.pacer, self.clock.now_s + (timeout or 0)
        if pacer.silences and pacer.silences[0][0] <= until:
            self.clock.now_s, lane, nbytes = pacer.silences.pop(0)
            pacer.traffic_ends(lane, nbytes)
            return True
        if pacer.sends and pacer.sends[0][0] <= until:
            self.clock.now_s, nbytes = pacer.sends.pop(0)
            pacer.traffic_begins(Lane.PIPELINE, nbytes)
            pacer.traffic_ends(Lane.PIPELINE, nbytes)
            return True
        if pacer.beginnings and pacer.beginnings[0][0] <= until:
            self.clock.now_s, rhythm = pacer.beginnings.pop(0)
            pacer.begin_iteration(rhythm)
            return True
        return super().wait(timeout)


def expect(*windows: tuple[float, float], sends: tuple[float, ...] = (), duration: float = 9.0) -> Rhythm:
    return Rhythm(sends_s=sends, duration_s=duration, windows=tuple(Window(begin_s=b, end_s=e) for b, e in windows))


def following(rhythm: Rhythm, total_bytes: int, deadline_s: float) -> Simulated:
    """A pacer that knows the link, at the beginning of an iteration and of a transfer."""
    pacer = Simulated()
    pacer.learn(RATE)
    pacer.begin_iteration(rhythm)
    pacer.follow(total_bytes, deadline_s)
    return pacer


def test_before_any_transfer_nothing_is_held_back() -> None:
    pacer = Simulated()
    assert pacer.go(10**9) == 0


def test_bytes_go_in_the_windows_that_have_room_for_them() -> None:
    pacer = following(expect((0.0, 0.05), (0.2, 0.35), (0.6, 0.9)), 3 * KB100, deadline_s=2.0)
    gone = [pacer.go(KB100) for _ in range(3)]
    assert gone == [0.2, 0.6, pytest.approx(0.6 + KB100 / RATE / PROBE_FACTOR)]  # 50 ms are left of the second window
    late, held = pacer.report()
    assert late == 0
    assert held == pytest.approx(gone[2] - 2 * KB100 / RATE / PROBE_FACTOR)  # all but the time that slices were leaving


def test_what_has_no_window_goes_when_only_the_time_to_send_is_left() -> None:
    pacer = following(expect((0.0, 0.15)), 3 * KB100, deadline_s=1.0)
    assert pacer.go(KB100) == 0
    assert pacer.go(KB100) == 0.8  # 200 kB take 0.2 s, and 1 s is the limit
    assert pacer.go(KB100) == 0.9
    assert pacer.report()[0] == 2 * KB100


def test_the_rhythm_follows_training_and_waits_for_its_next_send() -> None:
    """Expected: sends at 0.3 and 0.6. Training is late: until it has sent, the window after that send stays shut."""
    pacer = following(expect((0.4, 0.6), (0.7, 0.9), sends=(0.3, 0.6)), 2 * KB100, deadline_s=5.0)
    pacer.sends = [(1000.8, 50_000), (1001.4, 50_000)]
    assert pacer.go(KB100) == pytest.approx(0.9)  # a tenth of a second after the send, as in the rhythm
    pacer.clock.now_s = 1001.05  # too late for what is left of this window
    assert pacer.go(KB100) == pytest.approx(1.5)


def test_an_iteration_that_begins_reopens_the_windows() -> None:
    pacer = following(expect((0.0, 0.15), duration=0.5), 2 * KB100, deadline_s=5.0)
    assert pacer.go(KB100) == 0
    pacer.beginnings = [(1000.7, expect((0.1, 0.3), duration=0.5))]
    assert pacer.go(KB100) == pytest.approx(0.8)


def test_training_that_sends_holds_slices_back_for_as_long_as_its_bytes_take() -> None:
    pacer = following(expect((0.0, 9.0)), 3 * KB100, deadline_s=5.0)
    pacer.traffic_begins(Lane.PIPELINE, 50_000)
    pacer.traffic_ends(Lane.PIPELINE, 50_000)  # the call returns at once; the wire is busy for 50 ms
    assert pacer.go(KB100) == 0.05
    assert pacer.go(KB100) == pytest.approx(0.05 + KB100 / RATE / PROBE_FACTOR, abs=0.03)


def test_a_send_whose_peer_is_late_holds_slices_back_until_its_bytes_are_gone() -> None:
    """Accepted by the network 0.7 s after the call; the bytes take 50 ms more."""
    pacer = following(expect((0.0, 9.0)), KB100, deadline_s=5.0)
    pacer.traffic_begins(Lane.PIPELINE, 50_000)
    pacer.silences.append((1000.7, Lane.PIPELINE, 50_000))
    assert pacer.go(KB100) == 0.75


def test_the_rhythm_goes_on_from_when_the_network_has_a_message() -> None:
    """Expected: a send at 0.3, accepted at 0.4, a window from 0.5 on. Accepted at 2.0, so the window is from 2.1 on."""
    windows = (Window(begin_s=0.5, end_s=0.7),)
    pacer = following(Rhythm(sends_s=(0.3,), accepted_s=(0.4,), duration_s=0.9, windows=windows), KB100, deadline_s=5.0)
    pacer.clock.now_s = 1001.0
    pacer.traffic_begins(Lane.PIPELINE, 50_000)
    pacer.silences.append((1002.0, Lane.PIPELINE, 50_000))
    assert pacer.go(KB100) == 2.1


def test_each_message_sets_the_clock_to_its_own_place_and_so_does_a_collective_that_is_over() -> None:
    """Two messages and, between them, gradients, as expected; all of it is late."""
    windows = (
        Window(begin_s=0.25, end_s=0.4),
        Window(begin_s=0.5, end_s=0.6),
        Window(begin_s=0.9, end_s=1.05),
    )
    pacer = following(
        Rhythm(sends_s=(0.1, 0.4, 0.6), accepted_s=(0.2, 0.5, 0.8), duration_s=1.5, windows=windows),
        3 * KB100,
        deadline_s=30.0,
    )
    late = ((2, 3, Lane.PIPELINE, 3.05), (4, 5, Lane.GRADIENT, 5.0), (6, 8, Lane.PIPELINE, 8.1))
    for began, accepted, lane, expected in late:
        pacer.clock.now_s = 1000.0 + began
        pacer.traffic_begins(lane, 50_000)
        pacer.silences.append((1000.0 + accepted, lane, 50_000))
        assert pacer.go(KB100) == pytest.approx(expected)


def test_collectives_that_overlap_are_over_when_the_last_of_them_is() -> None:
    """Gradients of two buckets: sent one after the other, finished together."""
    windows = (Window(begin_s=0.5, end_s=0.9),)
    pacer = following(
        Rhythm(sends_s=(0.1, 0.2), accepted_s=(0.4, 0.5), duration_s=1.5, windows=windows), KB100, deadline_s=30.0
    )
    for _ in range(2):
        pacer.traffic_begins(Lane.GRADIENT, 1)
    pacer.silences = [(1003.0, Lane.GRADIENT, 1), (1004.0, Lane.GRADIENT, 1)]
    assert pacer.go(KB100) == 4.0


def test_what_goes_at_the_deadline_beside_training_is_late() -> None:
    pacer = following(expect((0.0, 9.0)), KB100, deadline_s=1.0)
    pacer.traffic_begins(Lane.PIPELINE, 50_000)
    assert pacer.go(KB100) == 1.0
    assert pacer.report()[0] == KB100


def test_a_collective_holds_slices_back_until_it_returns() -> None:
    pacer = following(expect((0.0, 9.0)), KB100, deadline_s=5.0)
    pacer.traffic_begins(Lane.GRADIENT, 1)
    pacer.silences.append((1000.7, Lane.GRADIENT, 1))
    assert pacer.go(KB100) == 0.7


def test_a_collective_that_never_returns_holds_nothing_beyond_the_deadline() -> None:
    pacer = following(expect((0.0, 9.0)), KB100, deadline_s=1.5)
    pacer.traffic_begins(Lane.GRADIENT, 1)
    assert pacer.go(KB100) == 1.5


def test_slices_leave_below_the_links_pace_but_one_transfer_in_eight_probes() -> None:
    pacer = Simulated()
    pacer.learn(RATE)
    for number in range(2 * PROBE_EVERY):
        pacer.clock.now_s = began = 1000.0 + 10 * number
        pacer.begin_iteration(expect((0.0, 9.0)))
        pacer.follow(5 * KB100, deadline_s=9.0)
        gone = [pacer.go(KB100) - (began - 1000.0) for _ in range(5)]
        pace = CALM_FACTOR if number % PROBE_EVERY else PROBE_FACTOR
        assert gone == [pytest.approx(n * KB100 / RATE / pace, abs=1e-5) for n in range(5)]
    assert REMEMBERED >= 2 * PROBE_EVERY  # what a probe has shown is not forgotten before the next one


def test_bandwidth_is_the_best_of_what_was_seen_without_the_time_that_was_held() -> None:
    pacer = Simulated()
    with pacer.transfer(10**6):
        pacer.clock.now_s += 1.0
    assert pacer.bytes_per_s == 1e6
    with pacer.transfer(10**6):
        pacer.clock.now_s += 4.0
    assert pacer.bytes_per_s == 1e6
    pacer.begin_iteration(expect((3.0, 5.0)))
    pacer.follow(10**6, deadline_s=9.0)
    with pacer.transfer(10**6):
        pacer.go(10**6)
        pacer.clock.now_s += 0.5
    assert pacer.bytes_per_s == 2e6
    with pacer.transfer(100):  # too little to tell
        pass
    assert pacer.bytes_per_s == 2e6
    for _ in range(REMEMBERED):
        with pacer.transfer(10**6):
            pacer.clock.now_s += 2.0
    assert pacer.bytes_per_s == 5e5


def test_a_transfer_that_kept_no_pace_shows_no_more_than_was_known() -> None:
    """Ranks of a node share its link. One that goes at once, when others have done, would take its rate for its own."""
    pacer = following(expect((0.0, 9.0)), 10**6, deadline_s=9.0)
    with pacer.transfer(10**6), pacer.urgent():
        pacer.go(10**6)
        pacer.clock.now_s += 0.5
    assert pacer.bytes_per_s == RATE
    for number in range(REMEMBERED):
        pacer.follow(10**6, deadline_s=1.0)
        with pacer.transfer(10**6):
            pacer.clock.now_s += 2.0  # past the deadline
            pacer.go(10**6)
        assert pacer.bytes_per_s == (RATE if number < REMEMBERED - 1 else RATE / 2), "and a slower link is learned"


def test_slices_take_a_few_milliseconds_of_the_link() -> None:
    for rate, slice_s, expected in (
        (1e5, 0.02, SLICE_MIN_BYTES), (1e8, 0.02, 2_000_000), (1e8, 0.005, 500_000), (1e12, 0.02, SLICE_MAX_BYTES),
    ):  # fmt: skip
        pacer = Simulated()
        pacer.learn(rate)
        pacer.begin_iteration(Rhythm(slice_s=slice_s))
        assert pacer.slice_bytes() == expected


def test_a_waiting_thread_is_woken_when_training_falls_silent() -> None:
    pacer = Pacer(lambda *_: None, SystemClock(), threading.Condition())
    pacer.begin_iteration(expect((0.0, 9.0)))
    pacer.follow(KB100, deadline_s=20.0)
    pacer.traffic_begins(Lane.ALL_TO_ALL, 1)
    gone = threading.Event()
    thread = threading.Thread(target=lambda: (pacer.admit(KB100), gone.set()))
    thread.start()
    assert not gone.wait(0.2)
    pacer.traffic_ends(Lane.ALL_TO_ALL, 1)
    assert gone.wait(5.0)
    thread.join()


def test_when_training_waits_nothing_is_held_back() -> None:
    pacer = Pacer(lambda *_: None, SystemClock(), threading.Condition())
    pacer.learn(RATE)
    pacer.begin_iteration(Rhythm(duration_s=30.0, windows=(), sends_s=()))
    pacer.follow(KB100, deadline_s=30.0)
    gone = threading.Event()
    sender = threading.Thread(target=lambda: (pacer.admit(KB100), gone.set()), daemon=True)
    sender.start()
    assert not gone.wait(0.2)
    with pacer.urgent():
        assert gone.wait(5)
    sender.join(5)


class SimulatedSteady(Steady):
    """A steady gate whose waits advance the clock."""

    def __init__(self, total_bytes: int, deadline_s: float) -> None:
        self.clock = ManualClock()
        super().__init__(lambda *_: None, self.clock, ManualCondition(self.clock))
        self.learn(RATE)
        self.follow(total_bytes, deadline_s)

    def go(self, nbytes: int) -> float:
        """Admit, and say when it went, since the plan began."""
        self.admit(nbytes)
        return round(self.clock.now_s - 1000.0, 6)


def test_steady_slices_leave_evenly_until_the_deadline() -> None:
    steady = SimulatedSteady(5 * KB100, deadline_s=2.0)
    assert [steady.go(KB100) for _ in range(5)] == [0.0, 0.4, 0.8, 1.2, 1.6]
    assert steady.report()[0] == 0


def test_steady_slices_that_are_behind_go_one_after_the_other_and_at_the_deadline_at_once() -> None:
    """The link carries a megabyte a second; 2 MB are to go in a second."""
    steady = SimulatedSteady(20 * KB100, deadline_s=1.0)
    gone = [steady.go(KB100) for _ in range(20)]
    takes_s = KB100 / RATE / PROBE_FACTOR
    assert gone[:11] == [pytest.approx(n * takes_s, abs=1e-4) for n in range(11)]
    assert gone[11:] == [pytest.approx(1.0, abs=1e-4)] * 9
    assert steady.report()[0] == 9 * KB100


def test_a_steady_gate_learns_from_transfers_that_were_not_held_alone() -> None:
    """While slices are held the network's buffers run empty, and show no limit."""
    steady = SimulatedSteady(10 * KB100, deadline_s=10.0)
    with steady.transfer(10 * KB100):
        for _ in range(10):
            steady.go(KB100)
    assert steady.bytes_per_s == RATE
    steady.follow(10 * KB100, deadline_s=0.0)
    with steady.transfer(10 * KB100):
        steady.clock.now_s += 0.5
    assert steady.bytes_per_s == 2 * RATE


def test_training_that_waits_holds_no_steady_slice_back() -> None:
    steady = SimulatedSteady(5 * KB100, deadline_s=20.0)
    assert steady.go(KB100) == 0.0
    with steady.urgent():
        assert steady.go(KB100) == 0.0


def test_eager_never_waits_and_tells_what_moved() -> None:
    seen: list[int] = []
    clock = ManualClock()
    eager = Eager(1 << 20, lambda begin, end, nbytes: seen.append(nbytes), clock)
    began = clock.monotonic()
    eager.admit(1 << 30)
    eager.left(5, began)
    assert clock.monotonic() == began
    assert eager.slice_bytes() == 1 << 20
    assert seen == [5]
