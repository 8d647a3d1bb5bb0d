# SPDX-License-Identifier: Apache-2.0
"""The controls of the emulated machine (``emulator/controls.cpp``), and what a backend and the packer need of it."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kernel_cases import POISON, DeviceBackend, HostMemory, Memory, UploadedBackend

from megatron_moetion import _C

Bytes = npt.NDArray[np.uint8]

# CUDA's numbers of errors
OUT_OF_MEMORY = 2
INVALID_DEVICE_FUNCTION = 98
NOT_SUPPORTED = 801

_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "reset": ([ctypes.c_uint], None),
    "allocate": ([ctypes.c_uint64, ctypes.c_int], ctypes.c_uint64),
    "make_stream": ([ctypes.c_int], ctypes.c_uint64),
    "fill": ([ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int, ctypes.c_uint64], None),
    "drain": ([ctypes.c_uint64], ctypes.c_bool),
    "begin_capture": ([], None),
    "end_capture": ([], ctypes.c_bool),
    "choose_kernels": ([ctypes.c_char_p], ctypes.c_bool),
    "fail_call": ([ctypes.c_char_p, ctypes.c_int64, ctypes.c_int], None),
    "fail_kernel": ([ctypes.c_int64], None),
    "skip_wait": ([ctypes.c_int64], None),
    "stall": ([ctypes.c_bool], None),
    "query_carelessly": ([], ctypes.c_int),
    "capture_mode": ([], ctypes.c_int),
    "num_violations": ([], ctypes.c_int64),
    "violation": ([ctypes.c_int64, ctypes.c_char_p, ctypes.c_uint64], None),
}


class Emulator:
    """The one machine of this process."""

    def __init__(self) -> None:
        library = ctypes.CDLL(_C.__file__)
        self._functions: dict[str, Any] = {}
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(library, f"emulator_{name}")
            function.argtypes, function.restype = arguments, result
            self._functions[name] = function

    def reset(self, seed: int = 1) -> None:
        """Forget work, faults and violations. ``seed`` chooses the order of what is enqueued from now on."""
        self._functions["reset"](seed)

    def array(self, nbytes: int, device: int = 0) -> Bytes:
        """Memory of a device, which stays for ever: tests are few, and work may be left that writes there."""
        address = self._functions["allocate"](nbytes + 64, device)
        aligned = -(-address // 64) * 64
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(aligned))

    def stream(self, device: int = 0) -> int:
        return int(self._functions["make_stream"](device))

    def fill(self, stream: int, array: npt.NDArray[Any], value: int) -> None:
        """Enqueue what training would: every byte becomes ``value``."""
        self._functions["fill"](stream, array.ctypes.data, value, array.nbytes)

    def drain(self, stream: int) -> None:
        """Let all that is enqueued on a stream happen."""
        assert self._functions["drain"](stream), "the work of this stream does not end"

    def begin_capture(self) -> None:
        """As if some thread began to capture a CUDA graph, in mode ``global``."""
        self._functions["begin_capture"]()

    def end_capture(self) -> bool:
        """Whether the capture is whole."""
        return bool(self._functions["end_capture"]())

    def choose_kernels(self, variant: str) -> bool:
        """Launch these kernels until the next ``reset``; False where they were not built."""
        return bool(self._functions["choose_kernels"](variant.encode()))

    def fail_call(self, call: str, error: int, nth: int = 1) -> None:
        """The ``nth`` call from now on, and those after it, return an error of CUDA's."""
        self._functions["fail_call"](call.encode(), nth, error)

    def fail_kernel(self, nth: int = 1) -> None:
        """The ``nth`` kernel from now on fails while it runs; after that the device is of no use."""
        self._functions["fail_kernel"](nth)

    def skip_wait(self, nth: int) -> None:
        """The ``nth`` ``cudaStreamWaitEvent`` from now on does nothing."""
        self._functions["skip_wait"](nth)

    @contextmanager
    def stalled(self) -> Any:
        """A time in which the device does nothing."""
        self._functions["stall"](True)
        try:
            yield
        finally:
            self._functions["stall"](False)

    def query_carelessly(self) -> int:
        """``cudaEventQuery`` as code calls it that set neither device nor capture mode; the error."""
        return int(self._functions["query_carelessly"]())

    def capture_mode(self) -> int:
        """Of this thread; 0 is ``global``."""
        return int(self._functions["capture_mode"]())

    def violations(self) -> list[str]:
        """What a real device or driver would have taken ill, or may have."""
        found = []
        for number in range(self._functions["num_violations"]()):
            text = ctypes.create_string_buffer(400)
            self._functions["violation"](number, text, 400)
            found.append(text.value.decode())
        return found


class EmulatedMemory(HostMemory):
    """Device memory, ``misalignment`` past a multiple of 64, poisoned."""

    def __init__(self, whole: Bytes, nbytes: int, misalignment: int = 0) -> None:
        whole[:] = POISON
        start = (misalignment - whole.ctypes.data) % 64
        self.view = whole[start : start + nbytes]
        self.address = int(whole.ctypes.data) + start


class OnEmulator:
    """Sources in device memory, destinations in pinned memory; a stream of its own, as torch's are."""

    emulator: Emulator
    pool: _C.DevicePool

    def source(self, nbytes: int, misalignment: int) -> Memory:
        return EmulatedMemory(self.emulator.array(nbytes + 128), nbytes, misalignment)

    def destination(self, nbytes: int, misalignment: int) -> Memory:
        return EmulatedMemory(self.pool.pinned(nbytes + 128), nbytes, misalignment)


class EmulatedBackend(OnEmulator, DeviceBackend):
    """Pieces travel with each call."""

    def __init__(self, emulator: Emulator, copy_engine_bytes: int | None = None, num_sms: int = 4) -> None:
        super().__init__("cuda:0", copy_engine_bytes, num_sms)
        self.emulator = emulator
        self.stream = emulator.stream()


class EmulatedUploadedBackend(OnEmulator, UploadedBackend):
    """Pieces stay on the device."""

    def __init__(self, emulator: Emulator) -> None:
        super().__init__("cuda:0", copy_engine_bytes=3000)
        self.emulator = emulator
        self.stream = emulator.stream()


class TorchCuda:
    """What the packer asks of ``torch.cuda``, for the emulated device; ``training`` is the current stream."""

    def __init__(self, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
        self._emulator = emulator
        self.training = emulator.stream()
        self.side: list[int] = []
        self._zeros = torch.zeros
        monkeypatch.setattr(torch.cuda, "Stream", self._make_stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: _StreamHandle(self.training))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 0))  # no room to measure engines in
        monkeypatch.setattr(torch.cuda, "synchronize", self._synchronize)
        monkeypatch.setattr(torch, "zeros", self._make_zeros)

    def _make_stream(self, device: object = None, priority: int = 0) -> _StreamHandle:
        self.side.append(self._emulator.stream())
        return _StreamHandle(self.side[-1])

    def _synchronize(self, device: object = None) -> None:
        for stream in (self.training, *self.side):
            self._emulator.drain(stream)

    def _make_zeros(self, *size: int, **options: Any) -> torch.Tensor:
        if torch.device(options.get("device", "cpu")).type == "cpu":
            return self._zeros(*size, **options)
        array = self._emulator.array(size[0])
        self._emulator.fill(self.training, array, 0)  # on the stream, as torch does it
        return torch.from_numpy(array)


class _StreamHandle:
    """Of ``torch.cuda.Stream``."""

    def __init__(self, stream: int) -> None:
        self.cuda_stream = stream
