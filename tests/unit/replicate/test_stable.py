# SPDX-License-Identifier: Apache-2.0
"""Safety of the whole bookkeeping: whatever is dropped and however late, the stable iteration can be recovered.

A model of the steady state on paper: ranks commit, drop and replicate, agree one iteration late, and free what
retention gives up; the real placement, agreement, retention, planning and making of room are what is tested. The
planner is the oracle: after every event and with any one node gone it must find the stable iteration or a newer one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import POOL, reports_of

from megatron_moetion.recover.plan import (
    NoPlan,
    RankFacts,
    RecoveryPlan,
    choose_newest_experts,
    choose_same_iteration,
    plan_recovery,
)
from megatron_moetion.recover.restore import Mover
from megatron_moetion.replicate.agreement import fates, mask_of, newest_common
from megatron_moetion.replicate.channel import Channel
from megatron_moetion.replicate.placement import place
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Page, Record, successor
from megatron_moetion.store.retention import Newest, Settled
from megatron_moetion.units import UnitKind

RANKS = 4
EXPERTS = 3
MOST_SELECTED = 2
PLACEMENT = place([f"node{r}" for r in range(RANKS)], 1)
FACTS = [
    RankFacts(
        rank=r,
        units=(
            ("dense", UnitKind.DENSE),
            # Ranks 0 and 1 hold shards of the same experts, ranks 2 and 3 of others.
            *((f"layers.{r // 2}.experts.{e}", UnitKind.EXPERT) for e in range(EXPERTS)),
            ("host", UnitKind.HOST),
        ),
    )
    for r in range(RANKS)
]
HOST = EXPERTS + 1
ALWAYS = (0, HOST)


@dataclass
class Paper:
    """An arena without bytes: three slots for what every snapshot takes, and for experts what is given."""

    expert_slots: int
    page: Page = field(default_factory=lambda: Page(stable=0))

    def has_room(self, records: tuple[Record, ...]) -> bool:
        held = [r.unit for r in (*self.page.records, *records)]
        return all(held.count(u) <= 3 for u in ALWAYS) and len(held) <= self.expert_slots + sum(map(held.count, ALWAYS))

    def edit(self, change: Callable[[Page], Mapping[str, Any]]) -> None:
        self.page = successor(self.page, **change(self.page))

    def add(self, records: tuple[Record, ...]) -> None:
        self.edit(lambda page: {"records": (*page.records, *records)})


CHOOSE = {"full": choose_same_iteration, "popularity": choose_newest_experts}


class Cluster:
    """Ranks on one node each, with their own arena and those that they hold for others."""

    def __init__(self, mode: str, draw: random.Random) -> None:
        self.mode = mode
        self.draw = draw
        slots = 3 * EXPERTS if mode == "full" else EXPERTS + 2 * MOST_SELECTED
        homes = [(r, n) for r in range(RANKS) for n in (r, *PLACEMENT.holders[r])]  # owner, node
        self.arenas = {home: Paper(slots) for home in homes}
        self.queues: list[list[tuple[int, tuple[Record, ...]]]] = [[] for _ in range(RANKS)]
        self.rounds: list[dict[int, bool]] = [{0: True} for _ in range(RANKS)]
        self.open: set[int] = set()
        self.masks: list[int] = []
        self.recent = [0]
        self.stable = 0
        for (owner, _), arena in self.arenas.items():
            arena.add(tuple(self.record(owner, u, 0) for u in range(HOST + 1)))

    def record(self, owner: int, unit: int, iteration: int) -> Record:
        digest = owner << 20 | unit << 10 | iteration
        return Record(unit=unit, iteration=iteration, epoch=0, slot=0, nbytes=64, digest=digest)

    def snapshot(self, iteration: int, drop_rate: float) -> None:
        """All ranks begin a snapshot; some drop it. Those that share experts select the same ones."""
        self.recent = [iteration, *self.recent]
        self.masks = [mask_of((i for i in r if r[i]), self.recent, r) for r in self.rounds]
        self.open.add(iteration)
        names = range(1, EXPERTS + 1)
        chosen = [self.draw.sample(names, self.draw.randint(0, MOST_SELECTED)) for _ in range(RANKS // 2)]
        for rank in range(RANKS):
            experts = names if self.mode == "full" else chosen[rank // 2]
            records = tuple(self.record(rank, u, iteration) for u in (*ALWAYS, *experts))
            if self.draw.random() < drop_rate or not self.arenas[rank, rank].has_room(records):
                records = ()
            self.arenas[rank, rank].add(records)
            self.queues[rank].append((iteration, records))

    def replicate(self, rank: int, refuse_rate: float) -> None:
        """The oldest snapshot that waits is sent, or refused."""
        iteration, records = self.queues[rank].pop(0)
        held = [self.arenas[rank, holder] for holder in PLACEMENT.holders[rank]]
        whole = bool(records) and self.draw.random() >= refuse_rate and all(a.has_room(records) for a in held)
        for arena in held if whole else ():
            arena.add(records)
        self.rounds[rank][iteration] = whole

    def learn(self) -> list[Callable[[], None]]:
        """What the agreement of one snapshot ago lets each rank free, one step a rank: they do not free in step."""
        mask = reduce(int.__and__, self.masks) if self.masks else 0
        settled = fates(mask, self.recent, self.open)
        self.open -= settled.keys()
        stable = self.stable = max(self.stable, newest_common(mask, self.recent) or 0)

        def free(arena: Paper) -> None:
            kept = Newest().keep(arena.page.records, Settled(stable=stable, whole=settled))
            arena.edit(lambda page: {"records": kept, "stable": stable})

        return [lambda arena=arena: free(arena) for arena in self.arenas.values()]  # type: ignore[misc]

    def plan(self, lost_nodes: set[int]) -> RecoveryPlan | NoPlan:
        return plan_recovery(FACTS, reports_of(self.arenas, lost_nodes), PLACEMENT, CHOOSE[self.mode])

    def check(self) -> None:
        for lost in (set[int](), *({n} for n in range(RANKS))):
            plan = self.plan(lost)
            assert isinstance(plan, RecoveryPlan), f"without nodes {lost}: {plan}"
            assert plan.iteration >= self.stable, f"without nodes {lost}"
            check_plan(plan, self.mode)


def check_plan(plan: RecoveryPlan, mode: str) -> None:
    """G2: dense units and host state at T, an expert at one iteration over all its shards."""
    experts: dict[str, set[int]] = {}
    for facts, choices in zip(FACTS, plan.choices, strict=True):
        for (name, kind), choice in zip(facts.units, choices, strict=True):
            if kind is UnitKind.EXPERT and mode != "full":
                experts.setdefault(name, set()).add(choice.iteration)
                assert choice.iteration <= plan.iteration
            else:
                assert choice.iteration == plan.iteration
    assert all(len(iterations) == 1 for iterations in experts.values())


def run(cluster: Cluster, steps: int, drop_rate: float, check: bool, first: int = 1, prompt: bool = False) -> None:
    """``prompt``: replication keeps up with every step."""
    for iteration in range(first, first + steps):
        for free in cluster.learn():
            free()
            if check and cluster.draw.random() < 0.2:
                cluster.check()
        cluster.snapshot(iteration, drop_rate)
        for rank in range(RANKS):
            while cluster.queues[rank] and (prompt or cluster.draw.random() < 0.7):
                cluster.replicate(rank, drop_rate)
        if check:
            cluster.check()


@pytest.mark.parametrize("mode", ["full", "popularity"])
@given(seed=st.integers(0, 10**6), drop_rate=st.sampled_from((0.0, 0.05, 0.3)))
@settings(max_examples=15)
def test_the_stable_iteration_is_reachable_after_any_prefix(mode: str, seed: int, drop_rate: float) -> None:
    run(Cluster(mode, random.Random(seed)), steps=14, drop_rate=drop_rate, check=True)


@pytest.mark.parametrize("mode", ["full", "popularity"])
@given(seed=st.integers(0, 10**6), drop_rate=st.sampled_from((0.0, 0.05, 0.3)), steps=st.integers(3, 14))
@settings(max_examples=40)
def test_a_node_lost_while_a_recovery_makes_room_leaves_a_plan(
    mode: str, seed: int, drop_rate: float, steps: int
) -> None:
    """Processes fail, all memory is there; room is made for what replicas lack; then a node is lost (G6)."""
    cluster = Cluster(mode, random.Random(seed))
    run(cluster, steps, drop_rate, check=False)
    for free in cluster.learn()[: cluster.draw.randint(1, len(cluster.arenas))]:
        free()
    plan = cluster.plan(set())
    assert isinstance(plan, RecoveryPlan)
    for node in range(RANKS):
        if cluster.draw.random() < 0.8:
            _mover(cluster, node, plan).make_room(plan.copies)
    cluster.check()


@pytest.mark.parametrize("mode", ["full", "popularity"])
@given(seed=st.integers(0, 10**6), drop_rate=st.sampled_from((0.1, 0.5, 0.9)))
@settings(max_examples=15)
def test_after_any_storm_of_drops_snapshots_become_stable_again(mode: str, seed: int, drop_rate: float) -> None:
    """Captures that some rank dropped must not fill the slots of the others for good."""
    cluster = Cluster(mode, random.Random(seed))
    run(cluster, 20, drop_rate, check=False)
    run(cluster, 20, 0.0, check=False, first=21, prompt=True)
    assert cluster.stable >= 38


@given(seed=st.integers(0, 10**6), steps=st.integers(3, 14))
@settings(max_examples=25)
def test_an_epoch_that_was_written_on_some_ranks_only_is_no_second_history(seed: int, steps: int) -> None:
    cluster = Cluster("popularity", random.Random(seed))
    run(cluster, steps, 0.2, check=False)
    plan = cluster.plan(set())
    assert isinstance(plan, RecoveryPlan)
    for transfer in plan.copies:
        found = next(r for r in cluster.arenas[transfer.owner, transfer.owner].page.records
                     if r.key == (transfer.unit, transfer.iteration))  # fmt: skip
        cluster.arenas[transfer.owner, transfer.target].add((found,))
    written = [n for n in range(RANKS) if cluster.draw.random() < 0.5]
    for node in written:
        _mover(cluster, node, plan).begin_epoch()
    again = cluster.plan(set())
    assert isinstance(again, RecoveryPlan)
    check_plan(again, "popularity")
    if written:
        assert (again.iteration, again.history_epoch) == (plan.iteration, plan.epoch)
        assert [[c.iteration for c in row] for row in again.choices] == [
            [c.iteration for c in row] for row in plan.choices
        ]


def _mover(cluster: Cluster, node: int, plan: RecoveryPlan) -> Mover:
    mine = {owner: cast(Arena, a) for (owner, where), a in cluster.arenas.items() if where == node}
    return Mover(
        rank=node,
        arenas=mine,
        channel=cast(Channel, None),
        pool=POOL,
        plan=plan,
        retentions=dict.fromkeys(range(RANKS), Newest()),
    )
