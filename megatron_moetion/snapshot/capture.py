# SPDX-License-Identifier: Apache-2.0
"""One snapshot from live state to committed captures: slots, packing, the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_moetion.arrays import Int64s
from megatron_moetion.clock import Clock
from megatron_moetion.errors import DeviceFault
from megatron_moetion.snapshot.device import Pace
from megatron_moetion.snapshot.packer import Packer
from megatron_moetion.snapshot.plan import Targets
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import NO_RECORDS, NO_SLOT, Records


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The contents of a snapshot, as unit numbers. The units of ``staged`` were copied by ``Packer.freeze``."""

    units: tuple[int, ...] = ()
    """Captured from live state; without one of them there is no snapshot."""
    staged: tuple[int, ...] = ()
    """Captured from copies; without one of them there is no snapshot. They may take longer than the optimizer waits."""
    optional: tuple[int, ...] = ()
    """Captured from live state, all of them or none: where there is no room or no time, the snapshot does without."""
    zero: tuple[int, ...] = ()
    """Known to be zeros, so that no byte of them is captured."""
    logs: tuple[int, ...] = ()
    """``LOG`` units, captured from copies as ``staged``. No byte is captured of those that turn out to be zeros."""
    problem: Callable[[], str | None] = lambda: None
    """Why there must be no snapshot; asked when what ``Packer.freeze`` copies is there, None: there may be one."""
    tokens: Mapping[int, int] = field(default_factory=dict)
    """By expert unit: tokens processed by then, which travel with its capture."""


@dataclass(frozen=True, kw_only=True)
class Captured:
    """The fate of a snapshot on this rank."""

    records: Records = NO_RECORDS
    """Committed; none where the snapshot was dropped."""
    dropped: str | None = None
    """Why it was: ``no-slot``, ``late``, ``device`` or ``missed``."""
    details: str | None = None
    """More about that, for a person."""
    left_out: str | None = None
    """Why its optional captures were left out: ``no-slot`` or ``late``."""
    zero: frozenset[int] = frozenset()
    """Units whose bytes were all zero, so that no byte of them was captured."""

    @property
    def is_there(self) -> bool:
        """Whether anything was committed."""
        return bool(self.records)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Taken:
    """Units, and for each of them a slot that was acquired for its capture."""

    units: Int64s
    slots: Int64s

    def __getitem__(self, rows: slice) -> _Taken:
        return _Taken(units=self.units[rows], slots=self.slots[rows])

    def and_then(self, other: _Taken) -> _Taken:
        """Both."""
        return _Taken(units=np.concatenate([self.units, other.units]), slots=np.concatenate([self.slots, other.slots]))


class SnapshotPace(Pace, Protocol):
    """Spreads the bytes of a snapshot over the time until the optimizer asks for the state.

    The training thread calls ``begin``, ``asked`` and ``hurry``, the packing thread the others.
    """

    def begin(self) -> None:
        """A snapshot is about to be submitted to the packing thread, which has done all that was submitted before."""
        ...

    def asked(self) -> None:
        """The optimizer asks for the state: what is left goes at once. Later snapshots learn how long it took."""
        ...

    def hurry(self) -> None:
        """Somebody waits for the snapshot: what is left goes at once, and a wait in ``admit`` ends."""
        ...

    def plan(self, nbytes: int) -> None:
        """So many bytes will leave a device from now on."""
        ...


class _Stretches:
    """Passes batches on at a pace, and reports each stretch in which bytes were on their way: pauses are none of it."""

    def __init__(self, pace: Pace, packed: Callable[[float, float, int], None], clock: Clock) -> None:
        self._pace = pace
        self._packed = packed
        self._now = clock.monotonic
        self._began = self._now()
        self.nbytes = 0
        """Of a device's batches in this stretch."""

    def is_early(self) -> bool:
        """See ``Pace``."""
        return self._pace.is_early()

    def admit(self, nbytes: int) -> None:
        """See ``Pace``. Nothing is on its way while the next batch is early."""
        if self._pace.is_early():
            self.end(self.nbytes)
        self._pace.admit(nbytes)
        if not self.nbytes:
            self._began = self._now()
        self.nbytes += nbytes

    def end(self, nbytes: int) -> None:
        """So many bytes have arrived since the stretch began."""
        if nbytes:
            self._packed(self._began, self._now(), nbytes)
        self.nbytes = 0


