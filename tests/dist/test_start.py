# SPDX-License-Identifier: Apache-2.0
"""Real processes that start: fresh, again, beside damaged or foreign arenas, and without enough memory."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, Nursery, Outcome, content, damage_captures, damage_header, damage_pages, truncate

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]

MakeJob = Callable[..., Job]
SAVED = 6
"""The iteration after which the first attempt ends. Arenas then hold this one and the two before it."""


def trained(job: MakeJob, **settings: Any) -> Job:
    """A job whose processes ended after ``SAVED`` iterations, all snapshots whole."""
    run = job(calm=True, iterations=10, **settings)
    first = run.attempt(iterations=SAVED)
    assert first.codes == [0] * run.toy.world_size
    assert not first.started[0]["recovered"]
    run.follow(first)
    return run


@pytest.mark.parametrize("mode", ["full", "popularity"])
def test_a_restart_goes_on_bitwise_from_its_own_memory(job: MakeJob, mode: str) -> None:
    run = trained(job, mode=mode)
    last = run.finish()
    assert (last.iteration, last.started[0]["epoch"]) == (SAVED, 1)
    assert last.fetched == [0, 0, 0, 0]
    assert run.events[-1]["event"] == "summary"
    if mode == "full":
        run.assert_as_if_nothing_had_happened()


# -- damaged arenas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "popularity"])
@pytest.mark.parametrize("part", ["payload", "digests"])
def test_one_flipped_bit_is_found_and_the_buddys_copy_is_used(job: MakeJob, mode: str, part: str) -> None:
    run = trained(job, mode=mode)
    damage_captures(run.arena(owner=1, node=0), [SAVED], part=part)
    last = run.finish()
    assert last.iteration == SAVED
    assert last.fetched == [0, 1, 0, 0]
    (recovered,) = (e for e in run.events if e["event"] == "recovered")
    assert recovered["damaged"] == 1
    if mode == "full":
        run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize("damaged", [(SAVED,), (SAVED, SAVED - 1)])
def test_where_both_copies_are_damaged_an_older_iteration_is_used_by_all(
    job: MakeJob, damaged: tuple[int, ...]
) -> None:
    run = trained(job)
    for node in range(2):
        damage_captures(run.arena(owner=3, node=node), damaged)
    assert run.finish().iteration == SAVED - len(damaged)
    run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize(
    "damage",
    [damage_pages, lambda p: truncate(p, 0.6), lambda p: truncate(p, 0), damage_header],
    ids=["both pages", "cut", "empty", "header"],
)
def test_an_arena_that_cannot_be_read_is_replaced_from_the_buddys(job: MakeJob, damage: Callable[[Path], None]) -> None:
    run = trained(job)
    damage(run.arena(owner=2, node=1))
    damage(run.arena(owner=0, node=1))
    last = run.finish()
    assert last.iteration == SAVED
    assert last.fetched == [0, 0, 7, 0]
    run.assert_as_if_nothing_had_happened()


def test_nothing_is_recovered_where_all_copies_of_one_rank_are_damaged(job: MakeJob) -> None:
    run = trained(job)
    for node in range(2):
        damage_pages(run.arena(owner=1, node=node))
    messages = run.refuse(3)
    assert all("no copy of rank(s) 1 is left" in m for m in messages)


# -- never silently from zero -----------------------------------------------------------------------------------


def test_a_restart_that_finds_nothing_ends_with_code_3_unless_it_may_start_anew(job: MakeJob) -> None:
    run = trained(job)
    shutil.rmtree(run.store)
    messages = run.refuse(3)
    assert all("nothing can be recovered" in m and "--moetion-allow-fresh" in m for m in messages)
    last = run.finish(allow_fresh=True)
    assert not last.started[0]["recovered"]
    assert last.iteration == 0
    run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize("restarts", [0, None], ids=["a new launch", "a restart"])
def test_a_group_of_nodes_lost_altogether_ends_with_code_3(job: MakeJob, restarts: int | None) -> None:
    run = trained(job, ranks_per_node=1)
    before = content(run.store)
    run.lose(2, 3)
    messages = run.refuse(3, restarts=restarts)
    assert all("no copy of rank(s) 2, 3 is left on any node" in m for m in messages)
    kept = content(run.store)
    assert kept
    assert all(before[name] == data for name, data in kept.items())
    last = run.finish(allow_fresh=True)
    assert last.iteration == 0
    run.assert_as_if_nothing_had_happened()


def test_without_replicas_a_lost_node_ends_with_code_3(job: MakeJob) -> None:
    run = trained(job, replicas=0)
    run.lose(1)
    assert all("no copy of rank(s) 2, 3" in m for m in run.refuse(3))


# -- strangers --------------------------------------------------------------------------------------------------

STRANGERS = {
    "layout": ({"elements": 1800}, "layout: the model, or how it is spread over ranks, is another one"),
    "mode": ({"mode": "popularity"}, "mode: the arena has 'full', this run has 'popularity'"),
    "chunks": ({"chunk_bytes": 8192}, "chunk-bytes: the arena has 4096, this run has 8192"),
    "world": ({"world_size": 2, "ranks_per_node": 1}, "world_size: the arena has 4, this run has 2"),
    "topology": ({"topology": "tp2"}, "topology: the arena has 'toy', this run has 'tp2'"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_arenas_of_something_else_are_refused_and_left_intact(job: MakeJob, kind: str) -> None:
    run = trained(job)
    settings, pattern = STRANGERS[kind]
    before = content(run.store)
    other = job(store=run.store, **settings)
    for message in other.refuse(2, allow_fresh=True):
        assert re.search(pattern, message), message
    assert content(run.store) == before
    run.finish()
    run.assert_as_if_nothing_had_happened()


DIFFERENT = {
    "mode": ({"mode": "popularity"}, "mode is 'full' on one and 'popularity' on the other"),
    "chunks": ({"chunk_bytes": 8192}, "chunk_bytes is 4096 on one and 8192 on the other"),
    "interval": ({"interval": 2}, "interval is 1 on one and 2 on the other"),
    "replicas": ({"replicas": 0}, "replicas is 1 on one and 0 on the other"),
    "slices": ({"in_flight_bytes": 1 << 20}, "in_flight_bytes is 67108864 on one and 1048576 on the other"),
    "traces": ({"trace_dir": "traces"}, "trace_dir is False on one and True on the other"),
    "allow_fresh": ({"allow_fresh": True}, "allow_fresh is False on one and True on the other"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_ranks_with_different_settings_are_refused(job: MakeJob, kind: str) -> None:
    run = job(timeout_s=3)
    settings, words = DIFFERENT[kind]
    messages = run.refuse(2, rank_settings={2: settings})
    assert all("ranks 0 and 2 were started differently" in m and words in m for m in messages)
    assert not content(run.store)


# -- memory -----------------------------------------------------------------------------------------------------


def test_too_little_memory_on_one_node_is_refused_before_the_first_step(job: MakeJob, store: Path) -> None:
    stat = shutil.disk_usage(store)
    run = job(ballast_bytes=stat.free + (1 << 20), odd_ranks=(3,), chunk_bytes=1 << 26)
    messages = run.refuse(2)
    assert all("MiB free and this arena needs" in m for m in messages)
    assert all(len(p.read_bytes()) < 1 << 20 for p in run.store.rglob("*.arena"))


def test_memory_that_cannot_be_allocated_is_refused_before_the_first_step(job: MakeJob) -> None:
    run = job(file_limit_bytes=1 << 16, odd_ranks=(1,))
    messages = run.refuse(2)
    assert all("MiB free and this arena needs" in m for m in messages)
    assert not list(run.store.rglob("*.tmp"))


@pytest.fixture
def second_nursery() -> Iterator[Nursery]:
    found = Nursery("toy")
    yield found
    found.close()


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.3])
def test_of_two_jobs_under_one_name_one_trains_and_the_other_is_refused(
    job: MakeJob, second_nursery: Nursery, store: Path, tmp_path: Path, delay_s: float
) -> None:
    settings = {"iterations": 60, "step_s": 0.05, "calm": True, "timeout_s": 2}
    ours = job(store=store / "one", **settings)
    theirs = Job(second_nursery, tmp_path / "theirs", store / "one", salted=True, **settings)
    found: dict[str, Outcome] = {}

    def run(which: str, wait_s: float, each: Job) -> None:
        time.sleep(wait_s)
        found[which] = each.attempt()

    threads = [
        threading.Thread(target=run, args=("ours", 0.0, ours)),
        threading.Thread(target=run, args=("theirs", delay_s, theirs)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [each for each in (ours, theirs) if found["ours" if each is ours else "theirs"].codes == [0] * 4]
    assert len(winners) == 1, {k: (o.codes, o.errors) for k, o in found.items()}
    winner, lost = winners[0], found["theirs" if winners[0] is ours else "ours"]
    assert lost.codes == [2] * 4
    assert all("is still in use by process" in error for error in lost.errors)
    winner.follow(found["ours" if winner is ours else "theirs"])
    again = winner.attempt(iterations=62)
    assert again.codes == [0] * 4
    winner.follow(again)
