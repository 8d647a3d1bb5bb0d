# SPDX-License-Identifier: Apache-2.0
"""The plans of all ranks of a run in one process, put together: what each rank does by itself in a real start."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, cast

from support import POOL

from megatron_moetion.coding import WHOLE
from megatron_moetion.recover.plan import (
    Choose,
    Key,
    Leg,
    NoPlan,
    Order,
    Reach,
    RecoveryPlan,
    Units,
    choose_newest_experts,
    copies_of,
    custodian,
    fetches_of,
    held_of,
    keepers_of,
    legs_at,
    no_arena,
    no_plan,
    order_of,
    plan_of,
    what_is_missing,
    with_parts_kept,
)
from megatron_moetion.recover.report import ArenaReport, History, Summary, of_history
from megatron_moetion.recover.restore import Mover
from megatron_moetion.recover.shared import captured_at, common, iterations_of, words_of
from megatron_moetion.replicate.channel import Channel
from megatron_moetion.replicate.placement import Placement
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Branch, Records, in_history
from megatron_moetion.store.retention import Retention
from megatron_moetion.units import UnitKind


@dataclass(frozen=True, kw_only=True)
class Left:
    """An arena that is left on a node."""

    node: int
    report: ArenaReport


@dataclass(frozen=True, kw_only=True, order=True)
class Choice:
    """One capture to be loaded."""

    unit: int
    iteration: int
    node: int
    digest: int
    tokens: int
    is_zero: bool


@dataclass(frozen=True, kw_only=True, order=True)
class Transfer:
    """One capture of ``owner`` that travels."""

    owner: int
    unit: int
    iteration: int
    source: int
    target: int


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """What all ranks have agreed on, and the orders of all owners."""

    plan: RecoveryPlan
    placement: Placement
    orders: Mapping[int, Order]
    fetch_legs: Sequence[Leg]
    copy_legs: Sequence[Leg]
    captured_at: Sequence[Mapping[str, int]]
    """By rank: of the experts that it shares with others."""

    @property
    def iteration(self) -> int:
        return self.plan.iteration

    @property
    def epoch(self) -> int:
        return self.plan.epoch

    @property
    def history_epoch(self) -> int:
        return self.plan.history_epoch

    @property
    def safe(self) -> int:
        return self.plan.safe

    @property
    def branches(self) -> tuple[Branch, ...]:
        return self.plan.branches

    @property
    def choices(self) -> list[list[Choice]]:
        """By owner."""
        return [
            [
                Choice(unit=r.unit, iteration=r.iteration, node=node, digest=r.digest, tokens=r.tokens,
                       is_zero=r.is_zero)
                for r, mask in zip(order.records, order.table["sources"].tolist(), strict=True)
                for node in [order.places[(mask & -mask).bit_length() - 1].node]
            ]
            for _, order in sorted(self.orders.items())
        ]  # fmt: skip

    @property
    def fetches(self) -> list[Transfer]:
        return self._transfers(self.fetch_legs)

    @property
    def copies(self) -> list[Transfer]:
        return self._transfers(self.copy_legs)

    def mover(
        self,
        rank: int,
        arenas: Mapping[Any, Any],
        retentions: Mapping[int, Retention],
        channel: Channel | None = None,
    ) -> Mover:
        """One rank's. It is told the orders that concern it, and no others. ``arenas``: by owner, or owner and part."""
        keyed = {key if isinstance(key, tuple) else (key, WHOLE): arena for key, arena in arenas.items()}
        return Mover(
            rank=rank,
            arenas=cast(Mapping[Key, Arena], keyed),
            channel=cast(Channel, channel),
            pool=POOL,
            plan=self.plan,
            orders={owner: self.orders[owner] for owner, _ in keyed},
            retentions=retentions,
        )

    def legs_at(self, rank: int) -> tuple[list[Leg], list[Leg]]:
        """What a rank takes part in: fetches, then copies."""
        return legs_at(rank, self.fetch_legs), legs_at(rank, self.copy_legs)

    def _transfers(self, legs: Sequence[Leg]) -> list[Transfer]:
        return [
            Transfer(owner=leg.owner, unit=unit, iteration=iteration, source=leg.source, target=leg.target)
            for leg in legs
            for unit, iteration in Records(self.orders[leg.owner].records.table[leg.rows]).keys
        ]


