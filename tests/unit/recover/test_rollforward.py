# SPDX-License-Identifier: Apache-2.0
"""Captures of several ages and logged gradients become one iteration's state, bit for bit; zeros take no bytes."""

from __future__ import annotations

import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fabrics import loopback_fabrics
from hypothesis import given, settings
from hypothesis import strategies as st
from mirrors import LONG_S, TIMING, Wires, eventually
from support import POOL, capture, find, identity, make_packer, no_probe, node_folder, scheduler, together

from megatron_moetion.clock import SystemClock
from megatron_moetion.coding import WHOLE
from megatron_moetion.framework import StepNote
from megatron_moetion.recover.opened import Opened
from megatron_moetion.recover.plan import Place, RecoveryPlan, fetches_of, order_of
from megatron_moetion.recover.restore import Mover, verified
from megatron_moetion.recover.rollforward import roll_forward
from megatron_moetion.recover.survey import survey_store
from megatron_moetion.replicate.holder import Holder
from megatron_moetion.replicate.placement import place
from megatron_moetion.replicate.replication import Replication
from megatron_moetion.replicate.worker import SystemThreads
from megatron_moetion.select.rotation import Rotation
from megatron_moetion.snapshot.gradlog import gradient_log
from megatron_moetion.snapshot.packer import Packer
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.chains import base_of, chain_layout
from megatron_moetion.store.manifest import NO_SLOT, Page, Record, Records
from megatron_moetion.store.open import OpenArenas
from megatron_moetion.store.retention import Chains
from megatron_moetion.store.sharedfile import create_arena, open_arena
from megatron_moetion.store.spec import ArenaShape, ArenaSpec
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

PERIOD = 3
ELEMENTS = 1000
SLOTS = 20
"""For each unit."""
Floats = npt.NDArray[np.float32]


