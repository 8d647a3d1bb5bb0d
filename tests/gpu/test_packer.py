# SPDX-License-Identifier: Apache-2.0
"""The packer with state on a GPU and a real arena in shared memory."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import acquire, capture, identity, is_whole, make_packer

from megatron_moetion import _C
from megatron_moetion.errors import UnsupportedState
from megatron_moetion.snapshot.packer import Packer
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Page, Record
from megatron_moetion.store.sharedfile import create_arena
from megatron_moetion.store.spec import ArenaSpec
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

DEVICE = "cuda:0"


class GpuState:
    """Units of many small and a few large tensors, a counter that cannot wait, and a host state."""

    def __init__(self) -> None:
        generator = torch.Generator(DEVICE).manual_seed(3)
        sizes = [7, 130, 4096, 1_000_003, 12_000_000]
        self.tensors = [torch.randn(n, device=DEVICE, generator=generator) for n in sizes]
        self.counter = torch.arange(5, device=DEVICE)
        regions = [self._region("big", i, t) for i, t in enumerate(self.tensors)]
        counter = self._region("small", 9, self.counter, at_once=True)
        self.inventory = Inventory(
            units=(
                Unit(name="big", kind=UnitKind.DENSE, regions=tuple(regions)),
                Unit(name="small", kind=UnitKind.DENSE, regions=(counter,)),
                Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=1000),
            )
        )

    @staticmethod
    def _region(unit: str, number: int, tensor: torch.Tensor, at_once: bool = False) -> Region:
        return Region(
            unit=unit, tensor=f"t{number}", role=Role.MASTER, dtype=str(tensor.dtype), start=0,
            nbytes=tensor.numel() * tensor.element_size(), address=tensor.data_ptr(), device=DEVICE, at_once=at_once,
        )  # fmt: skip


@pytest.fixture
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    units = GpuState().inventory
    spec = ArenaSpec.of(identity(layout=units.fingerprint), units, {u.name: 2 for u in units.units})
    path = (
        Path(os.environ.get("MOETION_TEST_STORE", "/dev/shm"))
        / f"moetion-gpu-test-{tmp_path_factory.getbasetemp().name}.arena"
    )
    found = create_arena(path, spec, Page())
    yield found
    found.remove()


def payload(arena: Arena, record: Record) -> np.ndarray:
    return arena.payload(record.slot)


def check_round_trip(state: GpuState, packer: Packer, arena: Arena) -> None:
    records = capture(packer, arena, 1)
    assert all(is_whole(arena, r) for r in records)
    expected = [t.clone() for t in (*state.tensors, state.counter)]
    for tensor in (*state.tensors, state.counter):
        tensor.zero_()
    for record in records:
        packer.scatter(record.unit, payload(arena, record))
    for found, before in zip((*state.tensors, state.counter), expected, strict=True):
        assert torch.equal(found, before)


def test_into_the_pinned_arena_and_back(arena: Arena) -> None:
    state = GpuState()
    packer = make_packer(state.inventory, 2)
    packer.adopt(arena.memory)
    assert packer.note.startswith("arena pinned"), packer.note
    check_round_trip(state, packer, arena)
    packer.close()


def test_by_way_of_a_buffer_where_the_arena_cannot_be_pinned(arena: Arena) -> None:
    state = GpuState()
    other = _C.DevicePool(DEVICE, rank=0, max_pieces=1, max_chunks=1)
    taken = other.register(arena.memory.ctypes.data, arena.memory.nbytes)  # what is pinned already cannot be again
    packer = make_packer(state.inventory, 2)
    packer.adopt(arena.memory)
    assert "could not be pinned" in packer.note
    check_round_trip(state, packer, arena)
    packer.close()
    taken.close()


def test_a_capture_holds_what_the_training_stream_had_done_by_then(arena: Arena) -> None:
    """The step is still running when ``freeze`` is called; what is enqueued after the pack changes nothing."""
    state = GpuState()
    packer = make_packer(state.inventory, 2)
    packer.adopt(arena.memory)
    torch.cuda._sleep(200_000_000)
    for tensor in state.tensors:
        tensor.add_(1)
    state.counter.add_(100)
    big = capture(packer, arena, 1)[0]
    expected = [t.clone() for t in state.tensors]
    for tensor in state.tensors:
        tensor.zero_()
    unit = state.inventory.units[0]
    for tensor, region, offset in zip(expected, unit.regions, unit.offsets, strict=True):
        found = torch.from_numpy(payload(arena, big)[offset : offset + region.nbytes].copy()).view(tensor.dtype)
        assert torch.equal(found, tensor.cpu())
    assert packer.staged(1, 0).view(np.int64).tolist() == [100, 101, 102, 103, 104]
    packer.close()


def test_a_freeze_does_not_wait_for_training_and_its_copies_are_those_of_that_moment() -> None:
    state = GpuState()
    packer = make_packer(state.inventory, 2)
    packer.freeze(b"")  # loads the kernel, which may wait for the device
    packer.settle()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    state.counter.add_(100)
    began = time.perf_counter()
    packer.freeze(b"")
    frozen_s = time.perf_counter() - began
    state.counter.add_(1000)
    assert packer.staged(1, 0).view(np.int64).tolist() == [100, 101, 102, 103, 104]
    assert frozen_s < 0.2, "the sleep alone takes about half a second"
    assert packer.waited_s > frozen_s
    packer.close()


def test_the_engines_are_measured_once_and_the_choice_is_said(arena: Arena) -> None:
    packer = make_packer(GpuState().inventory, 2)
    packer.adopt(arena.memory)
    assert re.search(r"from \d+ KiB on \(measured with \d+ MiB in runs of 4096 KiB: [\d.]+ GB/s", packer.note), (
        packer.note
    )
    note = packer.note
    packer.close()
    packer.adopt(arena.memory)
    assert packer.note == note
    packer.close()


def test_gradients_of_zeros_are_found_on_the_device() -> None:
    gradients = [torch.zeros(n, device=DEVICE) for n in (5_000_000, 300_000, 17)]
    gradients[1][200_000] = 1e-30
    units = []
    for number, gradient in enumerate(gradients):
        region = Region(
            unit=f"{number}.grad", tensor="g", role=Role.GRAD, dtype="torch.float32", start=0,
            nbytes=4 * len(gradient), address=gradient.data_ptr(), device=DEVICE, at_once=True,
        )  # fmt: skip
        units.append(Unit(name=f"{number}.grad", kind=UnitKind.LOG, regions=(region,)))
    packer = make_packer(Inventory(units=tuple(units)), 2)
    packer.freeze(b"")
    for gradient in gradients:  # as the next iteration does
        gradient.fill_(1.0)
    assert packer.zero_logs((0, 1, 2)) == {0, 2}
    packer.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one GPU")
def test_another_current_device_of_the_packing_thread_changes_nothing(arena: Arena) -> None:
    state = GpuState()
    packer = make_packer(state.inventory, 2)
    packer.adopt(arena.memory)
    packer.freeze(b"")
    used = torch.cuda.memory_reserved(1)
    found: list[Any] = []

    def pack() -> None:
        torch.cuda.set_device(1)
        found.append(packer.pack(acquire(arena, (0,))[1], lambda: None))

    thread = threading.Thread(target=pack)
    thread.start()
    thread.join()
    assert found[0] is not None
    assert torch.cuda.memory_reserved(1) == used
    packer.close()


def test_a_graph_may_be_captured_while_another_thread_packs(arena: Arena) -> None:
    """Also in the mode in which a capture forbids all threads most calls of the runtime."""
    state = GpuState()
    packer = make_packer(state.inventory, 2)
    packer.adopt(arena.memory)
    packer.freeze(b"")
    static = torch.zeros(1000, device=DEVICE)
    torch.cuda.synchronize()
    is_over, packed = threading.Event(), list[bool]()

    def pack() -> None:
        _, targets = acquire(arena, (0,))
        while not is_over.is_set():
            packed.append(packer.pack(targets, lambda: None) is not None)

    thread = threading.Thread(target=pack)
    thread.start()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="global"):
        for _ in range(200):
            static.add_(1)
        while len(packed) < 3:
            time.sleep(0.001)
    is_over.set()
    thread.join()
    static.zero_()
    graph.replay()
    assert static.unique().tolist() == [200.0]
    assert all(packed)
    packer.close()


class Busy:
    """A pool whose stream is busy when a capture is enqueued, so that nothing of it was read when that returns."""

    def __init__(self, pool: _C.DevicePool) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def pack_uploaded(self, chunks: np.ndarray, *, stream: int, copy_engine_bytes: int | None) -> int:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            torch.cuda._sleep(1_000_000_000)
        return self._pool.pack_uploaded(chunks, stream=stream, copy_engine_bytes=copy_engine_bytes)


def test_what_is_enqueued_after_the_stream_was_held_waits_for_the_capture_and_the_host_does_not(arena: Arena) -> None:
    state = GpuState()
    packer = make_packer(state.inventory, 2, watch=Busy)
    packer.adopt(arena.memory)
    packer.freeze(b"")
    expected = [t.clone() for t in state.tensors]
    torch.cuda.synchronize()
    waited: list[float] = []

    def given() -> None:
        began = time.perf_counter()
        packer.hold_stream()
        for tensor in state.tensors:
            tensor.zero_()
        waited.append(time.perf_counter() - began)

    (slot,), targets = acquire(arena, (0,))
    assert packer.pack(targets, lambda: None, given) is not None
    unit = state.inventory.units[0]
    for tensor, region, offset in zip(expected, unit.regions, unit.offsets, strict=True):
        found = torch.from_numpy(arena.payload(slot)[offset : offset + region.nbytes].copy()).view(tensor.dtype)
        assert torch.equal(found, tensor.cpu())
    assert not any(t.any() for t in state.tensors)
    assert waited[0] < 0.2, "the sleep alone takes about half a second"
    packer.close()


def test_host_memory_said_to_be_the_devices_is_refused_by_name() -> None:
    data = np.zeros(4096, dtype=np.uint8)
    region = Region(
        unit="a", tensor="layers.0.weight", role=Role.MASTER, dtype="uint8", start=0, nbytes=4096,
        address=data.ctypes.data, device=DEVICE,
    )  # fmt: skip
    units = (Unit(name="a", kind=UnitKind.DENSE, regions=(region,)),)
    with pytest.raises(UnsupportedState, match=r"layers.0.weight: span 0: .* is ordinary host memory"):
        make_packer(Inventory(units=units))
