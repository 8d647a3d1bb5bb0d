# SPDX-License-Identifier: Apache-2.0
"""Safety and progress of the bookkeeping in mode ``exact``: whatever is dropped, the stable iteration can be recovered.

A model of the steady state on paper, event by event: ranks take turns of captures and log gradients, drop, replicate,
agree one iteration late, and free what their rotation gives up, one arena at a time. The real rotation, agreement,
retention, placement, planning and making of room are what is tested; the planner is the oracle.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, reduce
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import POOL

from megatron_moetion.recover.plan import NoPlan, RankFacts, RecoveryPlan, plan_recovery
from megatron_moetion.recover.restore import Mover
from megatron_moetion.recover.survey import ArenaReport
from megatron_moetion.replicate.agreement import WINDOW, fates, mask_of, newest_common
from megatron_moetion.replicate.channel import Channel
from megatron_moetion.replicate.placement import place
from megatron_moetion.select.budget import exact_copies
from megatron_moetion.select.rotation import Rotation, Turn
from megatron_moetion.snapshot.gradlog import GradientLog, gradient_log
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.chains import ChainLayout, chain_layout
from megatron_moetion.store.manifest import NO_SLOT, Page, Record, successor
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind, log_units

RANKS = 4
PLACEMENT = place([f"node{r}" for r in range(RANKS)], 1)
BLOCK = 64
"""Elements that a cut is a multiple of."""
STATE = (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ, Role.GRAD)
NO_NODE: frozenset[int] = frozenset()


def parameter(unit: str, tensor: str, elements: int) -> tuple[Region, ...]:
    """Master copy, moments and gradient at made-up addresses."""
    base = 1 << 20
    return tuple(
        Region(
            unit=unit, tensor=tensor, role=role, dtype="float32", start=0, nbytes=4 * elements, address=base << n
        )  # fmt: skip
        for n, role in enumerate(STATE)
    )


def buffer(unit: str) -> Region:
    return Region(unit=unit, tensor="bias", role=Role.BUFFER, dtype="int64", start=0, nbytes=80, address=4096)


@cache
def log_of_rank(rank: int, period: int) -> GradientLog:
    """Ranks differ in what they hold; the last one has too little for a cut in each iteration of a long period."""
    blocks = (30 + 7 * rank) if rank < RANKS - 1 else 1
    name = f"layers.{rank}.dense"
    units = [
        Unit(name=name, kind=UnitKind.DENSE, layer=rank, regions=(*parameter(name, "w", BLOCK * blocks), buffer(name))),
        Unit(
            name="frozen",
            kind=UnitKind.FROZEN,
            regions=(
                Region(unit="frozen", tensor="f", role=Role.WEIGHT, dtype="bfloat16", start=0, nbytes=64, address=64),
            ),
        ),
    ]
    for e in range(3):
        own = f"layers.{rank}.experts.{e}"
        regions = parameter(own, "w", BLOCK * max(blocks // 2, 1))
        units.append(Unit(name=own, kind=UnitKind.EXPERT, layer=rank, expert=e, regions=regions))
    units.append(Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=1000))
    return gradient_log(Inventory(units=tuple(units)), period)


@cache
def facts(period: int) -> tuple[RankFacts, ...]:
    return tuple(
        RankFacts(rank=r, units=tuple((u.name, u.kind) for u in log_of_rank(r, period).inventory.units))
        for r in range(RANKS)
    )


@cache
def layout_of(owner: int, period: int) -> ChainLayout:
    return chain_layout([(u.name, int(u.kind), u.nbytes) for u in log_of_rank(owner, period).inventory.units])


class Paper:
    """An arena without bytes. Slots are the real numbers, shared by units of one size or (``apart``) by no others."""

    def __init__(self, log: GradientLog, apart: bool) -> None:
        units = log.inventory.units
        self.pool_of = [u.name if apart else u.nbytes for u in units]
        self.slots: Counter[Any] = Counter()
        for unit, count in zip(units, (exact_copies(log)[u.name] for u in units), strict=True):
            self.slots[unit.name if apart else unit.nbytes] += count
        self.most_records = 2 * self.slots.total()
        self.page = Page(stable=0)

    def has_room(self, records: Sequence[Record]) -> bool:
        held = Counter(self.pool_of[r.unit] for r in (*self.page.records, *records) if not r.is_zero)
        return all(count <= self.slots[pool] for pool, count in held.items())

    def edit(self, change: Callable[[Page], Mapping[str, Any]]) -> None:
        self.page = successor(self.page, **change(self.page))
        assert len(self.page.records) <= self.most_records, "the manifest page is full"

    def add(self, records: Sequence[Record]) -> None:
        self.edit(lambda page: {"records": (*page.records, *records)})


@dataclass(frozen=True, kw_only=True)
class Weather:
    """How often things go wrong, and whether replication keeps up with iterations; if not, how soon it goes on."""

    drop: float = 0.0
    refuse: float = 0.0
    late: float = 0.0
    zero: float = 0.0
    skipped: float = 0.0
    prompt: bool = True
    speed: float = 1.0


CALM = Weather()


@dataclass
class Side:
    """One rank: what its session knows."""

    rotation: Rotation
    stable: int = 0
    recent: list[int] = field(default_factory=lambda: [0])
    open: set[int] = field(default_factory=set)
    rounds: dict[int, bool] = field(default_factory=lambda: {0: True})
    queue: list[tuple[int, tuple[Record, ...]]] = field(default_factory=list)
    last: tuple[bool, bool] = (False, False)
    no_room: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    turns: dict[int, Turn] = field(default_factory=dict)


class Cluster:
    """Ranks on one node each, with their own arena and those that they hold for others."""

    def __init__(self, period: int, draw: random.Random, apart: bool = False) -> None:
        self.period = period
        self.draw = draw
        self.logs = [log_of_rank(r, period) for r in range(RANKS)]
        homes = [(r, n) for r in range(RANKS) for n in (r, *PLACEMENT.holders[r])]  # owner, node
        self.arenas = {home: Paper(self.logs[home[0]], apart) for home in homes}
        self.sides = [Side(Rotation(log, 0, dict.fromkeys(log.log_of, 0))) for log in self.logs]
        self.masks: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.masks[0] = [(0, 0)] * RANKS
        self.forced: set[tuple[int, int]] = set()
        """Snapshots (rank, iteration) that are dropped whatever the weather."""
        for (owner, _), arena in self.arenas.items():
            logs = set(self.logs[owner].log_of.values())
            everything = range(len(self.logs[owner].inventory.units))
            arena.add([self.record(owner, u, 0) for u in everything if u not in logs])

    @property
    def stable(self) -> int:
        return max(side.stable for side in self.sides)

    def record(self, owner: int, unit: int, iteration: int, zero: bool = False) -> Record:
        if zero:
            return Record(unit=unit, iteration=iteration, epoch=0, slot=NO_SLOT, nbytes=0, digest=0)
        digest = owner << 24 | unit << 12 | iteration
        return Record(unit=unit, iteration=iteration, epoch=0, slot=0, nbytes=64, digest=digest)

    # -- what one rank does, one event at a time ------------------------------------------------------------

    def on_step_end(self, rank: int, iteration: int, weather: Weather) -> Iterator[None]:
        """``Session.on_step_end``; yields after each thing that others may see."""
        side = self.sides[rank]
        is_there, captured = side.last
        side.rotation.packed(is_there=is_there, captured=captured)
        yield from self.learn(rank, iteration)
        side.recent = [iteration, *side.recent][:WINDOW]
        rounds = dict(sorted(side.rounds.items())[-WINDOW:])
        whole = [i for i in rounds if rounds[i]]
        reachable = mask_of(side.rotation.reachable(rounds), side.recent, rounds)
        self.masks[iteration].append((reachable, mask_of(whole, side.recent, rounds)))
        yield
        side.open.add(iteration)
        self.snapshot(rank, iteration, weather)
        yield

    def learn(self, rank: int, iteration: int) -> Iterator[None]:
        side = self.sides[rank]
        mask, whole = (reduce(int.__and__, column) for column in zip(*self.masks[iteration - 1], strict=True))
        settled = fates(mask, side.recent, side.open)
        stable = max(side.stable, newest_common(mask, side.recent) or 0)
        if stable == side.stable and not settled:
            return
        side.stable = stable
        side.open -= settled.keys()
        side.rotation.settle(stable, settled, fates(whole, side.recent, settled))
        for (owner, node), arena in self.arenas.items():
            if node == rank:
                kept = side.rotation.retain(arena.page.records, stable, layout_of(owner, self.period))
                arena.edit(lambda page, kept=kept: {"records": kept, "stable": stable})  # type: ignore[misc]
                yield

    def snapshot(self, rank: int, iteration: int, weather: Weather) -> None:
        """``Session._select`` and ``Flight.begin``."""
        side, log, arena = self.sides[rank], self.logs[rank], self.arenas[rank, rank]
        turn = side.turns[iteration] = side.rotation.turn(iteration)
        skipped = self.draw.random() < weather.skipped
        zero = frozenset(u for u in turn.logs if skipped or self.draw.random() < weather.zero * (u % 3))
        side.rotation.begin(iteration, turn, zero)
        staged = [self.record(rank, u, iteration) for u in (*log.always, *turn.logs) if u not in zero]
        optional = [self.record(rank, u, iteration) for u in turn.captures]
        dropped = (rank, iteration) in self.forced or self.draw.random() < weather.drop
        if not dropped and not arena.has_room(staged):
            side.no_room.append(iteration)
            dropped = True
        records: tuple[Record, ...] = ()
        captured = self.draw.random() >= weather.late
        if not dropped:
            if not arena.has_room([*staged, *optional]):
                side.left_out.append(iteration)
                captured = False
            zeros = [self.record(rank, u, iteration, zero=True) for u in sorted(zero)]
            records = (*staged, *(optional if captured else ()), *zeros)
            arena.add(records)
        side.last = (not dropped, captured)
        side.queue.append((iteration, records))

    def is_round_open(self, rank: int) -> bool:
        """Buddies take part in the round of an iteration once they have begun (or dropped) their own snapshot of it."""
        side = self.sides[rank]
        buddies = (*PLACEMENT.holders[rank], *PLACEMENT.owners_held_by(rank))
        return bool(side.queue) and all(side.queue[0][0] in self.sides[b].turns for b in buddies)

    def replicate(self, rank: int, weather: Weather) -> None:
        """The oldest snapshot that waits is sent, or refused."""
        iteration, records = self.sides[rank].queue.pop(0)
        held = [self.arenas[rank, holder] for holder in PLACEMENT.holders[rank]]
        wanted = bool(records) and self.draw.random() >= weather.refuse
        whole = wanted and all(a.has_room(records) for a in held)
        if wanted and not whole:
            self.sides[rank].no_room.append(iteration)
        for arena in held if whole else ():
            arena.add(records)
        self.sides[rank].rounds[iteration] = whole

    # -- time --------------------------------------------------------------------------------------------

    def run(self, iterations: range, weather: Weather, after_event: Callable[[], None] = lambda: None) -> None:
        """All ranks go through these iterations, as far apart as agreement allows."""

        def train(rank: int) -> Iterator[None]:
            for iteration in iterations:
                while len(self.masks[iteration - 1]) < RANKS or (weather.prompt and self.is_late(iteration)):
                    yield
                yield from self.on_step_end(rank, iteration, weather)

        training = {rank: train(rank) for rank in range(RANKS)}
        while training:
            rank = self.draw.choice(sorted(training))
            if next(training[rank], self) is self:
                del training[rank]
            rank = self.draw.randrange(RANKS)
            while self.is_round_open(rank) and (weather.prompt or self.draw.random() < weather.speed):
                self.replicate(rank, weather)
            after_event()
        while weather.prompt and any(side.queue for side in self.sides):
            for rank in filter(self.is_round_open, range(RANKS)):
                self.replicate(rank, weather)

    def is_late(self, iteration: int) -> bool:
        """Whether something of an earlier iteration still has to be begun or replicated."""
        before = iteration - 1
        return any(before > 0 and (before not in s.turns or any(i < iteration for i, _ in s.queue)) for s in self.sides)

    # -- what would be recovered -------------------------------------------------------------------------

    def plan(self, lost_nodes: frozenset[int] = NO_NODE) -> RecoveryPlan | NoPlan:
        reports = [
            ArenaReport(
                path=f"{node}/{owner}",
                node=node,
                owner=owner,
                epoch=a.page.epoch,
                stable=a.page.stable,
                branches=a.page.branches,
                captures=a.page.records,
            )
            for (owner, node), a in self.arenas.items()
            if node not in lost_nodes
        ]
        return plan_recovery(facts(self.period), reports, PLACEMENT, "exact")

    def check(self, lost: Sequence[frozenset[int]] = (NO_NODE, *(frozenset({n}) for n in range(RANKS)))) -> None:
        for nodes in lost:
            plan = self.plan(nodes)
            assert isinstance(plan, RecoveryPlan), f"without nodes {set(nodes)}: {plan}"
            assert plan.iteration >= self.stable, f"without nodes {set(nodes)}"
            self.check_plan(plan, nodes)

    def check_plan(self, plan: RecoveryPlan, lost: frozenset[int] = NO_NODE) -> None:
        """Of every slice one capture and all gradients since; all else as of T; each from where it really is."""
        for owner, choices in enumerate(plan.choices):
            found: dict[int, list[int]] = defaultdict(list)
            for choice in choices:
                found[choice.unit].append(choice.iteration)
                assert choice.node not in lost
                keys = {r.key for r in self.arenas[owner, choice.node].page.records}
                assert (choice.unit, choice.iteration) in keys
            units = facts(self.period)[owner].units
            logs = log_units(units)
            for number, (_, kind) in enumerate(units):
                if number in logs:
                    (base,) = found[number]
                    assert found[logs[number]] == list(range(base + 1, plan.iteration + 1))
                elif kind is not UnitKind.LOG:
                    assert found[number] == [0 if kind is UnitKind.FROZEN else plan.iteration]
