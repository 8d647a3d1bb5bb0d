# SPDX-License-Identifier: Apache-2.0
"""Safety and progress of the bookkeeping in mode ``exact``: whatever is dropped, the stable iteration can be recovered.

A model on paper, event by event: ranks take turns of captures and log gradients, drop, learn results of agreements each
in its own time, and free what their rotation gives up; each owner's replica becomes like the owner's arena, some time
later, first without what was dropped and then with what was added. The real rotation, agreement, retention, placement,
planning and making of room are what is tested; the planner is the oracle.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, reduce
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import Transfer, World, found_in, plan_world

from megatron_moetion.recover.plan import NoPlan, Units, choose_chains
from megatron_moetion.recover.restore import Mover
from megatron_moetion.replicate.agreement import WINDOW, Agreement, combine_words
from megatron_moetion.replicate.channel import Note, Reduced
from megatron_moetion.replicate.placement import place
from megatron_moetion.select.budget import exact_copies
from megatron_moetion.select.rotation import Rotation, Turn
from megatron_moetion.snapshot.gradlog import GradientLog, gradient_log
from megatron_moetion.store.chains import ChainLayout, chain_layout, log_units
from megatron_moetion.store.manifest import NO_SLOT, Page, Record, Records, successor
from megatron_moetion.store.retention import Chains
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

RANKS = 4
PLACEMENT = place([f"node{r}" for r in range(RANKS)], 1)
STATE = (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ, Role.GRAD)
NO_NODE: frozenset[int] = frozenset()
LOSSES = (NO_NODE, *(frozenset({n}) for n in range(RANKS)))
PERIODS = st.sampled_from((2, 3, 5, 8))


def parameter(unit: str, elements: int, gradient: str) -> tuple[Region, ...]:
    """Master copy, moments and gradient at made-up addresses."""
    found = []
    for n, role in enumerate(STATE):
        dtype = gradient if role is Role.GRAD else "float32"
        nbytes = elements * (2 if dtype == "bfloat16" else 4)
        found.append(
            Region(unit=unit, tensor="w", role=role, dtype=dtype, start=0, nbytes=nbytes, address=(1 + n) << 30)
        )
    return tuple(found)


@cache
def log_of_rank(rank: int, period: int, gradient: str = "float32") -> GradientLog:
    """Ranks differ in what they hold; the last one has too little for a cut in each iteration of a long period."""
    elements = 64 * (3000 + 700 * rank if rank < RANKS - 1 else 2)
    dense = f"layers.{rank}.dense"
    bias = Region(unit=dense, tensor="bias", role=Role.BUFFER, dtype="int64", start=0, nbytes=80, address=4096)
    fixed = Region(unit="frozen", tensor="f", role=Role.WEIGHT, dtype="bfloat16", start=0, nbytes=64, address=64)
    units = [
        Unit(name=dense, kind=UnitKind.DENSE, layer=rank, regions=(*parameter(dense, elements, gradient), bias)),
        Unit(name="frozen", kind=UnitKind.FROZEN, regions=(fixed,)),
    ]
    for e in range(3):
        name = f"layers.{rank}.experts.{e}"
        regions = parameter(name, elements // 2, gradient)
        units.append(Unit(name=name, kind=UnitKind.EXPERT, layer=rank, expert=e, regions=regions))
    units.append(Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=1000))
    return gradient_log(Inventory(units=tuple(units)), period)


@cache
def units_of(period: int) -> tuple[Units, ...]:
    return tuple(tuple((u.name, u.kind) for u in log_of_rank(r, period).inventory.units) for r in range(RANKS))


@cache
def layout_of(owner: int, period: int) -> ChainLayout:
    return chain_layout([(u.name, int(u.kind), u.nbytes) for u in log_of_rank(owner, period).inventory.units])


class Paper:
    """An arena without bytes. Units of one size share their slots, as in a real one, or (``apart``) nothing."""

    def __init__(self, log: GradientLog, apart: bool, page: Page) -> None:
        copies = exact_copies(log)
        pools: dict[Any, int] = {}
        names = [u.name if apart else u.nbytes for u in log.inventory.units]
        self.pool_of = np.array([pools.setdefault(name, len(pools)) for name in names])
        self.slots = np.zeros(len(pools), dtype=np.int64)
        for unit, pool in zip(log.inventory.units, self.pool_of, strict=True):
            self.slots[pool] += copies[unit.name]
        self.most_records = 2 * int(self.slots.sum())
        self.page = page

    def has_room(self, records: Sequence[Record]) -> bool:
        listed = self.page.records.followed_by(Records.of(records))
        units = listed.table["unit"][~listed.is_zero]
        taken = np.bincount(self.pool_of[units], minlength=len(self.slots))
        return len(listed) <= self.most_records and bool((taken <= self.slots).all())

    def edit(self, change: Callable[[Page], Mapping[str, Any]]) -> None:
        found = successor(self.page, **change(self.page))
        self.page = replace(found, records=Records.of(found.records))
        assert len(self.page.records) <= self.most_records, "the manifest page is full"

    def add(self, records: Sequence[Record]) -> None:
        self.edit(lambda page: {"records": page.records.followed_by(Records.of(records))})


def keys_of(records: Records) -> npt.NDArray[np.int64]:
    """One number a record."""
    keys: npt.NDArray[np.int64] = records.table["unit"].astype(np.int64) << 32 | records.table["iteration"]
    return keys


class Tree:
    """Combines the words of all ranks, round by round; each rank hears of a result in its own time."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.said: dict[int, dict[int, Sequence[int]]] = defaultdict(dict)
        self.results: list[Reduced] = []
        self.is_cut = False
        self.heard_at_once = 1.0

    def say(self, rank: int, number: int, words: Sequence[int]) -> None:
        self.said[number][rank] = words
        while len(words := self.said[len(self.results)]) == RANKS:
            combined = tuple(reduce(combine_words, words.values()))  # type: ignore[arg-type]
            self.results.append(Reduced(number=len(self.results), words=combined))


