# SPDX-License-Identifier: Apache-2.0
"""A session whose state lies on a device that is late, or fails: snapshots are dropped, and training never knows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from session_job import Job, OnDevice
from support import WatchedPool, together

from megatron_moetion._C import DeviceError, DevicePool
from megatron_moetion.errors import DeviceFault, ProtectionLost, StoreError

FAST = {"timeout_s": 0.05}
TRAINING = 0
"""The stream that training enqueues on."""


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "megatron_moetion")


def lines(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if text in r.getMessage()]


class Device(WatchedPool):
    """A pool whose work is not done, or whose calls fail, for as long as a test says."""

    is_late = False
    failing: frozenset[str] = frozenset()

    def __init__(self, pool: DevicePool) -> None:
        super().__init__(pool, [])

    def wait(self, ticket: int, *, timeout_s: float) -> bool:
        if "wait" in self.failing:
            self._fail()
        return not self.is_late and super().__getattr__("wait")(ticket, timeout_s=timeout_s)

    def __getattr__(self, name: str) -> Any:
        if name in self.failing:
            return self._fail
        return super().__getattr__(name)

    def _fail(self, *arguments: Any, **options: Any) -> Any:
        raise DeviceError("rank 0: pack of 3 pieces on cuda:0 failed: an illegal memory access was encountered")


def begun(folder: Path, **settings: Any) -> tuple[Job, Device]:
    """A job whose first rank's device can be disturbed, after two iterations."""
    pools: list[Device] = []

    def watch(pool: DevicePool) -> Device:
        pools.append(Device(pool))
        return pools[-1]

    job = Job(folder, state=OnDevice, device={0: {"watch": watch, **FAST}, 1: {}}, **settings)
    job.start()
    job.train(2)
    return job, pools[0]


def dropped(job: Job, rank: int = 0) -> dict[str, int]:
    return dict(job.sessions[rank].running.pipeline.counts.dropped)


