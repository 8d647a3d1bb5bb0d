# SPDX-License-Identifier: Apache-2.0
"""Executes plans: gathers live state into captures, scatters captures back, verifies digests."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from megatron_moetion._C import Cancel
from megatron_moetion._C import HostPool as HostPool  # rooms above take it from here, not from the compiled module
from megatron_moetion.arrays import Bytes, Digests, Int64s
from megatron_moetion.clock import Clock, SystemClock
from megatron_moetion.errors import DeviceFault, UnsupportedState
from megatron_moetion.snapshot.device import DEFAULT_SMS, HEAD_BYTES, TIMEOUT_S, DevicePacker, Pace, device_pool
from megatron_moetion.snapshot.digest import capture_digests, scatter_digests
from megatron_moetion.snapshot.plan import BATCH_BYTES, Targets, Templates, batch_of, groups, template
from megatron_moetion.units import ALIGNMENT_BYTES, Inventory, UnitKind, align_up

_CLOCK = SystemClock()


class Packer:
    """Packs one rank's units. One snapshot at a time; ``freeze`` and ``pack`` may run in different threads.

    Units in host memory are packed by the host's threads, units in device memory by the device. The regions' tensors
    must stay alive and unmoved for the packer's lifetime. State that changes before the next optimizer step
    (``at_once`` regions and the host state) is copied into a staging buffer by ``freeze``, gradients into one on their
    own device; everything else is read straight from the live tensors by ``pack``. ``device`` is what
    ``device_packer`` gives for the inventory.

    ``freeze`` only enqueues what a device copies. ``settle`` and ``pack``, in the packing thread, wait for that; the
    thread that trains waits in ``staged`` alone.
    """

    def __init__(
        self,
        inventory: Inventory,
        chunk_bytes: int,
        pool: HostPool,
        device: DevicePacker | None,
        *,
        batch_bytes: int = BATCH_BYTES,
        clock: Clock = _CLOCK,
    ) -> None:
        self._inventory = inventory
        self._pool = pool
        self._device = device
        self._batch_bytes = batch_bytes
        self._clock = clock
        self._cancel = Cancel()
        self._is_frozen = True
        self.waited_s = 0.0
        """Time that the training thread waited in ``staged`` for a device."""
        self._host_units = inventory.of_kind(UnitKind.HOST)
        self._on_device = _units_on_device(inventory)
        assert bool(self._on_device) == (device is not None), "a device packs its units, and only these"
        self._is_on_device = np.zeros(len(inventory.units), dtype=bool)
        self._is_on_device[list(self._on_device)] = True
        logs = [u for u in inventory.of_kind(UnitKind.LOG) if u in self._on_device]
        self._staged, nbytes = _staging_offsets(inventory, [u for u in range(len(inventory.units)) if u not in logs])
        heads_at, nbytes = nbytes, nbytes + HEAD_BYTES * len(logs)
        self._staging: Bytes = (
            self._device.pinned(nbytes) if self._device is not None else np.zeros(nbytes, dtype=np.uint8)
        )
        self._zeros: Bytes = np.zeros(0, dtype=np.uint8)
        base = self._staging.ctypes.data
        staged = {key: base + offset for key, offset in self._staged.items()}
        if logs and self._device is not None:
            on_device, on_device_bytes = _staging_offsets(inventory, logs)
            base = self._device.keep_staging(on_device_bytes)
            staged |= {key: base + offset for key, offset in on_device.items()}
        self._heads = self._staging[heads_at:].reshape(-1, HEAD_BYTES)
        """The first bytes of the gradient of each ``LOG`` unit in device memory, uint8[n, HEAD_BYTES]."""
        self._heads[:] = 0
        self._head_of = {u: row for row, u in enumerate(logs)}
        heads = [_head(inventory, u, self._heads[row].ctypes.data) for u, row in self._head_of.items()]
        self._frozen_by_device = np.concatenate(
            [_rows(inventory, staged, self._on_device), np.array(heads, dtype=np.int64).reshape(-1, 3)]
        )
        on_host = frozenset(range(len(inventory.units))) - self._on_device - {*self._host_units}
        self._frozen_by_host = _rows(inventory, staged, on_host)
        self._log_spans = _spans(inventory, staged)
        self._first_words = np.zeros(len(inventory.units), dtype=np.int64)
        """By ``LOG`` unit in host memory: the place of its first word in the staging buffer, counted in words."""
        for number in set(self._log_spans) - self._on_device:
            self._first_words[number] = self._staged[number, 0] // 8
        sources: dict[int, dict[int, int]] = defaultdict(dict)
        for (number, position), address in staged.items():
            sources[number][position] = address
        self._templates = Templates.of(
            [template(unit, chunk_bytes, sources[number]) for number, unit in enumerate(inventory.units)]
        )
        if self._device is not None:
            self._device.plan(self._templates)

    @property
    def note(self) -> str:
        """How a device's captures reach the arena, for a person; empty where there is no device."""
        return self._device.note if self._device is not None else ""

    @property
    def is_direct(self) -> bool:
        """Whether captures are made in the adopted arena without a second copy; always so from host memory."""
        return self._device is None or self._device.is_direct

    @property
    def pci_bus_id(self) -> str:
        """Address of the device on the PCI bus, such as ``0000:17:00.0``; "" where there is none."""
        return self._device.pci_bus_id if self._device is not None else ""

    def adopt(self, memory: Bytes) -> None:
        """Get ready to pack into this arena. ``close`` before its memory goes."""
        if self._device is not None:
            self._device.adopt(memory)

    def close(self) -> None:
        """Undo ``adopt``."""
        if self._device is not None:
            self._device.release()

    @property
    def settle_limit_s(self) -> float:
        """How long ``settle`` may wait for a device; 0 where there is none, and what ``freeze`` copies is there."""
        return self._device.timeout_s if self._device is not None else 0.0

    @property
    def fault(self) -> str | None:
        """Why nothing can be packed any more, a device's failure; None while all is well."""
        return self._device.fault if self._device is not None else None

    def bytes_on_device(self, units: Int64s) -> int:
        """Bytes of the captures of those of these units that lie in device memory."""
        return int(self._templates.nbytes[units[self._is_on_device[units]]].sum())

    def freeze(self, host_state: bytes) -> None:
        """Copy what cannot wait. ``host_state`` must fit the host unit's ``reserved_bytes``.

        A device copies in the order of training's stream; nobody waits for it here. Where it is late with an earlier
        snapshot, ``pack`` returns None until the next ``freeze``. ``DeviceFault`` where the device fails.
        """
        if self._device is not None:
            self._is_frozen = self._device.freeze(self._frozen_by_device)
        if len(self._frozen_by_host):
            self._pool.scatter(self._frozen_by_host)
        for number in self._host_units:
            reserved = self._inventory.units[number].reserved_bytes
            if len(host_state) > reserved:
                raise UnsupportedState(f"host state grew to {len(host_state)} bytes; {reserved} were reserved at start")
            offset = self._staged[number, 0]
            area = self._staging[offset : offset + reserved]
            area[: len(host_state)] = np.frombuffer(host_state, dtype=np.uint8)
            area[len(host_state) :] = 0

    def staged(self, unit: int, region: int) -> Bytes:
        """The bytes of an ``at_once`` region as of the last ``freeze``.

        Waits for a device, as long as its limit allows; for this thread, before ``pack`` begins in another one. Where
        it is late, or has failed, the bytes are those of some earlier ``freeze``, or torn, and ``pack`` packs nothing.
        """
        if self._device is not None and unit in self._on_device and self._is_frozen:
            began = self._clock.monotonic()
            with suppress(DeviceFault):  # the packing thread meets it, and drops the snapshot
                self._is_frozen = self._device.settle(self._cancel)
            self.waited_s += self._clock.monotonic() - began
        offset = self._staged[(unit, region)]
        return self._staging[offset : offset + self._inventory.units[unit].regions[region].nbytes]

    def settle(self) -> bool:
        """Wait until what ``freeze`` copies is there; False if cancelled or late.

        ``DeviceFault`` where the device fails.
        """
        return self._is_frozen and (self._device is None or self._device.settle(self._cancel))

    def zero_logs(self, units: Sequence[int]) -> frozenset[int] | None:
        """Those of these ``LOG`` units whose gradients were all zero bytes at the last ``freeze``. Waits as ``settle``.

        None if cancelled or late, ``DeviceFault`` where the device fails.
        """
        if not self.settle():
            return None
        here = np.array([u for u in units if u not in self._on_device], dtype=np.int64)
        first = self._staging.view(np.uint64)[self._first_words[here]]  # of nearly all gradients it is not zero
        found = {u for u in here[first == 0].tolist() if _is_zero(*self._log_spans[u])}
        there = [u for u in units if u in self._on_device and not self._heads[self._head_of[u]].any()]
        if there and self._device is not None:
            spans = np.array([self._log_spans[u] for u in there], dtype=np.int64)
            zero = self._device.are_zero(spans[:, 0], spans[:, 1], self._pool, self._cancel)
            if zero is None:
                return None
            found |= {u for u, is_zero in zip(there, zero.tolist(), strict=True) if is_zero}
        return frozenset(found)

    def pack(
        self,
        targets: Targets,
        between: Callable[[], None],
        on_enqueued: Callable[[], None] | None = None,
        pace: Pace | None = None,
    ) -> Digests | None:
        """Copy captures and fill their chunk digests; returns the capture digests, uint64[n].

        None if cancelled or late. ``between`` is called after each batch, ``on_enqueued`` when all host copies are done
        and all device copies are enqueued: from then on ``hold_stream`` protects what is still to be read. ``pace``
        says when a device's batches leave, None: at once. ``DeviceFault`` where the device fails.
        """
        if not self.settle():
            return None
        is_theirs = self._is_on_device[targets.units]
        for group in groups(self._templates, targets[~is_theirs], self._batch_bytes):
            batch = batch_of(self._templates, group)
            digests = np.empty(len(batch.chunks), dtype=np.uint64)
            if not self._pool.pack(batch.pieces, batch.chunks, digests, self._cancel):
                return None
            scatter_digests(self._pool, digests, group.digests, self._templates.num_chunks[group.units])
            between()
        if self._device is not None:
            if not self._device.pack(targets[is_theirs], self._pool, self._cancel, between, on_enqueued, pace):
                return None
        elif on_enqueued is not None:
            if self._cancel.is_set():  # after the last byte was read: whoever cancels later may write at once
                return None
            on_enqueued()
        return capture_digests(self._pool, targets.digests, self._templates.num_chunks[targets.units])

    def hold_stream(self) -> None:
        """Let what training enqueues on its stream from now on wait, on the device, for what ``pack`` still reads.

        Call it in the training thread, after ``on_enqueued`` or after ``cancel``. The host does not wait.
        """
        if self._device is not None:
            self._device.hold_stream()

    def cancel(self) -> None:
        """Make a running or coming ``pack`` return None soon, unless ``on_enqueued`` was called already.

        The canceller may write live state at once, after ``hold_stream``: nobody looks at what is read from now on.
        """
        self._cancel.set()

    @property
    def is_cancelled(self) -> bool:
        """Between ``cancel`` and ``allow``."""
        return self._cancel.is_set()

    def allow(self) -> None:
        """Undo ``cancel``."""
        self._cancel.clear()

    def scatter(self, unit: int, capture: Bytes) -> None:
        """Write a verified capture back into the unit's live regions."""
        regions = self._inventory.units[unit]
        rows = [
            (capture.ctypes.data + offset, region.address, region.nbytes)
            for region, offset in zip(regions.regions, regions.offsets, strict=True)
        ]
        table = np.array(rows, dtype=np.int64).reshape(-1, 3)
        if self._device is not None and unit in self._on_device:
            self._device.scatter(table)
        else:
            self._pool.scatter(table)

    def clear(self, unit: int) -> None:
        """Write zeros into the unit's live regions."""
        nbytes = self._inventory.units[unit].nbytes
        if self._zeros.nbytes < nbytes:
            self._zeros = self._device.pinned(nbytes) if self._device is not None else np.zeros(nbytes, dtype=np.uint8)
            self._zeros[:] = 0
        self.scatter(unit, self._zeros)