class Branch:
    """One rank's ``Reducer``."""

    def __init__(self, tree: Tree, rank: int) -> None:
        self.tree, self.rank = tree, rank
        self.heard = 0

    def contribute(self, number: int, words: Sequence[int], notes: Mapping[str, Note] | None = None) -> None:
        self.tree.say(self.rank, number, words)

    def results(self) -> list[Reduced]:
        first, tree = self.heard, self.tree
        while self.heard < len(tree.results) and not tree.is_cut and tree.draw.random() < tree.heard_at_once:
            self.heard += 1
        return tree.results[first : self.heard]

    def wait(self, number: int, timeout_s: float) -> bool:
        raise AssertionError("nothing waits in a step")


@dataclass(frozen=True, kw_only=True)
class Weather:
    """How often things go wrong; where links are not ``prompt``, how fast they are, and how soon results are heard."""

    drop: float = 0.0
    refuse: float = 0.0
    """Updates of replicas that come to nothing and are tried again."""
    late: float = 0.0
    """Snapshots without their turn's captures."""
    hole: float = 0.0
    """Iterations whose step cannot be logged."""
    sick: float = 0.0
    """Iterations that a rank calls unhealthy."""
    zero: float = 0.0
    """Gradients of zeros: of a third of the units never, of a third half as often as of the last one."""
    skipped: float = 0.0
    prompt: bool = True
    speed: float = 1.0
    heard: float = 1.0


CALM = Weather()
STORMS = st.builds(
    Weather,
    drop=st.sampled_from((0.0, 0.05, 0.3)),
    refuse=st.sampled_from((0.0, 0.05, 0.3)),
    late=st.sampled_from((0.0, 0.1, 0.5)),
    hole=st.sampled_from((0.0, 0.05, 0.5)),
    sick=st.sampled_from((0.0, 0.05)),
    zero=st.sampled_from((0.0, 0.25, 0.5)),
    skipped=st.sampled_from((0.0, 0.05)),
    prompt=st.just(False),
    speed=st.sampled_from((0.1, 0.3, 0.7, 1.0)),
    heard=st.sampled_from((0.1, 0.3, 0.7, 1.0)),
)
SHOWERS = st.builds(
    Weather,
    drop=st.sampled_from((0.0, 0.02)),
    late=st.sampled_from((0.0, 0.1)),
    zero=st.sampled_from((0.0, 0.25, 0.5)),
    skipped=st.sampled_from((0.0, 0.05)),
    prompt=st.just(False),
    speed=st.sampled_from((0.3, 0.7, 1.0)),
    heard=st.sampled_from((0.7, 1.0)),
)
"""In which the newest snapshots of all ranks are often newer than the stable one."""


