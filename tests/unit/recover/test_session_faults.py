# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around a session: newer checkpoints on disk, deleted stores, errors of one rank, sudden ends."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from session_job import Adapter, Job

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import (
    ConfigError,
    DeviceFault,
    IdentityMismatch,
    MoetionError,
    NothingRecoverable,
    ProtectionLost,
    StoreError,
    UnsupportedState,
)
from megatron_moetion.recover import startup
from megatron_moetion.recover.disk import Disk
from megatron_moetion.replicate.witness import Past
from megatron_moetion.run import prepare, starter
from megatron_moetion.run.upkeep import TRY_AGAIN
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.lock import NodeLock
from megatron_moetion.store.node import NodeFolder
from megatron_moetion.store.sharedfile import peek_arena


def lines(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if text in r.getMessage()]


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "megatron_moetion")


# -- the newer of memory and disk wins --------------------------------------------------------------------------


def trained(folder: Path, steps: int = 3, **settings: object) -> Job:
    job = Job(folder, **settings)  # type: ignore[arg-type]
    job.start()
    job.train(steps)
    return job


def test_a_newer_checkpoint_on_disk_beats_memory_and_both_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path).crash()
    second = Job(tmp_path, attempt=1)
    assert second.start(lambda: 30, lambda: 30) == [None, None]
    assert lines(caplog, "memory holds iteration 3, disk 30")
    assert second.iteration == 30
    images = second.train(2)
    second.crash()
    third = Job(tmp_path, attempt=2)  # of the new lineage, with the same checkpoint still there
    resumed = third.start(lambda: 30, lambda: 30)[0]
    assert resumed is not None
    assert resumed.iteration == 32
    assert [s.image() for s in third.states] == images
    third.crash()


@pytest.mark.parametrize("on_disk", [None, 1, 3])
def test_memory_that_is_as_new_as_disk_is_taken_and_disk_is_not_read(tmp_path: Path, on_disk: int | None) -> None:
    def never() -> NoReturn:
        raise AssertionError("memory has it")

    trained(tmp_path).crash()
    second = Job(tmp_path, attempt=1)
    resumed = second.start(never, lambda: on_disk)[0]
    assert resumed is not None
    assert resumed.iteration == 3
    second.crash()


@pytest.mark.parametrize(("mine", "says"), [(None, "see none"), (20, "an older one")])
def test_a_newer_checkpoint_that_only_some_ranks_see_is_an_error_of_all(
    tmp_path: Path, mine: int | None, says: str
) -> None:
    job = trained(tmp_path)
    expected = [s.image() for s in job.states]
    job.crash()
    second = Job(tmp_path, attempt=1)
    for error in all_errors(
        lambda: second.start_rank(0, Disk(load=lambda: 30, newest=lambda: 30)),
        lambda: second.start_rank(1, Disk(load=lambda: 30, newest=lambda: mine)),
    ):
        assert isinstance(error, StoreError)
        assert error.shared
        assert "iteration 30, memory one of 3" in str(error)
        assert "1 ranks ([1])" in str(error)
        assert says in str(error)
    third = Job(tmp_path, attempt=2)  # older ones on disk do not matter, whoever sees them
    seen = iter([2, None])
    assert third.start(lambda: 2, lambda: next(seen))[0] is not None
    assert [s.image() for s in third.states] == expected
    third.crash()


