# SPDX-License-Identifier: Apache-2.0
"""Real processes that are killed, nodes that vanish, snapshots that fail: what comes back is what was.

``Job.follow`` checks every recovery against what the ranks noted before the fault: in mode ``full`` all units of one
iteration, in mode ``popularity`` every expert of one iteration on all ranks that share it, and tokens lost as the state
itself tells them.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, Outcome

from megatron_moetion.observe.fault import POINTS

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]

MakeJob = Callable[..., Job]
OF_A_STEP, OF_A_HOLDER, OF_A_RECOVERY = POINTS[:4], POINTS[4:7], POINTS[7:]
SPARSE = {"mode": "popularity", "experts_per_snapshot": 1, "staleness_cap": 4, "lost_token_budget": 0.0}
EXACT = {"mode": "exact", "period": 3}
SETTINGS: dict[str, dict[str, Any]] = {"full": {"mode": "full"}, "popularity": SPARSE, "exact": EXACT}


def at(rank: int, iteration: int, point: str) -> list[tuple[int, int, str]]:
    """A kill at that iteration, or at the first one after it whose snapshot gets so far."""
    return [(rank, i, point) for i in range(iteration, iteration + 5)]


def assert_few_lost(rank: int, point: str, ended: Outcome, began: Outcome) -> None:
    """At most two iterations are done again, and one for each snapshot that is known to be dropped or had not begun."""
    reached = ended.of("step", rank)[-1]["iteration"]
    assert 0 <= reached - began.iteration <= 2 + (point == "before-select") + ended.drops


def assert_undisturbed(run: Job) -> None:
    """What mode ``popularity`` loses is checked where runs are followed."""
    if run.settings["mode"] != "popularity":
        run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize("mode", SETTINGS)
def test_a_forked_child_that_outlives_its_rank_holds_back_no_restart(job: MakeJob, mode: str) -> None:
    run = job(orphan_s=100, **SETTINGS[mode])
    first = run.fail(at(1, 5, "mid-pack"))
    orphans = [first.one("orphan", rank)["pid"] for rank in range(4)]
    try:
        for pid in orphans:
            os.kill(pid, 0)  # it lives
            maps = Path(f"/proc/{pid}/maps").read_text()
            held = [os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir()]
            assert not any(".arena" in line for line in [*maps.splitlines(), *held])
        second = run.finish(limit_s=30, orphan_s=0)
        assert all(Path(f"/proc/{pid}/fd").exists() and any(Path(f"/proc/{pid}/fd").iterdir()) for pid in orphans)
    finally:
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
    assert_few_lost(1, "mid-pack", first, second)
    assert_undisturbed(run)


def kill_at_random(run: Job, rng: random.Random, *, ahead: int) -> None:
    """Five times, at named points and at any moment, up to so many iterations ahead; nodes are lost where they may."""
    whole = True
    for _ in range(5):
        rank = rng.randrange(4)
        if rng.random() < 0.5:
            ended = run.attempt(kill=(rank, rng.randrange(1, ahead + 2), rng.random() * 0.02))
        else:
            reached = max((max(book, default=0) for book in run.book), default=0)
            point = rng.choice(POINTS)
            soon = at(rank, reached + rng.randrange(1, ahead + 1), point)
            ended = run.attempt([(rank, -1, point)] if point in OF_A_RECOVERY else soon)
        run.follow(ended)
        # Redundancy is complete again once a recovery is over; until then no second node may go.
        whole = whole or all(ended.of("started", r) for r in range(4))
        if whole and rng.random() < 0.5:
            run.lose(rng.randrange(2))
            whole = False
    run.finish()
    assert_undisturbed(run)


# -- one fault --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [None, 0, 1])
@pytest.mark.parametrize("point", OF_A_STEP)
def test_full_goes_on_bitwise_after_a_kill(job: MakeJob, point: str, lost: int | None) -> None:
    run = job()
    ended = run.fail(at(2, 7, point))
    if lost is not None:
        run.lose(lost)
    began = run.finish()
    assert_few_lost(2, point, ended, began)
    assert min(began.fetched[r] for r in range(4) if r // 2 == lost) > 0 if lost is not None else not any(began.fetched)
    run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize("lost", [None, 1])
@pytest.mark.parametrize("point", OF_A_STEP)
def test_popularity_takes_each_expert_from_one_iteration_and_counts(job: MakeJob, point: str, lost: int | None) -> None:
    run = job(**SPARSE, calm=True)
    ended = run.fail(at(1, 9, point))
    if lost is not None:
        run.lose(lost)
    began = run.finish()
    assert_few_lost(1, point, ended, began)
    lost = sum(s["lost"] for s in began.started)
    assert lost > 0
    oldest = min(age for s in began.started for age, _ in s["ages"].values())
    assert began.iteration - SPARSE["staleness_cap"] <= oldest < began.iteration
    assert sum(began.one("end", r)["lost"] for r in range(4)) == lost, "the rest of the run loses nothing"


def test_an_expert_that_one_rank_failed_to_capture_is_of_an_older_iteration_on_all(job: MakeJob) -> None:
    """Ranks 1 and 3 share experts; rank 1 alone lacks iteration 5, and nobody has been told so when the job ends."""
    run = job(**SPARSE, moved=(5,), odd_ranks=(1,), calm=True)
    ended = run.attempt(iterations=6)
    run.follow(ended)
    assert [ended.dropped(r) for r in range(4)] == [{}, {"moved": 1}, {}, {}]
    began = run.finish()
    assert began.iteration == 6
    assert all(5 not in age for r in (1, 3) for age in began.started[r]["ages"].values())


# -- lost nodes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", SETTINGS)
@pytest.mark.parametrize(
    ("world_size", "replicas", "lost"),
    [(4, 1, (1, 2)), (3, 2, (0, 2)), (5, 1, (0, 4))],
    ids=["one of each pair", "two of three", "one of a pair, one of a ring"],
)
def test_as_many_nodes_as_there_are_replicas_may_vanish(
    job: MakeJob, mode: str, world_size: int, replicas: int, lost: tuple[int, ...]
) -> None:
    run = job(world_size=world_size, ranks_per_node=1, replicas=replicas, **SETTINGS[mode])
    ended = run.fail(at(lost[0], 7, "mid-replication"))
    run.lose(*lost)
    assert_few_lost(lost[0], "mid-replication", ended, run.finish())
    assert_undisturbed(run)


@pytest.mark.parametrize("mode", ["full", "popularity"])
@pytest.mark.parametrize("point", OF_A_RECOVERY)
def test_the_node_that_took_over_is_lost_while_it_recovers(job: MakeJob, point: str, mode: str) -> None:
    run = job(**(SPARSE if mode == "popularity" else {}))
    run.fail(at(3, 6, "mid-pack"))
    run.lose(1)
    run.fail([(2, -1, point)])
    run.lose(1)
    run.finish()
    if mode == "full":
        run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize(("point", "lost"), list(zip(OF_A_RECOVERY, (0, 1, 0, 1), strict=True)))
def test_the_first_node_is_lost_in_the_recovery_from_a_kill(job: MakeJob, point: str, lost: int) -> None:
    run = job()
    run.fail(at(1, 6, "mid-replication"))
    run.fail([(2 * lost, -1, point)])
    run.lose(lost)
    run.finish()
    run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize("point", ["restore", "restored"])
def test_the_last_old_node_may_go_once_its_state_is_on_the_new_one(job: MakeJob, point: str) -> None:
    run = job()
    run.fail(at(3, 6, "mid-pack"))
    run.lose(1)
    run.fail([(0, -1, point)])
    run.lose(0)
    run.finish()
    run.assert_as_if_nothing_had_happened()


def test_a_node_is_lost_while_the_buddies_copies_are_completed(job: MakeJob) -> None:
    """Iteration 7 is on its owners only, and its way to the buddies is cut short: they still have what was stable."""
    run = job(slow_send=(7,), calm=True)
    run.fail(at(0, 7, "mid-replication"))
    run.fail([(0, -1, "fetch")], second_fetch=True, odd_ranks=(0,))
    run.lose(0)
    assert run.finish().iteration == 5
    run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize("point", OF_A_RECOVERY)
def test_with_two_replicas_a_second_node_may_go_while_the_first_is_replaced(job: MakeJob, point: str) -> None:
    run = job(world_size=3, ranks_per_node=1, replicas=2)
    run.fail(at(0, 6, "before-commit"))
    run.lose(0)
    run.fail([(2, -1, point)])
    run.lose(2)
    run.finish()
    run.assert_as_if_nothing_had_happened()


# -- several faults ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "popularity"])
def test_faults_in_a_row(job: MakeJob, mode: str) -> None:
    run = job(**(SPARSE if mode == "popularity" else {}), calm=True, iterations=14)
    for iteration, lost in ((4, 1), (7, 0), (8, None), (11, 1)):
        run.fail(at(iteration % 4, iteration, "mid-replication"))
        if lost is not None:
            run.lose(lost)
    last = run.finish()
    assert [e["epoch"] for e in run.events if e["event"] == "recovered"] == [1, 2, 3, 4]
    if mode == "full":
        assert last.iteration == 10
        run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize("seed", range(4))
def test_random_kills_again_and_again(job: MakeJob, seed: int) -> None:
    """At named points and at any moment, in training and in recovery, with and without the loss of a node."""
    rng = random.Random(seed)
    run = job(**SETTINGS[rng.choice(["full", "popularity"])], iterations=30, max_fruitless_recoveries=0)
    kill_at_random(run, rng, ahead=3)


@pytest.mark.parametrize("mode", SETTINGS)
def test_ranks_may_come_back_on_other_nodes(job: MakeJob, mode: str) -> None:
    run = job(**SETTINGS[mode], iterations=14)
    run.fail(at(0, 4, "mid-replication"))
    run.fail(at(1, 7, "before-commit"), places=[2, 3, 0, 1])
    run.lose(0)
    run.fail(at(2, 10, "mid-pack"), places=[0, 2, 1, 3])
    run.finish(places=[3, 0, 2, 1])
    assert_undisturbed(run)


# -- snapshots that fail ----------------------------------------------------------------------------------------

FAILING = (5, 6, 7)
FAILURES: dict[str, tuple[int, dict[str, Any]]] = {
    "late": (1, {"slow_pack": FAILING, "max_stall_ms": 1}),
    "moved": (1, {"moved": FAILING}),
    "freeze": (1, {"grown_host": FAILING}),
}
"""By reason: the rank that counts the drops, and what makes them."""


@pytest.mark.parametrize("mode", ["full", "popularity"])
@pytest.mark.parametrize("reason", FAILURES)
def test_a_dropped_snapshot_never_stops_training(job: MakeJob, reason: str, mode: str) -> None:
    rank, trouble = FAILURES[reason]
    run = job(**(SPARSE if mode == "popularity" else {}), **trouble, odd_ranks=(1,), calm=True)
    ended = run.fail(at(rank, 8, "before-select"))
    run.lose(1)
    assert ended.dropped(rank) == {reason: len(FAILING)}
    assert {n["stable"] for n in ended.of("saved") if n["iteration"] in (*FAILING[1:], 8)} == {FAILING[0] - 1}
    last = run.finish()
    assert last.iteration == FAILING[0] - 1
    assert last.dropped(rank) == {reason: len(FAILING)}
    assert last.one("end")["stable"] == run.toy.iterations - 2, "snapshots become stable again"
    if mode == "full":
        run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize("mode", ["full", "popularity"])
def test_slow_replication_drops_snapshots_and_stops_nothing(job: MakeJob, mode: str) -> None:
    run = job(**(SPARSE if mode == "popularity" else {}), slow_send=(5, 6), odd_ranks=(2,), iterations=30, step_s=0.01)
    ended = run.fail(at(1, 12, "before-select"))
    run.lose(0)
    last = run.finish()
    assert_few_lost(1, "before-select", ended, last)
    assert any(found.dropped(r).get("no-slot", 0) > 0 for found in (ended, last) for r in range(4))
    assert last.one("end")["stable"] > 12, "snapshots become stable again"
    if mode == "full":
        run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize("mode", ["full", "exact"])
def test_a_broken_network_stops_replication_and_not_training(job: MakeJob, mode: str) -> None:
    run = job(**SETTINGS[mode], cut_off_from=5, odd_ranks=(2,), timeout_s=2, iterations=12, calm=True)
    first = run.finish()
    (stable,) = {first.one("end", r)["stable"] for r in range(4)}
    assert stable <= 4
    run.assert_as_if_nothing_had_happened()
    run.lose(1)
    assert stable <= run.finish(cut_off_from=0).iteration <= 4
    run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize("mode", SETTINGS)
def test_a_rank_that_was_cut_off_for_a_while_is_protected_again_without_a_restart(job: MakeJob, mode: str) -> None:
    run = job(**SETTINGS[mode], cut_off_from=5, cut_off_until=9, odd_ranks=(2,), iterations=60, step_s=0.05)
    ended = run.fail(at(1, 50, "before-select"))
    run.lose(1)
    assert all(n["stable"] <= 5 for n in ended.of("saved") if n["iteration"] < 9)
    assert run.finish().iteration > 40
    assert_undisturbed(run)


@pytest.mark.parametrize("mode", SETTINGS)
@pytest.mark.parametrize("point", OF_A_HOLDER)
def test_a_holder_that_dies_in_an_update_is_still_worth_what_it_was(job: MakeJob, mode: str, point: str) -> None:
    """Rank 0 dies while it mirrors rank 2's iteration 7; then rank 2's node is lost."""
    run = job(**SETTINGS[mode], calm=True)
    run.fail(at(0, 7, point))
    run.lose(1)
    assert run.finish().iteration in (6, 7)
    assert_undisturbed(run)


def test_another_node_takes_the_place_of_a_holder_that_cannot_be_reached(job: MakeJob) -> None:
    """Rank 2 holds rank 1's replica; while nobody reaches rank 2, rank 0 does. Then rank 1's node is lost."""
    run = job(
        world_size=3, ranks_per_node=1, holder_patience=5, cut_off_from=5, odd_ranks=(2,), iterations=160, step_s=0.05
    )
    assert run.arena(1, 2) != run.arena(1, 0)
    ended = run.fail(at(0, 120, "before-select"))
    assert run.arena(1, 0).exists()
    assert max(n["stable"] for n in ended.of("saved")) > 60, "the job is protected with what there is"
    run.lose(1)
    assert run.finish(cut_off_from=0).iteration > 60
    run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize("mode", SETTINGS)
def test_a_damaged_snapshot_is_sent_again(job: MakeJob, mode: str) -> None:
    run = job(**SETTINGS[mode], damaged_payload=FAILING, odd_ranks=(1,), calm=True)
    ended = run.fail(at(1, 9, "before-select"))
    run.lose(1)
    assert not ended.drops
    assert run.finish().iteration == 8
    assert_undisturbed(run)


# -- one history ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", SETTINGS)
def test_what_a_node_still_holds_of_a_dead_history_is_not_mixed_in(job: MakeJob, mode: str) -> None:
    """Iteration 8 exists twice: on the node that was away, and part of it on the other, which lacks rank 2's."""
    run = job(**SETTINGS[mode], salted=True, calm=True)
    fault = at(2, 8, "mid-replication")
    run.fail(fault)
    run.take_away(1)
    second = run.fail(fault)
    assert second.iteration == 7
    run.bring_back(1)
    third = run.fail(at(1, 10, "mid-replication"))
    assert third.iteration == 7
    run.lose(0)
    assert run.finish().iteration == 9


