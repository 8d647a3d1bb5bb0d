# SPDX-License-Identifier: Apache-2.0
"""The vocabulary: the parts of training state. No behaviour beyond validation.

A *unit* is the smallest piece of state captured together. A *region* is one contiguous span of one
tensor on this rank that belongs to one unit. A unit's *capture* is the bytes of its regions in order,
each region starting at a multiple of ``ALIGNMENT_BYTES``, the gaps filled with zeros.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

ALIGNMENT_BYTES = 64


class UnitKind(enum.IntEnum):
    """How a unit takes part in snapshots."""

    DENSE = 1
    """Captured in every snapshot: attention, norms, router, shared experts, embedding, head."""
    EXPERT = 2
    """One expert of one layer: in ``popularity`` mode captured when it is selected."""
    FROZEN = 3
    """Never changes (``requires_grad=False``): captured once, in the baseline."""
    HOST = 4
    """Host state: RNG, scheduler, data cursor, counters. One per rank, captured in every snapshot."""
    LOG = 5
    """The gradient of another unit, as it lies in DDP's buffer after the step: in every snapshot of mode ``exact``."""


class Role(enum.IntEnum):
    """What a region is to the optimizer."""

    MASTER = 1
    EXP_AVG = 2
    EXP_AVG_SQ = 3
    WEIGHT = 4
    GRAD = 5
    BUFFER = 6
    MODEL = 7
    """A trained model parameter that no main value gives: state of the optimizer itself."""
    REMAINDER = 8
    """The lower 16 bits of an fp32 main value, whose upper ones are the ``MODEL`` parameter."""
    SCALE = 9
    """One element: the factor of all moments, or main values, of a shard."""


HOST_UNIT = "host"
"""Name of the one unit that holds a rank's host state."""
LOG_SUFFIX = ".grad"
"""A ``LOG`` unit is named after the unit whose gradient it is."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """One contiguous span of one live tensor.

    ``address`` is valid as long as the tensor that owns it; the adapter that made the region keeps that
    tensor alive. ``start`` counts elements from the beginning of the *whole* (unsharded over data
    parallelism) parameter, so that a layout can be compared between ranks and runs.
    """

    unit: str
    tensor: str
    role: Role
    dtype: str
    start: int
    nbytes: int
    address: int
    device: str = "cpu"
    """Where the memory is: ``cpu``, ``cuda:0``, ..."""
    at_once: bool = False
    """Changes before the next optimizer step (router bias, counters, gradients): copied inside ``on_step_end``."""
    together: str = ""
    """Regions of the same name here are never cut in mode ``exact``, whatever units they are in: they share one scale,
    or the optimizer's step needs all of them at once (Muon's matrices)."""

    def __post_init__(self) -> None:
        if self.nbytes <= 0 or self.start < 0 or self.address <= 0:
            raise ValueError(
                f"region {self.tensor} of unit {self.unit}: nbytes={self.nbytes}, start={self.start}, "
                f"address={self.address:#x}; all must be positive (start may be 0)"
            )


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A named group of regions on this rank. ``layer`` and ``expert`` are global numbers from 0."""

    name: str
    kind: UnitKind
    regions: tuple[Region, ...] = field(repr=False)
    layer: int | None = None
    expert: int | None = None
    reserved_bytes: int = 0
    """Size of a unit without regions: the host state, whose bytes are produced at capture time."""

    def __post_init__(self) -> None:
        foreign = [r.tensor for r in self.regions if r.unit != self.name]
        if foreign:
            raise ValueError(f"unit {self.name} was given regions of another unit: {foreign[:3]}")
        if (self.kind is UnitKind.EXPERT) != (self.expert is not None):
            raise ValueError(f"unit {self.name}: kind {self.kind.name} with expert={self.expert}")
        if bool(self.regions) == bool(self.reserved_bytes):
            raise ValueError(f"unit {self.name} needs regions or reserved_bytes, and not both")

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Byte offset of each region inside the capture."""
        offsets, cursor = [], 0
        for region in self.regions:
            offsets.append(cursor)
            cursor = align_up(cursor + region.nbytes)
        return tuple(offsets)

    @cached_property
    def nbytes(self) -> int:
        """Size of one capture, padding included; a multiple of ``ALIGNMENT_BYTES``."""
        if not self.regions:
            return align_up(self.reserved_bytes)
        return align_up(self.offsets[-1] + self.regions[-1].nbytes)


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """All units of one rank, in a fixed order. A unit's position is its number in arenas and messages."""

    units: tuple[Unit, ...]
    place: str = ""
    """Which parts this rank has of what other ranks have under the same names."""
    guide: str = ""
    """Where a checkpoint on disk has each tensor: the adapter's words, for whoever reads captures without it."""

    def __post_init__(self) -> None:
        names = [u.name for u in self.units]
        if len(set(names)) != len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise ValueError(f"units named twice: {twice[:5]}")

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Unit name to unit number."""
        return {u.name: i for i, u in enumerate(self.units)}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one full snapshot of this rank."""
        return sum(u.nbytes for u in self.units)

    def of_kind(self, kind: UnitKind) -> tuple[int, ...]:
        """Numbers of all units of one kind, in order."""
        return tuple(i for i, u in enumerate(self.units) if u.kind is kind)

    def with_host_bytes(self, nbytes: int) -> Inventory:
        """The same units, with room for ``nbytes`` more bytes in the host state."""
        units = (
            replace(u, reserved_bytes=u.reserved_bytes + nbytes) if u.kind is UnitKind.HOST else u for u in self.units
        )
        return replace(self, units=tuple(units))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that gives captured bytes their meaning; addresses and guide are left out."""
        digest = hashlib.sha256(self.place.encode())
        for unit in self.units:
            digest.update(f"{unit.name}|{unit.kind}|{unit.reserved_bytes}\n".encode())
            for r in unit.regions:
                digest.update(f"{r.tensor}|{r.role}|{r.dtype}|{r.start}|{r.nbytes}\n".encode())
        return digest.hexdigest()


def align_up(nbytes: int) -> int:
    """The next multiple of ``ALIGNMENT_BYTES``."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def total_bytes(units: Iterable[Unit]) -> int:
    """Bytes of one capture of each unit."""
    return sum(u.nbytes for u in units)
