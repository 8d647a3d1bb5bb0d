# SPDX-License-Identifier: Apache-2.0
"""An arena is registered in the background: once, with errors for whoever asks, and undone before it goes."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from session_job import Job, TroubledPacker
from support import POOL, ManualClock, ToyState

from megatron_moetion.arrays import Bytes
from megatron_moetion.errors import DeviceFault, IdentityMismatch, MoetionError
from megatron_moetion.recover.pinning import Pinning
from megatron_moetion.replicate.worker import SystemThreads
from megatron_moetion.snapshot.packer import HostPool, Packer
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Page
from megatron_moetion.store.node import NodeFolder
from megatron_moetion.store.spec import ArenaSpec, arena_name
from megatron_moetion.units import Inventory


class Pinner(Packer):
    """A packer that writes down what is done with arenas."""

    def __init__(self, inventory: Inventory, pool: HostPool, during: Callable[[], None] = lambda: None) -> None:
        super().__init__(inventory, 4096, pool, None)
        self.during = during
        self.done: list[str] = []
        self.threads: set[int] = set()

    def adopt(self, memory: Bytes) -> None:
        self.threads.add(threading.get_ident())
        self.during()
        self.done.append(f"adopt {memory[0]}")

    def close(self) -> None:
        self.done.append("close")


def pinner(during: Callable[[], None] = lambda: None) -> Pinner:
    return Pinner(ToyState().inventory(), POOL, during)


def pinning(packer: Packer, clock: ManualClock | None = None) -> Pinning:
    return Pinning(packer, SystemThreads(), clock or ManualClock())


A, B = np.full(64, 1, dtype=np.uint8), np.full(64, 2, dtype=np.uint8)


def test_what_was_begun_is_finished_once_and_timed() -> None:
    clock = ManualClock()
    packer = pinner(lambda: clock.sleep(3.5))
    pins = pinning(packer, clock)
    pins.begin(A)
    pins.begin(A)
    pins.finish(A)
    assert packer.done == ["adopt 1"]
    assert packer.threads.isdisjoint({threading.get_ident()})
    assert pins.seconds == 3.5
    pins.drop()
    assert packer.done == ["adopt 1"], "whoever adopted has the packer now"


def test_the_caller_goes_on_meanwhile() -> None:
    goes_on = threading.Event()
    pins = pinning(pinner(lambda: goes_on.wait(30) or pytest.fail("the caller waits")))
    pins.begin(A)
    goes_on.set()
    pins.finish(A)


def test_another_arena_takes_the_place_of_what_was_begun() -> None:
    began = threading.Event()
    packer = pinner(began.set)
    pins = pinning(packer)
    pins.begin(A)
    assert began.wait(30)
    pins.finish(B)
    assert packer.done == ["adopt 1", "close", "adopt 2"]


def test_what_was_begun_is_undone() -> None:
    began = threading.Event()
    packer = pinner(began.set)
    pins = pinning(packer)
    pins.drop()
    assert packer.done == []
    pins.begin(A)
    assert began.wait(30)
    pins.drop()
    pins.drop()
    assert packer.done == ["adopt 1", "close"]


@pytest.mark.parametrize("error", [DeviceFault("sticky"), RuntimeError("a bug")])
def test_an_error_is_raised_where_adoption_is_asked_for(error: Exception) -> None:
    def fail() -> None:
        raise error

    pins = pinning(pinner(fail))
    pins.begin(A)
    with pytest.raises(type(error), match=str(error)):
        pins.finish(A)
    pins.drop()


def test_a_process_that_ends_waits_for_no_driver() -> None:
    never = threading.Event()
    pins = pinning(pinner(lambda: never.wait(30) and None))
    pins.abandon()
    pins.begin(A)
    pins.abandon()
    never.set()


# -- in a start -----------------------------------------------------------------------------------------------


class Watched(TroubledPacker):
    """A packer of a job that writes down which arenas it adopts, and can be made to fail."""

    adopted: list[tuple[str, bool]]
    """Folder of each arena, and whether the thread of the start did it."""
    fails = False

    def adopt(self, memory: Bytes) -> None:
        self.adopted.append(("adopt", threading.current_thread().name.startswith("moetion-pin")))
        if self.fails:
            raise DeviceFault("the driver is gone")
        super().adopt(memory)

    def close(self) -> None:
        self.adopted.append(("close", False))
        super().close()


class WatchedJob(Job):
    """A job whose packers are watched."""

    fails: frozenset[int] = frozenset()

    def _make_packer(self, inventory: Inventory, config: object, pool: HostPool, rank: int) -> Packer:
        packer = Watched(inventory, 4096, pool, None)
        packer.disturbance = self.disturbances[rank]
        packer.adopted = []
        packer.fails = rank in self.fails
        return packer

    def adopted(self, rank: int) -> list[tuple[str, bool]]:
        packer = self.prepared[rank].packer
        assert isinstance(packer, Watched)
        return packer.adopted


class FailingJob(WatchedJob):
    """Rank 1's device fails."""

    fails = frozenset({1})


