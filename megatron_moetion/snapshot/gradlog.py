# SPDX-License-Identifier: Apache-2.0
"""What mode ``exact`` captures and logs: the state in slices that take turns, and each slice's gradient. Pure.

The state of all units is cut into ``period`` groups of equal bytes; a unit that lies across a cut becomes two slices,
so there are at most ``period`` - 1 more slices than units, however large some units are. Parameters that an optimizer
steps on as a whole, and those that share a scale, which follows from the whole in each step, are never cut. One that
lies in several units goes to the slice of the first. Groups are as equal as they allow, and may be empty. A slice's
gradient is a unit of its own, of kind ``LOG``; so is what a unit has beside parameters (router bias, counters), which
is captured in every snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.store.chains import always_of, log_units
from megatron_moetion.units import LOG_SUFFIX, Inventory, Region, Role, Unit, UnitKind

_CUT_ELEMENTS = 64
"""Cuts are at multiples of so many elements of a parameter, so that slices keep its alignment."""
_ELEMENT_ROLES = (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ, Role.MODEL, Role.REMAINDER, Role.GRAD)
_PARAMETER_ROLES = (*_ELEMENT_ROLES, Role.SCALE)


@dataclass(frozen=True, kw_only=True)
class GradientLog:
    """The units of one rank in mode ``exact``. Unit numbers are those of ``inventory``."""

    inventory: Inventory
    groups: tuple[tuple[int, ...], ...]
    """Slices of state that are captured together, by turn; as many groups as the period has iterations."""
    log_of: Mapping[int, int]
    """The ``LOG`` unit of each slice."""
    always: tuple[int, ...]
    """Units of every snapshot, gradients aside: host state, and buffers of units."""

    @property
    def state_bytes(self) -> int:
        """Bytes of one capture of every slice."""
        return sum(self.inventory.units[u].nbytes for u in self.log_of)

    @property
    def log_bytes(self) -> int:
        """Bytes of the gradients of one iteration."""
        return sum(self.inventory.units[u].nbytes for u in self.log_of.values())

    @property
    def group_bytes(self) -> tuple[int, ...]:
        """Bytes of one capture of each group."""
        return tuple(sum(self.inventory.units[u].nbytes for u in group) for group in self.groups)


@dataclass(frozen=True, kw_only=True)
class _Span:
    """One contiguous part of a parameter: its state and its gradient, element by element."""

    state: tuple[Region, ...]
    gradient: Region

    @property
    def elements(self) -> int:
        return self.state[0].nbytes // _itemsize(self.state[0])

    @property
    def bytes_an_element(self) -> int:
        return sum(_itemsize(r) for r in self.state)

    @property
    def together(self) -> str:
        return self.gradient.together

    def part(self, first: int, end: int) -> _Span:
        return _Span(state=tuple(_part(r, first, end) for r in self.state), gradient=_part(self.gradient, first, end))


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one slice takes as a whole: a span, or all spans that share scales."""

    spans: tuple[_Span, ...]
    scales: tuple[Region, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of the elements' state."""
        return sum(s.elements * s.bytes_an_element for s in self.spans)


def gradient_log(inventory: Inventory, period: int) -> GradientLog:
    """Cut an inventory for captures that come around every ``period`` (at least 1) iterations.

    ``UnsupportedState`` where a parameter has state and no gradient.
    """
    spans = {number: _spans(unit) for number, unit in enumerate(inventory.units)}
    parts_of = _uncut(inventory, spans)
    total = sum(s.elements * s.bytes_an_element for found in spans.values() for s in found)
    slices: list[tuple[Unit, int]] = []
    others: list[Unit] = []
    done = 0
    for number, unit in enumerate(inventory.units):
        rest = tuple(r for r in unit.regions if r.role not in _PARAMETER_ROLES)
        if rest or unit.kind is UnitKind.HOST:
            others.append(unit if not spans[number] else _buffers(unit, rest))
        parts = _by_group(parts_of[number], done, total, period)
        done += sum(part.nbytes for _, members in parts for part in members)
        for turn, (group, members) in enumerate(parts):
            name = unit.name if len(parts) == 1 else f"{unit.name}#{turn}"
            slices.append((_slice(unit, name, members), group))
            others.append(_log(name, unit, members))
    units = (*(s for s, _ in slices), *others)
    numbers = {u.name: i for i, u in enumerate(units)}
    log_of = log_units([(u.name, u.kind) for u in units])
    groups = [[numbers[s.name] for s, g in slices if g == group] for group in range(period)]
    return GradientLog(
        inventory=replace(inventory, units=units),
        groups=tuple(tuple(g) for g in groups),
        log_of=log_of,
        always=always_of([u.kind for u in units], log_of),
    )


def _spans(unit: Unit) -> list[_Span]:
    found: dict[tuple[str, int], list[Region]] = {}
    for region in unit.regions:
        if region.role in _ELEMENT_ROLES:
            found.setdefault((region.tensor, region.start), []).append(region)
    spans = []
    for (tensor, start), regions in found.items():
        gradients = [r for r in regions if r.role is Role.GRAD]
        if len(gradients) != 1:
            raise UnsupportedState(
                f"{tensor} from element {start}: mode 'exact' needs its gradient and found {len(gradients)}"
            )
        if len(regions) == 1:
            raise UnsupportedState(f"{tensor} from element {start}: there is a gradient and no state that it changes")
        spans.append(_Span(state=tuple(r for r in regions if r.role is not Role.GRAD), gradient=gradients[0]))
    return spans


def _uncut(inventory: Inventory, spans: Mapping[int, Sequence[_Span]]) -> dict[int, list[_Span | _Part]]:
    """Each unit's spans, those that share scales as one part of the first unit that has one of them."""
    members: dict[str, list[_Span]] = {}
    for span in (s for found in spans.values() for s in found):
        members.setdefault(span.together, []).append(span)
    scales: dict[str, list[Region]] = {}
    for region in (r for unit in inventory.units for r in unit.regions if r.role is Role.SCALE):
        scales.setdefault(region.together, []).append(region)
    parts: dict[int, list[_Span | _Part]] = {number: [] for number in spans}
    for number, found in spans.items():
        for span in found:
            if not span.together:
                parts[number].append(span)
            elif span.together in members:
                whole = members.pop(span.together)
                parts[number].append(_Part(spans=tuple(whole), scales=tuple(scales.pop(span.together, ()))))
    return parts


def _by_group(parts: Sequence[_Span | _Part], done: int, total: int, period: int) -> list[tuple[int, list[_Part]]]:
    """One unit's parts by group; ``done`` bytes of ``total`` come before them. Spans are cut, and wholes are not."""
    found: dict[int, list[_Part]] = {}
    for part in parts:
        if isinstance(part, _Part):
            middle = done + part.nbytes // 2
            found.setdefault(min(middle * period // total, period - 1), []).append(part)
            done += part.nbytes
            continue
        first = 0
        while first < part.elements:
            group = min(done * period // total, period - 1)
            room = -(-(group + 1) * total // period) - done
            end = first + -(-room // (part.bytes_an_element * _CUT_ELEMENTS)) * _CUT_ELEMENTS
            if group == period - 1 or part.elements - end < _CUT_ELEMENTS:
                end = part.elements
            found.setdefault(group, []).append(_Part(spans=(part.part(first, end),)))
            done += (end - first) * part.bytes_an_element
            first = end
    return list(found.items())


def _slice(unit: Unit, name: str, parts: Sequence[_Part]) -> Unit:
    regions = [r for part in parts for r in (*(r for s in part.spans for r in s.state), *part.scales)]
    return replace(unit, name=name, regions=tuple(replace(r, unit=name) for r in regions))


def _log(name: str, unit: Unit, parts: Sequence[_Part]) -> Unit:
    own = name + LOG_SUFFIX
    regions = tuple(replace(s.gradient, unit=own, at_once=True) for part in parts for s in part.spans)
    return Unit(name=own, kind=UnitKind.LOG, regions=regions, layer=unit.layer)


def _buffers(unit: Unit, regions: Sequence[Region]) -> Unit:
    name = f"{unit.name}.buffers"
    return Unit(name=name, kind=UnitKind.DENSE, layer=unit.layer, regions=tuple(replace(r, unit=name) for r in regions))


def _part(region: Region, first: int, end: int) -> Region:
    size = _itemsize(region)
    return replace(
        region,
        start=region.start + first,
        nbytes=(end - first) * size,
        address=region.address + first * size,
    )


def _itemsize(region: Region) -> int:
    return {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "int16": 2, "uint8": 1}[region.dtype]
