# SPDX-License-Identifier: Apache-2.0
"""Training state in the memory of the emulated device, and what its captures must hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emulated import Bytes, Emulator
from support import identity, is_whole

from megatron_moetion.arrays import Digests
from megatron_moetion.snapshot.plan import Targets
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Page, Record, Records
from megatron_moetion.store.sharedfile import create_arena
from megatron_moetion.store.spec import ArenaSpec
from megatron_moetion.units import Inventory, Region, Role, Unit, UnitKind


class StateOnDevice:
    """Units in the emulated device's memory: weights, gradients and counters that each step overwrites."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self.weights = [[emulator.array(n) for n in (5000, 64, 776)] for _ in range(4)]
        self.gradients = [emulator.array(3000) for _ in range(4)]
        self.counter = emulator.array(64)
        units = [
            Unit(
                name=f"weights{i}",
                kind=UnitKind.DENSE,
                regions=tuple(_region(f"weights{i}", f"t{j}", a) for j, a in enumerate(arrays)),
            )
            for i, arrays in enumerate(self.weights)
        ]
        units += [
            Unit(
                name=f"gradient{i}",
                kind=UnitKind.LOG,
                regions=(_region(f"gradient{i}", "gradient", array, Role.GRAD, at_once=True),),
            )
            for i, array in enumerate(self.gradients)
        ]
        counter = _region("counter", "counter", self.counter, Role.BUFFER, at_once=True)
        units.append(Unit(name="counter", kind=UnitKind.DENSE, regions=(counter,)))
        self.inventory = Inventory(units=tuple(units))

    def step(self, stream: int, iteration: int) -> None:
        """The optimizer's step: all weights become ``iteration``."""
        for arrays in self.weights:
            for array in arrays:
                self._emulator.fill(stream, array, iteration)

    def backward(self, stream: int, iteration: int) -> None:
        """Gradients and counters of an iteration."""
        for array in self.gradients:
            self._emulator.fill(stream, array, 100 + iteration)
        self._emulator.fill(stream, self.counter, 50 + iteration)

    def forward(self, stream: int) -> None:
        """The next iteration: gradients are zeroed, counters go on."""
        for array in self.gradients:
            self._emulator.fill(stream, array, 0)
        self._emulator.fill(stream, self.counter, 99)

    def expected(self, unit: int, iteration: int) -> int:
        """The value of all bytes of a unit's capture."""
        name = self.inventory.units[unit].name
        return iteration + (100 if name.startswith("gradient") else 50 if name == "counter" else 0)


def _region(unit: str, tensor: str, array: Bytes, role: Role = Role.MASTER, at_once: bool = False) -> Region:
    return Region(
        unit=unit, tensor=tensor, role=role, dtype="uint8", start=0, nbytes=array.nbytes, address=array.ctypes.data,
        device="cuda:0", at_once=at_once,
    )  # fmt: skip


def arena_of(state: StateOnDevice, folder: Path) -> Arena:
    """A new arena with three slots for each unit."""
    units = state.inventory
    spec = ArenaSpec.of(identity(layout=units.fingerprint), units, {u.name: 3 for u in units.units})
    return create_arena(folder / "rank00000.arena", spec, Page())


def records_of(arena: Arena, targets: Targets, slots: Sequence[int], iteration: int, digests: Digests) -> Records:
    """What ``pack`` gave, as a manifest lists it."""
    return Records.make(
        len(slots),
        unit=targets.units,
        iteration=iteration,
        epoch=0,
        slot=slots,
        nbytes=arena.unit_bytes[targets.units],
        digest=digests,
    )


def is_right(state: StateOnDevice, arena: Arena, record: Record) -> bool:
    """Whether a capture is whole, and of its iteration."""
    payload, unit = arena.payload(record.slot), state.inventory.units[record.unit]
    expected = state.expected(record.unit, record.iteration)
    return is_whole(arena, record) and all(
        bool((payload[offset : offset + region.nbytes] == expected).all())
        for region, offset in zip(unit.regions, unit.offsets, strict=True)
    )
