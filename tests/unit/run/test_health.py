# SPDX-License-Identifier: Apache-2.0
"""Iterations that training does not call healthy, and ranks that hang: two real sessions over the loopback."""

from __future__ import annotations

import json
import threading
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from fabrics import loopback_fabrics
from session_job import Job
from support import node_folder, together

from megatron_moetion.errors import HungPeer
from megatron_moetion.run.health import HANG_NOTE, Ended, ended_before, take_ended
from megatron_moetion.run.summary import add

MODES = ("full", "popularity")


def step(job: Job, *unhealthy: int) -> None:
    """One iteration of all ranks; ``unhealthy``: the ranks that see that something is wrong with it."""
    job.iteration += 1

    def one(rank: int) -> None:
        job.sessions[rank].before_optimizer_step()
        job.states[rank].step(job.iteration)
        job.sessions[rank].on_step_end(job.iteration, healthy=rank not in unhealthy)
        job.sessions[rank].drain()

    together(*(lambda r=r: one(r) for r in range(len(job.sessions))))  # type: ignore[misc]


@pytest.mark.parametrize("mode", MODES)
def test_an_unhealthy_iteration_and_the_one_before_never_become_stable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    job = Job(tmp_path, mode=mode, report=str(tmp_path / "events.jsonl"))
    job.start()
    images = [[state.image() for state in job.states]]
    for _ in range(5):
        step(job)
        images.append([state.image() for state in job.states])
    for _ in range(4):
        step(job, 1)  # rank 1 alone sees it
        assert {session.stable_iteration for session in job.sessions} <= {3, 4}
    assert [s.scalars()["moetion/unhealthy-iterations"] for s in job.sessions] == [0, 4]
    job.crash()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (said,) = [e for e in events if e["event"] == "trouble" and e["kind"] == "unhealthy"]
    assert (said["first"], said["iteration"], said["ranks"]) == (1, 6, 1)
    second = Job(tmp_path, attempt=1, mode=mode)
    assert {resumed.iteration for resumed in second.start() if resumed is not None} == {4}
    if mode == "full":
        assert [state.image() for state in second.states] == images[4]
    second.crash()


def test_protection_goes_on_after_a_single_unhealthy_iteration(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.start()
    for iteration in range(1, 11):
        step(job, *((0,) if iteration == 6 else ()))
    assert min(session.stable_iteration for session in job.sessions) >= 7
    job.crash()


def test_the_next_attempt_hears_of_a_hang_once_wherever_it_was_noted(tmp_path: Path) -> None:
    folders = [node_folder(tmp_path / f"node{n}") for n in range(3)]
    for folder in folders:
        folder.path.mkdir()
    Ended(unix_s=50.0, detect_s=7.0).write(folders[0])  # of an attempt before the last one
    Ended(unix_s=100.0, detect_s=130.0).write(folders[1])
    with loopback_fabrics(3) as fabrics:

        def ask() -> list[Ended | None]:
            return together(*(lambda r=r: ended_before(fabrics[r], folders[r]) for r in range(3)))  # type: ignore[misc]

        assert ask() == [Ended(unix_s=100.0, detect_s=130.0)] * 3
        assert ask() == [None] * 3
    assert Ended(unix_s=100.0, detect_s=130.0).phases(109.0) == {"detect": 130.0, "restart": 9.0}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"unix_s": []}', "x" * 10_000])
def test_a_note_that_is_none_is_taken_away(tmp_path: Path, text: str) -> None:
    folder = node_folder(tmp_path)
    (tmp_path / HANG_NOTE).write_text(text)
    assert take_ended(folder) is None
    assert not list(tmp_path.iterdir())
    (tmp_path / HANG_NOTE).mkdir()
    assert take_ended(folder) is None
    assert not (tmp_path / HANG_NOTE).exists()


def test_a_rank_whose_peer_is_silent_says_so_and_ends_with_its_own_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both ranks are cut off from each other, and no step ends."""
    codes: list[int] = []
    ended = threading.Semaphore(0)

    def end(code: int) -> None:
        codes.append(code)
        ended.release()

    job = Job(tmp_path, hang_timeout_s=1, report=str(tmp_path / "events.jsonl"), host={"end": end})
    job.start()
    step(job)
    with job.network.cut([0], [1]):
        assert all(ended.acquire(timeout=60) for _ in range(2))
    assert codes == [HungPeer.exit_code] * 2
    job.crash()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (hung,) = [e for e in events if e["event"] == "hung"]
    assert list(hung["silent_s"]) == ["1"]
    assert sorted(p.parent.name for p in tmp_path.rglob(HANG_NOTE)) == ["node0", "node1"]
    said = [r.getMessage() for r in caplog.records if "ends with exit code 5" in r.getMessage()]
    assert len(said) == 2, "one line a node"
    second = Job(tmp_path, attempt=1)
    resumed = second.start()[0]
    assert resumed is not None
    assert list(resumed.seconds)[:2] == ["detect", "restart"]
    second.crash()


def test_totals_of_all_ranks_come_out_the_same_in_any_tree() -> None:
    def totals(rank: int) -> dict[str, Any]:
        note = {"ranks": 1, "rank": rank, "iteration": 9, "text": f"rank {rank}"}
        return {
            "snapshots": 10 + rank % 3, "dropped": rank, "full": 100, "mean": 2.0,
            "layers": {f"layers.{rank % 2}": [rank, 10]}, "notes": {"disk": note} if rank > 2 else {},
        }  # fmt: skip

    ranks = [totals(rank) for rank in range(8)]
    row = reduce(add, ranks)
    halves = add(reduce(add, ranks[:4]), add(add(ranks[4], ranks[5]), add(ranks[6], ranks[7])))
    assert json.loads(json.dumps(row)) == json.loads(json.dumps(halves))
    assert row == {
        "snapshots": 10, "dropped": 28, "full": 800, "mean": 16.0,
        "layers": {"layers.0": (12, 40), "layers.1": (16, 40)},
        "notes": {"disk": {"ranks": 5, "rank": 3, "iteration": 9, "text": "rank 3"}},
    }  # fmt: skip


def test_a_run_whose_peer_is_gone_at_the_end_closes_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(tmp_path, report=str(tmp_path / "events.jsonl"))
    job.start()
    step(job)
    job.sessions[0].running.journal.warn_once("disk", 1, "the disk is full")  # on its way, and nobody hears of it
    with job.network.cut([0], [1]):
        together(*(session.close for session in job.sessions))
    text = caplog.text
    assert text.count("the summary is missing") == 2
    assert text.count("the disk is full") == 1
