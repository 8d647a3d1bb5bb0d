# SPDX-License-Identifier: Apache-2.0
"""Each call sets its device, and disturbs no other thread's capture of a CUDA graph, in whatever thread it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from emulated import Emulator

from megatron_moetion import _C

DEVICE = "cuda:1"
"""Not the device that a new thread seems to have."""


def in_a_new_thread(call: Callable[[], object]) -> None:
    """Run a call in a thread that has set nothing; what it raises is raised here."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as failure:  # carried to this thread, whatever it is
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for failure in failures:
        raise failure


class EveryCall:
    """Each call of a pool, one after the other."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self._source, self._target = emulator.array(5000, device=1), emulator.array(5000, device=1)
        self._arena = np.zeros(8192, dtype=np.uint8)
        self._side, self._training = emulator.stream(device=1), emulator.stream(device=1)
        self._ticket = 0

    def steps(self) -> list[Callable[[], None]]:
        return [self.make, self.check, self.register, self.pin, self.upload, self.order, self.pack, self.order_after,
                self.wait, self.read, self.finish, self.unregister, self.unpin, self.end]  # fmt: skip

    def make(self) -> None:
        self._pool = _C.DevicePool(DEVICE, rank=0, max_pieces=4, max_chunks=4, timed=True, census=True)

    def check(self) -> None:
        self._pool.check_spans_are_here(np.array([(self._source.ctypes.data, 5000)], dtype=np.int64))

    def register(self) -> None:
        self._registration = self._pool.register(self._arena.ctypes.data, self._arena.nbytes)

    def pin(self) -> None:
        self._pinned = self._pool.pinned(4096)

    def upload(self) -> None:
        self._pool.upload_pieces(np.array([(self._source.ctypes.data, 64, 5000)], dtype=np.int64))

    def order(self) -> None:
        self._emulator.fill(self._training, self._source, 7)
        self._pool.order(self._side, self._training)

    def pack(self) -> None:
        chunks = np.array([(self._target.ctypes.data, 5000, 0, 1, 64)], dtype=np.int64)
        self._ticket = self._pool.pack_uploaded(chunks, stream=self._side, copy_engine_bytes=1000)

    def order_after(self) -> None:
        self._pool.order_after(self._training, self._ticket)

    def wait(self) -> None:
        assert self._pool.wait(self._ticket, timeout_s=60)

    def read(self) -> None:
        assert self._pool.device_seconds(self._ticket) > 0
        assert len(self._pool.multiprocessors(self._ticket)) == 1

    def finish(self) -> None:
        self._pool.finish(self._ticket)
        assert (self._target == 7).all()

    def unregister(self) -> None:
        self._registration.close()

    def unpin(self) -> None:
        del self._pinned

    def end(self) -> None:
        del self._pool


def test_every_call_sets_the_device_in_its_own_thread(emulator: Emulator) -> None:
    for step in EveryCall(emulator).steps():
        in_a_new_thread(step)
        assert emulator.violations() == [], step.__name__


def test_no_call_ends_the_capture_of_a_graph(emulator: Emulator) -> None:
    for step in EveryCall(emulator).steps():
        emulator.begin_capture()
        in_a_new_thread(step)
        assert emulator.end_capture(), step.__name__


def test_every_call_leaves_the_capture_mode_of_its_thread_as_it_was(emulator: Emulator) -> None:
    before = emulator.capture_mode()
    for step in EveryCall(emulator).steps():
        step()
        assert emulator.capture_mode() == before, step.__name__


def test_the_emulator_sees_a_call_that_sets_nothing(machine: Emulator) -> None:
    machine.reset()
    in_a_new_thread(machine.query_carelessly)
    assert machine.violations() == ["cudaEventQuery in a thread that set no device"]
    machine.reset()
    machine.begin_capture()
    machine.query_carelessly()
    assert not machine.end_capture()


def test_a_refused_device_names_itself(emulator: Emulator) -> None:
    with pytest.raises(_C.DeviceError, match="cuda:9 is not there; this machine shows 2 device"):
        in_a_new_thread(lambda: _C.DevicePool("cuda:9", rank=0, max_pieces=1, max_chunks=1))
