# SPDX-License-Identifier: Apache-2.0
"""Silent ranks are named, and end a process only where they really hold it up for too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from fabrics import Faults, loopback_fabrics
from support import together

from megatron_moetion.clock import SystemClock
from megatron_moetion.replicate.fabric import SocketFabric
from megatron_moetion.replicate.watchdog import NAME_AFTER_S, Hang, Patience, Watchdog, named, speaks
from megatron_moetion.replicate.worker import SystemThreads

LIMIT_S = 120


def hang_after(patience: Patience, silent_s: Callable[[int], float], steps: Callable[[int], int]) -> int | None:
    """The first of 1000 seconds in which the process should end; rank 3 has been silent for so long."""
    for second in range(1, 1001):
        silent = {3: silent_s(second)} if silent_s(second) else {}
        if patience.look(silent, passed_s=1.0, steps=steps(second)).hang is not None:
            return second
    return None


def test_a_rank_that_is_silent_while_no_step_ends_is_a_hang() -> None:
    assert hang_after(Patience(LIMIT_S), lambda second: second, lambda second: 0) == LIMIT_S
    assert hang_after(Patience(0), lambda second: second, lambda second: 0) is None


@pytest.mark.parametrize("pause_s", [5, 30, 90])
def test_a_rank_that_goes_on_in_time_is_none(pause_s: int) -> None:
    silent_s = lambda second: second % 200 if second % 200 <= pause_s else 0
    assert hang_after(Patience(LIMIT_S), silent_s, lambda second: 0) is None


def test_a_rank_that_is_cut_off_while_steps_end_is_none_however_long_a_step_takes() -> None:
    assert hang_after(Patience(LIMIT_S), lambda second: second, lambda second: second // 10) is None
    assert hang_after(Patience(LIMIT_S), lambda second: second, lambda second: second // 110) is None
    patience = Patience(LIMIT_S)
    steps = lambda second: second // 172 if second < 600 else 3
    assert hang_after(patience, lambda second: max(0, second - 300), steps) == pytest.approx(4 * 172 + LIMIT_S, abs=3)


def test_a_process_that_was_stopped_itself_does_not_blame_the_others() -> None:
    patience = Patience(LIMIT_S)
    assert patience.look({}, passed_s=1.0, steps=5).hang is None
    # it was stopped for 1000 s, and has not read yet what came meanwhile
    assert patience.look({3: 1000.0, 4: 1000.0}, passed_s=2.0, steps=5).hang is None
    assert patience.look({}, passed_s=1.0, steps=5).hang is None


def test_a_silence_is_named_once_and_so_is_its_end() -> None:
    patience = Patience(LIMIT_S)
    looks = [patience.look({3: s} if s else {}, passed_s=1.0, steps=0) for s in (1, NAME_AFTER_S, 11, 12, 0, 0, 1, 0)]
    assert [dict(look.named) for look in looks] == [{}, {3: NAME_AFTER_S}, {}, {}, {}, {}, {}, {}]
    assert [dict(look.back) for look in looks] == [{}, {}, {}, {}, {3: 12}, {}, {}, {}]


def test_the_lowest_rank_that_can_speak_speaks() -> None:
    assert [speaks(rank, {}) for rank in range(3)] == [True, False, False]
    assert [speaks(rank, {0, 1, 5}) for rank in range(4)] == [False, False, True, False]


def test_machines_are_named_the_longest_silent_first() -> None:
    hosts = [f"host{rank // 2}" for rank in range(40)]
    assert named({3: 1.0, 4: 7.0}, hosts) == "rank 4 on host2, rank 3 on host1"
    assert named({rank: float(rank) for rank in range(20)}, hosts).endswith("rank 12 on host6 and 12 more")


class Watched:
    """A rank of a loopback fabric under a watchdog that ends nothing."""

    def __init__(self, fabric: SocketFabric, limit_s: float, talk: Callable[[Hang], None] = lambda hang: None) -> None:
        self.lines: list[str] = []
        self.hangs: list[Hang] = []
        self.ended = threading.Event()

        def last_words(hang: Hang) -> None:
            self.hangs.append(hang)
            talk(hang)

        self.watchdog = Watchdog(
            fabric=fabric,
            limit_s=limit_s,
            steps=lambda: 0,
            hosts=["host"] * fabric.world_size,
            say=self.lines.append,
            last_words=last_words,
            end=self.ended.set,
            clock=SystemClock(),
            threads=SystemThreads(),
            poll_s=0.02,
            last_words_s=0.2,
        )


def test_all_ranks_but_the_silent_one_end() -> None:
    network = Faults()
    with loopback_fabrics(4, cuts=network, heartbeat_s=0.05) as fabrics:
        ranks = [Watched(fabric, limit_s=0.5) for fabric in fabrics]
        others = [rank for n, rank in enumerate(ranks) if n != 2]
        with network.cut([2]):
            assert all(rank.ended.wait(30) for rank in others)
        assert all(set(rank.hangs[0].silent_s) == {2} for rank in others)
        assert all(rank.hangs[0].detect_s >= 0.5 for rank in others)
        for rank in ranks:
            rank.watchdog.close()


def test_a_rank_that_leaves_in_good_order_is_not_silent() -> None:
    with loopback_fabrics(3, heartbeat_s=0.05) as fabrics:
        together(*(lambda f=fabric: f.gather(0) for fabric in fabrics))  # type: ignore[misc]
        ranks = [Watched(fabric, limit_s=0.5) for fabric in fabrics]
        ranks[2].watchdog.close()
        fabrics[2].close()
        assert not any(rank.ended.wait(1.5) for rank in ranks[:2])
        for rank in ranks[:2]:
            rank.watchdog.close()


@pytest.mark.parametrize("fails", [False, True])
def test_words_that_cannot_be_said_do_not_keep_the_process(fails: bool) -> None:
    stuck = threading.Event()

    def talk(hang: Hang) -> None:
        if fails:
            raise OSError("no space left on device")
        stuck.wait(30)

    network = Faults()
    with loopback_fabrics(2, cuts=network, heartbeat_s=0.05) as fabrics, network.cut([1]):
        rank = Watched(fabrics[0], 0.3, talk)
        assert rank.ended.wait(20)
        stuck.set()
        rank.watchdog.close()


def test_a_watchdog_that_was_closed_ends_nothing() -> None:
    network = Faults()
    with loopback_fabrics(2, cuts=network, heartbeat_s=0.05) as fabrics, network.cut([1]):
        rank = Watched(fabrics[0], 0.5)
        rank.watchdog.close()
        rank.watchdog.close()
        time.sleep(1.2)
        assert not rank.ended.is_set()