def test_a_node_from_before_the_run_began_anew_brings_nothing_back(job: MakeJob) -> None:
    run = job(salted=True, calm=True)
    run.fail(at(2, 9, "before-commit"))
    run.take_away(1)
    run.lose(0)
    run.book = [{} for _ in run.book]
    fresh = run.fail(at(2, 5, "mid-replication"), allow_fresh=True)
    assert fresh.iteration == 0
    run.bring_back(1)
    assert run.finish().iteration == 4


def test_two_recoveries_of_one_number_are_not_mixed(job: MakeJob) -> None:
    """Nodes 0 and 1 went on without node 2 and vanished; node 2 went on without them; then node 1 comes back."""
    run = job(world_size=3, ranks_per_node=1, replicas=2, salted=True, calm=True)
    run.fail(at(0, 5, "mid-pack"))
    run.take_away(2)
    without_2 = run.fail(at(0, 6, "mid-replication"))
    run.take_away(1)
    run.lose(0)
    run.bring_back(2)
    without_0_and_1 = run.fail(at(1, 7, "mid-replication"))
    assert [(o.iteration, o.started[0]["epoch"]) for o in (without_2, without_0_and_1)] == [(4, 1), (4, 1)]
    run.bring_back(1)
    assert run.finish().iteration == 6
