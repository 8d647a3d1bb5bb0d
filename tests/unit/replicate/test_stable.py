# SPDX-License-Identifier: Apache-2.0
"""Safety of the whole bookkeeping: whatever is dropped and however late, the stable iteration can be recovered.

A model of the steady state on paper: ranks commit and drop, links mirror page by page, cut short anywhere, rounds of
agreement have their results on each rank when they come, and ranks free what retention gives up. The real placement,
agreement, retention, differences, planning and making of room are what is tested. The planner is the oracle: after
every event, and with as many nodes gone as redundancy says, it must find the newest iteration that any rank has taken
for stable, or a newer one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import World, found_in, plan_world

from megatron_moetion.recover.plan import NoPlan, choose_newest_experts, choose_same_iteration
from megatron_moetion.recover.restore import Mover
from megatron_moetion.replicate.agreement import Agreement, combine_words
from megatron_moetion.replicate.channel import Note, Reduced
from megatron_moetion.replicate.mirror import difference, plain
from megatron_moetion.replicate.placement import place
from megatron_moetion.store.manifest import Page, Record, successor
from megatron_moetion.store.retention import Newest, Settled
from megatron_moetion.units import UnitKind

RANKS = 4
EXPERTS = 3
MOST_SELECTED = 2
PLACEMENT = place([f"node{r}" for r in range(RANKS)], 1)
UNITS = [
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

    def has_room(self, records: Sequence[Record]) -> bool:
        held = [r.unit for r in (*self.page.records, *records)]
        return all(held.count(u) <= 3 for u in ALWAYS) and len(held) <= self.expert_slots + sum(map(held.count, ALWAYS))

    def edit(self, change: Callable[[Page], Mapping[str, Any]]) -> None:
        self.page = successor(self.page, **change(self.page))

    def add(self, records: Sequence[Record]) -> None:
        self.edit(lambda page: {"records": (*page.records, *records)})


CHOOSE = {"full": choose_same_iteration, "popularity": choose_newest_experts}


class Rounds:
    """``Reducer`` of one rank: a round's result is there once all have contributed, and ``let`` has let it through."""

    def __init__(self, said: dict[int, list[Sequence[int]]]) -> None:
        self._said = said
        self._arrived = self._read = 0

    def contribute(self, number: int, words: Sequence[int], notes: Mapping[str, Note] | None = None) -> None:
        self._said.setdefault(number, []).append(words)

    def let(self, count: int) -> None:
        """So many more results arrive, if they are there."""
        complete = sum(len(words) == RANKS for words in self._said.values())
        self._arrived = min(self._arrived + count, complete)

    def results(self) -> list[Reduced]:
        numbers = range(self._read, self._arrived)
        self._read = self._arrived
        return [Reduced(number=n, words=tuple(reduce(combine_words, self._said[n]))) for n in numbers]

    def wait(self, number: int, timeout_s: float) -> bool:
        raise AssertionError("nothing waits")