@pytest.mark.parametrize("loaded", [None, 2])
def test_a_checkpoint_that_turns_out_to_be_older_leaves_memory_the_winner(
    tmp_path: Path, loaded: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    images = trained(tmp_path)
    expected = [s.image() for s in images.states]
    images.crash()
    second = Job(tmp_path, attempt=1)
    resumed = second.start(lambda: loaded, lambda: 30)[0]
    assert resumed is not None
    assert resumed.iteration == 3
    assert [s.image() for s in second.states] == expected
    assert lines(caplog, f"disk should have held iteration 30 and gave {loaded}")
    second.crash()


# -- state that makes training fail --------------------------------------------------------------------------------


def poisoned(folder: Path, good_steps: int, attempt: int = 0, **settings: object) -> int:
    """One attempt: good iterations, one after which some value is not a number, and the crash that comes of it.

    Returns the iteration that it went on from.
    """
    job = Job(folder, attempt=attempt, **settings)  # type: ignore[arg-type]
    resumed = job.start()[0]
    if resumed is None or good_steps:
        job.train(good_steps)
        job.states[1].arrays["dense"][7] = float("nan")
        job.train(1)  # the snapshot of this iteration has it
    assert np.isnan(job.states[1].arrays["dense"][7]), "the next step would fail"
    job.crash()
    return resumed.iteration if resumed is not None else 0


def test_state_that_makes_training_fail_is_not_recovered_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One bad value in a moment: three recoveries of the same iteration, then the older checkpoint on disk."""
    report = tmp_path / "report.jsonl"
    poisoned(tmp_path, 4)
    assert [poisoned(tmp_path, 0, attempt=n, report=str(report)) for n in (1, 2, 3)] == [5, 5, 5]
    events = [json.loads(line) for line in report.read_text().splitlines()]
    assert [e["fruitless"] for e in events if e["event"] == "recovered"] == [0, 1, 2]
    caplog.clear()
    fourth = Job(tmp_path, attempt=4)
    assert fourth.start(lambda: 2, lambda: 2) == [None, None]
    assert fourth.iteration == fourth.sessions[0].stable_iteration == 2
    (said,) = lines(caplog, "times without getting further")
    assert "iteration 5, which memory holds, 3 times" in said
    images = fourth.train(2)
    fourth.crash()
    fifth = Job(tmp_path, attempt=5)  # the checkpoint on disk is older than what memory has now
    resumed = fifth.start(lambda: 2, lambda: 2)[0]
    assert resumed is not None
    assert resumed.iteration == 4
    assert [s.image() for s in fifth.states] == images
    fifth.crash()


def test_iterations_that_became_stable_in_between_begin_the_count_anew(tmp_path: Path) -> None:
    poisoned(tmp_path, 1)
    found = [poisoned(tmp_path, steps, attempt=n + 1) for n, steps in enumerate((0, 0, 2, 0, 0, 0))]
    assert found == [2, 2, 2, 5, 5, 5]
    with pytest.raises(NothingRecoverable):
        Job(tmp_path, attempt=7).start()


def test_without_a_checkpoint_on_disk_the_job_stops_and_says_how_to_go_on(tmp_path: Path) -> None:
    poisoned(tmp_path, 4)
    for attempt in (1, 2, 3):
        poisoned(tmp_path, 0, attempt=attempt)
    fourth = Job(tmp_path, attempt=4)
    for error in all_errors(*starts(fourth, Disk(load=lambda: None, newest=lambda: None))):
        assert isinstance(error, NothingRecoverable)
        assert error.shared
        assert error.exit_code == 3
        assert "iteration 5, which memory holds, 3 times" in str(error)
        assert "--moetion-max-fruitless-recoveries 0 tries it again" in str(error)
        assert f"delete {tmp_path / 'job'} on every node" in str(error)
    for each in fourth.prepared:
        each.close()
    fifth = Job(tmp_path, attempt=5, max_fruitless_recoveries=0)
    resumed = fifth.start()[0]
    assert resumed is not None
    assert resumed.iteration == 5
    fifth.crash()


@pytest.mark.parametrize("who", [(0,), (1,), (0, 1)])
def test_an_unhealthy_iteration_and_the_one_before_are_not_recovered(
    tmp_path: Path, who: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    job = trained(tmp_path)
    healthy = [s.image() for s in job.states]
    job.train(1)
    job.train(1, unhealthy=who)  # its loss came from the state after iteration 4
    job.crash()
    second = Job(tmp_path, attempt=1)
    resumed = second.start()[0]
    assert resumed is not None
    assert resumed.iteration == 3
    assert [s.image() for s in second.states] == healthy
    assert lines(caplog, "called unhealthy (iteration 4), and it is left out")
    images = second.train(2)
    second.crash()
    third = Job(tmp_path, attempt=2)  # iterations 4 and 5 are others now
    resumed = third.start()[0]
    assert resumed is not None
    assert resumed.iteration == 5
    assert [s.image() for s in third.states] == images
    third.crash()


def test_an_iteration_that_was_healthy_after_unhealthy_ones_is_recovered(tmp_path: Path) -> None:
    job = trained(tmp_path)
    for _ in range(40):
        job.train(1, unhealthy=(1,))
    images = job.train(2)
    job.crash()
    second = Job(tmp_path, attempt=1)
    resumed = second.start()[0]
    assert resumed is not None
    assert resumed.iteration == 45
    assert [s.image() for s in second.states] == images
    second.crash()


def test_vetoes_that_cannot_be_written_or_read_do_not_stop_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = trained(tmp_path, 4)
    in_the_way = tmp_path / "job" / "node0" / "rank00000.vetoed.json"
    in_the_way.mkdir()
    job.train(1, unhealthy=(0,))
    job.crash()
    assert lines(caplog, f"{in_the_way} cannot be written: Is a directory")
    (tmp_path / "job" / "node1" / "rank00001.vetoed.json").write_text('{"lineage": 1, "epoch"')
    second = Job(tmp_path, attempt=1)
    resumed = second.start()[0]
    assert resumed is not None
    assert resumed.iteration == 4
    second.crash()


# -- never silently from zero -----------------------------------------------------------------------------------


class Memory:
    """A witness that outlives attempts."""

    def __init__(self) -> None:
        self.baseline = False

    def past(self) -> Past:
        return Past(is_known=True, had_baseline=self.baseline)

    def note_baseline(self) -> None:
        self.baseline = True


def test_a_run_that_died_before_its_first_arenas_starts_by_itself(tmp_path: Path) -> None:
    witness = Memory()
    Job(tmp_path, witness=witness)  # its processes die before they start
    assert not witness.baseline
    second = Job(tmp_path, attempt=1, witness=witness)
    assert second.start() == [None, None]
    second.train(2)
    second.crash()
    shutil.rmtree(tmp_path / "job")
    with pytest.raises(NothingRecoverable):
        Job(tmp_path, attempt=2, witness=witness).start()


def test_agents_that_count_no_restarts_do_not_start_from_zero_where_the_witness_knows_better(tmp_path: Path) -> None:
    witness = Memory()
    trained(tmp_path, witness=witness).crash()
    shutil.rmtree(tmp_path / "job")  # both nodes were replaced, by spares whose agents never failed
    with pytest.raises(NothingRecoverable):
        Job(tmp_path, attempt=0, witness=witness).start()


def test_a_recovery_tells_the_witness_before_another_fault_can_take_what_there_is(tmp_path: Path) -> None:
    trained(tmp_path).crash()
    witness = Memory()  # of a supervisor that was started anew, by hand
    second = Job(tmp_path, witness=witness)
    with pytest.MonkeyPatch.context() as patched:
        fail_where(patched, startup, "Mover", lambda **_: True, StoreError("a fault"))
        all_errors(*starts(second))
    assert witness.baseline


def test_without_a_witness_a_restart_that_finds_nothing_asks_for_consent(tmp_path: Path) -> None:
    Job(tmp_path)
    with pytest.raises(NothingRecoverable):
        Job(tmp_path, attempt=1).start()


# -- other versions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("consent", [{"allow_fresh": True}, {}])
def test_arenas_of_another_version_are_left_alone_whatever_was_agreed_to(
    tmp_path: Path, consent: dict[str, object]
) -> None:
    trained(tmp_path).crash()
    paths = sorted((tmp_path / "job").rglob("*.arena"))
    for path in paths:
        path.write_bytes(b"MOETION1" + path.read_bytes()[8:])
    before = [path.read_bytes() for path in paths]
    with pytest.raises(IdentityMismatch, match="another version of MoEtion") as refusal:
        Job(tmp_path, attempt=1, **consent).start(lambda: 40, lambda: 40)  # type: ignore[arg-type]
    assert refusal.value.shared
    assert [path.read_bytes() for path in paths] == before


# -- paths that are no arenas -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rank00000.arena", "old.arena"])
@pytest.mark.parametrize("kind", ["folder", "link to nothing", "pipe"])
def test_a_path_that_is_no_file_is_passed_over_and_the_replica_is_used(tmp_path: Path, name: str, kind: str) -> None:
    job = trained(tmp_path)
    expected = [s.image() for s in job.states]
    job.crash()
    path = tmp_path / "job" / "node0" / name
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
        (path / "kept").write_text("somebody's")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nothing")
    second = Job(tmp_path, attempt=1)
    resumed = second.start()
    assert [r.iteration for r in resumed if r is not None] == [3, 3]
    assert [s.image() for s in second.states] == expected
    assert peek_arena(tmp_path / "job" / "node0" / "rank00000.arena")[1].stable == 3
    if kind == "folder":
        assert [p.read_text() for p in (tmp_path / "job").rglob("kept")] == ["somebody's"]
    second.crash()


# -- errors of one rank -----------------------------------------------------------------------------------------


def all_errors(*calls: Callable[[], object]) -> list[Exception]:
    """What each rank raises; every one must."""
    found: dict[int, Exception] = {}

    def run(rank: int, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4)  # less than the job's timeout: nobody waited for the rank that had given up
    assert sorted(found) == list(range(len(calls)))
    return [error for _, error in sorted(found.items())]


def fail_where(
    monkeypatch: pytest.MonkeyPatch, target: object, name: str, is_it: Callable[..., bool], error: Exception
) -> None:
    """Let a function raise where ``is_it`` says so of its arguments."""
    original = getattr(target, name)

    def call(*args: object, **named: object) -> object:
        if is_it(*args, **named):
            raise error
        return original(*args, **named)

    monkeypatch.setattr(target, name, call)


def starts(job: Job, disk: Disk | None = None) -> list[Callable[[], object]]:
    """Each rank's start."""
    return [lambda r=r: job.start_rank(r, disk) for r in range(len(job.prepared))]  # type: ignore[misc]


ON_RANK_1: dict[str, tuple[object, str, Callable[..., bool]]] = {
    "survey": (startup, "survey_store", lambda opened, names, ours, *_: ours.owner == 1),
    "open": (startup, "OpenArenas", lambda own, **_: Path(own.name).parent.name == "node1"),
    "verify": (starter, "verified", lambda pool, arena, *_: arena.spec.identity.owner == 1),
    "model": (Adapter, "copy_to_model", lambda self: self.rank == 1),
    "host state": (Adapter, "load_host_state", lambda self, *_: self.rank == 1),
    "epoch": (startup.Mover, "begin_epoch", lambda self: self.rank == 1),
}


@pytest.mark.parametrize("phase", ON_RANK_1)
@pytest.mark.parametrize("error", [StoreError("not today"), OSError(5, "not today"), RuntimeError("not today")])
def test_an_error_of_one_rank_while_a_run_recovers_is_raised_by_all_at_once(
    tmp_path: Path, phase: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = trained(tmp_path)
    expected = [s.image() for s in job.states]
    job.crash()
    second = Job(tmp_path, attempt=1)
    with monkeypatch.context() as patched:
        fail_where(patched, *ON_RANK_1[phase], error)
        first, other = all_errors(*starts(second))
    assert isinstance(first, MoetionError)
    assert first.shared
    assert "rank 1 on " in str(first)
    assert "not today" in str(first)
    assert str(other) == str(first) if isinstance(error, StoreError) else other is error
    for each in second.prepared:
        each.close()
    third = Job(tmp_path, attempt=2)
    resumed = third.start()[0]
    assert resumed is not None
    assert resumed.iteration == 3
    assert [s.image() for s in third.states] == expected
    third.crash()


@pytest.mark.parametrize("point", ["load", "begin"])
def test_an_error_of_one_rank_while_a_run_begins_is_raised_by_all_at_once(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path)

    def load() -> int | None:
        if point == "load" and next(calls):
            raise ValueError("no such checkpoint here")
        return None

    calls = iter([False, True])
    if point == "begin":
        is_it: Callable[..., bool] = lambda node, *_: node.path.name == "node1"
        fail_where(monkeypatch, NodeFolder, "create_arena", is_it, StoreError("no such checkpoint here"))
    found = all_errors(*starts(job, Disk(load=load)))
    assert all("no such checkpoint here" in str(error) for error in found)


def test_an_error_of_one_rank_while_sessions_are_made_is_raised_by_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_where(monkeypatch, prepare, "write_pid", lambda node, rank, attempt: rank == 1, OSError(28, "No space left"))
    with pytest.raises((MoetionError, OSError), match="No space left"):
        Job(tmp_path)


def test_a_lock_that_one_rank_does_not_get_is_an_error_of_all_and_the_others_give_theirs_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    taken = NodeLock.close
    monkeypatch.setattr(NodeLock, "close", lambda lock: closed.append(lock.path.parent.name) or taken(lock))
    is_second: Callable[..., bool] = lambda node, *_: node.path.name == "node1"
    fail_where(monkeypatch, NodeFolder, "lock", is_second, StoreError("process 7 has it"))
    with pytest.raises(StoreError, match=r"rank 1 on .*: process 7 has it"):
        Job(tmp_path)
    assert sorted(closed) == ["node0", "node0", "node1"], "its own, and one a node to remove the folder"
    assert list(tmp_path.iterdir()) == []


# -- a store that is deleted while training runs ----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "popularity"])
@pytest.mark.parametrize("what", ["job", "job/node0", "job/node0/rank00001.arena", "job/node1/lock"])
def test_a_deleted_store_is_noticed_at_the_next_snapshot_and_made_again(
    tmp_path: Path, mode: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = trained(tmp_path, mode=mode, experts_per_snapshot=0 if mode == "full" else 4)
    path = tmp_path / what
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    job.train(1)
    assert path.exists()
    images = job.train(2)
    assert lines(caplog, "were deleted while training runs; they were made again")
    caplog.clear()
    job.train(0)
    assert not lines(caplog, "deleted")
    job.crash()
    shutil.rmtree(tmp_path / "job" / "node1")
    second = Job(tmp_path, attempt=1, mode=mode, experts_per_snapshot=0 if mode == "full" else 4)
    resumed = second.start()[0]
    assert resumed is not None
    assert resumed.iteration == 6
    assert [s.image() for s in second.states] == images
    second.crash()


def test_a_deleted_arena_that_is_made_again_leaves_the_lock_where_it_is(tmp_path: Path) -> None:
    job = trained(tmp_path)
    (tmp_path / "job" / "node0" / "rank00000.arena").unlink()
    job.train(1)
    program = (
        "import sys; from pathlib import Path; from megatron_moetion.clock import SystemClock; "
        "from megatron_moetion.store.lock import NodeLock; "
        "NodeLock.take(Path(sys.argv[1]), 0, 1, wait_s=0, say=print, clock=SystemClock())"
    )
    other = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "job" / "node0")], capture_output=True, text=True, timeout=30
    )
    assert f"still in use by process {os.getpid()}" in other.stderr
    job.crash()