def device_packer(
    inventory: Inventory,
    chunk_bytes: int,
    *,
    rank: int = 0,
    num_sms: int = DEFAULT_SMS,
    timeout_s: float = TIMEOUT_S,
) -> DevicePacker | None:
    """What packs the units in device memory; None where there are none.

    ``rank`` names this process in errors, ``num_sms`` bounds how many of a GPU's multiprocessors packing takes, and
    what is not done in ``timeout_s`` is late. Raises ``UnsupportedState`` for state on several devices, or a unit that
    lies on a device in part.
    """
    found = _units_on_device(inventory)
    if not found:
        return None
    units = [inventory.units[i] for i in sorted(found)]
    (device,) = {r.device for u in units for r in u.regions}
    pool = device_pool(device, units, chunk_bytes, rank=rank, num_sms=num_sms)
    return DevicePacker(device, pool, units, chunk_bytes=chunk_bytes, timeout_s=timeout_s)


def _units_on_device(inventory: Inventory) -> frozenset[int]:
    devices = {r.device for u in inventory.units for r in u.regions} - {"cpu"}
    if len(devices) > 1:
        raise UnsupportedState(f"state lies on several devices: {', '.join(sorted(devices))}; one a rank is supported")
    found = frozenset(i for i, u in enumerate(inventory.units) if any(r.device in devices for r in u.regions))
    mixed = [inventory.units[i].name for i in sorted(found) if len({r.device for r in inventory.units[i].regions}) > 1]
    if mixed:
        raise UnsupportedState(f"unit {mixed[0]} lies partly in host memory and partly on {devices.pop()}")
    return found


