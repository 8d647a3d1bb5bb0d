# SPDX-License-Identifier: Apache-2.0
"""From the captures of one rank to its part of a checkpoint: its state at an iteration, a little of it at a time.

Without a gradient log each unit is complete by itself: it is copied out of the arena, verified, written, and
forgotten. With one (mode ``exact``) so are units that share a tensor, whose steps are replayed in place in between.
Nothing of another rank is needed, so several processes may write several ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from megatron_moetion.arrays import Bytes
from megatron_moetion.coding import FRAME_BYTES
from megatron_moetion.errors import ConfigError, CorruptArena
from megatron_moetion.export.survey import Owner
from megatron_moetion.framework import StepReplayer
from megatron_moetion.mcore.offline import require_replayable
from megatron_moetion.recover.plan import Place, sources_of
from megatron_moetion.recover.rollforward import roll_forward
from megatron_moetion.recover.survey import intact
from megatron_moetion.snapshot.codec import Codec
from megatron_moetion.snapshot.digest import chunk_spans, digest_of
from megatron_moetion.snapshot.host_state import decode
from megatron_moetion.snapshot.packer import HostPool, Packer
from megatron_moetion.store.chains import log_units
from megatron_moetion.store.manifest import Record, Records
from megatron_moetion.store.sheet import Span, has_scales
from megatron_moetion.units import Inventory, Region, Role, Unit, UnitKind

ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int16": 2, "uint8": 1,
              "bool": 1}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Stretch:
    """Elements from ``start`` on of one tensor: the bytes of each role that is captured of it, the gradient's too.

    ``entry``: that of the rank's guide. ``scales``: by their names in the optimizer, fp32 of one element.
    """

    entry: Mapping[str, Any]
    start: int
    arrays: Mapping[Role, Bytes]
    dtypes: Mapping[Role, str]
    scales: Mapping[str, Bytes]


MakeReplayer = Callable[[Owner, list[Stretch], Mapping[str, Any]], AbstractContextManager[StepReplayer]]
"""From what one rank's optimizers step on, and the adapter's host state; left when the steps are taken."""


class Part(Protocol):
    """Where a rank's state goes."""

    def add(self, stretch: Stretch) -> None:
        """Take it now: its memory is used again."""
        ...

    def add_rank(self, owner: Owner, state: Mapping[str, Any]) -> None:
        """Take what is no tensor; ``state``: the adapter's host state."""
        ...


def write_rank(owner: Owner, iteration: int, part: Part, pool: HostPool, make_replayer: MakeReplayer) -> int:
    """Give one rank's state at ``iteration`` to ``part``; returns how many optimizer steps were replayed.

    Captures are verified once more after they were copied. ``CorruptArena`` where one has changed, ``ConfigError`` for
    steps that cannot be replayed here.
    """
    refuse(owner)
    chosen = Chosen(owner, pool)
    (host_unit,) = (u for u, (_, kind) in enumerate(owner.units) if kind is UnitKind.HOST)
    (record,) = (r for r in chosen.records if r.unit == host_unit)
    content = bytes(chosen.payload(record.slot))
    chosen.require_intact([record], pool)
    state = decode(content)["adapter"]

    def write(units: list[int]) -> int:
        """These units; nothing of them is left in memory."""
        memory, steps = _Memory(owner, units), 0
        records = [replace(r, unit=units.index(r.unit)) for r in chosen.records if r.unit in set(units)]
        packer = Packer(memory.inventory, owner.sources[0].arena.spec.identity.chunk_bytes, pool, None)
        if log_of := log_units([owner.units[u] for u in units]):
            with make_replayer(owner, memory.stretches(is_stepped=True), state) as replayer:
                steps = roll_forward(packer, chosen, records, log_of=log_of, to=iteration, replayer=replayer)
        else:
            for each in records:
                packer.scatter(each.unit, chosen.payload(each.slot))
        chosen.require_intact(records, pool)
        for stretch in memory.stretches():
            part.add(stretch)
        return steps

    replayed = max((write(units) for units in batches(owner)), default=0)
    part.add_rank(owner, state)
    return replayed


def refuse(owner: Owner) -> None:
    """``ConfigError`` where the steps since a rank's captures cannot be replayed in another process."""
    if not log_units(owner.units):
        return
    if has_scales(owner.sheet):
        raise ConfigError(
            f"rank {owner.rank} has captures and logged gradients (mode 'exact') of an optimizer that keeps its state "
            f"in less than fp32: how its steps round is known on its own machines only; restart the run there"
        )
    require_replayable(owner.sheet.guide["optimizers"])


