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
from typing import Any, Protocol

import numpy as np

from megatron_moetion._C import Cancel, DeviceError, DevicePool, HostPool, Registration
from megatron_moetion.arrays import Bytes, Digests, Flags, Int64s
from megatron_moetion.errors import DeviceFault, UnsupportedState
from megatron_moetion.snapshot.digest import chunk_spans, num_chunks_of, scatter_digests
from megatron_moetion.snapshot.engines import Engines, measured
from megatron_moetion.snapshot.plan import Chunks, Targets, Templates, cuts
from megatron_moetion.units import ALIGNMENT_BYTES, Unit, UnitKind, align_up

DEFAULT_SMS = 4
DEVICE_BATCH_BYTES = 16 << 20
"""Bytes per call into a device's pool: 0.3 ms of a PCIe 5 link (55 GB/s), 0.6 ms of a PCIe 4 link. So long other
traffic of the link may have to wait behind it."""
SLOTS = 2
"""Batches in flight: one is waited for while the next one runs."""
TIMEOUT_S = 60.0
"""What is not done in this time is late, and so is its snapshot. The copies of ``freeze`` run after all that is
enqueued on training's stream, so this must be longer than an iteration's queue."""
HEAD_BYTES = 64
"""Of each gradient, copied to the host by ``freeze``: of nearly all gradients they are not zero."""
_POLL_S = 0.02
"""How often a wait for the device checks for cancellation."""
_RELEASE_TIMEOUT_S = 10.0
"""How long ``release`` waits for work under way."""
_STAGED_RUN_BYTES = 1 << 18
"""Gradients that are copied aside in training's own stream hold it up, so runs of this size and more are left to the
driver's copies, which may use all of the device's bandwidth, and not to a kernel on a few multiprocessors."""