@dataclass
class Side:
    """One rank: what its session knows, and for the tests what became of its snapshots."""

    rotation: Rotation
    agreement: Agreement
    rounds: dict[int, bool] = field(default_factory=dict)
    open: list[int] = field(default_factory=list)
    """Snapshots that are there, and not yet on the replica."""
    update: tuple[Page, list[int]] | None = None
    """The page that the replica is becoming like, which has dropped already what is not in it; and what was open."""
    last: tuple[bool, bool, bool, frozenset[int]] = (False, False, False, frozenset())
    """Of the newest snapshot: whether it is there, with its captures, and whether these were late."""
    turns: dict[int, Turn] = field(default_factory=dict)
    no_room: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)


class Cluster:
    """Ranks on one node each, with their own arena and the one that they hold for another."""

    def __init__(self, period: int, draw: random.Random, apart: bool = False, gradient: str = "float32") -> None:
        self.period, self.draw, self.apart = period, draw, apart
        self.logs = [log_of_rank(r, period, gradient) for r in range(RANKS)]
        self.most_groups = period
        """More in one snapshot are always late."""
        self.forced: set[tuple[int, int]] = set()
        """Snapshots (rank, iteration) that are dropped whatever the weather."""
        self.holes: set[tuple[int, int]] = set()
        """Of these the step cannot be logged."""
        self.cut_off: set[int] = set()
        """Owners whose replicas get nothing."""
        self.epoch = 0
        homes = [(r, n) for r in range(RANKS) for n in (r, *PLACEMENT.holders[r])]  # owner, node
        self.arenas = {home: Paper(self.logs[home[0]], apart, Page(stable=0)) for home in homes}
        for (owner, _), arena in self.arenas.items():
            logs = set(self.logs[owner].log_of.values())
            arena.add([self.record(owner, u, 0) for u in range(len(self.logs[owner].inventory.units)) if u not in logs])
        self.begin(0, [dict.fromkeys(log.log_of, 0) for log in self.logs])

    def begin(self, iteration: int, bases: Sequence[Mapping[int, int]]) -> None:
        self.began = iteration
        self.tree = Tree(self.draw)
        self.sides = [
            Side(rotation=Rotation(log, iteration, b), agreement=Agreement(Branch(self.tree, r), iteration))
            for r, (log, b) in enumerate(zip(self.logs, bases, strict=True))
        ]

    @property
    def stable(self) -> int:
        """What at least one manifest says, so that it outlives the processes."""
        return max(arena.page.stable for arena in self.arenas.values())

    @property
    def now(self) -> int:
        """The last iteration that all ranks have begun a snapshot of."""
        return min(max(side.turns, default=self.began) for side in self.sides)

    def record(self, owner: int, unit: int, iteration: int, zero: bool = False) -> Record:
        key = {"unit": unit, "iteration": iteration, "epoch": self.epoch}
        if zero:
            return Record(**key, slot=NO_SLOT, nbytes=0, digest=0)
        return Record(**key, slot=0, nbytes=64, digest=owner << 24 | unit << 12 | iteration)

    # -- what one rank does, one event at a time ------------------------------------------------------------

    def on_step_end(self, rank: int, iteration: int, weather: Weather) -> Iterator[None]:
        """``Session.on_step_end``; yields after each thing that others may see."""
        side = self.sides[rank]
        is_sick = self.draw.random() < weather.sick
        if is_sick:
            side.agreement.veto((iteration - 1, iteration))
        is_there, captured, late, zero = side.last
        side.rotation.packed(is_there=is_there, captured=captured, late=late, zero=zero)
        release = False
        for agreed in side.agreement.poll():
            if agreed.is_news:
                side.rotation.settle(agreed.stable, agreed.recoverable)
                release = True
        if (rank, iteration) in self.holes or self.draw.random() < weather.hole:
            side.rotation.interrupt(iteration)
        given_up = dict.fromkeys(side.rotation.unreachable, False)
        rounds = dict(sorted(side.rounds.items())[-WINDOW:]) | given_up
        recoverable = side.rotation.reachable(rounds)
        side.agreement.start(iteration, rounds=rounds, recoverable=recoverable, vote=0, redundancy=1)
        yield
        turn = side.turns[iteration] = side.rotation.turn(iteration)
        side.rotation.begin(iteration, turn)
        if release:
            settled = side.rotation.settled
            arena = self.arenas[rank, rank]
            kept = Chains(layout_of(rank, self.period)).keep(arena.page.records, settled)
            arena.edit(lambda page: {"records": kept, "stable": settled.stable})
            yield
        self.snapshot(rank, iteration, turn, weather, is_sick)
        yield

    def snapshot(self, rank: int, iteration: int, turn: Turn, weather: Weather, is_dropped: bool) -> None:
        """The packing thread."""
        side, log, arena = self.sides[rank], self.logs[rank], self.arenas[rank, rank]
        skipped = self.draw.random() < weather.skipped
        zero = frozenset(u for u in turn.logs if skipped or self.draw.random() < weather.zero * (u % 3))
        staged = [self.record(rank, u, iteration) for u in (*log.always, *turn.logs) if u not in zero]
        optional = [self.record(rank, u, iteration) for u in turn.captures]
        zeros = [self.record(rank, u, iteration, zero=True) for u in sorted(zero)]
        is_dropped |= turn.is_gap or (rank, iteration) in self.forced or self.draw.random() < weather.drop
        if not is_dropped and not arena.has_room([*staged, *zeros]):
            side.no_room.append(iteration)
            is_dropped = True
        late = self.draw.random() < weather.late or len(turn.groups) > self.most_groups
        if not is_dropped and not arena.has_room([*staged, *zeros, *optional]):
            side.left_out.append(iteration)
            captured = late = False
        else:
            captured = not late
        side.last = (not is_dropped, captured and not is_dropped, late and not is_dropped, zero)
        if is_dropped:
            side.rounds[iteration] = False
        else:
            arena.add([*staged, *(optional if captured else ()), *zeros])
            side.open.append(iteration)

    def is_behind(self, rank: int) -> bool:
        """Whether this rank's replica can be brought on."""
        mine, (holder,) = self.arenas[rank, rank].page, PLACEMENT.holders[rank]
        theirs = self.arenas[rank, holder].page
        return rank not in self.cut_off and (bool(self.sides[rank].open) or mine.stable != theirs.stable)

    def replicate(self, rank: int, weather: Weather) -> None:
        """Half of an update of this rank's replica: first it drops what the owner has dropped, then the rest comes."""
        side, (holder,) = self.sides[rank], PLACEMENT.holders[rank]
        mine, replica = self.arenas[rank, rank].page, self.arenas[rank, holder]
        if side.update is None:
            side.update = mine, list(side.open)
            theirs = replica.page.records
            kept = theirs.where(np.isin(keys_of(theirs), keys_of(mine.records)))
            replica.edit(lambda page: {"records": kept, "stable": mine.stable})
            return
        (page, offered), side.update = side.update, None
        coming = page.records.where(~np.isin(keys_of(page.records), keys_of(replica.page.records)))
        are_still_there = np.isin(keys_of(coming), keys_of(mine.records)).all()
        if self.draw.random() < weather.refuse or not are_still_there:
            return  # a slot that was used again while it was being read: its bytes are not the announced ones
        assert replica.has_room(coming), "it holds nothing that the owner does not hold"
        replica.add(coming)
        listed = set(mine.records.table["iteration"].tolist())
        side.rounds |= dict.fromkeys((i for i in offered if i in listed), True)
        side.open = [i for i in side.open if i not in offered and i in listed]

    # -- time --------------------------------------------------------------------------------------------

    def run(self, steps: int, weather: Weather, after_event: Callable[[], bool] = lambda: False) -> None:
        """All ranks go on, as far apart as training allows, or until ``after_event`` says that they failed."""
        iterations = range(self.now + 1, self.now + 1 + steps)
        self.tree.heard_at_once = weather.heard

        def train(rank: int) -> Iterator[None]:
            for iteration in iterations:
                while not all(iteration - 1 in (self.began, *side.turns) for side in self.sides) or (
                    weather.prompt and any(map(self.is_behind, range(RANKS)))
                ):
                    yield
                yield from self.on_step_end(rank, iteration, weather)

        training = {rank: train(rank) for rank in range(RANKS)}
        while training:
            rank = self.draw.choice(sorted(training))
            if next(training[rank], self) is self:
                del training[rank]
            rank = self.draw.randrange(RANKS)
            while self.is_behind(rank) and (weather.prompt or self.draw.random() < weather.speed):
                self.replicate(rank, weather)
            if after_event():
                return
        while weather.prompt and any(map(self.is_behind, range(RANKS))):
            for rank in filter(self.is_behind, range(RANKS)):
                self.replicate(rank, weather)

    # -- what would be recovered -------------------------------------------------------------------------

    def plan(self, lost_nodes: frozenset[int] = NO_NODE) -> World | NoPlan:
        return plan_world(units_of(self.period), found_in(self.arenas, lost_nodes), PLACEMENT, choose_chains)

    def plan_of(self, lost_nodes: frozenset[int] = NO_NODE) -> World:
        plan = self.plan(lost_nodes)
        assert isinstance(plan, World), f"without nodes {set(lost_nodes)}: {plan}"
        return plan

    def check(self, losses: Sequence[frozenset[int]] = LOSSES) -> None:
        for lost in losses:
            plan = self.plan_of(lost)
            assert plan.iteration >= self.stable, f"without nodes {set(lost)}"
            self.check_plan(plan, lost)

    def check_plan(self, plan: World, lost: frozenset[int] = NO_NODE) -> None:
        """Of every slice one capture and all gradients since; all else as of T; each from where it really is."""
        keys = {home: {r.key for r in arena.page.records} for home, arena in self.arenas.items()}
        for owner, choices in enumerate(plan.choices):
            found: dict[int, list[int]] = defaultdict(list)
            for choice in choices:
                found[choice.unit].append(choice.iteration)
                assert choice.node not in lost
                assert (choice.unit, choice.iteration) in keys[owner, choice.node]
            units = units_of(self.period)[owner]
            logs = log_units(units)
            for number, (_, kind) in enumerate(units):
                if number in logs:
                    (base,) = found[number]
                    assert found[logs[number]] == list(range(base + 1, plan.iteration + 1))
                elif kind is not UnitKind.LOG:
                    assert found[number] == [0 if kind is UnitKind.FROZEN else plan.iteration]

    def longest_chain(self) -> int:
        """Gradients that a recovery of the newest iteration needs of one slice, at most."""
        plan = self.plan_of()
        at = [
            c.iteration for log, row in zip(self.logs, plan.choices, strict=True) for c in row if c.unit in log.log_of
        ]
        return plan.iteration - min(at)

    # -- recovery ----------------------------------------------------------------------------------------

    def mover(self, node: int, plan: World) -> Mover:
        mine = {owner: arena for (owner, where), arena in self.arenas.items() if where == node}
        return plan.mover(node, mine, {owner: Chains(layout_of(owner, self.period)) for owner in range(RANKS)})

    def lose(self, lost: frozenset[int], plan: World) -> None:
        """These nodes are replaced; their arenas are made anew."""
        page = Page(epoch=plan.history_epoch, stable=plan.safe, branches=plan.branches[:-1])
        for owner, node in self.arenas:
            if node in lost:
                self.arenas[owner, node] = Paper(self.logs[owner], self.apart, page)

    def move(self, transfers: Sequence[Transfer]) -> None:
        for t in transfers:
            source, target = self.arenas[t.owner, t.source], self.arenas[t.owner, t.target]
            (record,) = (r for r in source.page.records if r.key == (t.unit, t.iteration))
            assert target.has_room([record]), "room was made"
            target.add([record])

    def recover(self, lost: frozenset[int]) -> World:
        """Every rank begins again from the newest iteration that can be recovered."""
        plan = self.plan_of(lost)
        self.lose(lost, plan)
        for legs, transfers in ((plan.fetch_legs, plan.fetches), (plan.copy_legs, plan.copies)):
            for node in range(RANKS):
                self.mover(node, plan).make_room(legs)
            self.move(transfers)
        for node in range(RANKS):
            self.mover(node, plan).begin_epoch()
        self.epoch = plan.epoch
        slices = [log.log_of for log in self.logs]
        bases = [{c.unit: c.iteration for c in row if c.unit in s} for row, s in zip(plan.choices, slices, strict=True)]
        self.begin(plan.iteration, bases)
        for side, log, row in zip(self.sides, self.logs, plan.choices, strict=True):
            slice_of = {number: unit for unit, number in log.log_of.items()}
            logged = Counter(slice_of[c.unit] for c in row if c.unit in slice_of and not c.is_zero)
            of_slices = {c.unit: c.iteration for c in row if c.unit in log.log_of}
            side.rotation = Rotation(log, plan.iteration, of_slices, logged)
        return plan