def crashed(folder: Path) -> list[bytes]:
    job = Job(folder)
    job.start()
    images = job.train(2)
    job.crash()
    return images


def test_a_run_that_recovers_and_one_that_begins_pin_each_arena_once(tmp_path: Path) -> None:
    for attempt in range(2):
        job = WatchedJob(tmp_path, attempt=attempt)
        job.start()
        assert [job.adopted(rank) for rank in range(2)] == [[("adopt", True)]] * 2
        job.train(2)
        job.crash()


def watch_creation(monkeypatch: pytest.MonkeyPatch, job: WatchedJob) -> None:
    """Write down when a rank makes its own arena, and see what stands when it makes any."""
    make = NodeFolder.create_arena

    def create_arena(node: NodeFolder, name: str, spec: ArenaSpec, page: Page) -> Arena:
        rank = int(node.path.name.removeprefix("node"))
        assert f"{node.path}/{name}" not in Path("/proc/self/maps").read_text(), "memory is held twice"
        if name == arena_name(rank):
            job.adopted(rank).append(("create", False))
        else:
            for _ in range(1000):
                if job.adopted(rank)[-1][0] == "adopt":
                    break
                time.sleep(0.01)
            else:
                raise AssertionError("the rank's own arena is not pinned while it makes others")
        return make(node, name, spec, page)

    monkeypatch.setattr(NodeFolder, "create_arena", create_arena)


def assert_replaced(job: WatchedJob, rank: int) -> None:
    """The arena that was found is given back before another one is made and pinned."""
    done = [name for name, _ in job.adopted(rank)]
    assert done in (["adopt", "close", "create", "adopt"], ["close", "create", "adopt"]), "it may not have begun"


def test_a_run_that_begins_anew_gives_the_old_arenas_back_before_it_makes_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed(tmp_path)
    job = WatchedJob(tmp_path, attempt=1)
    watch_creation(monkeypatch, job)
    assert job.start(lambda: 40, lambda: 40) == [None, None], "disk is newer"
    assert_replaced(job, 0)
    assert_replaced(job, 1)
    job.crash()


def test_an_arena_of_a_dead_history_is_given_back_before_another_one_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed(tmp_path)
    shutil.move(tmp_path / "job" / "node1", tmp_path / "away")
    shutil.rmtree(tmp_path / "job")
    anew = Job(tmp_path, attempt=1, allow_fresh=True)
    anew.start()
    anew.train(1)
    anew.crash()
    shutil.rmtree(tmp_path / "job" / "node1")
    shutil.move(tmp_path / "away", tmp_path / "job" / "node1")
    job = WatchedJob(tmp_path, attempt=2)
    watch_creation(monkeypatch, job)
    resumed = job.start()[1]
    assert resumed is not None
    assert resumed.iteration == 1
    assert job.adopted(0) == [("adopt", True)]
    assert_replaced(job, 1)
    job.crash()


def test_an_arena_of_another_run_is_given_back(tmp_path: Path) -> None:
    crashed(tmp_path)
    job = WatchedJob(tmp_path, attempt=1, elements=900)
    with pytest.raises(IdentityMismatch):
        job.start()
    for rank, prepared in enumerate(job.prepared):
        prepared.close()
        assert job.adopted(rank)[-1][0] == "close"
    again = Job(tmp_path, attempt=1)
    assert again.start()[0] is not None
    again.crash()


@pytest.mark.parametrize("recovers", [True, False])
def test_a_device_that_fails_while_it_pins_is_an_error_of_all_ranks(tmp_path: Path, recovers: bool) -> None:
    images = crashed(tmp_path) if recovers else []
    job = FailingJob(tmp_path, attempt=int(recovers))
    with pytest.raises(MoetionError, match=r"rank 1 on .*: the driver is gone"):
        job.start()
    for prepared in job.prepared:
        prepared.close()
    again = Job(tmp_path, attempt=1)
    if recovers:
        assert again.start()[0] is not None
        assert [s.image() for s in again.states] == images
    again.crash()