class Capturer:
    """Captures units into free slots of an arena. Used by the packing thread alone.

    ``packed`` is called for each stretch of time in which bytes of a snapshot were on their way to the arena without a
    pause: with the moments at which it began and ended (monotonic clock, seconds) and its bytes. ``pace`` makes the
    pauses, between the batches of a device.
    """

    def __init__(
        self,
        *,
        packer: Packer,
        arena: Arena,
        epoch: int,
        probe: Callable[[str, int], None],
        packed: Callable[[float, float, int], None],
        pace: SnapshotPace,
        clock: Clock,
    ) -> None:
        self._packer = packer
        self._arena = arena
        self._epoch = epoch
        self._probe = probe
        self._packed = packed
        self._pace = pace
        self._clock = clock

    def capture(
        self,
        iteration: int,
        contents: Contents,
        live_is_read: Callable[[], None],
        is_settled: Callable[[], None] = lambda: None,
    ) -> Captured:
        """Commit a snapshot, or drop it and give its slots back.

        ``is_settled`` is called when a device has reached what is captured, or will not in time. ``live_is_read`` is
        called once live state may be written, unless the caller has cancelled packing by then.
        """
        try:
            zero = self._settle(contents)
        except DeviceFault as error:
            return Captured(dropped="device", details=str(error))
        finally:
            is_settled()
        if zero is None:
            return Captured(dropped="late")
        if (problem := contents.problem()) is not None:
            return Captured(dropped="missed", details=problem)
        return self._capture(iteration, contents, zero, live_is_read)

    def _settle(self, contents: Contents) -> frozenset[int] | None:
        """Wait for the copies of ``freeze``; the units that are zeros, None where the device is late."""
        if not self._packer.settle():
            return None
        found = self._packer.zero_logs(contents.logs)
        return None if found is None else found | frozenset(contents.zero)

    def _capture(
        self, iteration: int, contents: Contents, zero: frozenset[int], live_is_read: Callable[[], None]
    ) -> Captured:
        copied = (*contents.staged, *(u for u in contents.logs if u not in zero))
        count = len(contents.units + copied + contents.optional) + len(zero)
        needed = self._acquire(contents.units + copied) if self._arena.can_list(count) else None
        if needed is None:
            return Captured(dropped="no-slot")
        live, staged = needed[: len(contents.units)], needed[len(contents.units) :]
        optional = self._acquire(contents.optional)
        left_out = "no-slot" if optional is None else None
        live = live.and_then(optional) if optional is not None else live
        self._pace.plan(self._packer.bytes_on_device(live.and_then(staged).units))
        stretches = _Stretches(self._pace, self._packed, self._clock)
        try:
            captured = self._pack(iteration, contents, live, stretches, live_is_read)
            if captured is None and not contents.staged:
                return self._drop("late", live)
            if captured is None:
                assert not contents.units, "what must be there is staged wherever something is optional"
                self._arena.release(live.slots)
                live, captured, left_out = live[:0], NO_RECORDS, left_out or ("late" if contents.optional else None)
            live_is_read()
            copies = self._pack(iteration, contents, staged, stretches)
            if copies is None:  # the device is late, or the pipeline is being closed
                return self._drop("late", live.and_then(staged))
        except DeviceFault as error:
            # Safe although the device may still write: after a fault it packs nothing, so nothing here is committed.
            return self._drop("device", live.and_then(staged), str(error))
        stored = captured + copies
        stretches.end(stretches.nbytes or int(stored.table["nbytes"].sum()))
        zeros = Records.make(len(zero), unit=sorted(zero), iteration=iteration, epoch=self._epoch, slot=NO_SLOT)
        self._probe("before-commit", iteration)
        self._arena.add(stored + zeros)
        return Captured(records=stored + zeros, left_out=left_out, zero=zero)

    def _drop(self, reason: str, taken: _Taken, details: str | None = None) -> Captured:
        self._arena.release(taken.slots)
        return Captured(dropped=reason, details=details)

    def _acquire(self, units: Sequence[int]) -> _Taken | None:
        """A slot for each unit, or None."""
        numbers = np.array(units, dtype=np.int64)
        slots = self._arena.acquire_all(self._arena.unit_bytes[numbers])
        return None if slots is None else _Taken(units=numbers, slots=slots)

    def _pack(
        self,
        iteration: int,
        contents: Contents,
        taken: _Taken,
        stretches: _Stretches,
        on_enqueued: Callable[[], None] | None = None,
    ) -> Records | None:
        """Fill the slots; None if that was cancelled."""
        addresses, sizes = self._arena.payload_addresses(taken.slots), self._arena.unit_bytes[taken.units]
        targets = Targets.in_slots(taken.units, addresses, sizes)
        digests = self._packer.pack(targets, lambda: self._probe("mid-pack", iteration), on_enqueued, stretches)
        if digests is None:
            return None
        return Records.make(
            len(digests),
            unit=taken.units,
            iteration=iteration,
            epoch=self._epoch,
            slot=taken.slots,
            nbytes=sizes,
            digest=digests,
            tokens=[contents.tokens.get(u, 0) for u in taken.units.tolist()] if contents.tokens else 0,
        )