def sometimes(cluster: Cluster, rate: float) -> Callable[[], bool]:
    """After an event: look whether all is well, now and then."""

    def look() -> bool:
        if cluster.draw.random() < rate:
            cluster.check()
        return False

    return look


def at_some_event(cluster: Cluster, most: int) -> Callable[[], bool]:
    """After an event: fail at one of the next so many."""
    events = count()
    last = cluster.draw.randrange(most)
    return lambda: next(events) >= last


def until_current(cluster: Cluster, weather: Weather, within: int) -> int | None:
    """Iterations until the stable one stays as new as agreement allows; None if it does not, within so many."""
    first: int | None = None
    for step in range(1, within + 2 * cluster.period + 12):
        cluster.run(1, weather)
        if cluster.stable < cluster.now - 2:
            first = None
        elif first is None:
            first = step
    return first if first is not None and first <= within else None


# -- safety -----------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), period=PERIODS, storm=STORMS, apart=st.booleans(), steps=st.integers(4, 24))
@settings(max_examples=50)
def test_the_stable_iteration_is_reachable_after_any_event(
    seed: int, period: int, storm: Weather, apart: bool, steps: int
) -> None:
    cluster = Cluster(period, random.Random(seed), apart)
    cluster.run(steps, storm, sometimes(cluster, 0.2))
    cluster.check()


