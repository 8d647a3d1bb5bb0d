# SPDX-License-Identifier: Apache-2.0
"""What an arena is like before anybody opens it: its identity, its specification and its layout. Pure.

The arena itself is in ``store/arena.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from megatron_moetion.arrays import Int64s
from megatron_moetion.coding import WHOLE, Part
from megatron_moetion.config import flag_of
from megatron_moetion.errors import NOT_OURS, CorruptArena, IdentityMismatch
from megatron_moetion.store.manifest import page_bytes
from megatron_moetion.store.sheet import sheet_of
from megatron_moetion.units import Inventory, UnitKind, align_up

FORMAT_VERSION = 3
HEADER_PREFIX_BYTES = 8 + 8 + 16  # magic, JSON length, BLAKE2b-128 of the JSON
_BLOCK_BYTES = 4096
_NAME = re.compile(r"rank(\d{5,})(?:\.\d+\+\d+\.\d+)?\.arena")
_SHAPE_BYTES = 8
"""Of each of the two digests of a shape."""
_SIZE_MAX = 1 << 48
"""Bytes, or slots. Sums of such sizes over all units of a rank fit in 64 bits."""
_RANKS_MAX = 1 << 17
"""Of a run: more than there are anywhere, and few enough to go through."""
_SPELLED = {name: flag_of(f"moetion_{name}") for name in ("run_id", "mode", "chunk_bytes", "period")}
"""Fields of the identity that are flags."""


@dataclass(frozen=True, kw_only=True)
class ArenaIdentity:
    """Whose state an arena holds. Arenas of one run differ in ``owner`` and, with it, ``layout``."""

    run_id: str
    owner: int
    world_size: int
    topology: str
    layout: str
    mode: str
    chunk_bytes: int
    period: int = 0
    """Of mode ``exact``; 0 in others."""
    format_version: int = FORMAT_VERSION
    fragment: int = 0
    """What of each capture the arena holds: see ``Part``. Arenas of one run may differ in it."""
    data: int = 1
    parity: int = 0


@dataclass(frozen=True, kw_only=True)
class ArenaSpec:
    """All that is needed to make an arena: identity, the owner's units, and slots as (bytes, count)."""

    identity: ArenaIdentity
    units: tuple[tuple[str, int, int], ...]
    """Name, kind and capture bytes of each unit, by unit number. Of whole captures, whatever part the arena holds."""
    slots: tuple[tuple[int, int], ...]
    """The same."""
    experts: int = 0
    """Of the owner's experts, how many a snapshot may hold: what the number of slots comes from. For messages."""
    sheet: str = ""
    """What the bytes of captures are, for a reader without the model: see ``store/sheet.py``."""

    @classmethod
    def of(
        cls, identity: ArenaIdentity, inventory: Inventory, copies: Mapping[str, int], experts: int = 0
    ) -> ArenaSpec:
        """Slots for ``copies[unit name]`` captures of each unit, pooled by size."""
        pools: Counter[int] = Counter()
        for unit in inventory.units:
            pools[unit.nbytes] += copies[unit.name]
        return cls(
            identity=identity,
            units=tuple((u.name, int(u.kind), u.nbytes) for u in inventory.units),
            slots=tuple(sorted(pools.items())),
            experts=experts,
            sheet=sheet_of(inventory),
        )

    @property
    def part(self) -> Part:
        """What of each capture the arena holds."""
        return Part(number=self.identity.fragment, data=self.identity.data, parity=self.identity.parity)

    def of_part(self, part: Part) -> ArenaSpec:
        """The specification of an arena that holds this part of the same captures."""
        identity = replace(self.identity, fragment=part.number, data=part.data, parity=part.parity)
        return replace(self, identity=identity)

    @property
    def name(self) -> str:
        """The arena's file name."""
        return arena_name(self.identity.owner, self.part)

    @property
    def stored_bytes(self) -> Int64s:
        """What a capture of each unit takes here, by unit."""
        part = self.part
        return np.array([part.stored_bytes(nbytes) for _, _, nbytes in self.units], dtype=np.int64)

    @property
    def pools(self) -> tuple[tuple[int, int], ...]:
        """Slots as they are here: bytes and count, by size."""
        if self.part.is_whole:
            return self.slots
        found: Counter[int] = Counter()
        for size, count in self.slots:
            found[self.part.stored_bytes(size)] += count
        return tuple(sorted(found.items()))

    @property
    def num_slots(self) -> int:
        """Slots in total."""
        return sum(count for _, count in self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        chunk_bytes = self.identity.chunk_bytes
        return _slots_start(self) + sum(count * _stride(size, chunk_bytes) for size, count in self.pools)

    @property
    def num_records(self) -> int:
        """The most records a page can need: one a slot; with gradient logs as many again, of captures of zeros."""
        return self.num_slots * (2 if any(kind == UnitKind.LOG for _, kind, _ in self.units) else 1)

    def to_json(self) -> bytes:
        """The header's document."""
        identity = dict(vars(self.identity))
        if self.part.is_whole:  # versions without fragments read it too
            for name in ("fragment", "data", "parity"):
                del identity[name]
        return json.dumps({**vars(self), "identity": identity}, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ArenaSpec:
        """Inverse of ``to_json``; raises ``CorruptArena`` on a document of another shape."""
        try:
            raw: dict[str, Any] = json.loads(data)
            found = cls(
                identity=ArenaIdentity(**raw["identity"]),
                units=tuple((str(n), int(UnitKind(k)), int(b)) for n, k, b in raw["units"]),
                slots=tuple((int(b), int(c)) for b, c in raw["slots"]),
                experts=int(raw.get("experts", 0)),
                sheet=str(raw["sheet"]),
            )
            for field in fields(ArenaIdentity):
                value = getattr(found.identity, field.name)
                if type(value).__name__ != field.type:
                    raise ValueError(f"{field.name} is {value!r}")
            sizes = [b for _, _, b in found.units] + [n for slot in found.slots for n in slot]
            if min(sizes, default=0) < 0 or found.identity.chunk_bytes < 1:
                raise ValueError("a size is negative")
            if max(*sizes, found.identity.chunk_bytes) > _SIZE_MAX:
                raise ValueError("a size is larger than any memory")
            Part.of(found.identity.fragment, found.identity.data, found.identity.parity)
            if problem := _contradiction(found):
                raise ValueError(problem)
        except NOT_OURS as error:
            raise CorruptArena(f"the arena header is not one of format {FORMAT_VERSION}: {error}") from error
        return found


@dataclass(frozen=True, kw_only=True)
class ArenaShape:
    """What of a specification follows from its owner, in some 40 bytes: for ranks that do not have all of it."""

    layout: str
    """The beginning of the layout's fingerprint."""
    slots: str
    """A digest."""
    experts: int

    @classmethod
    def of(cls, spec: ArenaSpec) -> ArenaShape:
        """The shape of such an arena."""
        slots = hashlib.blake2b(json.dumps(spec.slots).encode(), digest_size=_SHAPE_BYTES).hexdigest()
        return cls(layout=spec.identity.layout[: 2 * _SHAPE_BYTES], slots=slots, experts=spec.experts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Byte offsets inside an arena, slots by number. The chunk digests of a capture follow its bytes."""

    page_starts: tuple[int, int]
    page_area: int
    slot_starts: Int64s
    slot_sizes: Int64s
    pools: Mapping[int, tuple[int, int]]
    """By bytes of a capture: the first slot of that size, and how many there are."""
    nbytes: int

    @classmethod
    def of(cls, spec: ArenaSpec) -> Layout:
        """The layout that follows from a specification."""
        cursor = _slots_start(spec)
        area = _round(page_bytes(spec.num_records))
        header = cursor - 2 * area
        starts, sizes, pools = [], [], {}
        first = 0
        for size, count in spec.pools:
            stride = _stride(size, spec.identity.chunk_bytes)
            starts.append(cursor + stride * np.arange(count, dtype=np.int64))
            sizes.append(np.full(count, size, dtype=np.int64))
            pools[size] = (first, count)
            cursor += stride * count
            first += count
        return cls(
            page_starts=(header, header + area),
            page_area=area,
            slot_starts=np.concatenate([np.empty(0, dtype=np.int64), *starts]),
            slot_sizes=np.concatenate([np.empty(0, dtype=np.int64), *sizes]),
            pools=pools,
            nbytes=cursor,
        )


def arena_name(owner: int, part: Part = WHOLE) -> str:
    """File name of an arena inside a node's store: of one rank, and of the part of its captures."""
    suffix = "" if part.is_whole else f".{part.data}+{part.parity}.{part.number}"
    return f"rank{owner:05d}{suffix}.arena"


def owner_of(name: str) -> int | None:
    """The rank whose arena has this name; None where it is no arena's."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def num_chunks(nbytes: int, chunk_bytes: int) -> int:
    """Chunks of a capture."""
    return -(-nbytes // chunk_bytes)


def check_identity(found: ArenaSpec, ours: ArenaIdentity, shape: ArenaShape | None, path: str) -> None:
    """Raise ``IdentityMismatch``, naming both sides, unless an arena belongs to this run.

    ``ours`` is the identity of any rank of the run, ``shape`` that of the arena of ``found``'s owner.
    """
    mine, theirs = asdict(ours), asdict(found.identity)
    sides = [
        f"{_SPELLED.get(k, k)}: the arena has {theirs[k]!r}, this run has {mine[k]!r}"
        for k in mine
        if k not in ("owner", "layout", "fragment", "data", "parity") and mine[k] != theirs[k]
    ]
    if not sides and shape is not None:
        sides = _other_shape(ArenaShape.of(found), shape)  # where settings differ, this follows from them
    if sides:
        raise IdentityMismatch(
            f"{path} belongs to something else ({'; '.join(sides)}). Go back to what it was made with, take another "
            f"--moetion-run-id, or delete it"
        )


def _contradiction(spec: ArenaSpec) -> str | None:
    """Why there is no rank with such an arena."""
    identity, units = spec.identity, {name: UnitKind(kind) for name, kind, _ in spec.units}
    kept = {nbytes for nbytes, count in spec.slots if count}
    if not (0 <= identity.owner < _RANKS_MAX and 0 < identity.world_size <= _RANKS_MAX):
        return f"it is of rank {identity.owner} of {identity.world_size}; there are at most {_RANKS_MAX}"
    if len(units) != len(spec.units) or len(dict(spec.slots)) != len(spec.slots):
        return "a unit, or a size of slots, comes twice"
    if homeless := next((name for name, _, nbytes in spec.units if nbytes not in kept), None):
        return f"unit {homeless} has no slot"
    return None


def _slots_start(spec: ArenaSpec) -> int:
    return _round(HEADER_PREFIX_BYTES + len(spec.to_json())) + 2 * _round(page_bytes(spec.num_records))


def _stride(nbytes: int, chunk_bytes: int) -> int:
    """Bytes of a slot: a capture and its chunk digests."""
    return _round(nbytes + 8 * num_chunks(nbytes, chunk_bytes))


def _other_shape(found: ArenaShape, expected: ArenaShape) -> list[str]:
    """How two arenas of one owner differ, by what a user may have changed."""
    if found.layout != expected.layout:
        return ["layout: the model, or how it is spread over ranks, is another one"]
    if found.slots == expected.slots:
        return []
    if found.experts != expected.experts:
        return [
            f"room for {found.experts} experts a snapshot, this run wants {expected.experts}; one of "
            f"--moetion-[max-]experts-per-snapshot, -snapshot-bytes, -lost-token-budget differs"
        ]
    return ["slots: room for other captures than this run makes"]


def _round(nbytes: int) -> int:
    return -(-align_up(nbytes) // _BLOCK_BYTES) * _BLOCK_BYTES
