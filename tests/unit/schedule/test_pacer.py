# SPDX-License-Identifier: Apache-2.0
"""The pacer keeps to its plan, yields to training, and never holds a byte beyond the deadline. Time is simulated."""

from __future__ import annotations

import math
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
from megatron_moetion.schedule.planner import HEADROOM, Rhythm, Window
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


class SimulatedSteady(Steady):
    """A steady gate whose waits advance the clock."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.condition = Late(self.clock)
        super().__init__(lambda *_: None, self.clock, self.condition)

    def go(self, nbytes: int) -> float:
        """Admit, and say when it went, since the plan began."""
        self.admit(nbytes)
        return round(self.clock.now_s - 1000.0, 6)


class Late(ManualCondition):
    """Who waits wakes up so much later."""

    late_s = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        return super().wait(timeout + self.late_s)


class Simulation(Late):
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
    know(pacer)
    pacer.begin_iteration(rhythm)
    pacer.follow(total_bytes, deadline_s, 9.0)
    return pacer


def know(gate: Simulated | SimulatedSteady) -> None:
    """Two transfers have shown what the link carries: the first one of all, and a probe at twice its rate."""
    gate.learn(RATE)
    gate.follow(10**6, 9.0, 9.0, is_tight=True)
    with gate.transfer(10**6):
        gate.clock.now_s += 1.0
    gate.clock.now_s -= 1.0
    assert gate.bytes_per_s == RATE


class Wire:
    """A link to another rank: bytes leave one after the other, and the network's buffers take some of them at once.

    The answer to a transfer takes ``answer_s``.
    """

    def __init__(self, gate: Simulated | SimulatedSteady, bytes_per_s: float, *, buffer_bytes: int = 2 * KB100) -> None:
        self.gate = gate
        self.bytes_per_s = bytes_per_s
        self.buffer_bytes = buffer_bytes
        self.answer_s = 0.0
        self.iterations = 0
        """That the last transfer took."""
        self._free_s = 0.0

    def carry(self, nbytes: int, deadline_s: float, iteration_s: float, *, is_tight: bool = True) -> float:
        """One transfer; how long it took, in seconds."""
        gate, clock = self.gate, self.gate.clock
        began_s = clock.now_s
        gate.follow(nbytes, deadline_s, iteration_s, is_tight=is_tight)
        with gate.transfer(nbytes):
            while nbytes:
                part = min(nbytes, gate.slice_bytes())
                gate.admit(part)
                posted_s = clock.now_s
                self._free_s = max(self._free_s, posted_s) + part / self.bytes_per_s
                clock.now_s = max(posted_s, self._free_s - self.buffer_bytes / self.bytes_per_s)
                gate.left(part, posted_s)
                nbytes -= part
            clock.now_s = max(clock.now_s, self._free_s) + self.answer_s
        return clock.now_s - began_s

    def iterate(self, transfers: int, nbytes: int, iteration_s: float) -> int:
        """One transfer an iteration, or in several where one does not carry it; how many there were.

        Training leaves three quarters of an iteration to snapshots.
        """
        gate, clock, total = self.gate, self.gate.clock, 0
        rhythm = expect((0.0, 0.75 * iteration_s), duration=iteration_s)
        for _ in range(transfers):
            begins_s = clock.now_s
            if isinstance(gate, Simulated):
                gate.begin_iteration(rhythm)
                gate.beginnings = [(begins_s + n * iteration_s, rhythm) for n in range(1, 20)]
            room = HEADROOM * 0.75 * iteration_s * gate.bytes_per_s
            deadline_s = (min(8, max(1, math.ceil(nbytes / room))) - 0.1) * iteration_s
            took_s = self.carry(nbytes, deadline_s, iteration_s, is_tight=nbytes > room / 2)
            self.iterations = math.ceil(took_s / iteration_s)
            total += self.iterations
            clock.now_s = max(clock.now_s, begins_s + self.iterations * iteration_s)
        return total


def test_before_any_transfer_nothing_is_held_back() -> None:
    pacer = Simulated()
    assert pacer.go(10**9) == 0


def test_bytes_go_in_the_windows_that_have_room_for_them() -> None:
    pacer = following(expect((0.0, 0.05), (0.2, 0.35), (0.6, 0.9)), 3 * KB100, deadline_s=2.0)
    gone = [pacer.go(KB100) for _ in range(3)]
    assert gone == [0.2, 0.6, pytest.approx(0.6 + KB100 / RATE / CALM_FACTOR)]  # 25 ms are left of the second window
    late, held = pacer.report()
    assert late == 0
    assert held == pytest.approx(gone[2] - 2 * KB100 / RATE / CALM_FACTOR)  # all but the time that slices were leaving


def test_what_has_no_window_goes_when_only_the_time_to_send_is_left() -> None:
    pacer = following(expect((0.0, 0.15)), 3 * KB100, deadline_s=1.0)
    assert pacer.go(KB100) == 0
    assert pacer.go(KB100) == 0.75  # 200 kB take 0.25 s at a calm pace, and 1 s is the limit
    assert pacer.go(KB100) == 0.875
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
    assert pacer.go(KB100) == pytest.approx(0.05 + KB100 / RATE / CALM_FACTOR, abs=0.03)


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
    know(pacer)
    for number in range(1, 2 * PROBE_EVERY):
        pacer.clock.now_s = began = 1000.0 + 10 * number
        pacer.begin_iteration(expect((0.0, 9.0)))
        pacer.follow(5 * KB100, 9.0, 9.0)
        gone = [pacer.go(KB100) - (began - 1000.0) for _ in range(5)]
        pace = CALM_FACTOR if number % PROBE_EVERY else PROBE_FACTOR
        assert gone == [pytest.approx(n * KB100 / RATE / pace, abs=1e-5) for n in range(5)]
    assert REMEMBERED >= 2 * PROBE_EVERY  # what a probe has shown is not forgotten before the next one


def test_until_paces_are_kept_bandwidth_is_the_best_of_what_was_seen() -> None:
    pacer = Simulated()
    with pacer.transfer(10**6):
        pacer.clock.now_s += 1.0
    assert pacer.bytes_per_s == 1e6
    with pacer.transfer(10**6):
        pacer.clock.now_s += 4.0
    assert pacer.bytes_per_s == 1e6
    with pacer.transfer(100):  # too little to tell
        pass
    assert pacer.bytes_per_s == 1e6
    for _ in range(REMEMBERED):
        with pacer.transfer(10**6):
            pacer.clock.now_s += 2.0
    assert pacer.bytes_per_s == 5e5


def test_time_on_hold_does_not_count() -> None:
    pacer = Simulated()
    pacer.learn(RATE)
    pacer.begin_iteration(expect((3.0, 5.0)))
    pacer.follow(10**6, 9.0, 9.0)
    with pacer.transfer(10**6):
        pacer.go(10**6)
        pacer.clock.now_s += 0.5
    assert pacer.bytes_per_s == 2e6


def test_time_on_hold_does_not_count_between_slices_either() -> None:
    pacer = following(expect((3.0, 5.0)), 10**6, deadline_s=9.0)
    with pacer.transfer(10**6):
        assert pacer.go(5 * KB100) == 3.0
        pacer.left(5 * KB100, 1003.0)
        pacer.go(5 * KB100)
        pacer.left(5 * KB100, pacer.clock.now_s)
        pacer.clock.now_s += 0.5 / CALM_FACTOR
    assert pacer.bytes_per_s == RATE, "it kept its pace"


def test_a_thread_that_is_late_before_a_hold_was_on_hold_since_its_slice_had_left() -> None:
    pacer = following(expect((0.0, 0.2), (1.0, 1.3)), 2 * KB100, deadline_s=5.0)
    pacer.condition.late_s = 0.05
    assert [pacer.go(KB100) for _ in range(2)] == [0.0, 1.05]
    assert pacer.report()[1] == pytest.approx(1.05 - KB100 / RATE / CALM_FACTOR)


def test_calm_transfers_that_keep_their_pace_show_no_limit() -> None:
    wire = Wire(Simulated(), RATE)
    know(wire.gate)
    for number in range(1, 4 * REMEMBERED):
        wire.carry(10**6 if number % PROBE_EVERY else 1000, 0.9, 1.0)  # probes are too small to tell
    assert wire.gate.bytes_per_s == RATE


def test_a_probe_that_meets_a_limit_shows_little_more_than_was_known() -> None:
    """It may have taken what other ranks of the node leave of its link while they are calm."""
    pacer = Simulated()
    pacer.learn(RATE)
    pacer.follow(10**6, 9.0, 9.0)
    with pacer.transfer(10**6):
        pacer.clock.now_s += 1 / 1.4
    assert pacer.bytes_per_s == pytest.approx(PROBE_FACTOR * RATE)


GATES = ("bubble", "steady")


def make(gate: str) -> Simulated | SimulatedSteady:
    return Simulated() if gate == "bubble" else SimulatedSteady()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("late_s", [0.0, 0.4e-3, 2e-3])
def test_a_busy_thread_does_not_make_the_link_look_slow(gate: str, late_s: float) -> None:
    """It comes late to each slice. An estimate that followed would pace the next transfer down, and so on for good."""
    wire = Wire(make(gate), 100e6, buffer_bytes=1 << 20)
    wire.gate.condition.late_s, wire.answer_s = late_s, 3e-3
    wire.carry(10**7, 0.0, 0.0)
    wire.iterate(400, 10**7, 0.25)
    assert 0.8 < wire.gate.bytes_per_s / 100e6 < 1.1
    assert wire.iterations == 1


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("nbytes", [4 * 10**6, 10**7])
def test_a_first_transfer_that_was_slow_by_chance_is_soon_made_up_for(gate: str, nbytes: int) -> None:
    """A restart's first iteration, in which processes import and compile: a rank sends at a hundredth of its rate."""
    wire = Wire(make(gate), 100e6, buffer_bytes=1 << 20)
    with wire.gate.transfer(nbytes):
        wire.gate.clock.now_s += nbytes / 1e6
    assert wire.gate.bytes_per_s == pytest.approx(1e6)
    wire.gate.condition.late_s = 0.1e-3
    assert wire.iterate(9, nbytes, 0.25) < 45
    assert wire.iterations == 1, "one iteration carries a snapshot again"