@given(seed=st.integers(0, 10**6), period=PERIODS, storm=STORMS | SHOWERS, apart=st.booleans())
@settings(max_examples=40)
def test_a_run_that_recovers_goes_on_and_recovers_again(seed: int, period: int, storm: Weather, apart: bool) -> None:
    """At any event, with any one node lost; no branch is ever confused with another, and replicas have room."""
    cluster = Cluster(period, random.Random(seed), apart)
    for _ in range(4):
        cluster.run(3 * period + 8, storm, at_some_event(cluster, 200))
        before = cluster.stable
        lost = cluster.draw.choice(LOSSES)
        plan = cluster.recover(lost)
        assert plan.iteration >= before
        again = cluster.plan_of()
        assert (again.iteration, again.history_epoch, again.fetches, again.copies) == (
            plan.iteration,
            plan.epoch,
            [],
            [],
        )
        cluster.check()


@given(seed=st.integers(0, 10**6), period=PERIODS, storm=SHOWERS)
@settings(max_examples=60)
def test_a_node_lost_while_a_recovery_makes_room_leaves_a_plan(seed: int, period: int, storm: Weather) -> None:
    """Processes fail, all memory is there; room is made for what replicas lack, some arrives; then a node is lost."""
    cluster = Cluster(period, random.Random(seed))
    cluster.run(3 * period + 8, storm, at_some_event(cluster, 300))
    plan = cluster.plan_of()
    prepared = [node for node in range(RANKS) if cluster.draw.random() < 0.8]
    for node in prepared:
        cluster.mover(node, plan).make_room(plan.copy_legs)
    cluster.check()
    coming = [t for t in plan.copies if t.target in prepared]
    cluster.move(coming[: cluster.draw.randint(0, len(coming))])
    cluster.check()


