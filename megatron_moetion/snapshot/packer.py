# SPDX-License-Identifier: Apache-2.0
"""Executes plans: gathers live state into captures, scatters captures back, verifies digests."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_moetion._C import Cancel
from megatron_moetion._C import HostPool as HostPool  # rooms above take it from here, not from the compiled module
from megatron_moetion.errors import UnsupportedState
from megatron_moetion.snapshot.plan import Batch, Digests, Target, Template, batches, template
from megatron_moetion.snapshot.reference import capture_digest
from megatron_moetion.units import Inventory, Unit, UnitKind, align_up

if TYPE_CHECKING:
    from megatron_moetion.snapshot.bounce import Bounce

Bytes = npt.NDArray[np.uint8]

BATCH_BYTES = 32 << 20
"""Captures per call into the pool: small enough that a dropped snapshot stops soon."""


class Packer:
    """Packs one rank's units. One snapshot at a time; ``freeze`` and ``pack`` may run in different threads.

    The regions' tensors must stay alive and unmoved for the packer's lifetime. State that changes before the
    next optimizer step (``at_once`` regions and the host state) is copied into a staging buffer by ``freeze``;
    everything else is read straight from the live tensors by ``pack``.
    """

    def __init__(self, inventory: Inventory, chunk_bytes: int, num_threads: int) -> None:
        self._inventory = inventory
        self._chunk_bytes = chunk_bytes
        self._pool = HostPool(num_threads)
        self._cancel = Cancel()
        staged: list[tuple[int, int, int]] = []  # unit, region, offset
        cursor = 0
        for number, unit in enumerate(inventory.units):
            for position, region in enumerate(unit.regions):
                if region.at_once:
                    staged.append((number, position, cursor))
                    cursor = align_up(cursor + region.nbytes)
        self._host_units = inventory.of_kind(UnitKind.HOST)
        for number in self._host_units:
            staged.append((number, 0, cursor))
            cursor = align_up(cursor + inventory.units[number].reserved_bytes)
        self._staging = np.zeros(max(cursor, 1), dtype=np.uint8)
        self._staged = {(unit, region): offset for unit, region, offset in staged}
        base = self._staging.ctypes.data
        devices = {r.device for u in inventory.units for r in u.regions} - {"cpu"}
        self._bounced = frozenset(
            i for i, u in enumerate(inventory.units) if any(r.device in devices for r in u.regions)
        )
        self._bounce = _make_bounce([inventory.units[i] for i in sorted(self._bounced)], devices)
        self._templates: list[Template] = [
            template(
                unit,
                chunk_bytes,
                {r: base + offset for (u, r), offset in self._staged.items() if u == number},
                bounced=number in self._bounced,
            )
            for number, unit in enumerate(inventory.units)
        ]

    def freeze(self, host_state: bytes) -> None:
        """Copy what cannot wait. ``host_state`` must fit the host unit's ``reserved_bytes``."""
        if self._bounce is not None:
            self._bounce.mark()
        for (number, position), offset in self._staged.items():
            unit = self._inventory.units[number]
            if number in self._host_units:
                if len(host_state) > unit.reserved_bytes:
                    raise UnsupportedState(
                        f"host state grew to {len(host_state)} bytes; {unit.reserved_bytes} were reserved at start"
                    )
                area = self._staging[offset : offset + unit.reserved_bytes]
                area[: len(host_state)] = np.frombuffer(host_state, dtype=np.uint8)
                area[len(host_state) :] = 0
            elif self._bounce is not None and number in self._bounced:
                self.staged(number, position)[:] = self._bounce.read(unit, position)
            else:
                region = unit.regions[position]
                ctypes.memmove(self._staging.ctypes.data + offset, region.address, region.nbytes)

    def staged(self, unit: int, region: int) -> Bytes:
        """The bytes of an ``at_once`` region as of the last ``freeze``."""
        offset = self._staged[(unit, region)]
        return self._staging[offset : offset + self._inventory.units[unit].regions[region].nbytes]

    def pack(self, targets: Sequence[Target], between: Callable[[], None]) -> list[int] | None:
        """Copy captures and fill their chunk digests; returns the capture digests, or None if cancelled.

        ``between`` is called after each batch.
        """
        address = self._bounce.address if self._bounce is not None else 0
        for batch in batches(self._templates, targets, BATCH_BYTES, address):
            if self._bounce is not None:
                self._fetch(batch, self._bounce)
            if not self._pack_batch(batch):
                return None
            between()
        return [capture_digest(t.digests) for t in targets]

    def _fetch(self, batch: Batch, bounce: Bounce) -> None:
        """Bring a batch's device units to the host; what ``freeze`` staged goes over what is live now."""
        wanted = [(t.unit, o) for t, o in zip(batch.targets, batch.offsets, strict=True) if t.unit in self._bounced]
        bounce.load([self._inventory.units[u] for u, _ in wanted], [o for _, o in wanted])
        bases = dict(wanted)
        for number, position in self._staged:
            if number in bases:
                unit, data = self._inventory.units[number], self.staged(number, position)
                place = bounce.address + bases[number] + unit.offsets[position]
                ctypes.memmove(place, data.ctypes.data, data.nbytes)

    def _pack_batch(self, batch: Batch) -> bool:
        digests = np.empty(len(batch.chunks), dtype=np.uint64)
        if not self._pool.pack(batch.pieces, batch.chunks, digests, self._cancel):
            return False
        done = 0
        for target in batch.targets:
            target.digests[:] = digests[done : done + len(target.digests)]
            done += len(target.digests)
        return True

    def cancel(self) -> None:
        """Make a running or coming ``pack`` return None soon."""
        self._cancel.set()

    def allow(self) -> None:
        """Undo ``cancel``."""
        self._cancel.clear()

    def scatter(self, unit: int, capture: Bytes) -> None:
        """Write a verified capture back into the unit's live regions."""
        regions = self._inventory.units[unit]
        if self._bounce is not None and unit in self._bounced:
            self._bounce.store(regions, capture)
            return
        rows = [
            (capture.ctypes.data + offset, region.address, region.nbytes)
            for region, offset in zip(regions.regions, regions.offsets, strict=True)
        ]
        if rows:
            self._pool.scatter(np.array(rows, dtype=np.int64))

    def verify(self, capture: Bytes, digests: Digests, expected: int) -> bool:
        """Whether a capture's bytes agree with its chunk digests and these with the capture digest."""
        return verify(self._pool, self._chunk_bytes, capture, digests, expected)


def _make_bounce(units: Sequence[Unit], devices: set[str]) -> Bounce | None:
    """The way to the host for units in device memory; None where there are none, and then torch stays out of it."""
    if not units:
        return None
    if len(devices) != 1:
        raise UnsupportedState(f"state lies on several devices: {', '.join(sorted(devices))}; one a rank is supported")
    import torch

    from megatron_moetion.snapshot.bounce import Bounce

    return Bounce(units, BATCH_BYTES, torch.device(devices.pop()))


def verify(pool: HostPool, chunk_bytes: int, capture: Bytes, digests: Digests, expected: int) -> bool:
    """Whether ``capture`` is, byte for byte, what was captured (see the digest's odds in the format)."""
    starts = np.arange(0, len(capture), chunk_bytes, dtype=np.int64)
    rows = np.stack([starts + capture.ctypes.data, np.minimum(chunk_bytes, len(capture) - starts)], axis=1)
    found = np.empty(len(starts), dtype=np.uint64)
    pool.digest(np.ascontiguousarray(rows), found)
    return bool((found == digests).all()) and capture_digest(digests) == expected