@pytest.mark.parametrize("mode", ["full", "popularity"])
def test_a_stall_that_is_longer_than_the_limit_drops_snapshots_and_nothing_else(
    tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    job, device = begun(tmp_path, mode=mode, experts_per_snapshot=0 if mode == "full" else 2)
    device.is_late = True
    job.train(3)
    assert dropped(job) == {"late": 3}
    assert job.sessions[0].running.pipeline.ended is None
    device.is_late = False
    images = job.train(3)
    assert (dropped(job), dropped(job, 1)) == ({"late": 3}, {})
    stable = job.sessions[0].stable_iteration
    assert stable == 6, "the first snapshot after the stall is whole"
    assert len(lines(caplog, "a snapshot was dropped (late)")) == 1
    has_waited = job.sessions[0].scalars()["moetion/waited-for-device-s"] > 0
    assert has_waited == (mode == "popularity"), "for its counts alone"
    job.crash()
    second = Job(tmp_path, attempt=1, state=OnDevice, mode=mode, experts_per_snapshot=0 if mode == "full" else 2)
    resumed = second.start()[0]
    assert resumed is not None
    assert resumed.iteration == 8
    if mode == "full":
        assert [s.image() for s in second.states] == images
    second.crash()


CALLS = ["scatter", "wait", "pack_uploaded", "finish", "order_after"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", ["full", "popularity"])
def test_a_call_that_fails_drops_snapshots_with_one_line_and_training_goes_on(
    tmp_path: Path, mode: str, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    job, device = begun(tmp_path, mode=mode)
    before = dropped(job)
    device.failing = frozenset([call])
    images = job.train(3)
    assert images != job.train(1)
    device.failing = frozenset()
    if call == "order_after":  # asked after the snapshot was packed: there was nothing to wait for
        assert dropped(job) == before
    else:
        assert sum(dropped(job).values()) == 4
        assert job.sessions[0].running.pipeline.ended is not None
        assert len(lines(caplog, "a snapshot was dropped")) == len(dropped(job))
        assert lines(caplog, "an illegal memory access was encountered")
    job.crash()


@pytest.mark.parametrize("call", ["scatter", "pack_uploaded"])
def test_a_device_that_fails_for_good_ends_the_process_where_it_can_be_restarted(tmp_path: Path, call: str) -> None:
    job, device = begun(tmp_path, max_restarts=3, max_unprotected_iterations=3, drain_s=2)
    device.failing = frozenset([call])
    with pytest.raises(ProtectionLost, match="an illegal memory access was encountered"):
        job.train(20)
    assert job.iteration < 10
    job.crash()
    second = Job(tmp_path, attempt=1, max_restarts=3, state=OnDevice)
    resumed = second.start()[0]
    assert resumed is not None
    assert resumed.iteration == 2
    second.crash()


def test_an_arena_that_cannot_be_pinned_costs_a_copy_and_no_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(tmp_path, state=OnDevice, device={0: {"fault": "register"}, 1: {}})
    job.start()
    job.train(3)
    assert lines(caplog, "the arena could not be pinned")
    assert dropped(job) == {}
    assert job.sessions[0].stable_iteration == 1
    job.crash()


def started(folder: Path, device: Mapping[int, Mapping[str, Any]]) -> tuple[Job | None, str]:
    """A job, or the words in which a start was refused."""
    try:
        job = Job(folder, state=OnDevice, device=device)
        job.start()
    except (DeviceFault, StoreError) as error:
        return None, str(error)
    return job, ""


@pytest.mark.parametrize("fault", ["memory", "launch", "copy", "sticky"])
def test_a_driver_that_refuses_any_call_ends_a_start_with_its_words_or_drops_snapshots(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each call in turn, of the start and of the first iterations: it is refused, and so are all after it."""
    found: Counter[str] = Counter()
    for number in range(1, 90, 3):
        caplog.clear()
        device = {0: {"fault": f"{fault}:{number}", "batch_bytes": 4096}, 1: {}}
        job, refusal = started(tmp_path / str(number), device)
        if job is None:
            found["start"] += 1
            assert "(injected)" in refusal
            continue
        job.train(4)
        if not dropped(job):
            found["nothing"] += 1
        else:
            found["dropped"] += 1
            job.train(3)  # a drop is noted in the next iteration, and said once all ranks have been heard
            assert job.sessions[0].running.pipeline.ended is not None
            assert len(lines(caplog, "a snapshot was dropped")) == len(dropped(job))
            assert lines(caplog, "(injected)")
        job.crash()
    assert found["start"]
    assert found["dropped"] or fault == "memory", "all memory is taken at start"


# -- streams that run when they are asked for -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(1, 7))
def test_what_is_recovered_is_what_training_had_whatever_order_its_device_chose(tmp_path: Path, seed: int) -> None:
    """The optimizer steps as soon as training's stream has come there, whatever is still to be packed."""
    pools: dict[int, DevicePool] = {}

    class Ordered(OnDevice):
        def step(self, iteration: int) -> None:
            pools[self.rank].model_sync(TRAINING)
            super().step(iteration)

    def watch(rank: int) -> Callable[[DevicePool], DevicePool]:
        return lambda pool: pools.setdefault(rank, pool)

    device = {r: {"watch": watch(r), "seed": seed + 100 * r, "batch_bytes": 4096} for r in range(2)}
    job = Job(tmp_path, state=Ordered, device=device)
    job.start()

    def train(rank: int) -> list[bytes]:
        session, state, found = job.sessions[rank], job.states[rank], list[bytes]()
        for iteration in range(1, 9):
            session.before_optimizer_step()
            state.step(iteration)
            found.append(state.image())
            session.on_step_end(iteration)
            if iteration % 2 == 0:
                session.drain()  # training that takes no time leaves replication none
        return found

    images = list(zip(*together(lambda: train(0), lambda: train(1)), strict=True))
    assert {*dropped(job), *dropped(job, 1)} <= {"no-slot"}
    job.crash()
    second = Job(tmp_path, attempt=1, state=OnDevice)
    resumed = second.start()[0]
    assert resumed is not None
    assert resumed.iteration > 0
    assert tuple(s.image() for s in second.states) == images[resumed.iteration - 1]
    second.crash()


@pytest.mark.parametrize("restarted", [False, True])
def test_a_start_does_not_go_on_from_counts_that_are_not_there(tmp_path: Path, restarted: bool) -> None:
    """A recovery adds up tokens from the first copy: of a device that is late it would be what was there before."""
    settings = {"state": OnDevice, "mode": "popularity", "experts_per_snapshot": 2}
    if restarted:
        first = Job(tmp_path, **settings)
        first.start()
        first.train(3)
        first.crash()

    class Late(Device):
        """Late from the first copies on training's stream."""

        def scatter(self, rows: Any, **options: Any) -> int:
            self.is_late = options["copy_engine_bytes"] is not None  # a freeze's; what is written back comes without
            return int(super().__getattr__("scatter")(rows, **options))

    job = Job(tmp_path, attempt=int(restarted), device={0: {"watch": Late, **FAST}, 1: {}}, **settings)
    with pytest.raises(DeviceFault, match="late with the first copy"):
        job.start()
