# SPDX-License-Identifier: Apache-2.0
"""Units in device memory: packed by the GPU, straight into the arena where that could be pinned.

Where it could not, captures go to a bounded pinned buffer first and are copied on by the host.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_moetion._C import Cancel, DeviceError, DevicePool, HostPool, Registration
from megatron_moetion.arrays import Bytes, Int64s
from megatron_moetion.errors import DeviceFault, UnsupportedState
from megatron_moetion.snapshot.digest import scatter_digests
from megatron_moetion.snapshot.engines import SAMPLE_BYTES, crossover_bytes, measure
from megatron_moetion.snapshot.plan import BATCH_BYTES, Targets, Templates, groups
from megatron_moetion.units import ALIGNMENT_BYTES, Unit

DEFAULT_SMS = 8
SLOTS = 2
"""Batches in flight: one is waited for while the next one runs."""
TIMEOUT_S = 60.0
"""A batch that is not done in this time is late, and so is its snapshot. The copies of ``freeze`` run after all that is
enqueued on training's stream, so this must be longer than an iteration's queue."""
_POLL_S = 0.02
"""How often a wait for the device checks for cancellation."""
_RELEASE_TIMEOUT_S = 10.0
"""How long ``release`` waits for work under way."""
_STAGED_RUN_BYTES = 1 << 18
"""Gradients that are copied aside in training's own stream hold it up, so runs of this size and more are left to the
driver's copies, which may use all of the device's bandwidth, and not to a kernel on a few multiprocessors."""


@dataclass(frozen=True, kw_only=True)
class _Enqueued:
    """A batch of captures under way, and the host copies still to do if they were written to a bounce buffer."""

    ticket: int
    targets: Targets
    copies_to_arena: Int64s
    """int64[n, 3]: source, destination, nbytes."""


_NO_TARGETS = Targets(units=np.empty(0, np.int64), addresses=np.empty(0, np.int64), digests=np.empty(0, np.int64))
_NOTHING: Int64s = np.empty((0, 3), dtype=np.int64)


class _Streams:
    """Stream handles of one device, and scratch memory there. The model of a device has one stream, 0."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self.side = 0
        if self.on_gpu:
            import torch

            self._device = torch.device(device)
            # torch leaves streams untyped; priority 0 is the lowest
            self._stream = torch.cuda.Stream(self._device, priority=0)  # type: ignore[no-untyped-call]
            self.side = int(self._stream.cuda_stream)

    def current(self) -> int:
        """The stream that training's kernels are enqueued on."""
        if not self.on_gpu:
            return 0
        import torch

        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def allocate(self, nbytes: int) -> tuple[Any, int]:
        """Zeroed memory of the device and its address, which is valid as long as the memory is referenced."""
        if not self.on_gpu:
            model = np.zeros(nbytes, dtype=np.uint8)
            return model, model.ctypes.data
        import torch

        memory = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        return memory, memory.data_ptr()

    @contextmanager
    def scratch(self, nbytes: int) -> Iterator[int]:
        """The address of device memory that may be read until the block ends."""
        memory, address = self.allocate(nbytes)
        if self.on_gpu:
            import torch

            torch.cuda.synchronize(self._device)
        yield address
        del memory


@contextmanager
def naming_faults() -> Iterator[None]:
    """A device's error as the runtime's own."""
    try:
        yield
    except DeviceError as error:
        raise DeviceFault(str(error)) from error