@pytest.mark.parametrize("gate", GATES)
def test_a_link_that_was_slow_for_a_while_is_known_to_be_fast_again(gate: str) -> None:
    wire = Wire(make(gate), 100e6, buffer_bytes=1 << 20)
    wire.carry(10**7, 0.0, 0.0)
    wire.iterate(20, 10**7, 0.25)
    wire.bytes_per_s = 5e6
    wire.iterate(5 * REMEMBERED, 10**7, 0.25)
    assert 5e6 <= wire.gate.bytes_per_s < 5e6 / 0.74, "a slower link is learned, which empties its buffers on hold too"
    wire.bytes_per_s = 100e6
    wire.iterate(2 * PROBE_EVERY, 10**7, 0.25)
    assert wire.iterations == 1
    wire.iterate(4 * PROBE_EVERY, 10**7, 0.25)
    assert wire.gate.bytes_per_s > 45e6, "more than twice what a snapshot takes"


@pytest.mark.parametrize("buffer_bytes", [2 * KB100, 1 << 20, 4 << 20])
def test_no_probe_takes_the_networks_buffers_for_the_link(buffer_bytes: int) -> None:
    """They swallow a slice at once; what comes behind it waits."""
    wire = Wire(Simulated(), 5e6, buffer_bytes=buffer_bytes)
    wire.carry(10**7, 0.0, 0.0)
    for _ in range(10):
        wire.iterate(PROBE_EVERY, 10**7, 3.0)
        assert wire.gate.bytes_per_s == pytest.approx(5e6, rel=0.1)