@pytest.mark.parametrize("name", ["lock", "node.id", "rank00000.pid"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_any_name_in_the_store_may_be_taken_by_something_else(tmp_path: Path, name: str, kind: str) -> None:
    job = trained(tmp_path)
    expected = [s.image() for s in job.states]
    job.crash()
    path = tmp_path / "job" / "node0" / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    second = Job(tmp_path, attempt=1)
    assert [r.iteration for r in second.start() if r is not None] == [3, 3]
    assert [s.image() for s in second.states] == expected
    second.crash()


def test_a_deleted_store_that_cannot_be_made_again_is_said_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = trained(tmp_path)
    shutil.rmtree(tmp_path / "job" / "node0")
    with monkeypatch.context() as patched:
        fail_where(patched, Arena, "make_file_again", lambda arena: True, StoreError("no room"))
        job.train(3)
    said = lines(caplog, "cannot be made again: no room")
    assert len(said) == 1
    assert "node0" in said[0]
    job.train(TRY_AGAIN)
    assert len(lines(caplog, "they were made again")) == 1
    job.crash()


# -- snapshots that stop for good -------------------------------------------------------------------------------


def fail_devices(job: Job) -> None:
    """From now on no rank can pack."""

    def fail() -> NoReturn:
        raise DeviceFault("an illegal address")

    for each in job.disturbances:
        each.pack = fail


def test_a_run_that_lost_its_protection_says_so_again_and_ends_where_it_can_be_restarted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = trained(tmp_path, 4, max_restarts=3)
    fail_devices(job)
    with pytest.raises(ProtectionLost, match=r"stable iteration is still \d.*supervisor restarts") as end:
        job.train(60)
    assert end.value.exit_code == 4
    assert 4 + 20 - 3 <= job.iteration <= 4 + 20
    said = [line for line in lines(caplog, "no snapshot is protected since iteration") if "rank 0" in line]
    assert [int(line.split("costs ")[1].split()[0]) for line in said] == [4, 8, 16]
    job.crash()
    second = Job(tmp_path, attempt=1, max_restarts=3)
    resumed = second.start()[0]
    assert resumed is not None
    assert resumed.iteration >= 3
    second.train(3)
    assert second.sessions[0].stable_iteration > resumed.iteration
    second.crash()


def test_a_restart_that_ended_unprotected_in_the_same_place_does_not_end_the_process_again(tmp_path: Path) -> None:
    trained(tmp_path, 4, max_restarts=3).crash()
    second = Job(tmp_path, attempt=1, max_restarts=3)
    second.start()
    fail_devices(second)
    second.train(60)
    assert second.iteration == 64
    second.crash()


def test_a_device_that_failed_counts_as_the_end_of_protection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = trained(tmp_path, 4, max_restarts=3, drain_s=2)

    def fail() -> NoReturn:
        raise DeviceFault("an illegal address")

    job.disturbances[1].pack = fail
    with pytest.raises(ProtectionLost, match="an illegal address"):
        job.train(60)
    assert lines(caplog, "rank 1 iteration 8: no snapshot is protected since iteration")
    job.crash()


@pytest.mark.parametrize(("setting", "max_restarts"), [(-1, 0), (0, 9)])
def test_without_a_restart_at_hand_training_goes_on_unprotected(
    tmp_path: Path, setting: int, max_restarts: int
) -> None:
    job = trained(tmp_path, 4, max_restarts=max_restarts, max_unprotected_iterations=setting)
    fail_devices(job)
    job.train(60)
    assert job.iteration == 64
    job.crash()


def test_a_rank_whose_peer_is_cut_off_hears_that_the_stable_iteration_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = trained(tmp_path, 4)
    job.disturbances[1].pack = lambda: False  # rank 1 is never whole again
    job.train(150)
    assert len(lines(caplog, "some rank's snapshots are dropped")) == 2
    job.crash()


# -- ends without warning ---------------------------------------------------------------------------------------


def test_close_after_a_start_that_failed_lets_go_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path)
    closed: list[int] = []
    for prepared in job.prepared:
        prepared.undo.callback(closed.append, prepared.fabric.rank)
    with monkeypatch.context() as patched:
        fail_where(patched, startup, "survey_store", lambda *_: True, StoreError("not today"))
        all_errors(*starts(job))
    for prepared in job.prepared:
        prepared.close()
        prepared.close()
    assert closed == [0, 1]
    again = Job(tmp_path)  # the locks are free
    assert again.start() == [None, None]
    again.crash()


def test_close_while_an_exception_is_handled_waits_for_nobody(tmp_path: Path) -> None:
    job = trained(tmp_path, timeout_s=60)
    session_0, state = job.sessions[0], job.states[0]

    def lone_step() -> None:
        session_0.before_optimizer_step()
        state.step(4)
        session_0.on_step_end(4)  # its replication waits for rank 1, which never comes
        try:
            raise RuntimeError("CUDA out of memory, say")
        finally:
            session_0.close()

    def run() -> None:
        with pytest.raises(RuntimeError):
            lone_step()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    job.sessions[1].abandon()


def test_close_after_a_start_that_failed_waits_for_nobody_while_the_error_is_handled(tmp_path: Path) -> None:
    job = Job(tmp_path, timeout_s=60)
    job.disturbances[0].freeze = lambda: (_ for _ in ()).throw(RuntimeError("CUDA out of memory, say"))
    left = threading.Event()

    def run() -> None:
        try:
            job.start_rank(0)
        except RuntimeError:
            job.prepared[0].close()
            left.set()

    threading.Thread(target=run, daemon=True).start()
    with pytest.raises(MoetionError, match=r"rank 0 on .*CUDA out of memory"):
        job.start_rank(1)
    assert left.wait(5)
    job.prepared[1].abandon()


def test_state_that_cannot_be_frozen_at_the_start_is_an_error_of_all_ranks(tmp_path: Path) -> None:
    def fail() -> NoReturn:
        raise UnsupportedState("too much host state")

    job = Job(tmp_path)
    job.disturbances[1].freeze = fail
    for error in all_errors(*starts(job)):
        assert isinstance(error, UnsupportedState)
        assert "rank 1 on" in str(error)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="max-unprotected-iterations is -2"):
        MoetionConfig(max_unprotected_iterations=-2)