@given(seed=st.integers(0, 10**6), period=PERIODS, storm=SHOWERS)
@settings(max_examples=25)
def test_an_epoch_that_was_written_on_some_ranks_only_is_no_second_history(
    seed: int, period: int, storm: Weather
) -> None:
    cluster = Cluster(period, random.Random(seed))
    cluster.run(3 * period + 8, storm, at_some_event(cluster, 300))
    plan = cluster.plan_of()
    for node in range(RANKS):
        cluster.mover(node, plan).make_room(plan.copy_legs)
    cluster.move(plan.copies)
    written = [n for n in range(RANKS) if cluster.draw.random() < 0.5]
    for node in written:
        cluster.mover(node, plan).begin_epoch()
    again = cluster.plan_of()
    cluster.check_plan(again)
    if written:
        assert (again.iteration, again.history_epoch) == (plan.iteration, plan.epoch)
        assert [[(c.unit, c.iteration) for c in row] for row in again.choices] == [
            [(c.unit, c.iteration) for c in row] for row in plan.choices
        ]


@given(seed=st.integers(0, 10**6), period=PERIODS, storm=STORMS)
@settings(max_examples=25)
def test_the_oracle_misses_no_gradient(seed: int, period: int, storm: Weather) -> None:
    """Without any one of the gradients and other units that a plan chooses there is an older iteration, or none."""
    cluster = Cluster(period, random.Random(seed))
    cluster.run(2 * period + 4, storm)
    plan = cluster.plan_of()
    owner = cluster.draw.randrange(RANKS)
    needed = [c for c in plan.choices[owner] if c.unit not in cluster.logs[owner].log_of]
    gone = cluster.draw.choice([(c.unit, c.iteration) for c in needed])
    for node in (owner, *PLACEMENT.holders[owner]):
        cluster.arenas[owner, node].edit(lambda page: {"records": tuple(r for r in page.records if r.key != gone)})
    without = cluster.plan()
    assert isinstance(without, NoPlan) or without.iteration < plan.iteration


