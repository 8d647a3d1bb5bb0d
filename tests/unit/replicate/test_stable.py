# SPDX-License-Identifier: Apache-2.0
"""Safety of the whole bookkeeping: whatever is dropped and however late, the stable iteration can be recovered.

A model of the steady state on paper: ranks commit and drop, their holders' arenas become like theirs some time later,
each rank hears results of agreements in its own time, and frees what retention gives up; the real placement, agreement,
retention, planning and making of room are what is tested. The planner is the oracle: after every event and with any one
node gone it must find the stable iteration or a newer one.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import World, found_in, plan_world

from megatron_moetion.recover.plan import NoPlan, Units, choose_newest_experts, choose_same_iteration
from megatron_moetion.recover.restore import Mover
from megatron_moetion.replicate.agreement import WINDOW, Agreement, combine_words
from megatron_moetion.replicate.channel import Note, Reduced
from megatron_moetion.replicate.placement import place
from megatron_moetion.store.manifest import Page, Record, successor
from megatron_moetion.store.retention import Newest, Settled
from megatron_moetion.units import UnitKind

RANKS = 4
EXPERTS = 3
MOST_SELECTED = 2
PLACEMENT = place([f"node{r}" for r in range(RANKS)], 1)
UNITS: list[Units] = [
    (
        ("dense", UnitKind.DENSE),
        # Ranks 0 and 1 hold shards of the same experts, ranks 2 and 3 of others.
        *((f"layers.{r // 2}.experts.{e}", UnitKind.EXPERT) for e in range(EXPERTS)),
        ("host", UnitKind.HOST),
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


class Tree:
    """Combines the words of all ranks, round by round."""

    def __init__(self) -> None:
        self.said: dict[int, dict[int, Sequence[int]]] = defaultdict(dict)
        self.results: list[Reduced] = []

    def say(self, rank: int, number: int, words: Sequence[int]) -> None:
        self.said[number][rank] = words
        if len(self.said[number]) == RANKS:
            found = reduce(combine_words, self.said.pop(number).values())
            self.results.append(Reduced(number=number, words=tuple(found)))


class Branch:
    """One rank's ``Reducer``: it hears of so many results."""

    def __init__(self, tree: Tree, rank: int) -> None:
        self.tree, self.rank = tree, rank
        self.heard = self.allowed = 0

    def contribute(self, number: int, words: Sequence[int], notes: Mapping[str, Note] | None = None) -> None:
        self.tree.say(self.rank, number, words)

    def results(self) -> list[Reduced]:
        found = self.tree.results[self.heard : self.allowed]
        self.heard += len(found)
        return found

    def wait(self, number: int, timeout_s: float) -> bool:
        raise NotImplementedError


@dataclass
class Side:
    """What one rank knows."""

    branch: Branch
    agreement: Agreement
    rounds: dict[int, bool] = field(default_factory=dict)
    """Whether recent snapshots are whole here, as far as that is settled."""
    open: set[int] = field(default_factory=set)
    """Snapshots that are in the own arena, and not yet in the holders'."""


