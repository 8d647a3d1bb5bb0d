# SPDX-License-Identifier: Apache-2.0
"""The cases of ``kernel_cases.py`` on a GPU: from device memory to device memory and to pinned host memory."""

from __future__ import annotations

from collections.abc import Callable

import kernel_cases
import numpy as np
import pytest
import torch
from kernel_cases import POISON, Bytes, DeviceBackend, Memory, UploadedBackend

DEVICE = "cuda:0"


class GpuMemory:
    """Device memory, ``misalignment`` past a multiple of 64, poisoned."""

    def __init__(self, nbytes: int, misalignment: int = 0) -> None:
        self._whole = torch.full((nbytes + 128,), POISON, dtype=torch.uint8, device=DEVICE)
        start = (misalignment - self._whole.data_ptr()) % 64
        self._view = self._whole[start : start + nbytes]
        self.address = self._view.data_ptr() if nbytes else self._whole.data_ptr()

    def read(self) -> Bytes:
        return np.asarray(self._view.cpu().numpy())

    def write(self, content: Bytes) -> None:
        self._view.copy_(torch.from_numpy(content))
        torch.cuda.synchronize()


class PinnedMemory:
    """Pinned host memory, poisoned."""

    def __init__(self, pool: kernel_cases._C.DevicePool, nbytes: int, misalignment: int = 0) -> None:
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

    pool: kernel_cases._C.DevicePool
    to_host = False

    def source(self, nbytes: int, misalignment: int) -> Memory:
        return GpuMemory(nbytes, misalignment)

    def destination(self, nbytes: int, misalignment: int) -> Memory:
        return PinnedMemory(self.pool, nbytes, misalignment) if self.to_host else GpuMemory(nbytes, misalignment)


class GpuBackend(_OnGpu, DeviceBackend):
    """Pieces travel with each call."""

    def __init__(self, to_host: bool, copy_engine_bytes: int | None = None, num_sms: int = 8) -> None:
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