class Pace(Protocol):
    """Decides when a batch may leave the device. Used by the packing thread."""

    def is_early(self) -> bool:
        """Whether the next batch is not due yet."""
        ...

    def admit(self, nbytes: int) -> None:
        """Return when the next batch, of so many bytes, is due, or at once when there is no time left."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Enqueued:
    """A batch under way, and the host copies still to do if it was written to a bounce buffer."""

    ticket: int
    chunks: Chunks | None = None
    """None: it brings no digests that are kept."""
    copies_to_arena: Int64s
    """int64[n, 3]: source, destination, nbytes."""


_NOTHING: Int64s = np.empty((0, 3), dtype=np.int64)


class _Streams:
    """Stream handles of one device, and scratch memory there. Of the model, training's is 0 and ours is 1."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self.side = 1
        if self.on_gpu:
            import torch

            self._device = torch.device(device)
            # Training's own streams have priority 0, too: this one does not yield to them. (torch leaves it untyped.)
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
    chunk. What is not done in ``timeout_s`` is late. ``engines``: which engine moves what; None: it is measured on a
    GPU. Call ``plan`` once before all else. Raises ``UnsupportedState`` for a region that is not on its stated device,
    ``DeviceFault`` where the device fails.
    """

    def __init__(
        self,
        device: str,
        pool: DevicePool,
        units: Sequence[Unit],
        *,
        chunk_bytes: int,
        batch_bytes: int = DEVICE_BATCH_BYTES,
        timeout_s: float = TIMEOUT_S,
        engines: Engines | None = None,
    ) -> None:
        self._device = device
        self._pool = pool
        self._chunk_bytes = chunk_bytes
        self._batch_bytes = batch_bytes
        self._buffer_bytes = max(batch_bytes, chunk_bytes) + len(units) * ALIGNMENT_BYTES
        """Of a buffer for any batch, in which every chunk begins at an aligned place."""
        self._timeout_s = timeout_s
        self._templates = Templates.of(())
        self._chunks: Int64s = np.empty((0, 5), dtype=np.int64)
        """Rows for ``DevicePool.pack_uploaded``, of all units, destinations counted from a capture's first byte."""
        self._streams = _Streams(device)
        for unit in units:
            for region in unit.regions:
                self._check_place(region.tensor, region.address, region.nbytes)
        self._engines = engines
        self._registration: Registration | None = None
        self._abandoned: list[Registration] = []
        """Of memory that a late or failed device may still write: ended with the process."""
        self._buffers: tuple[Bytes, ...] = ()
        self._staging: Any = None
        self._aside = ""
        self._scratch_address = 0
        self._in_flight: deque[_Enqueued] = deque()
        """Batches whose tickets are not finished, the oldest first."""
        self._deciding = threading.Lock()
        self._held_for: int | None = None
        """Ticket of the last work that reads live state and may still be committed; guarded by the lock."""
        self.note = ""
        """How captures reach the arena, for a person; filled by ``adopt``."""
        self.fault: str | None = None
        """Why nothing can be packed any more; None while all is well. A device that has failed stays so."""

    @property
    def pci_bus_id(self) -> str:
        """See ``Packer``; "" for the model of a device."""
        return self._pool.pci_bus_id

    def pinned(self, nbytes: int) -> Bytes:
        """Host memory that the device reads and writes."""
        with naming_faults():
            return self._pool.pinned(nbytes)

    def keep_staging(self, nbytes: int) -> int:
        """Allocate device memory for gradients that wait to be packed, and for ``are_zero``; the gradients' address."""
        aside_bytes = align_up(self._buffer_bytes) + nbytes
        self._staging, self._scratch_address = self._streams.allocate(aside_bytes)
        self._aside = f"; gradients wait in {aside_bytes / 2**20:.1f} MiB of its memory"
        return self._scratch_address + align_up(self._buffer_bytes)

    def are_zero(self, addresses: Int64s, sizes: Int64s, host: HostPool, cancel: Cancel) -> Flags | None:
        """Whether each of these spans of the device is all zero, bool[n]; None if cancelled or late.

        Call it after ``settle``. They are digested where they are, by a pack into scratch memory of the device: only
        the digests come to the host, and those of zeros are known. A span that is not zero has them with the odds of a
        digest (``docs/snapshot_format.md``).
        """
        counts = num_chunks_of(sizes, self._chunk_bytes)
        spans = chunk_spans(addresses, sizes, self._chunk_bytes)
        found: list[Digests] = []
        with self._naming_faults():
            for first, end in cuts(spans[:, 1], self._batch_bytes):
                digests = self._digest(spans[first:end], cancel)
                if digests is None:
                    return None
                found.append(digests)
        differs = np.concatenate([np.empty(0, np.uint64), *found]) != _digests_of_zeros(host, spans[:, 1])
        owners = np.repeat(np.arange(len(sizes)), counts)
        is_zero: Flags = np.bincount(owners[differs], minlength=len(sizes)) == 0
        return is_zero

    def _digest(self, spans: Int64s, cancel: Cancel) -> Digests | None:
        """The digest of each (address, nbytes) in device memory; None if cancelled or late."""
        sizes, numbers = spans[:, 1], np.arange(len(spans))
        targets = self._scratch_address + np.cumsum(_aligned(sizes)) - _aligned(sizes)
        pieces = np.stack([spans[:, 0], targets, sizes], axis=1)
        chunks = np.stack([targets, sizes, numbers, np.ones_like(numbers)], axis=1)
        ticket = self._pool.pack(pieces, chunks, stream=self._streams.side)
        self._in_flight.append(_Enqueued(ticket=ticket, copies_to_arena=_NOTHING))
        if not self._is_done(self._in_flight[0], cancel):
            return None
        digests = np.empty(len(spans), dtype=np.uint64)
        self._pool.finish(ticket, digests)
        self._in_flight.popleft()
        return digests

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
            self._pool.upload_pieces(pieces, timeout_s=self._timeout_s)

    def adopt(self, memory: Bytes) -> None:
        """Pin an arena, so that captures are written into it; where the driver refuses, use a bounce buffer."""
        self.release()
        try:
            self._registration = self._pool.register(memory.ctypes.data, memory.nbytes)
        except DeviceError as error:
            self._take_buffers()
            held = sum(b.nbytes for b in self._buffers) >> 20
            way = f"the arena could not be pinned ({error}): captures go by way of {held} MiB of pinned memory"
            self.note = way + self._aside
            return
        if self._engines is None:
            self._engines = measured(self._device, self._streams.side, self._pool, timeout_s=self._timeout_s)
        way = f"arena pinned; captures land in it, packed on {self._pool.num_sms} SMs, {self._engines.note}"
        self.note = way + self._aside

    @property
    def timeout_s(self) -> float:
        """How long anything may take before it is late."""
        return self._timeout_s

    @property
    def is_direct(self) -> bool:
        """Whether captures are written into the arena without a second copy."""
        return self._registration is not None

    def release(self) -> None:
        """Undo ``adopt``, after what is under way. Memory that the device may still write stays pinned."""
        if self._registration is None:
            return
        is_quiet = False
        with suppress(DeviceError):
            is_quiet = self._drain(Cancel(), _RELEASE_TIMEOUT_S)
        if is_quiet:
            self._registration.close()
        else:
            self._abandoned.append(self._registration)
        self._registration = None

    def freeze(self, rows: Int64s) -> bool:
        """Enqueue copies (source, destination, nbytes) after all that is enqueued on the current stream.

        ``rows``: int64[n, 3]. Returns at once; ``settle`` waits for the copies. Later calls of ``pack`` read what that
        stream had written by now. False: the device is late with earlier work, and nothing is copied.
        """
        with self._naming_faults():
            if not self._drain(Cancel(), 0.0):
                return False
            # Without rows, too: nothing is packed before ``settle`` has seen training's stream come to this point.
            ticket = self._pool.scatter(rows, stream=self._streams.current(), copy_engine_bytes=_STAGED_RUN_BYTES)
            self._in_flight.append(_Enqueued(ticket=ticket, copies_to_arena=_NOTHING))
        return True

    def settle(self, cancel: Cancel) -> bool:
        """Wait until the copies of ``freeze`` are done, and all of an earlier snapshot; False if cancelled or late."""
        with self._naming_faults():
            return self._drain(cancel, self._timeout_s)

    def pack(
        self,
        targets: Targets,
        host: HostPool,
        cancel: Cancel,
        between: Callable[[], None],
        on_enqueued: Callable[[], None] | None,
        pace: Pace | None,
    ) -> bool:
        """Fill the targets and their digests, after ``settle``; False if cancelled or late.

        ``on_enqueued`` is called when all copies are enqueued, some of them not done: from then on ``hold_stream``
        holds training's stream for this call's work. ``pace`` says when
        batches leave, None: at once; whoever cancels has to end its waits, too.
        """
        with self._naming_faults():
            for number, chunks in enumerate(Chunks.of(self._templates, targets).batches(self._batch_bytes)):
                # While a batch waits to be due nothing is in flight: so the time on the link is known.
                is_early = pace is not None and pace.is_early()
                while self._in_flight and (is_early or len(self._in_flight) == SLOTS):
                    if not self._finish_oldest(host, cancel):
                        return False
                    between()
                if pace is not None:
                    pace.admit(int(chunks.nbytes.sum()))
                if cancel.is_set():
                    return False
                self._in_flight.append(self._start(chunks, number % SLOTS))
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
        ticket = self._pool.scatter(rows, stream=stream, copy_engine_bytes=self._copy_engine_bytes)
        self._pool.finish(ticket, timeout_s=self._timeout_s)

    @property
    def _copy_engine_bytes(self) -> int | None:
        return self._engines.copy_engine_bytes if self._engines is not None else None

    def _start(self, chunks: Chunks, slot: int) -> _Enqueued:
        rows = self._chunks[chunks.rows]
        rows[:, 0] += chunks.addresses
        copies = _NOTHING
        if not self.is_direct:
            room = _aligned(chunks.nbytes)
            places = self._take_buffers()[slot].ctypes.data + np.cumsum(room) - room
            copies = np.stack([places, rows[:, 0], chunks.nbytes], axis=1)
            rows[:, 0] = places
        ticket = self._pool.pack_uploaded(rows, stream=self._streams.side, copy_engine_bytes=self._copy_engine_bytes)
        return _Enqueued(ticket=ticket, chunks=chunks, copies_to_arena=copies)

    def _finish_oldest(self, host: HostPool, cancel: Cancel) -> bool:
        """Wait for the oldest batch and complete it; False if cancelled or late: then it stays under way."""
        batch = self._in_flight[0]
        if not self._is_done(batch, cancel):
            return False
        assert batch.chunks is not None, "settle has finished everything else"
        digests = np.empty(len(batch.chunks), dtype=np.uint64)
        self._pool.finish(batch.ticket, digests)
        self._in_flight.popleft()
        host.scatter(batch.copies_to_arena)
        scatter_digests(host, digests, *batch.chunks.digest_runs())
        return True

    def _drain(self, cancel: Cancel, timeout_s: float) -> bool:
        """Wait for all batches under way and discard their results; False if cancelled or late."""
        while self._in_flight:
            if not self._is_done(self._in_flight[0], cancel, timeout_s):
                return False
            self._pool.finish(self._in_flight[0].ticket)
            self._in_flight.popleft()
        return True

    def _is_done(self, batch: _Enqueued, cancel: Cancel, timeout_s: float | None = None) -> bool:
        """Wait for one batch; False if cancelled or late."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        for _ in range(1 + int(limit_s / _POLL_S)):
            if self._pool.wait(batch.ticket, timeout_s=min(_POLL_S, limit_s)):
                return True
            if cancel.is_set():
                return False
        return False

    @contextmanager
    def _naming_faults(self) -> Iterator[None]:
        """As ``naming_faults``, remembered."""
        try:
            with naming_faults():
                yield
        except DeviceFault as error:
            self.fault = str(error)
            raise

    def _take_buffers(self) -> tuple[Bytes, ...]:
        if not self._buffers:
            self._buffers = tuple(self.pinned(self._buffer_bytes) for _ in range(SLOTS))
        return self._buffers

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
    batch_bytes: int = DEVICE_BATCH_BYTES,
    **options: Any,
) -> DevicePool:
    """A pool with room for what packing these units enqueues at once.

    ``device`` is ``cuda:N``, or ``model:N``, whose memory is this process's. ``rank`` names this process in errors,
    ``num_sms`` bounds how many of a GPU's multiprocessors packing takes; for other ``options`` see ``DevicePool``.
    Raises ``DeviceFault`` where the device does not work.
    """
    # A batch's chunks; and the rows that ``freeze`` and ``scatter`` bring.
    num_rows = max(
        sum(sum(r.at_once for r in u.regions) + (u.kind is UnitKind.LOG) for u in units),
        max(len(u.regions) for u in units),
        -(-max(batch_bytes, chunk_bytes) // chunk_bytes) + len(units),
    )
    with naming_faults():
        return DevicePool(
            device,
            rank=rank,
            max_pieces=num_rows,
            max_chunks=num_rows,
            num_slots=SLOTS,
            num_sms=num_sms,
            **options,
        )


def _aligned(nbytes: Int64s) -> Int64s:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _digests_of_zeros(host: HostPool, nbytes: Int64s) -> Digests:
    """The digest of so many zero bytes, uint64[n]."""
    sizes, which = np.unique(nbytes, return_inverse=True)
    zeros = np.zeros(max(sizes, default=0), dtype=np.uint8)
    found = np.empty(len(sizes), dtype=np.uint64)
    host.digest(np.stack([np.full_like(sizes, zeros.ctypes.data), sizes], axis=1), found)
    return found[which]