def batches(owner: Owner) -> Iterator[list[int]]:
    """Units that are put together at a time, by number.

    Those that share a tensor, where steps are replayed: a step of it is taken in one piece, as in training. All, where
    there are scales: one may be in another unit than what it belongs to.
    """
    units = [unit for unit, (_, kind) in enumerate(owner.units) if kind is not UnitKind.HOST]
    if has_scales(owner.sheet):
        yield units
    elif log_units(owner.units):
        yield from _sharing_tensors(owner, units)
    else:
        yield from ([unit] for unit in units)


def memory_bytes(owner: Owner) -> int:
    """What ``write_rank`` holds at most of this rank's state. What is rebuilt is held twice."""
    units = owner.sources[0].arena.spec.units
    has_fragments = any(not source.arena.spec.part.is_whole for source in owner.sources)
    twice = max(nbytes for _, _, nbytes in units) if has_fragments else 0
    return twice + max((sum(units[u][2] for u in batch) for batch in batches(owner)), default=0)


def _sharing_tensors(owner: Owner, units: Sequence[int]) -> list[list[int]]:
    found: list[tuple[set[str], list[int]]] = []
    for unit in units:
        tensors, together = {span.tensor for span in owner.sheet.units[unit]}, [unit]
        others = []
        for its_tensors, its_units in found:
            if its_tensors.isdisjoint(tensors):
                others.append((its_tensors, its_units))
            else:
                tensors, together = tensors | its_tensors, its_units + together
        found = [*others, (tensors, sorted(together))]
    return [together for _, together in found]


class _Memory:
    """Some of a rank's units, in arrays by tensor and role."""

    def __init__(self, owner: Owner, units: Sequence[int]) -> None:
        self._owner = owner
        self._numbers: Mapping[str, int] = owner.sheet.guide["tensors"]
        self._spans: dict[tuple[str, Role], list[Span]] = defaultdict(list)
        for span in (span for unit in units for span in owner.sheet.units[unit]):
            self._spans[span.tensor, span.role].append(span)
        self._arrays: dict[tuple[str, Role], tuple[int, Bytes]] = {}
        for key, spans in self._spans.items():
            merged = _merged(spans)
            first, last = merged[0][0], merged[-1][1]
            self._arrays[key] = first, np.zeros((last - first) * ITEM_BYTES[spans[0].dtype], dtype=np.uint8)
        self.inventory = Inventory(units=tuple(self._unit(number) for number in units))

    def stretches(self, *, is_stepped: bool = False) -> list[Stretch]:
        """What is here of each tensor that a checkpoint has. ``is_stepped``: what optimizers step on, and nothing else.

        The roles of one stretch are of one length, except that buffers and frozen weights stand alone.
        """
        roles: dict[str, dict[Role, str]] = defaultdict(dict)
        for (tensor, role), spans in self._spans.items():
            if role is not Role.SCALE:
                roles[tensor][role] = spans[0].dtype
        found, scales = [], self._scales()
        for tensor, dtypes in roles.items():
            if tensor not in self._numbers:
                continue  # counts of tokens
            entry = self._owner.sheet.guide["parameters"][self._numbers[tensor]]
            if entry["link"] is None if is_stepped else not entry["views"]:
                continue
            leading = next(role for role in dtypes if role is not Role.GRAD)
            for start, end in _merged(self._spans[tensor, leading]):
                arrays = {r: self._bytes(tensor, r, dtype, start, end) for r, dtype in dtypes.items()}
                found.append(
                    Stretch(
                        entry=entry, start=start, arrays=arrays, dtypes=dtypes, scales=scales[self._numbers[tensor]]
                    )
                )
        return found

    def _scales(self) -> dict[int, dict[str, Bytes]]:
        """By parameter. They are named after one of its tensors, and the state that they belong to."""
        found: dict[int, dict[str, Bytes]] = defaultdict(dict)
        for (name, role), (_, array) in self._arrays.items():
            if role is Role.SCALE:
                tensor, *state = name.rsplit(".", 2)
                found[self._numbers[tensor]][".".join(state)] = array
        return found

    def _unit(self, number: int) -> Unit:
        name, kind = self._owner.units[number]
        nbytes = self._owner.sources[0].arena.spec.units[number][2]
        regions = tuple(
            Region(
                unit=name,
                tensor=span.tensor,
                role=span.role,
                dtype=span.dtype,
                start=span.start,
                nbytes=span.nbytes,
                address=self._bytes(
                    span.tensor, span.role, span.dtype, span.start, span.start + span.nbytes // ITEM_BYTES[span.dtype]
                ).ctypes.data,
                at_once=kind is UnitKind.LOG,
            )
            for span in self._owner.sheet.units[number]
        )
        expert = 0 if kind is UnitKind.EXPERT else None
        unit = Unit(name=name, kind=kind, regions=regions, expert=expert, reserved_bytes=0 if regions else nbytes)
        if unit.nbytes != nbytes:
            raise CorruptArena(f"unit {name} of rank {self._owner.rank} has {nbytes} bytes, its sheet {unit.nbytes}")
        return unit

    def _bytes(self, tensor: str, role: Role, dtype: str, start: int, end: int) -> Bytes:
        """Elements [start, end) of a tensor in this role."""
        first, array = self._arrays[tensor, role]
        size = ITEM_BYTES[dtype]
        return array[(start - first) * size : (end - first) * size]