class Cluster:
    """Ranks on one node each, with their own arena and those that they hold for others."""

    def __init__(self, mode: str, draw: random.Random) -> None:
        self.mode = mode
        self.draw = draw
        slots = 3 * EXPERTS if mode == "full" else EXPERTS + 2 * MOST_SELECTED
        homes = [(r, n) for r in range(RANKS) for n in (r, *PLACEMENT.holders[r])]  # owner, node
        self.arenas = {home: Paper(slots) for home in homes}
        tree = Tree()
        branches = [Branch(tree, rank) for rank in range(RANKS)]
        self.sides = [Side(branch, Agreement(branch, 0)) for branch in branches]
        for (owner, _), arena in self.arenas.items():
            arena.add(tuple(self.record(owner, u, 0) for u in range(HOST + 1)))

    @property
    def stable(self) -> int:
        """The newest iteration that any rank calls stable."""
        return max(side.agreement.stable for side in self.sides)

    def record(self, owner: int, unit: int, iteration: int) -> Record:
        digest = owner << 20 | unit << 10 | iteration
        return Record(unit=unit, iteration=iteration, epoch=0, slot=0, nbytes=64, digest=digest)

    def snapshot(self, iteration: int, drop_rate: float) -> None:
        """All ranks begin a snapshot; some drop it. Those that share experts select the same ones."""
        names = range(1, EXPERTS + 1)
        chosen = [self.draw.sample(names, self.draw.randint(0, MOST_SELECTED)) for _ in range(RANKS // 2)]
        for rank, side in enumerate(self.sides):
            side.agreement.start(
                iteration,
                rounds=side.rounds,
                recoverable=[i for i, is_whole in side.rounds.items() if is_whole],
                vote=0,
                redundancy=1,
            )
            experts = names if self.mode == "full" else chosen[rank // 2]
            records = tuple(self.record(rank, u, iteration) for u in (*ALWAYS, *experts))
            if self.draw.random() < drop_rate or not self.arenas[rank, rank].has_room(records):
                side.rounds[iteration] = False
            else:
                self.arenas[rank, rank].add(records)
                side.open.add(iteration)

    def replicate(self, rank: int, refuse_rate: float) -> None:
        """The holders' arenas become like the rank's: first nothing is in them that is not in its own."""
        side, page = self.sides[rank], self.arenas[rank, rank].page
        for holder in PLACEMENT.holders[rank]:
            arena = self.arenas[rank, holder]
            arena.edit(lambda held: {"records": [r for r in held.records if r.key in page.records.keys]})
            if self.draw.random() < refuse_rate:
                return
            arena.edit(lambda held: {"records": page.records, "stable": page.stable})
        for iteration in side.open:
            side.rounds[iteration] = (HOST, iteration) in page.records.keys
        side.open.clear()

    def learn(self, hears: Callable[[], bool] = lambda: True) -> list[Callable[[], None]]:
        """Results that a rank hears let it free captures, one step a rank: they do not free in step."""

        def free(rank: int, settled: Settled) -> None:
            arena = self.arenas[rank, rank]
            arena.edit(lambda page: {"records": Newest().keep(page.records, settled), "stable": settled.stable})

        steps = []
        for rank, side in enumerate(self.sides):
            while side.branch.allowed < len(side.branch.tree.results) and hears():
                side.branch.allowed += 1
            for agreed in side.agreement.poll():
                settled = Settled(stable=agreed.stable, whole=agreed.recoverable)
                side.rounds = {i: w for i, w in side.rounds.items() if i > agreed.stable - WINDOW}
                steps.append(lambda rank=rank, settled=settled: free(rank, settled))
        return steps  # type: ignore[return-value]

    def plan(self, lost_nodes: set[int]) -> World | NoPlan:
        return plan_world(UNITS, found_in(self.arenas, lost_nodes), PLACEMENT, CHOOSE[self.mode])

    def check(self) -> None:
        for lost in (set[int](), *({n} for n in range(RANKS))):
            plan = self.plan(lost)
            assert isinstance(plan, World), f"without nodes {lost}: {plan}"
            assert plan.iteration >= self.stable, f"without nodes {lost}"


def check_plan(plan: World, mode: str) -> None:
    """G2: dense units and host state at T, an expert at one iteration over all its shards."""
    experts: dict[str, set[int]] = {}
    for units, choices in zip(UNITS, plan.choices, strict=True):
        for (name, kind), choice in zip(units, choices, strict=True):
            if kind is UnitKind.EXPERT and mode != "full":
                experts.setdefault(name, set()).add(choice.iteration)
                assert choice.iteration <= plan.iteration
            else:
                assert choice.iteration == plan.iteration
    assert all(len(iterations) == 1 for iterations in experts.values())


def run(cluster: Cluster, steps: int, drop_rate: float, check: bool, first: int = 1, prompt: bool = False) -> None:
    """``prompt``: replication keeps up with every step, and results come at once."""
    draw = cluster.draw
    for iteration in range(first, first + steps):
        for free in cluster.learn(lambda: prompt or draw.random() < 0.7):
            free()
            if check and draw.random() < 0.2:
                cluster.check()
        cluster.snapshot(iteration, drop_rate)
        for rank in range(RANKS):
            if prompt or draw.random() < 0.7:
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
    for free in cluster.learn(lambda: cluster.draw.random() < 0.5):
        free()
    plan = cluster.plan(set())
    assert isinstance(plan, World)
    for node in range(RANKS):
        if cluster.draw.random() < 0.8:
            _mover(cluster, node, plan).make_room(plan.copy_legs)
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
    assert isinstance(plan, World)
    for transfer in plan.copies:
        found = next(r for r in cluster.arenas[transfer.owner, transfer.owner].page.records
                     if r.key == (transfer.unit, transfer.iteration))  # fmt: skip
        cluster.arenas[transfer.owner, transfer.target].add((found,))
    written = [n for n in range(RANKS) if cluster.draw.random() < 0.5]
    for node in written:
        _mover(cluster, node, plan).begin_epoch()
    again = cluster.plan(set())
    assert isinstance(again, World)
    check_plan(again, "popularity")
    if written:
        assert (again.iteration, again.history_epoch) == (plan.iteration, plan.epoch)
        assert [[c.iteration for c in row] for row in again.choices] == [
            [c.iteration for c in row] for row in plan.choices
        ]


def _mover(cluster: Cluster, node: int, plan: World) -> Mover:
    mine = {owner: arena for (owner, where), arena in cluster.arenas.items() if where == node}
    return plan.mover(node, mine, dict.fromkeys(range(RANKS), Newest()))