class Toy:
    """A parameter under momentum descent whose rate depends on the step, a bias that is none, and a host state."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.weight: Floats = self.random.normal(size=ELEMENTS).astype(np.float32)
        self.momentum: Floats = np.zeros(ELEMENTS, dtype=np.float32)
        self.gradient: Floats = np.zeros(ELEMENTS, dtype=np.float32)
        self.bias = np.zeros(10, dtype=np.int64)
        self.fixed = self.random.normal(size=33).astype(np.float32)
        self.skipped: set[int] = set()

    def inventory(self) -> Inventory:
        def region(unit: str, tensor: str, role: Role, array: npt.NDArray[Any]) -> Region:
            return Region(
                unit=unit, tensor=tensor, role=role, dtype=str(array.dtype), start=0, nbytes=array.nbytes,
                address=array.ctypes.data, at_once=role in (Role.GRAD, Role.BUFFER),
            )  # fmt: skip

        regions = (
            region("dense", "w", Role.MASTER, self.weight),
            region("dense", "w", Role.EXP_AVG, self.momentum),
            region("dense", "w", Role.GRAD, self.gradient),
            region("dense", "bias", Role.BUFFER, self.bias),
        )
        fixed = (region("frozen", "f", Role.WEIGHT, self.fixed),)
        return Inventory(
            units=(
                Unit(name="dense", kind=UnitKind.DENSE, regions=regions),
                Unit(name="frozen", kind=UnitKind.FROZEN, regions=fixed),
                Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=100),
            )
        )

    def train(self, iteration: int, without: Sequence[tuple[int, int]] = (), skip: bool = False) -> None:
        """A step; elements ``without`` have no gradient. A skipped one leaves gradients behind that were not used."""
        self.gradient[:] = self.random.normal(size=ELEMENTS)
        for start, end in without:
            self.gradient[start:end] = 0
        if skip:
            self.skipped.add(iteration)
            self.gradient[:] = np.inf
        self.replay(iteration)
        self.bias += iteration

    def image(self) -> bytes:
        return b"".join(a.tobytes() for a in (self.weight, self.momentum, self.bias, self.fixed))

    def forget(self) -> None:
        """As in a new process."""
        self.weight[:] = 7
        self.momentum[:] = -7
        self.gradient[:] = 99
        self.fixed[:] = 0
        self.bias[:] = -1

    # -- StepReplayer

    @property
    def bytes_a_step(self) -> int:
        return 0

    def remember(self, steps: int) -> None: ...

    def note_step(self, iteration: int, *, stepped: bool = True) -> StepNote:
        return StepNote(skipped=iteration in self.skipped)

    def begin_replay(self, state: Mapping[str, Any]) -> None: ...

    def replay(self, iteration: int) -> bool:
        if iteration in self.skipped:
            return False
        self.momentum *= np.float32(0.9)
        self.momentum += self.gradient
        self.weight -= np.float32(0.1 / (1 + iteration)) * self.momentum
        return True


class Run:
    """A toy, its arena, and what it was after each iteration."""

    def __init__(self, folder: Path, period: int = PERIOD, owner: int = 0, seed: int = 0) -> None:
        self.toy = Toy(seed)
        self.log = gradient_log(self.toy.inventory(), period)
        self.packer = make_packer(self.log.inventory)
        self.frozen = self.log.inventory.of_kind(UnitKind.FROZEN)
        self.spec = ArenaSpec.of(
            identity(owner=owner, layout=self.log.inventory.fingerprint, mode="exact"),
            self.log.inventory,
            dict.fromkeys(self.log.inventory.index, SLOTS),
        )
        self.arena = self.make_arena(folder)
        self.images = [self.toy.image()]
        self.capture(0, (*self.log.log_of, *self.log.always, *self.frozen))

    @property
    def slices(self) -> tuple[int, ...]:
        return tuple(self.log.log_of)

    def make_arena(self, folder: Path) -> Arena:
        folder.mkdir(parents=True, exist_ok=True)
        return create_arena(folder / f"rank{self.spec.identity.owner:05d}.arena", self.spec, Page())

    def elements(self, unit: int) -> tuple[int, int]:
        first = self.log.inventory.units[unit].regions[0]
        return first.start, first.start + first.nbytes // 4

    def capture(self, iteration: int, units: Collection[int], zero: Collection[int] = ()) -> tuple[Record, ...]:
        """Commit these units and, as records alone, those of zeros."""
        records = list(capture(self.packer, self.arena, iteration, tuple(units)))
        zeros = [zero_record(u, iteration) for u in zero]
        self.arena.add(zeros)
        return (*records, *zeros)

    def train(
        self, iteration: int, captures: Collection[int] = (), quiet: Collection[int] = (), skip: bool = False
    ) -> None:
        """A step, and a snapshot with all gradients; ``quiet`` slices have none."""
        self.toy.train(iteration, [self.elements(u) for u in quiet], skip)
        logs = self.log.log_of.values()
        zero = tuple(logs) if skip else tuple(self.log.log_of[u] for u in quiet)
        self.capture(iteration, (*captures, *self.log.always, *(u for u in logs if u not in zero)), zero)
        self.images.append(self.toy.image())

    def choose(self, iteration: int) -> list[Record] | None:
        """What leads to an iteration, as a plan chooses it; None if nothing does."""
        at: dict[int, dict[int, Record]] = defaultdict(dict)
        for record in self.arena.page.records:
            at[record.unit][record.iteration] = record
        found = [at[u][0] for u in self.frozen]
        for unit, log in self.log.log_of.items():
            base = base_of(at[unit], at[log], iteration)
            if base is None:
                return None
            found += [at[unit][base], *(at[log][i] for i in range(base + 1, iteration + 1))]
        for unit in self.log.always:
            if iteration not in at[unit]:
                return None
            found.append(at[unit][iteration])
        return found

    def recover(self, iteration: int, method: Callable[..., int] = roll_forward) -> int:
        records = self.choose(iteration)
        assert records is not None
        self.toy.forget()
        random.Random(iteration).shuffle(records)
        return method(self.packer, self.arena, records, log_of=self.log.log_of, to=iteration, replayer=self.toy)


def zero_record(unit: int, iteration: int) -> Record:
    return Record(unit=unit, iteration=iteration, epoch=0, slot=NO_SLOT, nbytes=0, digest=0)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@contextmanager
def new_run(period: int) -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), period)
        yield run
        run.arena.close()


# -- rolling forward --------------------------------------------------------------------------------------------------


def test_slices_of_one_tensor_that_were_captured_at_different_times_come_together(run: Run) -> None:
    a, b, c = run.slices
    for iteration, captures in enumerate([(a,), (b,), (c,), (), ()], start=1):
        run.train(iteration, captures)
    for iteration, replayed in ((5, 4), (3, 2), (4, 3)):
        assert run.recover(iteration) == replayed
        assert run.toy.image() == run.images[iteration]


def test_an_iteration_of_which_every_slice_was_captured_needs_no_step(run: Run) -> None:
    run.train(1)
    run.train(2, run.slices)
    assert run.recover(2) == 0
    assert run.toy.image() == run.images[2]


def test_slices_of_zeros_are_stepped_without_a_gradient_and_not_left_as_they_are(run: Run) -> None:
    a, b, c = run.slices
    run.train(1, (a,))
    run.train(2, (b,), quiet=(a, c))
    run.train(3, (), quiet=(a,))
    assert {r.is_zero for r in run.arena.page.records if r.key == (run.log.log_of[a], 2)} == {True}
    assert run.recover(3) == 3
    assert run.toy.image() == run.images[3], "momentum moves them on"


def test_a_skipped_step_is_skipped_again(run: Run) -> None:
    a, b, _ = run.slices
    run.train(1, (a,))
    run.train(2, (b,), skip=True)
    run.train(3)
    assert run.images[2][: run.toy.weight.nbytes] == run.images[1][: run.toy.weight.nbytes]
    assert run.recover(3) == 2
    assert run.toy.image() == run.images[3]
    run.toy.skipped.clear()
    assert run.recover(3) == 3
    assert run.toy.image() != run.images[3], "a step without gradients is not a skipped one"


def newest_first(
    packer: Packer, arena: Arena, records: Sequence[Record], *, log_of: Mapping[int, int], to: int, replayer: Toy
) -> int:
    """Wrong on purpose: all captures are written at once, then every step is replayed."""
    for record in records:
        if record.unit not in log_of.values():
            packer.scatter(record.unit, arena.payload(record.slot))
    logged = {r.key: r for r in records if r.unit in log_of.values()}
    replayed = 0
    for iteration in range(min(i for _, i in logged), to + 1):
        for unit in log_of.values():
            record = logged.get((unit, iteration))
            if record is None or record.is_zero:
                packer.clear(unit)
            else:
                packer.scatter(unit, arena.payload(record.slot))
        replayed += replayer.replay(iteration)
    return replayed


def steps_of_newer_slices_last(
    packer: Packer, arena: Arena, records: Sequence[Record], *, log_of: Mapping[int, int], to: int, replayer: Toy
) -> int:
    """Wrong on purpose: a capture is written after the step that follows it."""
    late = [replace(r, iteration=min(r.iteration + 1, to)) if r.unit in log_of else r for r in records]
    return roll_forward(packer, arena, late, log_of=log_of, to=to, replayer=replayer)


@pytest.mark.parametrize("wrong", [newest_first, steps_of_newer_slices_last])
def test_in_another_order_it_is_another_state(run: Run, wrong: Callable[..., int]) -> None:
    a, b, _ = run.slices
    run.train(1, (a,))
    run.train(2, (b,))
    run.train(3)
    run.recover(3, wrong)
    assert run.toy.image() != run.images[3]
    run.recover(3)
    assert run.toy.image() == run.images[3]


def test_what_was_in_live_state_before_does_not_matter(run: Run) -> None:
    a, _, _ = run.slices
    run.train(1, (a,))
    run.train(2)
    for number in (np.float32("nan"), np.float32("inf"), np.float32(0)):
        records = run.choose(2)
        assert records is not None
        for array in (run.toy.weight, run.toy.momentum, run.toy.gradient, run.toy.fixed):
            array[:] = number
        with np.errstate(invalid="ignore"):
            roll_forward(run.packer, run.arena, records, log_of=run.log.log_of, to=2, replayer=run.toy)
        assert run.toy.image() == run.images[2]


@given(seed=st.integers(0, 10**6), period=st.integers(2, 6), steps=st.integers(1, 16))
@settings(max_examples=40)
def test_whatever_turns_were_taken_the_newest_iteration_comes_back(seed: int, period: int, steps: int) -> None:
    """Turns as the rotation gives them, quiet slices, skipped steps, late captures, and snapshots that were dropped."""
    draw = random.Random(seed)
    with new_run(period) as run:
        rotation = Rotation(run.log, 0, dict.fromkeys(run.slices, 0))
        for iteration in range(1, steps + 1):
            newest = max(rotation.reachable(dict.fromkeys(range(iteration), True)))
            rotation.settle(newest, {i: False for i in range(newest + 1, iteration)})
            if draw.random() < 0.1:
                rotation.interrupt(iteration)
            turn = rotation.turn(iteration)
            quiet = [u for u in run.slices if draw.random() < 0.3]
            skip = draw.random() < 0.1
            dropped, late = turn.is_gap or draw.random() < 0.1, draw.random() < 0.1
            run.toy.train(iteration, [run.elements(u) for u in quiet], skip)
            run.images.append(run.toy.image())
            zero = [u for u in turn.logs if skip or u in {run.log.log_of[q] for q in quiet}]
            rotation.begin(iteration, turn)
            if not dropped:
                logs = [u for u in turn.logs if u not in zero]
                run.capture(iteration, (*run.log.always, *logs, *(() if late else turn.captures)), zero)
            rotation.packed(is_there=not dropped, captured=not late, late=late, zero=frozenset(zero))
            free_old(run, iteration)
        newest = max(i for i in range(steps + 1) if run.choose(i) is not None)
        assert newest == max(rotation.reachable({i: True for i in range(steps + 1)}))
        run.recover(newest)
        assert run.toy.image() == run.images[newest]


def free_old(run: Run, iteration: int) -> None:
    """Only what the newest iteration that can be recovered needs stays, and what is newer."""
    newest = max(i for i in range(iteration + 1) if run.choose(i) is not None)
    needed = {r.key for r in run.choose(newest) or ()}
    run.arena.edit(lambda page: {"records": tuple(r for r in page.records if r.key in needed or r.iteration > newest)})


# -- captures of zeros on their way -----------------------------------------------------------------------------------


def test_records_of_zeros_take_no_slot_and_outlive_the_process(run: Run) -> None:
    log = next(iter(run.log.log_of.values()))
    run.arena.edit(lambda page: {"records": ()})
    zeros = [zero_record(log, i) for i in range(run.spec.num_slots + 1)]
    run.arena.add(zeros)
    run.arena.close()
    again = open_arena(Path(run.arena.name))
    assert again.page.records == tuple(zeros)
    for size, count in run.spec.slots:
        slots = [again.acquire(size) for _ in range(count)]
        assert None not in slots
        assert again.acquire(size) is None
        again.release([s for s in slots if s is not None])
    again.edit(lambda page: {"records": page.records[:1]})
    again.add([replace(zeros[0], epoch=3)])
    assert again.page.records == (replace(zeros[0], epoch=3),)
    again.close()


def test_a_page_has_room_for_as_many_zeros_as_slots(run: Run) -> None:
    log = next(iter(run.log.log_of.values()))
    run.arena.edit(lambda page: {"records": ()})
    run.arena.add([zero_record(log, i) for i in range(run.spec.num_records)])
    assert run.spec.num_records == 2 * run.spec.num_slots
    with pytest.raises(ValueError, match="do not fit"):
        run.arena.add([zero_record(log, run.spec.num_records)])
    assert len(run.arena.page.records) == run.spec.num_records


def test_a_survey_reports_zeros_and_what_is_wrong_with_them(run: Run) -> None:
    a, b, c = run.slices
    run.train(1, (a,), quiet=(b, c))
    good = run.arena.page.records
    wrong = [
        replace(zero_record(run.log.log_of[a], 2), nbytes=64),
        replace(zero_record(run.log.log_of[a], 3), unit=99),
    ]
    run.arena.add(wrong)
    run.arena.close()
    name = Path(run.arena.name)
    opened = Opened(node_folder(name.parent), lambda arena: None)
    (found,) = survey_store(opened, [name.name], run.spec.identity, [ArenaShape.of(run.spec)], POOL)
    assert not found.problem
    assert set(found.records) == set(good)
    assert sum(r.is_zero for r in found.records) == 2
    assert found.damaged == len(wrong)


def test_what_was_verified_of_zeros_is_that_they_are_listed(run: Run) -> None:
    _, b, c = run.slices
    run.train(1, (), quiet=(b, c))
    records = run.choose(1)
    assert records is not None
    order = order_of(0, [r.key for r in records], {Place(0): Records.of(records)}, place(["node0", "node1"], 1))
    assert verified(POOL, run.arena, order) == records


class Buddies:
    """Two ranks, each with its own arena and one for the other, and mirrors between them."""

    def __init__(self, folder: Path) -> None:
        self.runs = [Run(folder / f"node{r}", owner=r, seed=r) for r in range(2)]
        self.held = [self.runs[1 - r].make_arena(folder / f"node{r}") for r in range(2)]
        self.wires = Wires()
        self.fabrics = loopback_fabrics(2, cuts=self.wires)
        self.replications = [self._replication(folder / f"node{r}", r) for r in range(2)]
        for rank in range(2):
            self.offer(rank, 0)  # the captures that a run begins with

    def _replication(self, folder: Path, rank: int) -> Replication:
        layout = chain_layout(self.runs[rank].spec.units)
        arenas = OpenArenas(own=self.runs[rank].arena, held={1 - rank: self.held[rank]}, retention=Chains(layout))
        holder = Holder(
            mesh=self.fabrics[rank].mesh,
            arenas=arenas,
            node=node_folder(folder),
            pool=POOL,
            probe=no_probe,
            threads=SystemThreads(),
            timeout_s=TIMING.answer_s,
        )
        return Replication(
            mesh=self.fabrics[rank].mesh,
            own=arenas.own,
            holder=holder,
            placement=place(["node0", "node1"], 1),
            pool=POOL,
            probe=no_probe,
            pacing=scheduler(),
            patience=1000,
            timeout_s=LONG_S,
            clock=SystemClock(),
            threads=SystemThreads(),
            timing=TIMING,
        )

    def offer(self, rank: int, iteration: int) -> dict[tuple[int, int], Record]:
        """The rank's captures of an iteration, once its holder has them."""
        self.replications[rank].offer(iteration, is_there=True)
        assert eventually(lambda: iteration in self.replications[rank].whole), self.replications[rank].states()
        return {r.key: r for r in self.runs[rank].arena.page.records if r.iteration == iteration}

    def snapshot(self, rank: int, iteration: int) -> dict[tuple[int, int], Record]:
        """One slice's capture and gradient, and zeros for the others."""
        run = self.runs[rank]
        first, *others = run.slices
        run.train(iteration, (first,), quiet=others)
        return self.offer(rank, iteration)

    def mirrored(self, rank: int, iteration: int) -> dict[tuple[int, int], Record]:
        return {r.key: r for r in self.held[1 - rank].page.records if r.iteration == iteration}

    def close(self) -> None:
        for replication in self.replications:
            replication.close()
        self.fabrics.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Buddies]:
    buddies = Buddies(tmp_path)
    yield buddies
    buddies.close()