def found_in(arenas: Mapping[tuple[int, int], Any], lost_nodes: Collection[int] = ()) -> list[Left]:
    """What surveys would report of arenas on paper, by (owner, node), with these nodes gone."""
    return [
        Left(
            node=node,
            report=ArenaReport(
                path=f"{node}/{owner}", owner=owner, history=History.of(arena.page), records=arena.page.records
            ),
        )
        for (owner, node), arena in arenas.items()
        if node not in lost_nodes
    ]


def plan_world(
    units: Sequence[Units], left: Sequence[Left], placement: Placement, choose: Choose, nonce: int = 0
) -> World | NoPlan:
    """The recovery that these ranks agree on, from what is left. ``units``: of each rank.

    Experts of one name are shared; each rank tells others only what it tells them in a real start.
    """
    ranks = range(len(units))
    surveyed: dict[int, list[ArenaReport]] = {rank: [] for rank in ranks}
    for each in left:
        surveyed[custodian(max(each.report.owner, 0), each.node, placement)].append(each.report)
    summary = reduce(Summary.followed_by, (_sent(Summary.of(surveyed[rank])) for rank in ranks))
    if summary.newest is None:
        return no_arena(summary)
    newest = summary.newest
    tables = {
        keeper: {
            (r.owner, r.part): r.records.where(in_history(r.records, newest.branches, newest.epoch))
            for r in of_history(reports, newest)
            if not r.problem
        }
        for keeper, reports in surveyed.items()
    }
    keepers = keepers_of([sorted(tables[rank]) for rank in ranks], placement)
    placement = with_parts_kept(placement, keepers)
    copies = [
        {place: tables[keeper][owner, place.part] for place, keeper in keepers.get(owner, {}).items()}
        for owner in ranks
    ]
    held = [held_of(mine) for mine in copies]
    shared = _meet(units, held) if choose is choose_newest_experts else [{} for _ in ranks]
    for mine, names, iterations in zip(held, units, shared, strict=True):
        mine.update({n: set(iterations[name]) for n, (name, _) in enumerate(names) if name in iterations})
    reach = reduce(Reach.followed_by, (_sent(Reach.of(rank, units[rank], held[rank], choose)) for rank in ranks))
    plan = plan_of(reach, newest, nonce)
    if plan is None:
        wanted = reach.hosts[:3]
        texts = [what_is_missing(rank, units[rank], held[rank], choose, wanted) for rank in ranks]
        return no_plan(reach, reduce(lambda mine, theirs: {**theirs, **mine}, texts), began=summary.began)
    orders = {}
    for rank in ranks:
        chosen = choose(units[rank], held[rank], plan.iteration)
        assert not isinstance(chosen, str), chosen
        order = order_of(rank, chosen, copies[rank], placement)
        orders[rank] = Order.from_bytes(rank, order.to_bytes())
    return World(
        plan=plan,
        placement=placement,
        orders=orders,
        fetch_legs=[leg for order in orders.values() for leg in fetches_of(order, keepers, placement)],
        copy_legs=[leg for order in orders.values() for leg in copies_of(order, placement)],
        captured_at=[captured_at(iterations, plan.iteration) for iterations in shared],
    )


def _meet(units: Sequence[Units], held: Sequence[Mapping[int, set[int]]]) -> list[dict[str, tuple[int, ...]]]:
    """Of each rank: the iterations that all shards of its experts have."""
    names = [tuple(name for name, kind in mine if kind is UnitKind.EXPERT) for mine in units]
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank, mine in enumerate(names):
        groups[mine].append(rank)
    found = {}
    for mine, members in groups.items():
        words = [
            words_of(mine, {name: held[rank].get(n, set()) for n, (name, _) in enumerate(units[rank])})
            for rank in members
        ]
        found[mine] = iterations_of(mine, reduce(common, words))
    return [found[mine] for mine in names]


def _sent(document: Any) -> Any:
    """As it arrives at another rank."""
    return type(document).from_json(json.loads(json.dumps(document.to_json())))


def restamped(left: Sequence[Left], world: World, branches_max: int) -> list[Left]:
    """The arenas after everybody has begun the plan's epoch, with all captures kept."""
    history = replace(world.plan.history, branches=world.plan.branches[-branches_max:])
    return [
        replace(
            each,
            report=replace(each.report, history=history, records=each.report.records.replace(epoch=world.plan.epoch)),
        )
        for each in left
    ]