class DevicePacker:
    """The device's part of a ``Packer``; for one thread at a time, except ``hold_stream``.

    A snapshot that is late or cancelled may leave work under way, whose results are not used. ``settle`` waits for that
    work before the next snapshot begins, so its late writes are harmless.

    ``pool`` is what ``device_pool`` makes for this device and these units; a batch has ``batch_bytes``, or one larger
    capture. What is not done in ``timeout_s`` is late. Call ``plan`` once before all else. Raises ``UnsupportedState``
    for a region that is not on its stated device, ``DeviceFault`` where the device fails.
    """

    def __init__(
        self,
        device: str,
        pool: DevicePool,
        units: Sequence[Unit],
        *,
        batch_bytes: int = BATCH_BYTES,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._device = device
        self._pool = pool
        self._batch_bytes = batch_bytes
        self._timeout_s = timeout_s
        self._largest_bytes = _largest_bytes(units, batch_bytes)
        self._templates = Templates.of(())
        self._chunks: Int64s = np.empty((0, 5), dtype=np.int64)
        """Rows for ``DevicePool.pack_uploaded``, of all units, destinations counted from a capture's first byte."""
        self._streams = _Streams(device)
        for unit in units:
            for region in unit.regions:
                self._check_place(region.tensor, region.address, region.nbytes)
        self._copy_engine_bytes: int | None = None
        self._registration: Registration | None = None
        self._buffers: tuple[Bytes, ...] = ()
        self._staging: Any = None
        self._staging_address = 0
        self._in_flight: deque[_Enqueued] = deque()
        """Batches whose tickets are not finished, the oldest first."""
        self._deciding = threading.Lock()
        self._held_for: int | None = None
        """Ticket of the last work that reads live state and may still be committed; guarded by the lock."""
        self.note = ""
        """How captures reach the arena, for a person; filled by ``adopt``."""

    @property
    def pci_bus_id(self) -> str:
        """See ``Packer``; "" for the model of a device."""
        return ""

    def pinned(self, nbytes: int) -> Bytes:
        """Host memory that the device reads and writes."""
        with naming_faults():
            return self._pool.pinned(nbytes)

    def keep_staging(self, nbytes: int) -> int:
        """Allocate device memory for gradients that wait to be packed; its address."""
        self._staging, self._staging_address = self._streams.allocate(nbytes)
        return self._staging_address

    def are_zero(self, spans: Sequence[tuple[int, int]]) -> list[bool]:
        """Whether each (address, nbytes) of the staging memory is all zero. Waits for the current stream."""
        parts = [self._staging[a - self._staging_address :][:n] for a, n in spans]
        if not self._streams.on_gpu or not parts:
            return [not part.any() for part in parts]
        import torch

        return [not any_set for any_set in torch.stack([part.any() for part in parts]).tolist()]

    def plan(self, templates: Templates) -> None:
        """Upload all units' pieces to the device once: a snapshot sends only the places of its chunks.

        In the uploaded plan the captures of all units, by unit number, are contiguous.
        """
        self._templates = templates
        # places are positive, as addresses are
        starts = ALIGNMENT_BYTES + np.cumsum(templates.nbytes) - templates.nbytes
        pieces = templates.pieces.copy()
        pieces[:, 1] += np.repeat(starts, templates.num_pieces)
        at = templates.chunks[:, 0] + np.repeat(starts, templates.num_chunks)
        self._chunks = np.column_stack([templates.chunks, at])
        self._chunks[:, 2] += np.repeat(templates.first_piece, templates.num_chunks)
        with naming_faults():
            self._pool.upload_pieces(pieces)

    def adopt(self, memory: Bytes) -> None:
        """Pin an arena, so that captures are written into it; where the driver refuses, use a bounce buffer."""
        self.release()
        try:
            self._registration = self._pool.register(memory.ctypes.data, memory.nbytes)
        except DeviceError as error:
            self._take_buffers()
            held = sum(b.nbytes for b in self._buffers) >> 20
            self.note = f"the arena could not be pinned ({error}): captures go by way of {held} MiB of pinned memory"
            return
        if self._streams.on_gpu:
            self._measure()
        limit = self._copy_engine_bytes
        large = f"{self._pool.copy_engine} from {limit >> 10} KiB on (measured)" if limit else "no copy engine"
        self.note = f"arena pinned; captures land in it, packed on {self._pool.num_sms} SMs, {large}"

    @property
    def is_direct(self) -> bool:
        """Whether captures are written into the arena without a second copy."""
        return self._registration is not None

    def release(self) -> None:
        """Undo ``adopt``, after what is under way."""
        if self._registration is not None:
            with suppress(DeviceError):
                self._drain(Cancel(), _RELEASE_TIMEOUT_S)
            self._registration.close()
            self._registration = None

    def freeze(self, rows: Int64s) -> bool:
        """Copy (source, destination, nbytes) at once, after all that is enqueued on the current stream; wait for it.

        ``rows``: int64[n, 3]. Later calls of ``pack`` read what that stream had written by now. False: the device is
        late, and the copies may not be used.
        """
        current, never = self._streams.current(), Cancel()
        with naming_faults():
            if not self._drain(never, self._timeout_s):
                return False
            if len(rows):
                ticket = self._pool.scatter(rows, stream=current, copy_engine_bytes=_STAGED_RUN_BYTES)
                self._in_flight.append(_Enqueued(ticket=ticket, targets=_NO_TARGETS, copies_to_arena=_NOTHING))
                if not self._drain(never, self._timeout_s):
                    return False
            self._pool.order(self._streams.side, current)
        return True

    def settle(self, cancel: Cancel) -> bool:
        """Wait until nothing of an earlier snapshot is under way; False if cancelled or late."""
        with naming_faults():
            return self._drain(cancel, self._timeout_s)

    def pack(
        self,
        targets: Targets,
        host: HostPool,
        cancel: Cancel,
        between: Callable[[], None],
        on_enqueued: Callable[[], None] | None = None,
    ) -> bool:
        """Fill the targets and their digests, after ``settle``; False if cancelled or late.

        ``on_enqueued`` is called when all copies are enqueued, some of them not done: from then on ``hold_stream``
        holds training's stream for this call's work.
        """
        with naming_faults():
            for number, group in enumerate(groups(self._templates, targets, self._batch_bytes)):
                if len(self._in_flight) == SLOTS:
                    if not self._finish_oldest(host, cancel):
                        return False
                    between()
                if cancel.is_set():
                    return False
                self._in_flight.append(self._start(group, number % SLOTS))
            if on_enqueued is not None:
                with self._deciding:
                    # A canceller calls ``hold_stream`` next: either it sees our ticket, or we see the cancellation.
                    if cancel.is_set():
                        return False
                    self._held_for = self._in_flight[-1].ticket if self._in_flight else None
                on_enqueued()
            while self._in_flight:
                if not self._finish_oldest(host, cancel):
                    return False
                between()
        return True

    def hold_stream(self) -> None:
        """Make all later work of training's stream wait, on the device, for the last ``pack`` with ``on_enqueued``.

        May be called while that ``pack`` still runs: after ``on_enqueued``, or after a cancellation. A cancelled
        ``pack`` is not waited for, since its results are not used.
        """
        with self._deciding:
            held_for = self._held_for
        if held_for is not None:
            with suppress(DeviceError):  # the pool is broken now: the packing thread meets that, and drops the snapshot
                self._pool.order_after(self._streams.current(), held_for)

    def scatter(self, rows: Int64s) -> None:
        """Copy each row (source in host memory, destination on the device, nbytes), and wait."""
        with naming_faults():
            if self.is_direct:
                self._finish_scatter(rows)
                return
            buffer = self._take_buffers()[0]
            for source, destination, nbytes in rows.tolist():
                for at in range(0, nbytes, buffer.nbytes):
                    part = min(buffer.nbytes, nbytes - at)
                    ctypes.memmove(buffer.ctypes.data, source + at, part)
                    self._finish_scatter(np.array([(buffer.ctypes.data, destination + at, part)], dtype=np.int64))

    def _finish_scatter(self, rows: Int64s) -> None:
        stream = self._streams.current()
        self._pool.finish(self._pool.scatter(rows, stream=stream, copy_engine_bytes=self._copy_engine_bytes))

    def _start(self, targets: Targets, slot: int) -> _Enqueued:
        sizes = self._templates.nbytes[targets.units]
        places, copies = targets.addresses, _NOTHING
        if not self.is_direct:
            places = self._take_buffers()[slot].ctypes.data + np.cumsum(sizes) - sizes
            copies = np.stack([places, targets.addresses, sizes], axis=1)
        chunks = self._chunks[self._templates.rows_of_chunks(targets.units)]
        chunks[:, 0] += np.repeat(places, self._templates.num_chunks[targets.units])
        ticket = self._pool.pack_uploaded(chunks, stream=self._streams.side, copy_engine_bytes=self._copy_engine_bytes)
        return _Enqueued(ticket=ticket, targets=targets, copies_to_arena=copies)

    def _finish_oldest(self, host: HostPool, cancel: Cancel) -> bool:
        """Wait for the oldest batch and complete its captures; False if cancelled or late: then it stays under way."""
        batch = self._in_flight[0]
        if not self._is_done(batch, cancel, self._timeout_s):
            return False
        counts = self._templates.num_chunks[batch.targets.units]
        digests = np.empty(int(counts.sum()), dtype=np.uint64)
        self._pool.finish(batch.ticket, digests)
        self._in_flight.popleft()
        host.scatter(batch.copies_to_arena)
        scatter_digests(host, digests, batch.targets.digests, counts)
        return True

    def _drain(self, cancel: Cancel, timeout_s: float) -> bool:
        """Wait for all batches under way and discard their results; False if cancelled or late."""
        while self._in_flight:
            if not self._is_done(self._in_flight[0], cancel, timeout_s):
                return False
            self._pool.finish(self._in_flight.popleft().ticket)
        return True

    def _is_done(self, batch: _Enqueued, cancel: Cancel, timeout_s: float) -> bool:
        """Wait for one batch; False if cancelled or late."""
        for _ in range(1 + int(timeout_s / _POLL_S)):
            if self._pool.wait(batch.ticket, timeout_s=min(_POLL_S, timeout_s)):
                return True
            if cancel.is_set():
                return False
        return False

    def _take_buffers(self) -> tuple[Bytes, ...]:
        if not self._buffers:
            self._buffers = tuple(self._pool.pinned(self._largest_bytes) for _ in range(SLOTS))
        return self._buffers

    def _measure(self) -> None:
        with naming_faults(), self._streams.scratch(SAMPLE_BYTES) as source:
            samples = measure(self._device, source=source, stream=self._streams.side, num_sms=self._pool.num_sms)
        self._copy_engine_bytes = crossover_bytes(samples)

    def _check_place(self, tensor: str, address: int, nbytes: int) -> None:
        try:
            with naming_faults():
                self._pool.check_spans_are_here(np.array([(address, nbytes)], dtype=np.int64))
        except ValueError as error:
            raise UnsupportedState(f"{tensor}: {error}") from error


def device_pool(
    device: str,
    units: Sequence[Unit],
    chunk_bytes: int,
    *,
    rank: int = 0,
    num_sms: int = DEFAULT_SMS,
    batch_bytes: int = BATCH_BYTES,
    fault: str = "",
) -> DevicePool:
    """A pool with room for what packing these units enqueues at once.

    ``device`` is ``cuda:N``, or ``model:N``, whose memory is this process's. ``rank`` names this process in errors,
    ``num_sms`` bounds how many of a GPU's multiprocessors packing takes; for ``fault`` see ``DevicePool``. Raises
    ``DeviceFault`` where the device does not work.
    """
    # A batch's chunks; and the rows that ``freeze`` and ``scatter`` bring.
    num_rows = max(
        sum(sum(r.at_once for r in u.regions) for u in units),
        max(len(u.regions) for u in units),
        -(-_largest_bytes(units, batch_bytes) // chunk_bytes) + len(units),
    )
    with naming_faults():
        return DevicePool(
            device,
            rank=rank,
            max_pieces=num_rows,
            max_chunks=num_rows,
            num_slots=SLOTS,
            num_sms=num_sms,
            fault=fault,
        )


def _largest_bytes(units: Sequence[Unit], batch_bytes: int) -> int:
    """Of one batch."""
    return max(batch_bytes, *(u.nbytes for u in units))