class Chosen:
    """The captures of an owner that lead to T, from several arenas perhaps, under slot numbers of their own."""

    def __init__(self, owner: Owner, pool: HostPool) -> None:
        self._owner = owner
        self._pool = pool
        arenas = [source.arena for source in owner.sources]
        self._places = [{key: row for row, key in enumerate(source.records.keys)} for source in owner.sources]
        copies = {Place(n, arena.spec.part): owner.sources[n].records for n, arena in enumerate(arenas)}
        sources = sources_of(copies, -1)
        self._sources = [tuple(place.node for place in sources[key].places) for key in owner.chosen]
        """The numbers of the sources of each: one, or as many as have fragments that rebuild it."""
        self._codecs: dict[tuple[int, int], Codec] = {}
        self._found = [self._record(numbers[0], key) for numbers, key in zip(self._sources, owner.chosen, strict=True)]
        self.records = [
            record if record.is_zero else replace(record, slot=number) for number, record in enumerate(self._found)
        ]

    def payload(self, slot: int) -> Bytes:
        """See ``Payloads``. What is rebuilt from fragments is the caller's alone, and verified."""
        numbers, record = self._sources[slot], self._found[slot]
        arenas = [self._owner.sources[number].arena for number in numbers]
        if arenas[0].spec.part.is_whole:
            return arenas[0].payload(record.slot)
        part = arenas[0].spec.part
        code = (part.data, part.parity)
        codec = self._codecs[code] = self._codecs.get(code) or Codec(*code)
        rows = {
            arena.spec.part.number: arena.payload(self._record(number, record.key).slot)[FRAME_BYTES:]
            for number, arena in zip(numbers, arenas, strict=True)
        }
        capture = np.empty(arenas[0].spec.units[record.unit][2], dtype=np.uint8)
        codec.restore(rows, 0, capture)
        address, size = (np.array([n], dtype=np.int64) for n in (capture.ctypes.data, capture.nbytes))
        spans = chunk_spans(address, size, arenas[0].spec.identity.chunk_bytes)
        digests = np.empty(len(spans), dtype=np.uint64)
        self._pool.digest(spans, digests)
        if digest_of(self._pool, digests.view(np.uint8)) != record.digest:
            raise _changed(", ".join(arena.name for arena in arenas))
        return capture

    def require_intact(self, records: Sequence[Record], pool: HostPool) -> None:
        """``CorruptArena`` where one of these has changed since it was read."""
        slots = {record.slot for record in records if not record.is_zero}
        for number, source in enumerate(self._owner.sources):
            if not source.arena.spec.part.is_whole:
                continue
            used = [self._found[slot] for slot in slots if self._sources[slot] == (number,)]
            if used and not intact(source.arena, Records.of(used), pool).all():
                raise _changed(source.arena.name)

    def _record(self, number: int, key: tuple[int, int]) -> Record:
        """Of this source."""
        return self._owner.sources[number].records[self._places[number][key]]


def _changed(name: str) -> CorruptArena:
    return CorruptArena(
        f"{name}: captures changed while they were read, so a process still writes to them; run the command again, or "
        f"end the run first"
    )


def _merged(spans: list[Span]) -> list[tuple[int, int]]:
    """As stretches without holes: first element and end of each, in order."""
    found: list[tuple[int, int]] = []
    for span in sorted(spans, key=lambda s: s.start):
        end = span.start + span.nbytes // ITEM_BYTES[span.dtype]
        if found and span.start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((span.start, end))
    return found