def test_zeros_reach_a_buddy_without_a_byte_of_payload(pair: Buddies) -> None:
    before = dict(pair.wires.sent)
    for rank in range(2):
        ours, run = pair.snapshot(rank, 1), pair.runs[rank]
        copies = pair.mirrored(rank, 1)
        assert {k: replace(r, slot=0) for k, r in copies.items()} == {k: replace(r, slot=0) for k, r in ours.items()}
        for key, own in ours.items():
            assert copies[key].is_zero == own.is_zero
            if not own.is_zero:
                assert pair.held[1 - rank].payload(copies[key].slot).tobytes() == run.arena.payload(own.slot).tobytes()
        payload = sum(r.nbytes for r in ours.values())
        zeros = sum(run.spec.units[unit][2] for (unit, _), r in ours.items() if r.is_zero)
        assert payload <= pair.wires.sent[rank, 1 - rank] - before[rank, 1 - rank] < payload + zeros


def test_a_snapshot_of_nothing_but_zeros_is_whole(pair: Buddies) -> None:
    zeros = [zero_record(u, 1) for u in pair.runs[0].log.log_of.values()]
    pair.runs[0].arena.add(zeros)
    assert pair.offer(0, 1) == pair.mirrored(0, 1) == {r.key: r for r in zeros}


