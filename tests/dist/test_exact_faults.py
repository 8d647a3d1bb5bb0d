# SPDX-License-Identifier: Apache-2.0
"""Mode ``exact`` under faults, in every phase: what comes back is bitwise what was. More are in ``test_faults.py``."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from jobs import Job
from test_faults import EXACT, OF_A_RECOVERY, OF_A_STEP, assert_few_lost, at, kill_at_random

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]

MakeJob = Callable[..., Job]
PERIOD = EXACT["period"]
FAILING = (5, 6)


@pytest.mark.parametrize("lost", [None, 0, 1])
@pytest.mark.parametrize("point", OF_A_STEP)
def test_goes_on_bitwise_after_a_kill(job: MakeJob, point: str, lost: int | None) -> None:
    """Each point and each lost node at each iteration of a period, though not all three together."""
    iteration = 7 + (OF_A_STEP.index(point) + (lost or 0) + (lost is not None)) % PERIOD
    run = job(**EXACT)
    ended = run.fail(at(2, iteration, point))
    if lost is not None:
        run.lose(lost)
    began = run.finish()
    assert_few_lost(2, point, ended, began)
    assert all(s["replayed"] <= 2 * PERIOD for s in began.started)
    run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize("lost_again", [False, True])
@pytest.mark.parametrize("point", OF_A_RECOVERY)
def test_a_recovery_is_cut_short(job: MakeJob, point: str, lost_again: bool) -> None:
    run = job(**EXACT)
    run.fail(at(3, 8, "mid-pack"))
    run.lose(1)
    run.fail([(2, -1, point)])
    if lost_again:
        run.lose(1)
    run.finish()
    run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize("point", ["restore", "restored"])
def test_the_last_old_node_may_go_once_its_state_is_on_the_new_one(job: MakeJob, point: str) -> None:
    run = job(**EXACT)
    run.fail(at(3, 7, "mid-pack"))
    run.lose(1)
    run.fail([(0, -1, point)])
    run.lose(0)
    run.finish()
    run.assert_as_if_nothing_had_happened()


def test_faults_in_a_row(job: MakeJob) -> None:
    run = job(**EXACT, calm=True, iterations=16)
    for iteration, lost in ((4, 1), (7, 0), (8, None), (9, 1), (13, 0)):
        run.fail(at(iteration % 4, iteration, "mid-replication"))
        if lost is not None:
            run.lose(lost)
    run.finish()
    assert [e["epoch"] for e in run.events if e["event"] == "recovered"] == [1, 2, 3, 4, 5]
    run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize("period", [2, 5, 8])
@pytest.mark.parametrize("seed", range(2))
def test_random_kills_again_and_again(job: MakeJob, seed: int, period: int) -> None:
    run = job(mode="exact", period=period, iterations=36, max_fruitless_recoveries=0)
    kill_at_random(run, random.Random(100 * period + seed), ahead=6)


@pytest.mark.parametrize("fault", [7, 8, 14])
@pytest.mark.parametrize(
    ("reason", "rank", "trouble"),
    [
        ("moved", 1, {"moved": FAILING}),
        ("freeze", 1, {"grown_host": FAILING}),
    ],
)
def test_after_a_dropped_snapshot_chains_begin_anew(
    job: MakeJob, reason: str, rank: int, trouble: dict[str, Any], fault: int
) -> None:
    """Until they have, the iteration before the drop is what there is to go back to. One snapshot is enough."""
    run = job(**EXACT, **trouble, odd_ranks=(1,), calm=True, iterations=18)
    ended = run.fail(at(rank, fault, "before-select"))
    run.lose(1)
    assert ended.dropped(rank) == {reason: len(FAILING)}
    began = run.finish()
    assert began.iteration == (FAILING[0] - 1 if fault == 7 else fault - 1)
    assert began.one("end")["stable"] == run.toy.iterations - 2
    run.assert_as_if_nothing_had_happened()


def test_a_late_capture_is_left_out_and_breaks_nothing(job: MakeJob) -> None:
    run = job(**EXACT, slow_pack=(5,), max_stall_ms=1, odd_ranks=(1,), calm=True)
    run.fail(at(1, 8, "before-select"))
    run.lose(1)
    began = run.finish()
    assert began.iteration == 7
    assert began.drops == 0
    run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize(("max_stall_ms", "drops"), [(5000, False), (1, True)])
def test_slow_replication_is_waited_for_and_stops_nothing(job: MakeJob, max_stall_ms: int, drops: bool) -> None:
    """Up to a limit; beyond it snapshots are dropped, and chains begin anew once it is fast enough."""
    slow = {"slow_send": (5, 6, 7, 8), "odd_ranks": (2,), "max_stall_ms": max_stall_ms}
    run = job(**EXACT, **slow, iterations=40, step_s=0.01)
    ended = run.fail(at(1, 16, "before-select"))
    run.lose(0)
    assert any(ended.dropped(r).get("no-slot", 0) > 0 for r in range(4)) == drops
    last = run.finish()
    assert last.one("end")["stable"] > 30, "snapshots become stable again"
    run.assert_as_if_nothing_had_happened()


def test_replication_that_is_always_too_slow_still_makes_iterations_stable(job: MakeJob) -> None:
    run = job(**EXACT, slow_send=tuple(range(1, 30)), odd_ranks=(2,), iterations=20, step_s=0.01)
    ended = run.fail(at(1, 15, "before-select"))
    run.lose(1)
    assert ended.drops == 0
    assert run.finish().iteration >= 12
    run.assert_as_if_nothing_had_happened()


def test_another_period_is_refused_by_name(job: MakeJob) -> None:
    run = job(**EXACT, iterations=5)
    run.finish()
    errors = run.refuse(2, period=4)
    assert all("period: the arena has 3, this run has 4" in e for e in errors)
    assert run.attempt(iterations=6).codes == [0] * 4
