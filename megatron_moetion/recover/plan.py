# SPDX-License-Identifier: Apache-2.0
"""Where every rank's state comes from after a failure. Pure: what surveys found in, a plan or an explanation out.

All ranks agree on the newest iteration T that each of them can reach, from the iterations that each one reaches. Then
every owner orders what it needs to get there: for each unit the capture to load (in mode ``exact`` also the gradients
since then), the node to load it from, and the holders that lack it. Loading part of a state is never planned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_moetion.arrays import Flags, Int64s
from megatron_moetion.errors import understood
from megatron_moetion.recover.report import History, Summary
from megatron_moetion.recover.shared import ITERATIONS_MAX
from megatron_moetion.replicate.placement import Placement
from megatron_moetion.store.chains import base_of, log_units
from megatron_moetion.store.manifest import RECORD, Branch, Records
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
ORDER = np.dtype([("record", RECORD), ("node", "<i8"), ("lacking", "<u8")])
HOLDERS_MAX = 64
"""Bits of ``lacking``."""


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """What is loaded of one owner, and what travels for that. Made by the owner, and told to those concerned.

    ``table`` is a read-only array of ``ORDER``, sorted by unit and iteration: the capture (its ``slot`` says only
    whether it is one of zeros), the node that it is read from, and a bit for each of the owner's holders that lacks it.
    """

    owner: int
    table: np.ndarray[Any, np.dtype[np.void]]

    @property
    def records(self) -> Records:
        """The captures; of a ``LOG`` unit one for each iteration that is replayed, of other units one."""
        return Records(self.table["record"])

    @property
    def nodes(self) -> Int64s:
        """The node that each is read from."""
        found: Int64s = self.table["node"]
        return found

    def lacked_by(self, number: int) -> Flags:
        """Whether the owner's n-th holder lacks each."""
        found: Flags = (self.table["lacking"] >> np.uint64(number)) & np.uint64(1) == 1
        return found

    def to_bytes(self) -> bytes:
        """The table."""
        data: bytes = self.table.tobytes()
        return data

    @classmethod
    def from_bytes(cls, owner: int, data: bytes) -> Order:
        """Inverse of ``to_bytes``; ``ChannelError`` for bytes that are no table."""
        with understood("an order of captures"):
            return cls(owner=owner, table=np.frombuffer(data, dtype=ORDER))


def held_of(copies: Mapping[int, Records]) -> dict[int, set[int]]:
    """By unit: the iterations of one owner's captures on any node. ``copies``: its captures, by node."""
    found: dict[int, set[int]] = {}
    for records in copies.values():
        for unit, iteration in records.keys:
            found.setdefault(unit, set()).add(iteration)
    return found


def order_of(
    owner: int, chosen: Sequence[tuple[int, int]], copies: Mapping[int, Records], placement: Placement
) -> Order:
    """Of each chosen capture (unit, iteration) where it is loaded from: local memory, else the first node that has it.

    ``copies``: the owner's captures, by node.
    """
    home = placement.node_of[owner]
    places = {node: {key: row for row, key in enumerate(records.keys)} for node, records in copies.items()}
    nearest = sorted(places, key=lambda node: (node != home, node))
    holders = [placement.node_of[holder] for holder in placement.holders[owner]]
    assert len(holders) <= HOLDERS_MAX, f"{len(holders)} replicas"
    sources = [next(node for node in nearest if key in places[node]) for key in chosen]
    table = np.zeros(len(chosen), dtype=ORDER)
    table["node"] = sources
    table["lacking"] = [
        sum(1 << n for n, node in enumerate(holders) if key not in places.get(node, ())) for key in chosen
    ]
    for node in set(sources):
        rows = np.flatnonzero(table["node"] == node)
        table["record"][rows] = copies[node].table[[places[node][chosen[row]] for row in rows.tolist()]]
    return Order(owner=owner, table=table)


@dataclass(frozen=True, kw_only=True, eq=False)
class Leg:
    """Captures of ``owner`` that travel from rank ``source`` to rank ``target``: rows of the owner's order."""

    owner: int
    source: int
    target: int
    rows: Int64s

    @property
    def key(self) -> tuple[int, int, int]:
        """By this all ranks order what travels between two of them."""
        return (self.owner, self.source, self.target)


Keepers = Mapping[int, Mapping[int, int]]
"""By owner and node: the rank that keeps the owner's arena of that node open while the run starts."""


def keepers_of(kept: Iterable[Sequence[int]], placement: Placement) -> dict[int, dict[int, int]]:
    """From the owners of the arenas that each rank keeps open, by rank: see ``Keepers``."""
    found: dict[int, dict[int, int]] = {}
    for keeper, owners in enumerate(kept):
        for owner in owners:
            found.setdefault(owner, {})[placement.node_of[keeper]] = keeper
    return found


def fetches_of(order: Order, keepers: Keepers, placement: Placement) -> list[Leg]:
    """From other nodes to the owner."""
    home = placement.node_of[order.owner]
    return [
        Leg(
            owner=order.owner,
            source=keepers[order.owner][node],
            target=order.owner,
            rows=np.flatnonzero(order.nodes == node),
        )
        for node in np.unique(order.nodes).tolist()
        if node != home
    ]


def copies_of(order: Order, placement: Placement) -> list[Leg]:
    """From the owner to holders that lack a capture, so that redundancy is complete again."""
    legs = (
        Leg(owner=order.owner, source=order.owner, target=holder, rows=np.flatnonzero(order.lacked_by(number)))
        for number, holder in enumerate(placement.holders[order.owner])
    )
    return [leg for leg in legs if len(leg.rows)]


def legs_at(rank: int, legs: Iterable[Leg]) -> list[Leg]:
    """Those that a rank takes part in, in the order in which each pair of ranks carries them out."""
    return sorted((leg for leg in legs if rank in (leg.source, leg.target)), key=lambda leg: leg.key)
