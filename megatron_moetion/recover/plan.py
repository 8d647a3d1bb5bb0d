# SPDX-License-Identifier: Apache-2.0
"""Where every rank's state comes from after a failure. Pure: what surveys found in, a plan or an explanation out.

All ranks agree on the newest iteration T that each of them can reach, from the iterations that each one reaches. Then
every owner orders what it needs to get there: for each unit the capture to load (in mode ``exact`` also the gradients
since then), the place to load it from, or the places of as many different fragments as rebuild it, and the holders that
lack it. Loading part of a state is never planned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from megatron_moetion.arrays import Flags, Int64s
from megatron_moetion.coding import WHOLE, Part
from megatron_moetion.errors import understood
from megatron_moetion.recover.report import History, Summary
from megatron_moetion.recover.shared import ITERATIONS_MAX
from megatron_moetion.replicate.placement import Placement
from megatron_moetion.store.chains import base_of, log_units
from megatron_moetion.store.manifest import NO_RECORDS, RECORD, Branch, Records
from megatron_moetion.units import UnitKind

Units = Sequence[tuple[str, UnitKind]]
"""One rank's units by number: names and kinds."""
Held = Mapping[int, Collection[int]]
"""The iterations of a rank's captures that are left anywhere, by unit. A unit without any may be missing."""
Choose = Callable[[Units, Held, int], "list[tuple[int, int]] | str"]
"""The captures of one rank that lead to an iteration, as unit and iteration, sorted; or the text of which is missing.

Each mode has its own rule. Of experts that several ranks share, ``Held`` has what all their shards have.
"""

_RANKS_NAMED = 8
ORDER = np.dtype([("record", RECORD), ("sources", "<u8"), ("lacking", "<u8")])
BITS = 64
"""Of ``sources`` and of ``lacking``."""
_PLACE_WORDS = 4


# -- which iteration --------------------------------------------------------------------------------------------


def choose_same_iteration(units: Units, held: Held, iteration: int) -> list[tuple[int, int]] | str:
    """Every unit as it was at T; what never changes may be older (mode ``full``)."""
    return _choose_units(units, held, iteration, may_be_older=(UnitKind.FROZEN,))


def choose_newest_experts(units: Units, held: Held, iteration: int) -> list[tuple[int, int]] | str:
    """Experts as they were at the newest iteration up to T that all their shards have; the rest as at T."""
    return _choose_units(units, held, iteration, may_be_older=(UnitKind.FROZEN, UnitKind.EXPERT))


def _choose_units(
    units: Units, held: Held, iteration: int, may_be_older: Collection[UnitKind]
) -> list[tuple[int, int]] | str:
    chosen = []
    for number, (name, kind) in enumerate(units):
        found = _newest(held.get(number, ()), iteration, may_be_older=kind in may_be_older)
        if found is None:
            is_shared = kind is UnitKind.EXPERT and kind in may_be_older
            return f"no iteration of {name} that all its shards have" if is_shared else f"no copy of {name}"
        chosen.append((number, found))
    return chosen


def choose_chains(units: Units, held: Held, iteration: int) -> list[tuple[int, int]] | str:
    """Of every slice the newest capture from which all gradients to T are there, and these gradients."""
    chosen: list[tuple[int, int]] = []
    log_of = log_units(units)
    for number, (name, kind) in enumerate(units):
        if kind is UnitKind.LOG:
            continue
        found = held.get(number, ())
        if number in log_of:
            base = base_of(found, held.get(log_of[number], ()), iteration)
            if base is None:
                return f"no captures and gradients of {name} that reach it"
            chosen.extend((log_of[number], i) for i in range(base + 1, iteration + 1))
        else:
            base = _newest(found, iteration, may_be_older=kind is UnitKind.FROZEN)
            if base is None:
                return f"no copy of {name}"
        chosen.append((number, base))
    return sorted(chosen)


