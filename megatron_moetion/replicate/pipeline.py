# SPDX-License-Identifier: Apache-2.0
"""Snapshots on their way: packed by one thread, replicated by another, each iteration in its order.

The main thread only begins a snapshot and, before the optimizer steps, makes sure that live state is read before it
is written. A snapshot that finds no free slot, is late, or is not accepted by a buddy is dropped and counted;
its replication round still takes place, empty, so that all ranks stay in step.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from megatron_moetion.clock import Clock
from megatron_moetion.errors import ChannelError, DeviceFault
from megatron_moetion.replicate.agreement import WINDOW
from megatron_moetion.replicate.replicator import Replicator
from megatron_moetion.replicate.worker import Threads
from megatron_moetion.snapshot.capture import Captured, Capturer, Contents, SnapshotPace
from megatron_moetion.snapshot.packer import Packer
from megatron_moetion.store.manifest import Records
from megatron_moetion.store.open import OpenArenas
from megatron_moetion.store.retention import Settled
from megatron_moetion.units import Inventory


@dataclass
class SnapshotCounts:
    """The fates of this rank's snapshots."""

    begun: int = 0
    bytes_committed: int = 0
    committed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason: ``no-slot``, ``late``, ``moved``, ``missed`` (a step), ``freeze`` (host state or device), ``device``,
    ``budget`` (made rarer to fit the links), ``gap`` (on purpose: only that ends a chain that has grown too long),
    ``refused`` (a buddy had no room), ``channel``."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Captures that snapshots can do without, by reason: ``no-slot``, ``late``."""
    zero_bytes: int = 0
    """Of captures that were known to be zeros, so that no byte of them was copied."""
    waited_s: float = 0.0
    """Time that training waited for replication (mode ``exact``)."""
    waited_for_device_s: float = 0.0
    """Time that an optimizer step waited until the device was where the last one ended: the host had run ahead."""


@dataclass(frozen=True, kw_only=True)
class Skip:
    """There is no snapshot of an iteration on this rank; its round takes place, empty."""

    reason: str
    """One of those of ``SnapshotCounts.dropped``."""
    details: str | None = None
    """More about it, for a person."""