class Member:
    """One rank: its arena and its holder's, what it knows of the mirror, and its agreement."""

    def __init__(self, own: Paper, mirror: Paper, said: dict[int, list[Sequence[int]]]) -> None:
        self.own, self.mirror = own, mirror
        self.rounds: dict[int, bool] = {0: True}
        self.offered: list[int] = []
        self.reducer = Rounds(said)
        self.agreement = Agreement(self.reducer, 0)
        self.is_away = False
        """The holder is done without."""

    @property
    def redundancy(self) -> int:
        """As ``Replication`` has it, of a holder that can be reached."""
        return int(self.agreement.stable in difference(self.own.page.records, plain(self.mirror.page.records)).whole)

    def learn(self) -> None:
        """Results that have come, and what they let go."""
        for agreed in self.agreement.poll():
            settled = Settled(stable=agreed.stable, whole=agreed.recoverable)
            kept = Newest().keep(self.own.page.records, settled)
            self.own.edit(lambda page, kept=kept, settled=settled: {"records": kept, "stable": settled.stable})  # type: ignore[misc]

    def commit(self, iteration: int, records: Sequence[Record]) -> None:
        """The words of this round, then the snapshot, if there is room for it."""
        able = [i for i, whole in self.rounds.items() if whole]
        self.agreement.start(iteration, rounds=self.rounds, recoverable=able, vote=-1, redundancy=self.redundancy)
        if records and self.own.has_room(records):
            self.own.add(records)
            self.offered.append(iteration)
        else:
            self.rounds[iteration] = False
        self.mark()

    def replicate(self, *, dies: bool) -> None:
        """One step of the mirror: what the arena no longer has goes, and of the oldest iteration the rest comes.

        ``dies``: the connection is lost in between.
        """
        found = difference(self.own.page.records, plain(self.mirror.page.records))
        stale = set(found.stale.keys)
        kept = tuple(r for r in self.mirror.page.records if r.key not in stale)
        self.mirror.edit(lambda page: {"records": kept, "stable": self.own.page.stable})
        if found.missing and not dies:
            oldest = found.iterations[0]
            added = found.missing.where(found.missing.table["iteration"] == oldest)
            assert self.mirror.has_room(added), "an arena and its mirror are of one size"
            self.mirror.add(added)
        self.mark()

    def mark(self) -> None:
        """Which snapshots are whole."""
        whole = difference(self.own.page.records, plain(self.mirror.page.records)).whole
        listed = set(self.own.page.records.table["iteration"].tolist())
        self.rounds |= {i: True for i in self.offered if i in listed and (self.is_away or i in whole)}