def _newest(found: Collection[int], iteration: int, *, may_be_older: bool) -> int | None:
    if iteration in found:
        return iteration
    return max((i for i in found if i <= iteration), default=None) if may_be_older else None


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The iterations that some ranks can reach, each of them. The same size for any number of ranks."""

    hosts: tuple[int, ...]
    """Of these every rank has its host state; the newest first."""
    iterations: tuple[int, ...]
    """Of these, the ones that every rank can reach."""
    lost: int = 0
    """Ranks of which no copy is left."""
    named: tuple[int, ...] = ()
    """The first of them."""
    vetoed: tuple[int, ...] = ()
    """Of ``hosts``, the ones that some rank has called unhealthy."""

    @classmethod
    def of(cls, rank: int, units: Units, held: Held, choose: Choose, vetoed: Collection[int] = ()) -> Reach:
        """One rank's."""
        host = next(number for number, (_, kind) in enumerate(units) if kind is UnitKind.HOST)
        hosts = sorted(held.get(host, ()), reverse=True)[:ITERATIONS_MAX]
        is_lost = not any(held.values())
        return cls(
            hosts=tuple(hosts),
            iterations=tuple(i for i in hosts if not isinstance(choose(units, held, i), str)),
            lost=int(is_lost),
            named=(rank,) if is_lost else (),
            vetoed=tuple(i for i in hosts if i in vetoed),
        )

    def followed_by(self, later: Reach) -> Reach:
        """This, of lower ranks, and that of later ranks, as one."""
        hosts = tuple(i for i in self.hosts if i in later.hosts)
        return Reach(
            hosts=hosts,
            iterations=tuple(i for i in self.iterations if i in later.iterations),
            lost=self.lost + later.lost,
            named=(*self.named, *later.named)[:_RANKS_NAMED],
            vetoed=tuple(i for i in hosts if i in self.vetoed or i in later.vetoed),
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Reach:
        """Inverse of ``to_json``."""
        with understood("the iterations that it can reach"):
            return cls(lost=raw["lost"], **{name: tuple(found) for name, found in raw.items() if name != "lost"})


@dataclass(frozen=True, kw_only=True)
class RecoveryPlan:
    """One consistent recovery, as far as all ranks agree on it."""

    iteration: int
    epoch: int
    """The epoch that begins with this recovery."""
    lineage: int
    branches: tuple[Branch, ...]
    """All recoveries of this run, this one included."""
    history_epoch: int
    """Epoch of the history that is recovered from."""
    safe: int
    """Newest iteration known to be whole on all replicas: kept until T is. T may be newer and on its owners only."""
    fruitless: int = 0
    """Recoveries in a row, before this one, from which the run has not come further than T."""
    vetoed: tuple[int, ...] = ()
    """Iterations from T on that all ranks can reach and some rank has called unhealthy. T is one as a last resort."""

    @property
    def history(self) -> History:
        """The history that begins with this recovery."""
        return History(lineage=self.lineage, epoch=self.epoch, stable=self.iteration, branches=self.branches)

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class NoPlan:
    """Why nothing can be recovered, for a person."""

    reason: str
    began: bool
    """Whether this run had trained."""


def plan_of(reach: Reach, newest: History, nonce: int) -> RecoveryPlan | None:
    """The newest iteration that all ranks can reach in this history; ``nonce``: see ``Branch``.

    One that a rank has vetoed is left out while there is another. What was stable could not be vetoed.
    """
    if not reach.iterations:
        return None
    vetoed = {i for i in reach.vetoed if i > newest.stable}
    iteration = next((i for i in reach.iterations if i not in vetoed), reach.iterations[0])
    branch = Branch(epoch=newest.epoch + 1, iteration=iteration, nonce=nonce)
    return RecoveryPlan(
        iteration=iteration,
        epoch=branch.epoch,
        lineage=newest.lineage,
        branches=(*newest.branches, branch),
        history_epoch=newest.epoch,
        safe=min(iteration, newest.stable),
        fruitless=newest.fruitless(iteration),
        vetoed=tuple(i for i in reach.iterations if i >= iteration and i in vetoed),
    )


def no_arena(summary: Summary) -> NoPlan:
    """Where no sound arena was found."""
    more = summary.problems - len(summary.texts)
    listed = "; ".join(summary.texts) + (f"; and {more} more" if more else "")
    return NoPlan(reason=listed or "no arena of this run was found on any node", began=summary.began)


def what_is_missing(rank: int, units: Units, held: Held, choose: Choose, iterations: Sequence[int]) -> dict[str, str]:
    """By iteration, as a JSON-able key: what this rank lacks of those that it cannot reach."""
    found = {str(i): choose(units, held, i) for i in iterations}
    return {i: f"rank {rank} has {missing}" for i, missing in found.items() if isinstance(missing, str)}


def no_plan(reach: Reach, missing: Mapping[str, str], *, began: bool) -> NoPlan:
    """Where there are arenas, and no iteration that every rank can reach. ``missing``: of all ranks."""
    texts = [f"iteration {i}: {missing[i]}" for i in sorted(missing, key=int, reverse=True)]
    without = f"no copy of rank(s) {_short(reach.named, reach.lost)} is left on any node" if reach.lost else None
    nothing = "there is no iteration of which every rank has its host state"
    return NoPlan(reason="; ".join(texts) or without or nothing, began=began)


def _short(named: Sequence[int], count: int) -> str:
    listed = ", ".join(str(r) for r in named)
    return listed + (f" and {count - len(named)} more" if count > len(named) else "")


# -- from where -------------------------------------------------------------------------------------------------


def custodian(owner: int, node: int, placement: Placement) -> int:
    """The rank that opens ``owner``'s arena on ``node``: the owner, its buddy, else a fixed rank of the node."""
    if placement.node_of[owner] == node:
        return owner
    for holder in placement.holders[owner]:
        if placement.node_of[holder] == node:
            return holder
    ranks = placement.ranks_on(node)
    return ranks[owner % len(ranks)]


Key = tuple[int, Part]
"""Of an arena on a node: its owner, and what of captures it has."""


class Place(NamedTuple):
    """Where some of an owner's captures are: on a node, whole or as one fragment each."""

    node: int
    part: Part = WHOLE


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """What is loaded of one owner, and what travels for that. Made by the owner, and told to those concerned.

    ``table`` is a read-only array of ``ORDER``, sorted by unit and iteration: the capture (its ``slot`` says only
    whether it is one of zeros), a bit for each of ``places`` that it is read from (one, or as many as have fragments
    that rebuild it), and a bit for each of the owner's holders that lacks it.
    """

    owner: int
    places: tuple[Place, ...]
    table: np.ndarray[Any, np.dtype[np.void]]

    @property
    def whole(self) -> Key:
        """The owner's own arena."""
        return (self.owner, WHOLE)

    @property
    def records(self) -> Records:
        """The captures; of a ``LOG`` unit one for each iteration that is replayed, of other units one."""
        return Records(self.table["record"])

    def read_from(self, number: int) -> Flags:
        """Whether each is read from the n-th place."""
        return _has_bit(self.table["sources"], number)

    def lacked_by(self, number: int) -> Flags:
        """Whether the owner's n-th holder lacks each."""
        return _has_bit(self.table["lacking"], number)

    def is_from(self, node: int) -> Flags:
        """Whether all of each is read on this node."""
        here = sum(1 << number for number, place in enumerate(self.places) if place.node == node)
        found: Flags = self.table["sources"] & ~np.uint64(here) == 0
        return found

    @property
    def is_rebuilt(self) -> Flags:
        """Whether each is rebuilt from fragments."""
        whole = sum(1 << number for number, place in enumerate(self.places) if place.part.is_whole)
        found: Flags = (self.table["sources"] & np.uint64(whole) == 0) & ~self.records.is_zero
        return found

    def to_bytes(self) -> bytes:
        """The places and the table."""
        words = np.array([[place.node, *astuple(place.part)] for place in self.places], dtype=np.int64)
        data: bytes = np.int64(len(self.places)).tobytes() + words.tobytes() + self.table.tobytes()
        return data

    @classmethod
    def from_bytes(cls, owner: int, data: bytes) -> Order:
        """Inverse of ``to_bytes``; ``ChannelError`` for bytes that are no order."""
        with understood("an order of captures"):
            count = int(np.frombuffer(data, dtype=np.int64, count=1)[0])
            words = np.frombuffer(data, dtype=np.int64, count=_PLACE_WORDS * count, offset=8).reshape(-1, _PLACE_WORDS)
            places = tuple(Place(node, Part.of(*part)) for node, *part in words.tolist())
            table = np.frombuffer(data, dtype=ORDER, offset=8 + words.nbytes)
            if len(places) > BITS or any(not mask or mask >> len(places) for mask in set(table["sources"].tolist())):
                raise ValueError("captures are read from nowhere")
            return cls(owner=owner, places=places, table=table)


def _has_bit(masks: Any, number: int) -> Flags:
    found: Flags = (masks >> np.uint64(number)) & np.uint64(1) == 1
    return found


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a capture is read from: one whole copy, or fragments that rebuild it."""

    places: tuple[Place, ...]
    row: int
    """Of the first place's records."""


def sources_of(copies: Mapping[Place, Records], home: int) -> dict[tuple[int, int], Source]:
    """By unit and iteration: where each capture is read from that can be had at all.

    From the first of these that there is: the node ``home``; another whole copy; fragments, the rows of the capture as
    they are before computed ones. Fragments rebuild a capture only together with others of the very same one: of one
    digest, and cut alike. A capture of zeros needs no bytes: any record of it will do.
    """
    found: dict[tuple[int, int], Source] = {}
    pieces: dict[tuple[Any, ...], dict[int, tuple[Place, int]]] = {}
    for place in sorted(copies, key=lambda p: (not p.part.is_whole, p.node != home, p.node, p.part.number)):
        records = copies[place]
        rows = zip(records.keys, records.table["digest"].tolist(), records.is_zero.tolist(), strict=True)
        for row, (key, digest, is_zero) in enumerate(rows):
            if key in found:
                continue
            if place.part.is_whole or is_zero:
                found[key] = Source(places=(place,), row=row)
                continue
            numbers = pieces.setdefault((key, digest, place.part.data, place.part.parity), {})
            numbers.setdefault(place.part.number, (place, row))
    for (key, _, data, _), numbers in pieces.items():
        if key not in found and len(numbers) >= data:
            chosen = sorted(numbers, key=lambda n: (numbers[n][0].node != home, n))[:data]
            found[key] = Source(places=tuple(numbers[n][0] for n in chosen), row=numbers[chosen[0]][1])
    return found


def held_of(copies: Mapping[Place, Records]) -> dict[int, set[int]]:
    """By unit: the iterations of one owner's captures that can be had. ``copies``: its captures, by place."""
    found: dict[int, set[int]] = {}
    for unit, iteration in sources_of(copies, -1):
        found.setdefault(unit, set()).add(iteration)
    return found


def order_of(
    owner: int, chosen: Sequence[tuple[int, int]], copies: Mapping[Place, Records], placement: Placement
) -> Order:
    """Of each chosen capture (unit, iteration) where it is loaded from: see ``sources_of``.

    ``copies``: the owner's captures, by place.
    """
    sources = sources_of(copies, placement.node_of[owner])
    places = tuple(sorted({place for key in chosen for place in sources[key].places}))
    seats = [
        Place(placement.node_of[h], part)
        for h, part in zip(placement.holders[owner], placement.parts[owner], strict=True)
    ]
    assert max(len(seats), len(places)) <= BITS, f"{len(seats)} holders, {len(places)} places"
    bits = {place: 1 << number for number, place in enumerate(places)}
    table = np.zeros(len(chosen), dtype=ORDER)
    table["sources"] = [sum(bits[place] for place in sources[key].places) for key in chosen]
    first = [sources[key].places[0] for key in chosen]
    for place in set(first):
        rows = [row for row, its in enumerate(first) if its == place]
        table["record"][rows] = copies[place].table[[sources[chosen[row]].row for row in rows]]
    wanted = list(zip(chosen, table["record"]["digest"].tolist(), strict=True))
    for number, seat in enumerate(seats):
        records = copies.get(seat, NO_RECORDS)
        there = set(zip(records.keys, records.table["digest"].tolist(), strict=True))
        table["lacking"] += np.array([0 if each in there else 1 << number for each in wanted], dtype=np.uint64)
    return Order(owner=owner, places=places, table=table)


@dataclass(frozen=True, kw_only=True, eq=False)
class Leg:
    """Captures of ``owner`` that travel from rank ``source`` to rank ``target``: rows of the owner's order.

    ``part``: what of them is at the end that is not the owner's.
    """

    owner: int
    source: int
    target: int
    rows: Int64s
    part: Part = WHOLE

    @property
    def out_of(self) -> Key:
        """The arena that they are read from."""
        return (self.owner, self.part if self.target == self.owner else WHOLE)

    @property
    def into(self) -> Key:
        """The arena that they are written to."""
        return (self.owner, WHOLE if self.target == self.owner else self.part)

    @property
    def key(self) -> tuple[int, int, int, Part]:
        """By this all ranks order what travels between two of them."""
        return (self.owner, self.source, self.target, self.part)


Keepers = Mapping[int, Mapping[Place, int]]
"""By owner and place: the rank that keeps the owner's arena of that node open while the run starts."""


def keepers_of(kept: Iterable[Iterable[Key]], placement: Placement) -> dict[int, dict[Place, int]]:
    """From owner and part of the arenas that each rank keeps open, by rank: see ``Keepers``."""
    found: dict[int, dict[Place, int]] = {}
    for keeper, arenas in enumerate(kept):
        for owner, part in arenas:
            found.setdefault(owner, {})[Place(placement.node_of[keeper], part)] = keeper
    return found


def with_parts_kept(placement: Placement, keepers: Keepers) -> Placement:
    """The placement in which holders go on with the fragments that they have, where no two have the same one.

    Ranks may have come back on other nodes of their group: then less has to travel.
    """
    if not placement.coding.is_on:
        return placement
    parts = []
    for owner, holders in enumerate(placement.holders):
        usual = [placement.coding.part(position) for position in range(len(holders))]
        there = keepers.get(owner, {})
        has = [{part for part in usual if Place(placement.node_of[h], part) in there} for h in holders]
        given = {position: part for position, part in enumerate(usual) if part in has[position]}
        for position in range(len(holders)):
            free = sorted(has[position] - set(given.values()))
            if position not in given and free:
                given[position] = free[0]
        left = [part for part in usual if part not in given.values()]
        parts.append(tuple(given[p] if p in given else left.pop(0) for p in range(len(holders))))
    return replace(placement, parts=tuple(parts))


def fetches_of(order: Order, keepers: Keepers, placement: Placement) -> list[Leg]:
    """From other nodes to the owner; of fragments also from its own."""
    home = placement.node_of[order.owner]
    return [
        Leg(
            owner=order.owner,
            source=keepers[order.owner][place],
            target=order.owner,
            rows=np.flatnonzero(order.read_from(number)),
            part=place.part,
        )
        for number, place in enumerate(order.places)
        if place != Place(home, WHOLE)
    ]


def copies_of(order: Order, placement: Placement) -> list[Leg]:
    """From the owner to holders that lack a capture, so that redundancy is complete again."""
    holders = zip(placement.holders[order.owner], placement.parts[order.owner], strict=True)
    legs = (
        Leg(
            owner=order.owner,
            source=order.owner,
            target=holder,
            rows=np.flatnonzero(order.lacked_by(number)),
            part=part,
        )
        for number, (holder, part) in enumerate(holders)
    )
    return [leg for leg in legs if len(leg.rows)]


def legs_at(rank: int, legs: Iterable[Leg]) -> list[Leg]:
    """Those that a rank takes part in, in the order in which each pair of ranks carries them out."""
    return sorted((leg for leg in legs if rank in (leg.source, leg.target)), key=lambda leg: leg.key)