class Pipeline:
    """Owns the two threads. ``replicator`` is None where no replicas are kept. ``Capturer`` has the other arguments."""

    def __init__(
        self,
        *,
        packer: Packer,
        inventory: Inventory,
        arenas: OpenArenas,
        replicator: Replicator | None,
        epoch: int,
        probe: Callable[[str, int], None],
        packed: Callable[[float, float, int], None],
        pace: SnapshotPace,
        clock: Clock,
        threads: Threads,
    ) -> None:
        self._packer = packer
        self._inventory = inventory
        self._arenas = arenas
        self._replicator = replicator
        self._clock = clock
        self._threads = threads
        self._pace = pace
        self._capturer = Capturer(
            packer=packer, arena=arenas.own, epoch=epoch, probe=probe, packed=packed, pace=pace, clock=clock
        )
        self._packing = threads.worker("moetion-pack")
        self._sending = threads.worker("moetion-send")
        self._pack: Future[None] | None = None
        self._sends: list[Future[None]] = []
        self._lock = threading.Lock()
        self._rounds: dict[int, float | None] = {}
        """When the snapshots of recent iterations became whole; None: they never will."""
        self._live_is_read = threads.event()
        self._is_released = threads.event()
        self._is_released.set()
        self._is_settled = threads.event()
        self._is_settled.set()
        self._outcome = Captured()
        self.counts = SnapshotCounts()
        self.details: dict[str, str] = {}
        """More about a reason for which snapshots are dropped, for a person."""
        self.broken: str | None = None
        """Why nothing is replicated any more; None while all is well."""

    def submit(self, iteration: int, contents: Contents | Skip, release: Settled | None = None) -> None:
        """Begin to capture units as they are now; live state is read before ``finish_packing`` returns.

        ``release``: the captures that arenas may drop; done first, in the packing thread. None: nothing.
        """
        self.finish()
        self.counts.begun += 1
        if isinstance(contents, Skip):
            self._count(contents.reason)
        self._live_is_read.clear()
        self._is_released.clear()
        self._outcome = Captured()
        wanted = contents if isinstance(contents, Contents) else None
        if self._packer.settle_limit_s:
            self._is_settled.clear()
        self._pace.begin()
        self._pack = self._packing.submit(self._capture, iteration, wanted, release)

    def finish_packing(self, max_stall_s: float) -> None:
        """Return once live state may be written; captures that take longer than ``max_stall_s`` are cancelled.

        Copies already enqueued on a device finish first: the training stream waits for them there, and the host does
        not. Cancelled captures are not waited for, since their bytes are not used. The time counts from the moment at
        which a device has reached what is captured: a host that is an iteration ahead waits for that, as long as the
        packer allows, and has that time to itself.
        """
        if self._pack is None:
            return
        self._pace.asked()
        if not self._packer.is_cancelled and not self._live_is_read.is_set():
            began = self._clock.monotonic()
            self._is_settled.wait(self._packer.settle_limit_s)
            self.counts.waited_for_device_s += self._clock.monotonic() - began
            if not self._live_is_read.wait(max_stall_s):
                with self._lock:
                    if not self._live_is_read.is_set():
                        self._packer.cancel()
        self._packer.hold_stream()

    def finish(self) -> Captured:
        """Return once the last snapshot is packed or dropped, and which of it."""
        if self._pack is not None:
            self._pace.hurry()
            self._pack.result()
            self._pack = None
        return self._outcome

    @property
    def ended(self) -> str | None:
        """Why no snapshot of this rank will be whole any more; None while all is well."""
        return self.broken or self.details.get("device") or self._packer.fault

    def wait_until_released(self) -> None:
        """Return once arenas have released the captures that the last ``submit`` named, which is done first."""
        self._is_released.wait()

    def catch_up(self, max_stall_s: float) -> None:
        """Wait until all snapshots are replicated, at most this long.

        For mode ``exact``, where a dropped snapshot breaks every chain. Call it after ``finish``. The time is added to
        ``counts``.
        """
        began = self._clock.monotonic()
        self._threads.wait(self._sends, max_stall_s)
        self.counts.waited_s += self._clock.monotonic() - began

    def drain(self) -> None:
        """Wait until everything begun is packed and replicated or dropped. Bounded by the channel's time limits."""
        self.finish()
        for send in self._sends:
            send.result()
        self._sends.clear()

    @property
    def whole(self) -> frozenset[int]:
        """Recent iterations that are whole here and on all replicas."""
        return frozenset(i for i, whole in self.rounds.items() if whole)

    @property
    def rounds(self) -> dict[int, bool]:
        """Recent iterations whose fate is known here: whether they are whole here and on all replicas."""
        with self._lock:
            return {i: moment_s is not None for i, moment_s in self._rounds.items()}

    @property
    def whole_since(self) -> dict[int, float]:
        """Recent iterations that are whole here and on all replicas, and since when (monotonic clock, seconds)."""
        with self._lock:
            return {i: moment_s for i, moment_s in self._rounds.items() if moment_s is not None}

    def close(self) -> None:
        """Stop both threads after the calls under way."""
        self._packer.cancel()
        self._pace.hurry()
        self._packing.close()
        self._sending.close()

    def abandon(self, wait_s: float) -> bool:
        """Stop both threads without waiting for peers; ``wait_s`` is for what is under way. Whether all of it was done.

        Afterwards nothing may be expected of the packer, the arenas or the channel.
        """
        until = self._clock.monotonic() + wait_s
        pack = [self._pack] if self._pack is not None else []
        self._pace.hurry()
        is_packed = self._threads.wait(pack, wait_s)  # a snapshot's replication is submitted when it is packed
        is_done = is_packed and self._threads.wait(self._sends, max(0.0, until - self._clock.monotonic()))
        self._packer.cancel()
        self._packing.abandon()
        self._sending.abandon()
        return is_done

    def _capture(self, iteration: int, contents: Contents | None, release: Settled | None) -> None:
        try:
            if release is not None:
                self._arenas.release(release)
            self._is_released.set()
            if contents is not None:
                self._outcome = self._capturer.capture(iteration, contents, self._release_live, self._is_settled.set)
                self._count_captured(self._outcome)
            else:
                with suppress(DeviceFault):  # so that the host is never an iteration ahead; ``freeze`` meets the fault
                    self._packer.settle()
            records = self._outcome.records
        finally:
            self._is_released.set()
            self._is_settled.set()
            self._release_live()
        for send in self._sends:
            if send.done():
                send.result()  # faults are handled where they happen; an error here is a bug, and must show
        self._sends = [s for s in self._sends if not s.done()]
        if len(self._sends) >= WINDOW and not self.broken:
            self.broken = f"{len(self._sends)} snapshots wait to be replicated"
        self._sends.append(self._sending.submit(self._replicate, iteration, records))

    def _release_live(self) -> None:
        with self._lock:  # a cancellation is for the reading of live state, and for nothing after it
            self._live_is_read.set()
            self._packer.allow()

    def _count_captured(self, captured: Captured) -> None:
        if captured.dropped is not None:
            self._count(captured.dropped)
            if captured.details is not None:
                self.details[captured.dropped] = captured.details
        if captured.left_out is not None:
            self.counts.left_out[captured.left_out] += 1
        if captured.is_there:
            self.counts.committed += 1
            self.counts.zero_bytes += sum(self._inventory.units[u].nbytes for u in captured.zero)
            self.counts.bytes_committed += int(captured.records.table["nbytes"].sum())

    def _replicate(self, iteration: int, records: Records) -> None:
        if self.broken:
            self._drop("channel", records)
            return
        if self._replicator is None:
            self._mark(iteration, bool(records))
            return
        try:
            whole = self._replicator.replicate(iteration, records)
        except ChannelError as error:
            self.broken = str(error)
            self._drop("channel", records)
            return
        if not whole:
            self._drop("refused", records)
        self._mark(iteration, whole)

    def _drop(self, reason: str, records: Records) -> None:
        if records:  # else it was dropped before, for another reason
            self._count(reason)

    def _count(self, reason: str) -> None:
        with self._lock:
            self.counts.dropped[reason] += 1

    def _mark(self, iteration: int, whole: bool) -> None:
        with self._lock:
            self._rounds[iteration] = self._clock.monotonic() if whole else None
            while len(self._rounds) > WINDOW:
                del self._rounds[min(self._rounds)]
