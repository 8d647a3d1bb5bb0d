# SPDX-License-Identifier: Apache-2.0
"""The vocabulary: what training state is made of. No behaviour beyond validation.

A *unit* is the smallest piece of state captured together. A *region* is one contiguous span of one
tensor on this rank that belongs to one unit. A unit's *capture* is the bytes of its regions in order,
each region starting at a multiple of ``ALIGNMENT_BYTES``, the gaps filled with zeros.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

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
        strangers = [r.tensor for r in self.regions if r.unit != self.name]
        if strangers:
            raise ValueError(f"unit {self.name} was given regions of another unit: {strangers[:3]}")
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

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that gives captured bytes their meaning; addresses are left out."""
        digest = hashlib.sha256()
        for unit in self.units:
            digest.update(f"{unit.name}|{unit.kind}|{unit.reserved_bytes}\n".encode())
            for r in unit.regions:
                digest.update(f"{r.tensor}|{r.role}|{r.dtype}|{r.start}|{r.nbytes}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class TokenCounter:
    """Where one expert's token count lives: element ``position`` of an int64 ``at_once`` region."""

    expert: str
    """Name of the expert's unit."""
    unit: str
    """Name of the unit that the count is captured with."""
    tensor: str
    position: int


class StateAdapter(Protocol):
    """What the runtime needs from a training framework. Implemented in ``mcore/optimizer.py``."""

    def inventory(self) -> Inventory:
        """Every byte of training state on this rank, as units. Addresses stay valid as long as the adapter lives."""
        ...

    def token_counters(self) -> tuple[TokenCounter, ...]:
        """Tokens processed here since the run began, for each expert of this rank's layers.

        In the same order on all ranks that share the experts, also for experts whose optimizer state is on
        another of these ranks, so that this rank has no unit of them. Empty where tokens are not counted.
        """
        ...

    def moved(self) -> str:
        """Which tensor is no longer where the inventory says, for a person; empty while all are in place."""
        ...

    def counts_tokens(self) -> bool:
        """Whether this rank's token counts belong in sums over all ranks.

        Ranks that hold parts of the same experts by tensor parallelism count the same tokens: one of them says yes.
        """
        ...

    def expert_peers(self) -> tuple[int, ...]:
        """Global ranks that hold shards of the same experts as this rank, itself included."""
        ...

    def host_state(self) -> dict[str, Any]:
        """A JSON-able document of all other state; ``bytes`` values are allowed."""
        ...

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        """Put back what ``host_state`` returned."""
        ...

    def after_step(self) -> None:
        """Called once an iteration, after the optimizer step and before anything of it is captured."""
        ...

    def routed_tokens(self) -> Mapping[str, int]:
        """Tokens routed on this rank since the run began, dropped ones included, by the name of a layer's dense unit.

        Only layers whose routers tell.
        """
        ...

    def layer_tokens(self) -> Mapping[str, Mapping[str, float]]:
        """Tokens an iteration of late, on this rank, by the name of a layer's dense unit. Talks to no other rank.

        ``routed`` and ``processed``, to be added up over ranks; ``debt``: lost ones of the layer that are still to be
        made up for, the same on all ranks that run it. Only layers whose routers tell.
        """
        ...

    def recalibrate(self, lost: Mapping[str, int]) -> str:
        """After a recovery: raise the capacity of experts that lost tokens (unit name to tokens, over all ranks).

        Collective. Returns why capacity stays as it is, empty if it can be raised.
        """
        ...

    def state_hash(self) -> str:
        """Of all training state on this rank, host state included: equal if and only if every bit is."""
        ...

    def resync(self) -> None:
        """After a write-back into the regions: make model parameters agree with the optimizer's."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepNote:
    """What became of an iteration's optimizer step."""

    skipped: bool = False
    """There was none: gradients overflowed, and state is as it was."""
    problem: str = ""
    """Why it cannot be replayed (two steps, gradients gone), for a person; empty if it can."""


class StepReplayer(Protocol):
    """What mode ``exact`` needs beside ``StateAdapter``. Implemented in ``mcore/optimizer.py``.

    Its ``inventory`` has a region with ``Role.GRAD`` for each span of a parameter: the gradient that the step used,
    which must still be there right after it. The host unit has no room for steps yet: that depends on the period.
    """

    @property
    def bytes_a_step(self) -> int:
        """What the host state may grow by for each step that it tells of."""
        ...

    def remember(self, steps: int) -> None:
        """From now on the host state tells of the last ``steps`` ones."""
        ...

    def note_step(self, iteration: int) -> StepNote:
        """Enter what the optimizer was told in this iteration, at its end, into the host state."""
        ...

    def begin_replay(self, state: Mapping[str, Any]) -> None:
        """Take what the optimizer was told in recent iterations from a host state."""
        ...

    def replay(self, iteration: int) -> bool:
        """Take that iteration's step once more, with the gradients that are in the ``GRAD`` regions now.

        False if it was a skipped one, and nothing changed.
        """
        ...


def log_units(units: Sequence[tuple[str, UnitKind]]) -> dict[int, int]:
    """From names and kinds by unit number: for each unit whose gradient is logged, the unit of that log."""
    numbers = {name: number for number, (name, _) in enumerate(units)}
    return {
        numbers[name.removesuffix(LOG_SUFFIX)]: number
        for number, (name, kind) in enumerate(units)
        if kind is UnitKind.LOG
    }


def always_of(kinds: Sequence[UnitKind], log_of: Mapping[int, int]) -> tuple[int, ...]:
    """Units of every snapshot of mode ``exact`` beside gradients: neither part of a chain nor fixed for good."""
    members = {*log_of, *log_of.values()}
    return tuple(u for u, kind in enumerate(kinds) if u not in members and kind is not UnitKind.FROZEN)


def align_up(nbytes: int) -> int:
    """The next multiple of ``ALIGNMENT_BYTES``."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def total_bytes(units: Iterable[Unit]) -> int:
    """Bytes of one capture of each unit."""
    return sum(u.nbytes for u in units)
