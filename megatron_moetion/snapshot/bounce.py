# SPDX-License-Identifier: Apache-2.0
"""State in device memory, by way of a bounded pinned host buffer: device to buffer here, buffer to arena by the pool.

Correct on any CUDA device and not fast: every byte is moved twice. Regions are wrapped as tensors without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_moetion.units import Region, Unit

Bytes = npt.NDArray[np.uint8]


class _Span:
    """A region of device memory, as the CUDA array interface describes it."""

    def __init__(self, region: Region) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (region.nbytes,),
            "typestr": "|u1",
            "data": (region.address, False),
            "version": 3,
        }


def device_view(region: Region) -> torch.Tensor:
    """uint8[nbytes] over the region's live memory."""
    return torch.as_tensor(_Span(region), device=region.device)


class Bounce:
    """The buffer, its stream, and views of all regions of the given units; for one thread at a time.

    A ``device`` that is not CUDA stands for memory of this process; tests use it.
    """

    def __init__(self, units: Sequence[Unit], buffer_bytes: int, device: torch.device) -> None:
        self._device = device
        largest = max(u.nbytes for u in units)
        self.capacity_bytes = max(buffer_bytes, largest)
        self._buffer = torch.empty(self.capacity_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._views = {(u.name, i): self._view(r) for u in units for i, r in enumerate(u.regions)}
        # torch leaves streams and events untyped
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ready: torch.cuda.Event | None = None

    @property
    def address(self) -> int:
        """Address of the buffer's first byte."""
        return self._buffer.data_ptr()

    def mark(self) -> None:
        """Copies that begin later wait for what the current stream was given up to now."""
        if self._stream is not None:
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record(torch.cuda.current_stream(self._device))

    def load(self, units: Sequence[Unit], offsets: Sequence[int]) -> None:
        """Copy units into the buffer, laid out as in a capture, and wait for the copies."""
        if self._stream is None:
            self._copy(units, offsets)
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if self._ready is not None:
                self._stream.wait_event(self._ready)
            self._copy(units, offsets)
            self._stream.synchronize()

    def read(self, unit: Unit, position: int) -> Bytes:
        """One small region, at once; blocks until it is on the host."""
        found: Bytes = self._views[unit.name, position].cpu().numpy()
        return found

    def store(self, unit: Unit, capture: Bytes) -> None:
        """Write a capture back into the live regions."""
        for position, (region, offset) in enumerate(zip(unit.regions, unit.offsets, strict=True)):
            part = torch.from_numpy(capture[offset : offset + region.nbytes])
            self._views[unit.name, position].copy_(part)

    def _copy(self, units: Sequence[Unit], offsets: Sequence[int]) -> None:
        for unit, base in zip(units, offsets, strict=True):
            for position, (region, offset) in enumerate(zip(unit.regions, unit.offsets, strict=True)):
                place = self._buffer[base + offset : base + offset + region.nbytes]
                place.copy_(self._views[unit.name, position], non_blocking=True)

    def _view(self, region: Region) -> torch.Tensor:
        if self._device.type == "cuda":
            return device_view(region)
        from ctypes import c_uint8

        return torch.from_numpy(np.ctypeslib.as_array((c_uint8 * region.nbytes).from_address(region.address)))