def test_a_transfer_that_kept_no_pace_shows_no_more_than_was_known() -> None:
    """Ranks of a node share its link. One that goes at once, when others have done, would take its rate for its own."""
    pacer = following(expect((0.0, 9.0)), 10**6, deadline_s=9.0)
    with pacer.transfer(10**6), pacer.urgent():
        pacer.go(10**6)
        pacer.clock.now_s += 0.5
    assert pacer.bytes_per_s == RATE
    for number in range(REMEMBERED + 1):
        pacer.follow(10**6, 1.0, 9.0)
        with pacer.transfer(10**6):
            pacer.clock.now_s += 2.0  # past the deadline
            pacer.go(10**6)
        forgotten = REMEMBERED - 2
        assert pacer.bytes_per_s == (RATE if number <= forgotten else RATE / 2), "and a slower link is learned"


def test_a_deadline_comes_sooner_where_iterations_turn_out_to_be_short() -> None:
    """A run's first iteration takes long, and was all that was known when its snapshot began to travel."""
    steady = SimulatedSteady()
    know(steady)
    steady.follow(5 * KB100, 10.0, 10.0)
    assert steady.go(KB100) == 0.0
    steady.hasten(11.0)
    assert steady.go(KB100) == 2.0
    steady.hasten(2.5)  # over in 2.5 s, and three of five slices are left
    assert [steady.go(KB100) for _ in range(3)] == [2.125, 2.25, 2.375]


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
    pacer.follow(KB100, 20.0, 20.0)
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
    pacer.follow(KB100, 30.0, 30.0)
    gone = threading.Event()
    sender = threading.Thread(target=lambda: (pacer.admit(KB100), gone.set()), daemon=True)
    sender.start()
    assert not gone.wait(0.2)
    with pacer.urgent():
        assert gone.wait(5)
    sender.join(5)


