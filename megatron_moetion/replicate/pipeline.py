# SPDX-License-Identifier: Apache-2.0
"""Snapshots on their way: packed by one thread, replicated by others, each iteration in its order.

The main thread only begins a snapshot and, before the optimizer steps, makes sure that live state is read before it
is written. A snapshot that finds no free slot or is late is dropped and counted. One that is committed is replicated as
soon as its holders can be reached, while its captures stand in the arena.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field

from megatron_moetion.clock import Clock
from megatron_moetion.errors import DeviceFault
from megatron_moetion.replicate.agreement import WINDOW
from megatron_moetion.replicate.replication import HolderState, Replication
from megatron_moetion.replicate.worker import Threads
from megatron_moetion.snapshot.capture import Captured, Capturer, Contents, SnapshotPace
from megatron_moetion.snapshot.packer import Packer
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
    ``budget`` (made rarer to fit the links), ``gap`` (no chain of gradients leads to it, and there is no room yet to
    begin anew; or one has grown too long),
    ``agreement`` (ranks do not yet know what to choose), ``unhealthy`` (loss or gradients are not what they should be).
    """
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
    """There is no snapshot of an iteration on this rank."""

    reason: str
    """One of those of ``SnapshotCounts.dropped``."""
    details: str | None = None
    """More about it, for a person."""


class Pipeline:
    """Owns the packing thread and takes over ``replication``, which is None where no replicas are kept.

    ``Capturer`` has the other arguments.
    """

    def __init__(
        self,
        *,
        packer: Packer,
        inventory: Inventory,
        arenas: OpenArenas,
        replication: Replication | None,
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
        self._replication = replication
        self._clock = clock
        self._threads = threads
        self._pace = pace
        self._capturer = Capturer(
            packer=packer, arena=arenas.own, epoch=epoch, probe=probe, packed=packed, pace=pace, clock=clock
        )
        self._packing = threads.worker("moetion-pack")
        self._pack: Future[None] | None = None
        self._lock = threading.Lock()
        self._dropped: set[int] = set()
        """Recent iterations of which there is no snapshot here."""
        self._alone: dict[int, float] = {}
        """Recent iterations that are whole here, and since when, where no replicas are kept."""
        self._live_is_read = threads.event()
        self._is_released = threads.event()
        self._is_released.set()
        self._is_settled = threads.event()
        self._is_settled.set()
        self._outcome = Captured()
        self.counts = SnapshotCounts()
        self.details: dict[str, str] = {}
        """More about a reason for which snapshots are dropped, for a person."""

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
        return self.details.get("device") or self._packer.fault

    def wait_until_released(self) -> None:
        """Return once arenas have released the captures that the last ``submit`` named, which is done first."""
        self._is_released.wait()

    def catch_up(self, max_stall_s: float) -> None:
        """Wait while a holder that can be reached lacks two snapshots or more, at most this long.

        For mode ``exact``, where a dropped snapshot breaks every chain. Call it after ``finish``. The time is added to
        ``counts``.
        """
        if self._replication is None:
            return
        began = self._clock.monotonic()
        self._replication.catch_up(max_stall_s)
        self.counts.waited_s += self._clock.monotonic() - began

    def drain(self) -> None:
        """Wait until everything begun is packed, and replicated or dropped. See ``Replication.drain``."""
        self.finish()
        if self._replication is not None:
            self._replication.drain()

    @property
    def whole(self) -> frozenset[int]:
        """Recent iterations that are whole here and on all active holders."""
        return frozenset(self.whole_since)

    @property
    def rounds(self) -> dict[int, bool]:
        """Recent iterations whose fate is known here: whether they are whole here and on all active holders."""
        whole = self.whole_since
        with self._lock:
            return dict.fromkeys(self._dropped, False) | dict.fromkeys(whole, True)

    @property
    def whole_since(self) -> Mapping[int, float]:
        """Recent iterations that are whole here and on all holders, and since when (monotonic clock, seconds)."""
        if self._replication is not None:
            return self._replication.whole
        with self._lock:
            return dict(self._alone)

    def redundancy(self, iteration: int) -> int:
        """Losses of nodes that this iteration survives, as far as is known; see ``Replication.redundancy``."""
        return 0 if self._replication is None else self._replication.redundancy(iteration)

    @property
    def pending(self) -> int:
        """Recent snapshots that are committed here and that some active holder lacks."""
        return 0 if self._replication is None else self._replication.pending

    def holders(self) -> tuple[HolderState, ...]:
        """See ``Replication.states``."""
        return () if self._replication is None else self._replication.states()

    def remarks(self) -> list[tuple[str, str]]:
        """What has changed around the holders since the last call: a kind and a text each."""
        return [] if self._replication is None else self._replication.remarks()

    def quiet(self) -> AbstractContextManager[bool]:
        """While it is entered, after ``drain``, no thread writes to the arenas. False: one still may."""
        return nullcontext(True) if self._replication is None else self._replication.quiet()

    def close(self) -> None:
        """Stop all threads after the calls under way."""
        self._packer.cancel()
        self._pace.hurry()
        self._packing.close()
        if self._replication is not None:
            self._replication.close()

    def abandon(self, wait_s: float) -> bool:
        """Stop all threads without waiting for peers; ``wait_s`` is for what is under way. Whether all of it was done.

        Afterwards nothing may be expected of the packer or the arenas.
        """
        until = self._clock.monotonic() + wait_s
        pack = [self._pack] if self._pack is not None else []
        self._pace.hurry()
        is_done = self._threads.wait(pack, wait_s)
        if self._replication is not None:
            left_s = max(0.0, until - self._clock.monotonic())
            is_done = is_done and self._replication.wait(left_s)
        self._packer.cancel()
        self._packing.abandon()
        if self._replication is not None:
            self._replication.abandon()
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
        finally:
            self._is_released.set()
            self._is_settled.set()
            self._release_live()
        self._mark(iteration, self._outcome.is_there)

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

    def _count(self, reason: str) -> None:
        with self._lock:
            self.counts.dropped[reason] += 1

    def _mark(self, iteration: int, is_there: bool) -> None:
        """The snapshot is committed, or there is none."""
        with self._lock:
            if not is_there:
                self._dropped.add(iteration)
            elif self._replication is None:
                self._alone[iteration] = self._clock.monotonic()
            self._dropped = set(sorted(self._dropped)[-WINDOW:])
            self._alone = dict(sorted(self._alone.items())[-WINDOW:])
        if self._replication is not None:
            self._replication.offer(iteration, is_there=is_there)