# -- while all goes well ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("period", [2, 3, 5, 8, 13])
def test_steady_turns_find_room_and_chains_stay_within_a_period(period: int, apart: bool) -> None:
    cluster = Cluster(period, random.Random(period), apart)
    for iteration in range(1, 4 * period + 3):
        cluster.run(1, CALM)
        assert cluster.stable == max(iteration - 2, 0)
        assert cluster.longest_chain() < period
        for log, side in zip(cluster.logs, cluster.sides, strict=True):
            turn = side.turns[iteration]
            taking_turns = [g for g in log.groups if g]
            assert turn.captures == taking_turns[(iteration - 1) % len(taking_turns)]
            assert turn.logs == tuple(log.log_of.values())
    assert all(not side.no_room and not side.left_out and not side.rotation.spared_bytes for side in cluster.sides)


@given(seed=st.integers(0, 10**6), period=PERIODS, zero=st.sampled_from((0.1, 0.5)), apart=st.booleans())
@settings(max_examples=20)
def test_quiet_slices_are_spared_one_turn_and_chains_stay_within_two_periods(
    seed: int, period: int, zero: float, apart: bool
) -> None:
    cluster = Cluster(period, random.Random(seed), apart)
    weather = Weather(zero=zero, skipped=0.1)
    spared = [0] * RANKS
    for iteration in range(1, 5 * period):
        cluster.run(1, weather)
        assert cluster.stable == max(iteration - 2, 0)
        assert cluster.longest_chain() < 2 * period
        for rank, (log, side) in enumerate(zip(cluster.logs, cluster.sides, strict=True)):
            units = log.inventory.units
            turn = side.turns[iteration]
            (group,) = turn.groups
            whole = [g for g in log.groups if g][group]
            assert set(turn.captures) <= set(whole)
            spared[rank] += sum(units[u].nbytes for u in whole if u not in turn.captures)
    cluster.run(1, CALM)  # the last turn's sparing is counted one iteration later
    assert all(not side.no_room and not side.left_out for side in cluster.sides)
    assert [side.rotation.spared_bytes for side in cluster.sides] == spared


# -- after something was dropped ----------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("gradient", ["float32", "bfloat16"])
@pytest.mark.parametrize("period", [2, 3, 8, 16])
def test_one_dropped_snapshot_leads_to_no_other(period: int, gradient: str, apart: bool) -> None:
    for rank in (0, RANKS - 1):
        for at in range(period + 1, 2 * period + 1):
            cluster = Cluster(period, random.Random(at), apart, gradient)
            cluster.forced = {(rank, at)}
            cluster.run(at, CALM)
            assert until_current(cluster, CALM, 7) is not None
            assert not any(side.no_room for side in cluster.sides)


@given(
    seed=st.integers(0, 10**6),
    period=st.sampled_from((2, 3, 5, 8, 16)),
    storm=STORMS,
    apart=st.booleans(),
    gradient=st.sampled_from(("float32", "bfloat16")),
    recovers=st.booleans(),
)
@settings(max_examples=40)
def test_after_any_storm_iterations_become_stable_again(
    seed: int, period: int, storm: Weather, apart: bool, gradient: str, recovers: bool
) -> None:
    """Also if the job fails in the storm, with replicas and logs as they are then."""
    cluster = Cluster(period, random.Random(seed), apart, gradient)
    cluster.run(2 * period + 8, storm)
    if recovers:
        cluster.recover(NO_NODE)
    assert until_current(cluster, CALM, 2 * period + 12) is not None