_Places = dict[tuple[int, int], int]
"""By unit and region: where it is."""


def _staging_offsets(inventory: Inventory, units: Sequence[int]) -> tuple[_Places, int]:
    """Where in a staging buffer each ``at_once`` region and each host state goes, and the buffer's size."""
    offsets: _Places = {}
    cursor = 0
    for number in units:
        unit = inventory.units[number]
        waiting = [(i, r.nbytes) for i, r in enumerate(unit.regions) if r.at_once]
        for position, nbytes in [(0, unit.reserved_bytes)] if unit.kind is UnitKind.HOST else waiting:
            offsets[number, position] = cursor
            cursor = align_up(cursor + nbytes)
    return offsets, max(cursor, ALIGNMENT_BYTES)


def _rows(inventory: Inventory, staged: _Places, units: frozenset[int]) -> Int64s:
    """The staged regions of these units: source, destination, nbytes."""
    rows = [
        (inventory.units[u].regions[r].address, address, inventory.units[u].regions[r].nbytes)
        for (u, r), address in staged.items()
        if u in units
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _spans(inventory: Inventory, staged: _Places) -> dict[int, tuple[int, int]]:
    """Address and size of each ``LOG`` unit's staged gradients, which lie one behind the other."""
    logs = inventory.of_kind(UnitKind.LOG)
    return {u: (staged[u, 0], inventory.units[u].nbytes) for u in logs}


def _head(inventory: Inventory, unit: int, address: int) -> tuple[int, int, int]:
    """The copy of the beginning of a ``LOG`` unit's gradient: source, destination, nbytes."""
    region = inventory.units[unit].regions[0]
    return region.address, address, min(HEAD_BYTES, region.nbytes)


def _is_zero(address: int, nbytes: int) -> bool:
    """Whether memory of this process is all zero; looks at a little of it first."""
    data = np.ctypeslib.as_array((ctypes.c_uint64 * (nbytes // 8)).from_address(address))
    return not data[:512].any() and not data.any()
