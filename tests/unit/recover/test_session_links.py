# SPDX-License-Identifier: Apache-2.0
"""Real sessions whose links fail: T goes on after the link's return, without a restart, and is what it says."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from mirrors import TIMING
from session_job import Job

MODES = ("full", "popularity")
FEW = 6
"""Iterations in which T reaches a new one once a link is back: late snapshots arrive, ranks agree on them, older ones
are released, a new one finds room, and ranks agree on that."""


def job_of(folder: Path, **settings: Any) -> Job:
    """A job whose links try again soon."""
    return Job(folder, host={"links": TIMING}, **settings)


def started(folder: Path, **settings: Any) -> Job:
    job = job_of(folder, **settings)
    job.start()
    job.train(3)
    assert job.sessions[0].stable_iteration >= 1
    return job


def stables(job: Job) -> list[int]:
    return [session.stable_iteration for session in job.sessions]


def check_advance(job: Job) -> None:
    """T is a new one within a few iterations."""
    before = job.iteration
    job.train(FEW)
    assert min(stables(job)) > before


def check_recovery(job: Job, folder: Path, **settings: Any) -> None:
    """A restart finds the state of T, on both ranks."""
    images = [s.image() for s in job.states]
    stable, last = min(stables(job)), job.iteration
    job.crash()
    second = job_of(folder, attempt=1, **settings)
    resumed = second.start()[0]
    assert resumed is not None
    assert resumed.iteration >= stable
    if settings["mode"] == "full":
        second.train(last - resumed.iteration)
        assert [s.image() for s in second.states] == images
    second.crash()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resets", [1, 10])
def test_resets_cost_no_snapshot(tmp_path: Path, mode: str, resets: int) -> None:
    job = started(tmp_path, mode=mode)
    job.network.reset(resets, 0, 1, "hold")
    check_advance(job)
    check_recovery(job, tmp_path, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_partition_stops_stable_and_its_end_lets_it_go_on(tmp_path: Path, mode: str) -> None:
    job = started(tmp_path, mode=mode)
    before = max(stables(job))
    with job.network.cut([0], [1], "hold"):
        job.train(6)
        assert before <= max(stables(job)) <= before + 2
        assert [s.scalars()["moetion/redundancy"] for s in job.sessions] == [0, 0]
    check_advance(job)
    assert [s.scalars()["moetion/redundancy"] for s in job.sessions] == [1, 1]
    check_recovery(job, tmp_path, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_connections_that_are_lost_all_the_time_only_delay(tmp_path: Path, mode: str) -> None:
    rng = random.Random(3)
    job = started(tmp_path, mode=mode)
    for _ in range(20):
        if rng.random() < 0.5:
            job.network.reset(1, rng.randrange(2), None, "hold")
        job.train(1)
    check_advance(job)
    check_recovery(job, tmp_path, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sender", [0, 1])
def test_damage_on_the_way_is_not_believed(tmp_path: Path, mode: str, sender: int) -> None:
    job = started(tmp_path, mode=mode)
    for position in (-1, 3, 40, 70):
        job.network.flip(3, sender, 1 - sender, "hold", position % 64 if position > 0 else -1)
        job.train(2)
    check_advance(job)
    check_recovery(job, tmp_path, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_without_its_holder_a_rank_goes_on_and_says_what_it_is_worth(
    tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = started(tmp_path, mode=mode, holder_patience=3)
    with job.network.cut([0], [1], "hold"):
        for _ in range(200):
            job.train(1)
            if min(stables(job)) > 10:
                break
        assert min(stables(job)) > 10
        assert [s.scalars()["moetion/redundancy-least"] for s in job.sessions] == [0, 0]
        assert "the loss of node 0 alone would cost all that is in memory" in caplog.text
        job.train(3)
    for _ in range(200):
        job.train(1)
        if all(s.scalars()["moetion/redundancy-least"] == 1 for s in job.sessions):
            break
    assert [s.scalars()["moetion/redundancy-least"] for s in job.sessions] == [1, 1]
    check_advance(job)
    check_recovery(job, tmp_path, mode=mode)


def test_after_any_storm_a_restart_finds_what_was_stable(tmp_path: Path) -> None:
    rng = random.Random(11)
    job = started(tmp_path, mode="full", holder_patience=4)
    with ExitStack() as cuts:
        for _ in range(20):
            if rng.random() < 0.3:
                cuts.enter_context(job.network.cut([0], [1], "hold"))
            if rng.random() < 0.3:
                cuts.close()
            job.train(1)
        check_recovery(job, tmp_path, mode="full")
