# SPDX-License-Identifier: Apache-2.0
"""The cases of ``kernel_cases.py`` on a GPU: from device memory to device memory and to pinned host memory."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable

import kernel_cases
import numpy as np
import pytest
import torch
from kernel_cases import POISON, Bytes, DeviceBackend, Memory, UploadedBackend, check, make_case

from megatron_moetion import _C

DEVICE = "cuda:0"


class GpuMemory:
    """Device memory, ``misalignment`` past a multiple of 64, poisoned."""

    def __init__(self, nbytes: int, misalignment: int = 0) -> None:
        self._whole = torch.full((nbytes + 128,), POISON, dtype=torch.uint8, device=DEVICE)
        start = (misalignment - self._whole.data_ptr()) % 64
        self._view = self._whole[start : start + nbytes]
        self.address = self._view.data_ptr() if nbytes else self._whole.data_ptr()
        torch.cuda.synchronize()  # the stream of the pack would not wait for the poison

    def read(self) -> Bytes:
        return np.asarray(self._view.cpu().numpy())

    def write(self, content: Bytes) -> None:
        self._view.copy_(torch.from_numpy(content))
        torch.cuda.synchronize()


class PinnedMemory:
    """Pinned host memory, poisoned."""

    def __init__(self, pool: _C.DevicePool, nbytes: int, misalignment: int = 0) -> None:
        whole = pool.pinned(nbytes + 128)
        whole[:] = POISON
        start = (misalignment - whole.ctypes.data) % 64
        self._view = whole[start : start + nbytes]
        self.address = int(self._view.ctypes.data)

    def read(self) -> Bytes:
        return self._view.copy()

    def write(self, content: Bytes) -> None:
        self._view[:] = content


class _OnGpu:
    """Sources on the GPU; destinations there or in pinned memory. On a stream of its own."""

    pool: _C.DevicePool
    to_host = False

    def source(self, nbytes: int, misalignment: int) -> Memory:
        return GpuMemory(nbytes, misalignment)

    def destination(self, nbytes: int, misalignment: int) -> Memory:
        return PinnedMemory(self.pool, nbytes, misalignment) if self.to_host else GpuMemory(nbytes, misalignment)


class GpuBackend(_OnGpu, DeviceBackend):
    """Pieces travel with each call."""

    def __init__(self, to_host: bool, copy_engine_bytes: int | None = None, num_sms: int = 4) -> None:
        super().__init__(DEVICE, copy_engine_bytes, num_sms)
        self.to_host = to_host
        self._stream = torch.cuda.Stream()
        self.stream = self._stream.cuda_stream


class GpuUploadedBackend(_OnGpu, UploadedBackend):
    """Pieces stay on the device."""

    def __init__(self) -> None:
        super().__init__(DEVICE, copy_engine_bytes=3000)
        self.to_host = True
        self._stream = torch.cuda.Stream()
        self.stream = self._stream.cuda_stream


BACKENDS: dict[str, Callable[[], DeviceBackend]] = {
    "device": lambda: GpuBackend(to_host=False),
    "device-one-sm": lambda: GpuBackend(to_host=False, num_sms=1),
    "device-all-sms": lambda: GpuBackend(to_host=False, num_sms=10_000),
    "pinned": lambda: GpuBackend(to_host=True),
    "pinned-copy-engine": lambda: GpuBackend(to_host=True, copy_engine_bytes=1),
    "pinned-uploaded": lambda: GpuUploadedBackend(),
}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> DeviceBackend:
    return BACKENDS[request.param]()


@pytest.mark.parametrize("case", kernel_cases.ALL, ids=lambda case: case.__name__)
def test_case(backend: DeviceBackend, case: Callable[[DeviceBackend], None]) -> None:
    case(backend)


@pytest.mark.parametrize("name", ["device", "pinned", "pinned-copy-engine"])
def test_one_gibibyte(name: str) -> None:
    kernel_cases.one_gibibyte(BACKENDS[name]())


@pytest.mark.parametrize("num_sms", [1, 4, 8])
def test_a_kernel_stays_on_as_many_multiprocessors_as_it_was_allowed(num_sms: int) -> None:
    """Tiles for all multiprocessors of any GPU, so that a grid that is too large would show."""
    nbytes = 64 << 20
    pool = _C.DevicePool(DEVICE, rank=0, max_pieces=1, max_chunks=1, num_sms=num_sms, timed=True, census=True)
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    rows = np.array([(source.data_ptr(), target.data_ptr(), nbytes)], np.int64)
    began = time.perf_counter()
    ticket = pool.scatter(rows, stream=stream.cuda_stream)
    assert pool.wait(ticket, timeout_s=60)
    found = pool.multiprocessors(ticket)
    assert 1 <= len(found) <= num_sms
    assert max(found) < torch.cuda.get_device_properties(DEVICE).multi_processor_count
    assert 0 < pool.device_seconds(ticket) < time.perf_counter() - began
    pool.finish(ticket)


def test_the_gpu_is_named_as_the_system_names_it() -> None:
    pool = _C.DevicePool(DEVICE, rank=0, max_pieces=1, max_chunks=1)
    assert re.fullmatch(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", pool.pci_bus_id)


def test_a_graph_is_captured_while_another_thread_packs() -> None:
    """In mode "global" the driver gives the capture up when any thread makes a call that it thinks unsafe."""
    backend = GpuBackend(to_host=True, copy_engine_bytes=3000)
    case = make_case(backend, [[(0, 1_500_007)], [(3, 5000)] * 3], np.random.default_rng(16))
    is_over, rounds, failures = threading.Event(), [0], list[BaseException]()

    def use() -> None:
        try:
            while not is_over.is_set():
                check(case, backend)
                rounds[0] += 1
        except BaseException as failure:  # carried to the main thread, whatever it is
            failures.append(failure)

    def wait_for_rounds(number: int) -> None:
        until = rounds[0] + number
        while rounds[0] < until and not failures:
            time.sleep(0.001)

    weights, graph = torch.zeros(1000, device=DEVICE), torch.cuda.CUDAGraph()
    thread = threading.Thread(target=use)
    thread.start()
    try:
        wait_for_rounds(1)
        with torch.cuda.graph(graph, capture_error_mode="global"):
            for _ in range(5):
                weights.add_(1)
                wait_for_rounds(2)
    finally:
        is_over.set()
        thread.join()
    assert not failures
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert (weights == 10).all()
