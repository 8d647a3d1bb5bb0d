# SPDX-License-Identifier: Apache-2.0
"""Snapshots in flight: packed by one thread, replicated by another, each iteration in its order.

The main thread only begins a snapshot and, before the optimizer steps, makes sure that nothing still reads
live state. A snapshot that finds no free slot, is late, or is not accepted by a buddy is dropped and counted;
its replication round still takes place, empty, so that all ranks stay in step.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field

from megatron_moetion.errors import ChannelError, DeviceFault
from megatron_moetion.replicate.agreement import WINDOW
from megatron_moetion.replicate.replicator import Replicator
from megatron_moetion.snapshot.packer import Packer
from megatron_moetion.snapshot.plan import Target
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Record
from megatron_moetion.units import Inventory


@dataclass
class FlightCounts:
    """What became of this rank's snapshots."""

    begun: int = 0
    bytes_committed: int = 0
    committed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason: ``no-slot``, ``late``, ``moved``, ``freeze`` (host state or device), ``device``, ``budget`` (made
    rarer to fit the links), ``refused`` (a buddy had no room), ``channel``."""


class Flight:
    """Owns the two threads. ``replicator`` is None where no replicas are kept.

    ``packed`` is told when a snapshot's bytes began to be packed and were in the arena (monotonic clock, seconds), and
    how many there were.
    """

    def __init__(
        self,
        *,
        packer: Packer,
        inventory: Inventory,
        arena: Arena,
        replicator: Replicator | None,
        epoch: int,
        probe: Callable[[str, int], None],
        packed: Callable[[float, float, int], None],
    ) -> None:
        self._packer = packer
        self._packed = packed
        self._inventory = inventory
        self._arena = arena
        self._replicator = replicator
        self._epoch = epoch
        self._probe = probe
        self._packing = ThreadPoolExecutor(1, thread_name_prefix="moetion-pack")
        self._sending = ThreadPoolExecutor(1, thread_name_prefix="moetion-send")
        self._pack: Future[None] | None = None
        self._sends: list[Future[None]] = []
        self._lock = threading.Lock()
        self._rounds: dict[int, bool] = {}
        self.counts = FlightCounts()
        self.details: dict[str, str] = {}
        """More about a reason for which snapshots are dropped, for a person."""
        self.broken = ""
        """Why nothing is replicated any more; empty while all is well."""

    def begin(self, iteration: int, units: Sequence[int], tokens: Mapping[int, int]) -> None:
        """Start to capture ``units`` as they are now; state is read until ``finish_packing``.

        ``tokens[u]`` is what expert unit u has processed; it travels with the capture.
        """
        self.finish_packing(None)
        self.counts.begun += 1
        slots = self._acquire(units)
        self._pack = self._packing.submit(self._capture, iteration, tuple(units), slots, dict(tokens))

    def skip(self, iteration: int, reason: str) -> None:
        """Drop this iteration's snapshot on this rank; its round takes place, empty."""
        self.finish_packing(None)
        self.counts.begun += 1
        self._count(reason)
        self._pack = self._packing.submit(self._capture, iteration, (), None, {})

    def finish_packing(self, max_stall_s: float | None) -> None:
        """Return once live state is no longer read; a snapshot that takes longer than ``max_stall_s`` is dropped."""
        if self._pack is None:
            return
        try:
            self._pack.result(max_stall_s)
        except FutureTimeout:
            self._packer.cancel()
            self._pack.result()  # bounded: the packer checks between pieces
            self._packer.allow()
        self._pack = None

    def drain(self) -> None:
        """Wait until everything begun is packed and replicated or dropped. Bounded by the channel's time limits."""
        self.finish_packing(None)
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
            return dict(self._rounds)

    def close(self) -> None:
        """Stop both threads after what they are doing."""
        self._packer.cancel()
        self._packing.shutdown(wait=True, cancel_futures=True)
        self._sending.shutdown(wait=True, cancel_futures=True)

    def _acquire(self, units: Sequence[int]) -> list[int] | None:
        slots: list[int] = []
        for unit in units:
            slot = self._arena.acquire(self._inventory.units[unit].nbytes)
            if slot is None:
                self._arena.release(slots)
                self._count("no-slot")
                return None
            slots.append(slot)
        return slots

    def _capture(self, iteration: int, units: tuple[int, ...], slots: list[int] | None, tokens: dict[int, int]) -> None:
        records = () if slots is None else self._fill(iteration, units, slots, tokens)
        for send in self._sends:
            if send.done():
                send.result()  # a fault is handled where it happens; what is raised here is a bug, and must show
        self._sends = [s for s in self._sends if not s.done()]
        if len(self._sends) >= WINDOW and not self.broken:
            self.broken = f"{len(self._sends)} snapshots wait to be replicated"
        self._sends.append(self._sending.submit(self._replicate, iteration, records))

    def _fill(
        self, iteration: int, units: tuple[int, ...], slots: list[int], tokens: dict[int, int]
    ) -> tuple[Record, ...]:
        targets = [
            Target(unit=u, address=self._arena.payload(s).ctypes.data, digests=self._arena.digests(s))
            for u, s in zip(units, slots, strict=True)
        ]
        began = time.monotonic()
        try:
            digests = self._packer.pack(targets, lambda: self._probe("mid-pack", iteration))
        except DeviceFault as error:
            # A late write of the device into these slots hurts nobody: after a fault it packs nothing any more.
            self._arena.release(slots)
            self.details["device"] = f": {error}"
            self._count("device")
            return ()
        if digests is None:
            self._arena.release(slots)
            self._count("late")
            return ()
        self._packed(began, time.monotonic(), sum(self._inventory.units[u].nbytes for u in units))
        records = tuple(
            Record(
                unit=u,
                iteration=iteration,
                epoch=self._epoch,
                slot=s,
                nbytes=self._inventory.units[u].nbytes,
                digest=d,
                tokens=tokens.get(u, 0),
            )
            for u, s, d in zip(units, slots, digests, strict=True)
        )
        self._probe("before-commit", iteration)
        self._arena.add(records)
        self.counts.committed += 1
        self.counts.bytes_committed += sum(r.nbytes for r in records)
        return records

    def _replicate(self, iteration: int, records: tuple[Record, ...]) -> None:
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

    def _drop(self, reason: str, records: Sequence[Record]) -> None:
        if records:  # else it was dropped before, for another reason
            self._count(reason)

    def _count(self, reason: str) -> None:
        with self._lock:
            self.counts.dropped[reason] += 1

    def _mark(self, iteration: int, whole: bool) -> None:
        with self._lock:
            self._rounds[iteration] = whole
            while len(self._rounds) > WINDOW:
                del self._rounds[min(self._rounds)]