class Cluster:
    """Ranks on one node each, with their own arena and those that they hold for others."""

    def __init__(self, mode: str, draw: random.Random) -> None:
        self.mode = mode
        self.draw = draw
        slots = 3 * EXPERTS if mode == "full" else EXPERTS + 2 * MOST_SELECTED
        homes = [(r, n) for r in range(RANKS) for n in (r, *PLACEMENT.holders[r])]  # owner, node
        self.arenas = {home: Paper(slots) for home in homes}
        for (owner, _), arena in self.arenas.items():
            arena.add([self.record(owner, u, 0) for u in range(HOST + 1)])
        said: dict[int, list[Sequence[int]]] = {}
        self.members = [Member(self.arenas[r, r], self.arenas[r, PLACEMENT.holders[r][0]], said) for r in range(RANKS)]

    @property
    def stable(self) -> int:
        """The newest that any rank goes by."""
        return max(m.agreement.stable for m in self.members)

    def record(self, owner: int, unit: int, iteration: int) -> Record:
        digest = owner << 20 | unit << 10 | iteration
        return Record(unit=unit, iteration=iteration, epoch=0, slot=0, nbytes=64, digest=digest)

    def snapshot(self, iteration: int, drop_rate: float) -> None:
        """All ranks begin a snapshot; some drop it. Those that share experts select the same ones."""
        names = range(1, EXPERTS + 1)
        chosen = [self.draw.sample(names, self.draw.randint(0, MOST_SELECTED)) for _ in range(RANKS // 2)]
        for rank, member in enumerate(self.members):
            experts = names if self.mode == "full" else chosen[rank // 2]
            records = [self.record(rank, u, iteration) for u in (*ALWAYS, *experts)]
            member.commit(iteration, [] if self.draw.random() < drop_rate else records)

    def plan(self, lost_nodes: set[int]) -> World | NoPlan:
        return plan_world(UNITS, found_in(self.arenas, lost_nodes), PLACEMENT, CHOOSE[self.mode])

    def check(self) -> None:
        stable = self.stable
        may_be_lost = [{n} for n in range(RANKS)] if self.holds(stable) else []
        for lost in (set[int](), *may_be_lost):
            plan = self.plan(lost)
            assert isinstance(plan, World), f"without nodes {lost}: {plan}"
            assert plan.iteration >= stable, f"without nodes {lost}"
            check_plan(plan, self.mode)

    def holds(self, stable: int) -> bool:
        """Whether every rank would say that this iteration survives the loss of a node."""
        return all(stable in difference(m.own.page.records, plain(m.mirror.page.records)).whole for m in self.members)


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


def run(
    cluster: Cluster, steps: int, drop_rate: float, *, check: bool, first: int = 1, prompt: bool = False,
    away_rate: float = 0.0,
) -> None:  # fmt: skip
    """``prompt``: replication and agreement keep up with every step. ``away_rate``: of holders that come and go."""
    draw = cluster.draw
    for iteration in range(first, first + steps):
        for member in cluster.members:
            member.reducer.let(9 if prompt else draw.choice((0, 1, 1, 2)))
            member.learn()
            if check and draw.random() < 0.2:
                cluster.check()
        cluster.snapshot(iteration, drop_rate)
        for member in cluster.members:
            if draw.random() < away_rate:
                member.is_away = not member.is_away
                member.mark()
            for _ in range(9 if prompt else draw.randint(0, 2)):
                member.replicate(dies=draw.random() < drop_rate)
                if check and draw.random() < 0.2:
                    cluster.check()
        if check:
            cluster.check()


@pytest.mark.parametrize("mode", ["full", "popularity"])
@given(
    seed=st.integers(0, 10**6),
    drop_rate=st.sampled_from((0.0, 0.05, 0.3)),
    away_rate=st.sampled_from((0.0, 0.1, 0.5)),
)
@settings(max_examples=25, deadline=None)
def test_the_stable_iteration_is_reachable_after_any_prefix(
    mode: str, seed: int, drop_rate: float, away_rate: float
) -> None:
    run(Cluster(mode, random.Random(seed)), steps=14, drop_rate=drop_rate, check=True, away_rate=away_rate)


@pytest.mark.parametrize("mode", ["full", "popularity"])
@given(seed=st.integers(0, 10**6), drop_rate=st.sampled_from((0.0, 0.05, 0.3)), steps=st.integers(3, 14))
@settings(max_examples=40, deadline=None)
def test_a_node_lost_while_a_recovery_makes_room_leaves_a_plan(
    mode: str, seed: int, drop_rate: float, steps: int
) -> None:
    """Processes fail, all memory is there; room is made for what replicas lack; then a node is lost (G6)."""
    cluster = Cluster(mode, random.Random(seed))
    run(cluster, steps, drop_rate, check=False)
    for member in cluster.members:
        if cluster.draw.random() < 0.5:
            member.reducer.let(9)
            member.learn()
    plan = cluster.plan(set())
    assert isinstance(plan, World)
    for node in range(RANKS):
        if cluster.draw.random() < 0.8:
            _mover(cluster, node, plan).make_room(plan.legs_at(node)[1])
    cluster.check()


@pytest.mark.parametrize("mode", ["full", "popularity"])
@given(seed=st.integers(0, 10**6), drop_rate=st.sampled_from((0.1, 0.5, 0.9)))
@settings(max_examples=15, deadline=None)
def test_after_any_storm_of_drops_snapshots_become_stable_again(mode: str, seed: int, drop_rate: float) -> None:
    """Captures that some rank dropped must not fill the slots of the others for good."""
    cluster = Cluster(mode, random.Random(seed))
    run(cluster, 20, drop_rate, check=False, away_rate=0.2)
    run(cluster, 20, 0.0, check=False, first=21, prompt=True)
    assert cluster.stable >= 38


@given(seed=st.integers(0, 10**6), steps=st.integers(3, 14))
@settings(max_examples=25, deadline=None)
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
        assert (again.iteration, again.plan.epoch) == (plan.iteration, plan.plan.epoch + 1)
        assert [[c.iteration for c in row] for row in again.choices] == [
            [c.iteration for c in row] for row in plan.choices
        ]


def _mover(cluster: Cluster, node: int, plan: World) -> Mover:
    mine = {owner: arena for (owner, where), arena in cluster.arenas.items() if where == node}
    return plan.mover(node, mine, dict.fromkeys(range(RANKS), Newest()))
