# SPDX-License-Identifier: Apache-2.0
"""What a device's packer does between a freeze and a capture: who waits for what, batches, and gradients of zeros."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import CHUNK_BYTES, ManualClock, WatchedPool, identity, is_whole, make_packer, no_probe

from megatron_moetion import _C
from megatron_moetion.clock import SystemClock
from megatron_moetion.errors import DeviceFault
from megatron_moetion.schedule.pace import EvenPace
from megatron_moetion.snapshot.capture import Captured, Capturer, Contents
from megatron_moetion.snapshot.device import DEVICE_BATCH_BYTES, device_pool
from megatron_moetion.snapshot.packer import Packer
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Page
from megatron_moetion.store.sharedfile import create_arena
from megatron_moetion.store.spec import ArenaSpec
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

WEIGHTS, HOST, FIRST_LOG = 0, 1, 2


class Stalled(WatchedPool):
    """A pool whose work is done when a test says so."""

    def __init__(self, pool: _C.DevicePool) -> None:
        self.record: list[str] = []
        super().__init__(pool, self.record)
        self.is_done = True

    def wait(self, ticket: int, *, timeout_s: float) -> bool:
        self.record.append("wait")
        return self.is_done and self._pool.wait(ticket, timeout_s=timeout_s)


class Gradients:
    """Weights with a counter that cannot wait, gradients of four slices, and a host state; an arena for them."""

    def __init__(self, folder: Path, device: str = "model:0", *, copies: int = 1, **packing: Any) -> None:
        rng = np.random.default_rng(7)
        self.weights = rng.integers(0, 256, 300_000, dtype=np.uint8)
        self.counter = np.array([3, 1, 4], dtype=np.int64)
        self.gradients = [rng.integers(1, 256, n, dtype=np.uint8) for n in (40_000, 32, 9_000, 70_001)]
        weights = (
            self.region("w", "w", self.weights, device),
            self.region("w", "n", self.counter, device, at_once=True),
        )
        logs = [
            Unit(name=f"{n}.grad", kind=UnitKind.LOG, regions=(self.region(f"{n}.grad", "g", g, device, at_once=True),))
            for n, g in enumerate(self.gradients)
        ]
        host = Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=256)
        self.inventory = Inventory(units=(Unit(name="w", kind=UnitKind.DENSE, regions=weights), host, *logs))
        spec = ArenaSpec.of(
            identity(layout=self.inventory.fingerprint),
            self.inventory,
            {u.name: copies for u in self.inventory.units},
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.arena: Arena = create_arena(folder / "rank00000.arena", spec, Page())
        self.pools: list[Stalled] = []
        self.packer: Packer = make_packer(self.inventory, watch=self._watch, **packing)
        self.packer.adopt(self.arena.memory)
        self.packed: list[int] = []
        self.capturer = Capturer(
            packer=self.packer,
            arena=self.arena,
            epoch=0,
            probe=no_probe,
            packed=lambda begin_s, end_s, nbytes: self.packed.append(nbytes),
            pace=EvenPace(ManualClock(), threading.Event()),
            clock=SystemClock(),
        )
        self.logs = tuple(self.inventory.of_kind(UnitKind.LOG))

    @staticmethod
    def region(unit: str, name: str, data: np.ndarray, device: str, at_once: bool = False) -> Region:
        return Region(
            unit=unit, tensor=name, role=Role.GRAD if name == "g" else Role.MASTER, dtype="uint8", start=0,
            nbytes=data.nbytes, address=data.ctypes.data, device=device, at_once=at_once,
        )  # fmt: skip

    def _watch(self, pool: _C.DevicePool) -> Stalled:
        self.pools.append(Stalled(pool))
        return self.pools[-1]

    def capture(self, iteration: int = 1, **contents: Any) -> Captured:
        self.packer.freeze(b"host")
        wanted = Contents(**{"staged": (HOST,), "logs": self.logs, **contents})
        return self.capturer.capture(iteration, wanted, lambda: None)

    def kept(self) -> dict[int, bytes]:
        """The captures that the arena lists, by unit; empty for zeros."""
        for record in self.arena.page.records:
            assert record.is_zero or is_whole(self.arena, record)
        return {r.unit: b"" if r.is_zero else self.arena.payload(r.slot).tobytes() for r in self.arena.page.records}


# -- who waits -----------------------------------------------------------------------------------------------


def test_a_freeze_waits_for_nothing_and_what_it_copies_is_waited_for_where_it_is_read(tmp_path: Path) -> None:
    rig = Gradients(tmp_path)
    pool = rig.pools[0]
    pool.is_done = False
    pool.record.clear()
    rig.packer.freeze(b"host")
    assert "wait" not in pool.record
    pool.is_done = True
    before = len(pool.record)
    assert rig.packer.staged(WEIGHTS, 1).view(np.int64).tolist() == [3, 1, 4]
    assert "wait" in pool.record[before:], "the training thread reads its counts, so it waits"
    assert rig.packer.settle()


@pytest.mark.parametrize("is_done", [True, False])
def test_an_arena_stays_pinned_while_the_device_may_write_to_it(tmp_path: Path, is_done: bool) -> None:
    ended: list[int] = []
    rig = Gradients(tmp_path)

    class Registration:
        def __init__(self, address: int) -> None:
            self.address = address

        def close(self) -> None:
            ended.append(self.address)

    rig.pools[0].register = lambda address, nbytes: Registration(address)
    rig.packer.adopt(rig.arena.memory)
    rig.packer.freeze(b"host")
    rig.pools[0].is_done = is_done
    rig.packer.close()
    assert ended == [rig.arena.memory.ctypes.data] * is_done
    assert not rig.packer.is_direct


def test_a_freeze_is_refused_without_waiting_while_earlier_work_is_not_done(tmp_path: Path) -> None:
    rig = Gradients(tmp_path, timeout_s=0.05)
    rig.packer.freeze(b"host")
    pool = rig.pools[0]
    pool.is_done = False
    pool.record.clear()
    rig.packer.freeze(b"host")
    assert pool.record == ["wait"], "asked once, not waited for, and nothing was enqueued"
    assert not rig.packer.settle()
    assert rig.capture().dropped == "late"
    pool.is_done = True
    assert rig.capture().is_there
    assert rig.packer.fault is None


def test_counts_that_come_too_late_drop_their_snapshot(tmp_path: Path) -> None:
    rig = Gradients(tmp_path, timeout_s=0.05)
    rig.packer.freeze(b"host")
    rig.pools[0].is_done = False
    rig.packer.staged(WEIGHTS, 1)
    assert rig.packer.waited_s > 0
    rig.pools[0].is_done = True
    contents = Contents(units=(WEIGHTS, HOST))
    assert rig.capturer.capture(1, contents, lambda: None).dropped == "late"
    rig.packer.freeze(b"host")
    assert rig.capturer.capture(2, contents, lambda: None).is_there


def test_counts_of_a_device_that_fails_are_no_error_of_the_training_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> bool:
        raise _C.DeviceError("an illegal address")

    rig = Gradients(tmp_path)
    rig.packer.freeze(b"host")
    monkeypatch.setattr(rig.pools[0], "wait", fail)
    rig.packer.staged(WEIGHTS, 1)
    found = rig.capturer.capture(1, Contents(units=(WEIGHTS, HOST)), lambda: None)
    assert (found.dropped, found.details) == ("device", "an illegal address")
    assert rig.packer.fault == "an illegal address"
    with pytest.raises(DeviceFault, match="an illegal address"):
        rig.packer.freeze(b"host")


def test_a_problem_is_asked_for_when_the_copies_are_there(tmp_path: Path) -> None:
    rig = Gradients(tmp_path)
    record = rig.pools[0].record

    def problem() -> str:
        assert record[-1].startswith("finish"), "of the freeze"
        return "gradients were overwritten"

    found = rig.capture(problem=problem)
    assert (found.dropped, found.details) == ("missed", "gradients were overwritten")
    assert rig.capture().is_there, "and no slot was taken"


# -- gradients of zeros --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["model:0", "cpu"])
def test_gradients_of_zeros_become_records_without_bytes(tmp_path: Path, device: str) -> None:
    rig = Gradients(tmp_path, device)
    rig.gradients[1][:] = 0
    rig.gradients[3][:] = 0
    found = rig.capture()
    zeros = frozenset({rig.logs[1], rig.logs[3]})
    assert found.zero == zeros
    kept = rig.kept()
    assert {u for u, data in kept.items() if not data} == zeros
    assert kept[rig.logs[0]][:40_000] == rig.gradients[0].tobytes()
    assert kept[rig.logs[2]][:9_000] == rig.gradients[2].tobytes()
    assert rig.arena.acquire_all(rig.arena.unit_bytes[list(zeros)]) is not None, "their slots are free"


@pytest.mark.parametrize("place", [64, 4096, 39_999])
def test_a_gradient_that_begins_with_zeros_is_none(tmp_path: Path, place: int) -> None:
    """Its first bytes are all that the host sees; the device looks at the others."""
    rig = Gradients(tmp_path)
    rig.gradients[0][:] = 0
    rig.gradients[0][place] = 1
    assert rig.capture().zero == frozenset()
    assert rig.kept()[rig.logs[0]][:40_000] == rig.gradients[0].tobytes()


def test_gradients_of_zeros_are_looked_at_where_they_are_and_only_they(tmp_path: Path) -> None:
    rig = Gradients(tmp_path, batch_bytes=20_000)
    record = rig.pools[0].record
    record.clear()
    rig.capture()
    assert not any(c.startswith("pack ") for c in record), "no gradient begins with zeros"
    rig.arena.edit(lambda page: {"records": ()})
    for gradient in rig.gradients:
        gradient[:] = 0
    record.clear()
    rig.packed.clear()
    assert rig.capture().zero == frozenset(rig.logs)
    assert [c for c in record if c.startswith("pack ")], "digested on the device"
    assert not any(c.startswith("pack_uploaded") for c in record), "and none of their bytes leaves it"


def test_gradients_known_to_be_zeros_are_not_looked_at(tmp_path: Path) -> None:
    rig = Gradients(tmp_path)
    found = rig.capture(logs=(), zero=rig.logs)
    assert found.zero == frozenset(rig.logs)
    assert {u for u, data in rig.kept().items() if not data} == set(rig.logs)


def test_gradients_that_cannot_be_looked_at_in_time_drop_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Gradients(tmp_path, timeout_s=0.05)
    rig.gradients[0][:] = 0
    pool, pack = rig.pools[0], rig.pools[0].pack

    def slow(*arguments: Any, **options: Any) -> Any:
        pool.is_done = False
        return pack(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pool, "pack", slow, raising=False)
        assert rig.capture().dropped == "late"
    pool.is_done = True
    assert rig.capture().zero == frozenset({rig.logs[0]})


# -- batches -------------------------------------------------------------------------------------------------


def test_a_capture_that_is_larger_than_a_batch_travels_in_several(tmp_path: Path) -> None:
    """So that neither a wait, nor the memory for batches, depends on the size of an expert."""
    rig = Gradients(tmp_path, batch_bytes=3 * CHUNK_BYTES)
    sizes: list[int] = []
    pack = rig.pools[0].pack_uploaded

    def measured(chunks: np.ndarray, **options: Any) -> Any:
        sizes.append(int(chunks[:, 1].sum()))
        return pack(chunks, **options)

    rig.pools[0].pack_uploaded = measured  # type: ignore[attr-defined]
    assert rig.capture(logs=(), staged=(), units=(WEIGHTS, HOST)).is_there
    assert max(sizes) <= 3 * CHUNK_BYTES
    assert sum(sizes) == rig.packer.bytes_on_device(np.array([WEIGHTS, HOST]))
    assert rig.kept()[WEIGHTS][:300_000] == rig.weights.tobytes()


def test_an_arena_that_cannot_be_pinned_is_reached_by_a_buffer_of_the_size_of_a_batch(tmp_path: Path) -> None:
    rig = Gradients(tmp_path, batch_bytes=CHUNK_BYTES, fault="register")
    assert not rig.packer.is_direct
    assert rig.capture(logs=(), staged=(), units=(WEIGHTS, HOST)).is_there
    assert rig.kept()[WEIGHTS][:300_000] == rig.weights.tobytes()


def test_a_pool_has_room_for_a_batch_of_the_smallest_captures() -> None:
    data = np.zeros(8, dtype=np.uint8)
    units = [
        Unit(name=f"u{n}", kind=UnitKind.DENSE, regions=(Gradients.region(f"u{n}", "w", data, "model:0"),))
        for n in range(50)
    ]
    pool = device_pool("model:0", units, 1 << 20)
    rows = DEVICE_BATCH_BYTES // (1 << 20) + len(units)
    chunks = np.array([(data.ctypes.data, 0, 0, 0)] * rows, np.int64)
    pool.finish(pool.pack(np.empty((0, 3), np.int64), chunks))