def test_zeros_go_with_a_snapshot_that_is_refused_or_damaged(pair: Buddies) -> None:
    held, run = pair.held[1], pair.runs[0]
    size = max(nbytes for _, _, nbytes in run.spec.units)
    slots = [held.acquire(size) for _ in range(held.spec.num_slots)]
    run.train(1, run.slices[:1], quiet=run.slices[1:])
    pair.replications[0].offer(1, is_there=True)
    assert eventually(lambda: pair.replications[0].states()[0].problem is not None), "there is no room"
    assert pair.mirrored(0, 1) == {}
    pair.wires.damage(0, 2, 5)
    held.release([s for s in slots if s is not None])
    assert eventually(lambda: 1 in pair.replications[0].whole)
    assert pair.mirrored(0, 1).keys() == {r.key for r in run.arena.page.records if r.iteration == 1}


def test_zeros_are_fetched_by_their_record_alone(pair: Buddies) -> None:
    run, log = pair.runs[0], pair.runs[0].log.log_of[pair.runs[0].slices[0]]
    zero = replace(zero_record(log, 1), epoch=2)
    pair.held[1].add([zero])
    placement = place(["node0", "node1"], 1)
    plan = RecoveryPlan(iteration=1, epoch=3, lineage=0, branches=(), history_epoch=2, safe=1)
    order = order_of(0, [zero.key], {Place(1): Records.of([zero])}, placement)
    (leg,) = fetches_of(order, {0: {Place(1): 1}}, placement)
    movers = [
        Mover(
            rank=r,
            arenas={(0, WHOLE): arena},
            channel=pair.fabrics[r].channel,
            pool=POOL,
            plan=plan,
            orders={0: order},
            retentions={0: Chains(chain_layout(arena.spec.units))},
        )
        for r, arena in enumerate((run.arena, pair.held[1]))
    ]
    assert together(*(lambda m=m: m.move([leg]) for m in movers)) == [0, 0]  # type: ignore[misc]
    assert find(run.arena, log, 1) == zero