@pytest.mark.parametrize("period", [2, 4, 8, 16])
def test_where_copies_of_all_state_are_always_late_iterations_still_become_stable(period: int) -> None:
    """As long as a part is in time: here a quarter of the state, or one group. Gaps may follow each other then."""
    cluster = Cluster(period, random.Random(3))
    cluster.most_groups = max(1, period // 4)
    cluster.forced = {(1, 2 * period)}
    cluster.run(2 * period, CALM)
    for _ in range(6 * period):
        cluster.run(1, CALM)
        assert cluster.now - cluster.stable <= 4 * period + 4


@pytest.mark.parametrize(("period", "rank", "at"), [(12, 0, 24), (13, 1, 37), (16, 1, 42), (24, 0, 68)])
def test_one_dropped_snapshot_leads_to_no_other_whatever_the_period(period: int, rank: int, at: int) -> None:
    cluster = Cluster(period, random.Random(0))
    cluster.forced = {(rank, at)}
    cluster.run(at, CALM)
    assert until_current(cluster, CALM, 2 * period + 6) is not None
    assert all(not side.no_room for side in cluster.sides)


SHORT_GAP = 5
"""Snapshots in a row that one rank may lack without a consequence for any other."""


@pytest.mark.parametrize("missing", [2, SHORT_GAP, 8, 20, 60])
@pytest.mark.parametrize("period", [2, 8])
def test_a_long_gap_of_one_rank_is_over_when_its_snapshots_are_there_again(period: int, missing: int) -> None:
    for rank in (0, RANKS - 1):
        for at in range(2 * period + 1, 3 * period + 1, max(1, period // 3)):
            cluster = Cluster(period, random.Random(at))
            cluster.forced = {(rank, at + k) for k in range(missing)}
            cluster.run(at + missing - 1, CALM, sometimes(cluster, 0.01))
            assert cluster.stable >= at - 1
            assert until_current(cluster, CALM, 2 * period + 8) is not None
            others = [side for r, side in enumerate(cluster.sides) if r != rank]
            assert missing > SHORT_GAP or not any(side.no_room for side in others)


@given(
    seed=st.integers(0, 10**6),
    period=st.sampled_from((2, 3, 8)),
    storm=SHOWERS,
    still=st.integers(1, 60),
    owners=st.frozensets(st.integers(0, RANKS - 1)),
)
@settings(max_examples=20)
def test_while_nothing_becomes_stable_nothing_is_lost_and_afterwards_it_goes_on(
    seed: int, period: int, storm: Weather, still: int, owners: frozenset[int]
) -> None:
    """Some replicas, or without ``owners`` the results of agreements, do not come for a long time."""
    cluster = Cluster(period, random.Random(seed))
    cluster.run(period + 3, storm)
    before = cluster.stable
    cluster.cut_off, cluster.tree.is_cut = set(owners), not owners
    cluster.run(still, storm, sometimes(cluster, 0.02))
    cluster.check()
    assert cluster.stable >= before
    cluster.cut_off, cluster.tree.is_cut = set(), False
    assert until_current(cluster, CALM, 3 * period + 8) is not None


@pytest.mark.parametrize("period", [2, 8])
def test_a_step_that_cannot_be_logged_costs_its_own_iteration(period: int) -> None:
    for rank in (0, RANKS - 1):
        at = 2 * period + 1
        cluster = Cluster(period, random.Random(at))
        cluster.holes = {(rank, at)}
        cluster.run(at + 3, CALM)
        assert cluster.stable == at + 1
        assert not any(side.no_room or side.left_out for side in cluster.sides)


def test_where_no_step_can_be_logged_every_second_iteration_becomes_stable() -> None:
    cluster = Cluster(4, random.Random(0))
    cluster.run(20, replace(CALM, hole=1.0))
    assert cluster.now - cluster.stable <= 3
    cluster.check()


@given(seed=st.integers(0, 10**6), period=st.sampled_from((2, 3)))
@settings(max_examples=20)
def test_one_dropped_snapshot_leads_to_no_other_where_slices_are_quiet(seed: int, period: int) -> None:
    cluster = Cluster(period, random.Random(seed))
    at = cluster.draw.randrange(period, 3 * period)
    cluster.forced = {(cluster.draw.randrange(RANKS), at)}
    weather = Weather(zero=0.3)
    cluster.run(at, weather)
    assert until_current(cluster, weather, 2 * period + 6) is not None
    assert all(not side.no_room for side in cluster.sides)


@given(seed=st.integers(0, 10**6), period=PERIODS, storm=STORMS, late=st.just(0.0), steps=st.integers(10, 40))
@settings(max_examples=60)
def test_after_any_storm_of_drops_snapshots_become_stable_again(
    seed: int, period: int, storm: Weather, late: float, steps: int
) -> None:
    cluster = Cluster(period, random.Random(seed))
    cluster.run(steps, replace(storm, late=late))
    assert until_current(cluster, CALM, 3 * period + 8) is not None


@given(seed=st.integers(0, 10**6), period=PERIODS, late=st.integers(1, 12))
@settings(max_examples=60)
def test_after_captures_were_late_for_some_time_snapshots_become_stable_again(
    seed: int, period: int, late: int
) -> None:
    cluster = Cluster(period, random.Random(seed))
    cluster.run(cluster.draw.randint(1, 3 * period), CALM)
    cluster.run(period + late, Weather(late=0.8))
    assert until_current(cluster, CALM, 3 * period + 8) is not None