def steady_following(total_bytes: int, deadline_s: float) -> SimulatedSteady:
    """A steady gate that knows the link, at the beginning of a transfer."""
    steady = SimulatedSteady()
    know(steady)
    steady.follow(total_bytes, deadline_s, 20.0)
    return steady


def test_steady_slices_leave_evenly_until_the_deadline() -> None:
    steady = steady_following(5 * KB100, deadline_s=2.0)
    assert [steady.go(KB100) for _ in range(5)] == [0.0, 0.4, 0.8, 1.2, 1.6]
    assert steady.report()[0] == 0


def test_steady_slices_that_are_behind_go_one_after_the_other_and_at_the_deadline_at_once() -> None:
    """The link carries a megabyte a second; 2 MB are to go in a second."""
    steady = steady_following(20 * KB100, deadline_s=1.0)
    gone = [steady.go(KB100) for _ in range(20)]
    takes_s = KB100 / RATE / CALM_FACTOR
    assert gone[:9] == [pytest.approx(n * takes_s, abs=1e-4) for n in range(9)]
    assert gone[9:] == [pytest.approx(1.0, abs=1e-4)] * 11
    assert steady.report()[0] == 12 * KB100


def test_a_steady_probe_keeps_a_pace_of_its_own_where_bytes_have_hardly_room() -> None:
    """While slices are held the network's buffers run empty, and show no limit."""
    wire = Wire(SimulatedSteady(), 4 * RATE)
    with wire.gate.transfer(10**6):
        wire.gate.clock.now_s += 1.0
    for _ in range(PROBE_EVERY):
        wire.carry(10**6, 10.0, 10.0, is_tight=False)
    assert wire.gate.bytes_per_s == RATE
    for _ in range(3):
        wire.carry(10**6, 10.0, 10.0)
    assert wire.gate.bytes_per_s > 3 * RATE


def test_training_that_waits_holds_no_steady_slice_back() -> None:
    steady = steady_following(5 * KB100, deadline_s=20.0)
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
