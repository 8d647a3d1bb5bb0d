# SPDX-License-Identifier: Apache-2.0
"""All tensors of a run in this process's memory, whole over data parallelism, filled rank by rank from captures.

A parameter has one array for each role (main value, moments), as long as the model-parallel part of it that a rank
computes with. Each data parallel rank's shard is a span of that array. So captures are written where they belong, and
steps are replayed in place (mode ``exact``): besides the state itself there are only one rank's gradients in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_moetion.arrays import Bytes
from megatron_moetion.errors import ConfigError, CorruptArena
from megatron_moetion.export.survey import Found, Owner
from megatron_moetion.framework import StepReplayer
from megatron_moetion.recover.rollforward import roll_forward
from megatron_moetion.recover.survey import intact
from megatron_moetion.snapshot.host_state import decode
from megatron_moetion.snapshot.packer import HostPool, Packer
from megatron_moetion.store.chains import log_units
from megatron_moetion.store.manifest import Records
from megatron_moetion.store.sheet import Span
from megatron_moetion.units import Inventory, Region, Role, Unit, UnitKind

ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int16": 2, "uint8": 1,
              "bool": 1}  # fmt: skip
_EXPORTED = (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ, Role.WEIGHT, Role.BUFFER, Role.GRAD)
Key = tuple[str, tuple[int, ...]]
"""Of a parameter: the key that a checkpoint has for its first view, and where in it that view begins."""


@dataclass(eq=False)
class Whole:
    """One parameter or buffer, over all ranks. ``guide``: its entry in a rank's guide."""

    guide: Mapping[str, Any]
    arrays: dict[Role, Bytes] = field(default_factory=dict)
    dtypes: dict[Role, str] = field(default_factory=dict)
    covered: dict[Role, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """Spans of bytes that captures have filled."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """A stretch of a tensor that one rank's optimizer steps on: the bytes of each role, the gradient's too."""

    link: int
    group: int
    arrays: Mapping[Role, Bytes]
    dtypes: Mapping[Role, str]


MakeReplayer = Callable[[Owner, list[Held], Mapping[str, Any]], StepReplayer]
"""From what one rank holds and the adapter's host state."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Assembled:
    """The state at T. ``hosts``: each rank's host state."""

    wholes: Mapping[Key, Whole]
    hosts: tuple[Mapping[str, Any], ...]
    replayed_steps: int
    nbytes: int


class Assembly:
    """Fills arrays rank by rank; ``finish`` once all ranks are in."""

    def __init__(self, found: Found, pool: HostPool, make_replayer: MakeReplayer) -> None:
        self._found = found
        self._pool = pool
        self._make_replayer = make_replayer
        self._wholes: dict[Key, Whole] = {}
        self._hosts: list[Mapping[str, Any]] = []
        self._replayed = 0

    def add(self, owner: Owner) -> None:
        """One rank's captures, verified once more after they were copied. ``CorruptArena`` where one has changed."""
        memory = _Memory(owner, self._wholes)
        packer = Packer(memory.inventory, self._found.identity.chunk_bytes, self._pool, None)
        try:
            self._write(owner, memory, packer)
        finally:
            packer.close()

    def finish(self) -> Assembled:
        """Everything; ``CorruptArena`` where spans of a parameter are missing."""
        for (name, _), whole in self._wholes.items():
            for role, spans in whole.covered.items():
                end = 0
                for start, stop in sorted(spans):
                    if start > end:
                        break
                    end = max(end, stop)
                if end != whole.arrays[role].nbytes:
                    raise CorruptArena(f"no rank has all of the {role.name} of {name}: it ends at byte {end}")
        nbytes = sum(a.nbytes for whole in self._wholes.values() for a in whole.arrays.values())
        return Assembled(wholes=self._wholes, hosts=tuple(self._hosts), replayed_steps=self._replayed, nbytes=nbytes)

    def _write(self, owner: Owner, memory: _Memory, packer: Packer) -> None:
        chosen = _Chosen(owner)
        (host_unit,) = (u for u, (_, kind) in enumerate(owner.units) if kind is UnitKind.HOST)
        host = decode(bytes(chosen.payload(next(r.slot for r in chosen.records if r.unit == host_unit))))
        records = [r for r in chosen.records if r.unit != host_unit]
        if log_of := log_units(owner.units):
            replayer = self._make_replayer(owner, memory.held(), host["adapter"])
            to = self._found.iteration
            steps = roll_forward(packer, chosen, records, log_of=log_of, to=to, replayer=replayer)
            self._replayed = max(self._replayed, steps)
        else:
            for record in records:
                packer.scatter(record.unit, chosen.payload(record.slot))
        for number, source in enumerate(owner.sources):
            if not intact(source.arena, chosen.of_source(number), self._pool).all():
                raise CorruptArena(
                    f"{source.arena.name}: captures changed while they were read, so a process still writes to them; "
                    f"run the command again, or end the run first"
                )
        self._hosts.append(host)


class _Memory:
    """One rank's regions, in the arrays of the whole parameters."""

    def __init__(self, owner: Owner, wholes: dict[Key, Whole]) -> None:
        self._owner = owner
        self._wholes = wholes
        self._guide = owner.sheet.guide
        self._scratch: dict[tuple[str, Role], tuple[int, Bytes]] = {}
        self._spans: dict[tuple[str, Role], list[Span]] = defaultdict(list)
        for spans in owner.sheet.units:
            for span in spans:
                if span.role not in _EXPORTED:
                    raise ConfigError(
                        f"rank {owner.rank} has a {span.role.name} of {span.tensor}: the state of a precision-aware "
                        f"optimizer, or of scaled moments, cannot be exported yet"
                    )
                self._spans[span.tensor, span.role].append(span)
        self.inventory = Inventory(
            units=tuple(self._unit(number, spans) for number, spans in enumerate(owner.sheet.units))
        )

    def held(self) -> list[Held]:
        """What the rank's optimizers step on, each stretch of a tensor once."""
        roles: dict[str, dict[Role, str]] = defaultdict(dict)
        for (tensor, role), spans in self._spans.items():
            roles[tensor][role] = spans[0].dtype
        found = []
        for tensor, dtypes in roles.items():
            for start, end in _merged(self._spans.get((tensor, Role.MASTER), [])):
                entry = self._entry(tensor)
                assert entry is not None, f"{tensor} has main values and is not in the guide"
                arrays = {r: self._bytes(tensor, r, dtype, start, end) for r, dtype in dtypes.items()}
                found.append(Held(link=entry["link"], group=entry["group"], arrays=arrays, dtypes=dtypes))
        return found

    def _unit(self, number: int, spans: tuple[Span, ...]) -> Unit:
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
                address=self._fill(span).ctypes.data,
                at_once=kind is UnitKind.LOG,
            )
            for span in spans
        )
        expert = 0 if kind is UnitKind.EXPERT else None
        unit = Unit(name=name, kind=kind, regions=regions, expert=expert, reserved_bytes=0 if regions else nbytes)
        if unit.nbytes != nbytes:
            raise CorruptArena(f"unit {name} of rank {self._owner.rank} has {nbytes} bytes, its sheet {unit.nbytes}")
        return unit

    def _fill(self, span: Span) -> Bytes:
        """The memory of a span, which is noted as filled."""
        size = ITEM_BYTES[span.dtype]
        end = span.start + span.nbytes // size
        if (whole := self._whole(span.tensor)) is not None and span.role is not Role.GRAD:
            whole.covered[span.role].append((span.start * size, end * size))
        return self._bytes(span.tensor, span.role, span.dtype, span.start, end)

    def _bytes(self, tensor: str, role: Role, dtype: str, start: int, end: int) -> Bytes:
        """Elements [start, end) of a tensor in this role."""
        size = ITEM_BYTES[dtype]
        whole = self._whole(tensor)
        if whole is None or role is Role.GRAD:  # of this rank alone, and for a short while
            if (tensor, role) not in self._scratch:
                spans = _merged(self._spans[tensor, role])
                first, last = spans[0][0], spans[-1][1]
                self._scratch[tensor, role] = (first, np.zeros((last - first) * size, dtype=np.uint8))
            first, array = self._scratch[tensor, role]
            return array[(start - first) * size : (end - first) * size]
        if role not in whole.arrays:
            whole.arrays[role] = np.zeros(whole.guide["numel"] * size, dtype=np.uint8)
            whole.dtypes[role] = dtype
        return whole.arrays[role][start * size : end * size]

    def _whole(self, tensor: str) -> Whole | None:
        """None for what a checkpoint does not have (counts of tokens)."""
        entry = self._entry(tensor)
        if entry is None or not entry["views"]:
            return None
        first = entry["views"][0]
        return self._wholes.setdefault((first["key"], tuple(first["global_offset"])), Whole(entry))

    def _entry(self, tensor: str) -> Mapping[str, Any] | None:
        number = self._guide["tensors"].get(tensor)
        found: Mapping[str, Any] | None = None if number is None else self._guide["parameters"][number]
        return found


class _Chosen:
    """The captures of an owner that lead to T, from several arenas perhaps, under slot numbers of their own."""

    def __init__(self, owner: Owner) -> None:
        places = [{key: row for row, key in enumerate(source.records.keys)} for source in owner.sources]
        self.sources = [next(n for n, keys in enumerate(places) if key in keys) for key in owner.chosen]
        """The number of the source of each."""
        self._owner = owner
        self._found = [
            owner.sources[n].records[places[n][key]] for n, key in zip(self.sources, owner.chosen, strict=True)
        ]
        self.records = [
            record if record.is_zero else replace(record, slot=number) for number, record in enumerate(self._found)
        ]

    def payload(self, slot: int) -> Bytes:
        """See ``Payloads``."""
        return self._owner.sources[self.sources[slot]].arena.payload(self._found[slot].slot)

    def of_source(self, number: int) -> Records:
        """What is read from one arena, as that has it."""
        return Records.of([r for n, r in zip(self.sources, self._found, strict=True) if n == number])


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
