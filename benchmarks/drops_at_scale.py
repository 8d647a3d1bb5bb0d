# SPDX-License-Identifier: Apache-2.0
"""How far is the stable iteration behind where each rank drops a snapshot now and then, by the number of ranks?

The code of agreement, of turns and chains and of retention is the product's, and so are the slots of arenas; bytes and
time are left out. A rank that has dropped nothing of late does what all such ranks do, so one object stands for all of
them. Links are prompt: a snapshot is on its holder when the next one begins, and a round has its result one iteration
later; so the best lag is 2. In mode ``exact`` the copy of all state after a gap is in time.

A drop here is one that is final. What replication repairs, a connection that fails for instance, is none: the chance of
a drop is what remains of it. "Reference" is the rule of old in mode ``exact``: a gap breaks the chains of all ranks,
which begin anew together when all know of it. In mode ``full`` the rule is the same as of old: every rank must have the
iteration.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Protocol

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._common import Result, at_least, parser, report
from megatron_moetion.replicate.agreement import Agreed, Agreement, combine_words
from megatron_moetion.replicate.channel import Note, Reduced
from megatron_moetion.select.budget import exact_copies, full_copies
from megatron_moetion.select.rotation import Rotation, Turn
from megatron_moetion.snapshot.gradlog import GradientLog, gradient_log
from megatron_moetion.store.chains import chain_layout
from megatron_moetion.store.manifest import Records
from megatron_moetion.store.retention import Chains, Newest, Retention, Settled
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

PERIOD = 8
CHANCES = (1e-4, 1e-5)
RANKS = (1024, 16384)
ITERATIONS, QUICK_ITERATIONS = 2000, 400
WARM_UP = 20


class Round:
    """The ``Reducer`` of one object: what was said goes into the round, and its result comes in the next iteration."""

    def __init__(self) -> None:
        self.said: tuple[int, ...] = ()
        self.heard: list[Reduced] = []

    def contribute(self, number: int, words: Sequence[int], notes: Mapping[str, Note] | None = None) -> None:
        """See ``Reducer``."""
        self.said = tuple(words)

    def results(self) -> list[Reduced]:
        """See ``Reducer``."""
        found, self.heard = self.heard, []
        return found

    def wait(self, number: int, timeout_s: float) -> bool:
        """See ``Reducer``."""
        return True


class Book(Protocol):
    """What a mode knows of its snapshots."""

    def settle(self, agreed: Agreed) -> Settled:
        """See ``SnapshotMode``."""
        ...

    def recoverable(self, rounds: Mapping[int, bool]) -> Sequence[int]:
        """See ``SnapshotMode``."""
        ...

    def given_up(self) -> frozenset[int]:
        """See ``SnapshotMode``."""
        ...

    def begin(self, iteration: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The units that must be in a snapshot, and those that it can do without; None: there is none."""
        ...

    def packed(self, is_there: bool, captured: bool) -> None:
        """The fate of the snapshot that was begun."""
        ...


class FullBook:
    """Every snapshot holds all units."""

    def __init__(self, inventory: Inventory) -> None:
        self._units = tuple(range(len(inventory.units)))

    def settle(self, agreed: Agreed) -> Settled:
        return Settled(stable=agreed.stable, whole=agreed.recoverable)

    def recoverable(self, rounds: Mapping[int, bool]) -> list[int]:
        return [i for i, is_whole in rounds.items() if is_whole]

    def given_up(self) -> frozenset[int]:
        return frozenset()

    def begin(self, iteration: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._units, ()

    def packed(self, is_there: bool, captured: bool) -> None: ...


class ExactBook:
    """Turns and chains."""

    def __init__(self, log: GradientLog) -> None:
        self._log = log
        self.rotation = Rotation(log, 0, dict.fromkeys(log.log_of, 0))

    def settle(self, agreed: Agreed) -> Settled:
        if agreed.is_news:
            self.rotation.settle(agreed.stable, agreed.recoverable)
        return self.rotation.settled

    def recoverable(self, rounds: Mapping[int, bool]) -> list[int]:
        return self.rotation.reachable(rounds)

    def given_up(self) -> frozenset[int]:
        return self.rotation.unreachable

    def begin(self, iteration: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        turn: Turn = self.rotation.turn(iteration)
        self.rotation.begin(iteration, turn)
        return None if turn.is_gap else ((*self._log.always, *turn.logs), turn.captures)

    def packed(self, is_there: bool, captured: bool) -> None:
        self.rotation.packed(is_there=is_there, captured=captured, late=False, zero=frozenset())


@dataclass
class Side:
    """One rank, or many that are alike."""

    book: Book
    retention: Retention
    slots: np.ndarray
    """By unit: captures that there is room for."""
    page: Records
    rounds: dict[int, bool] = field(default_factory=dict)
    reducer: Round = field(default_factory=Round)
    agreement: Agreement = field(init=False)
    lacking: int = -1
    """The newest iteration that it dropped."""

    def __post_init__(self) -> None:
        self.agreement = Agreement(self.reducer, 0)

    def on_step_end(self, iteration: int, is_dropped: bool) -> bool:
        """A snapshot, as in ``Session.on_step_end``; whether it is there."""
        for agreed in self.agreement.poll():
            settled = self.book.settle(agreed)
            if agreed.is_news:
                self.page = self.retention.keep(self.page, settled)
        rounds = self.rounds | dict.fromkeys(self.book.given_up(), False)
        self.agreement.start(iteration, rounds=rounds, recoverable=self.book.recoverable(rounds), vote=0, redundancy=1)
        found = self.book.begin(iteration)
        is_there = found is not None and not is_dropped and self._has_room(found[0])
        captured = False
        if found is not None and is_there:
            captured = self._has_room((*found[0], *found[1]))
            units = (*found[0], *(found[1] if captured else ()))
            self.page = self.page + Records.make(len(units), unit=units, iteration=iteration)
        self.book.packed(is_there, captured)
        self.rounds[iteration] = is_there
        self.rounds.pop(iteration - 40, None)
        if not is_there:
            self.lacking = iteration
        return is_there

    def split(self) -> Side:
        """One of them goes its own way."""
        shared = (self.slots, self.retention, getattr(self.book, "_log", None))
        return copy.deepcopy(self, {id(each): each for each in shared if each is not None})

    def _has_room(self, units: Sequence[int]) -> bool:
        listed = np.concatenate([self.page.table["unit"].astype(np.int64), np.array(units, dtype=np.int64)])
        return bool((np.bincount(listed, minlength=len(self.slots)) <= self.slots).all())


@dataclass(frozen=True, kw_only=True)
class Found:
    """Of one run: what became of the stable iteration."""

    share: float
    """Of the iterations, those in which the stable one advances."""
    lag: float
    lag_p99: float
    consequences: float
    """Snapshots an iteration and rank that are not there because of drops of other ranks, or of earlier ones."""


def start(mode: str) -> Side:
    """A rank whose baseline is stable."""
    inventory = _inventory()
    if mode == "full":
        copies = full_copies(inventory.units)
        slots = np.array([copies[u.name] for u in inventory.units])
        page = Records.make(len(slots), unit=np.arange(len(slots)))
        return Side(book=FullBook(inventory), retention=Newest(), slots=slots, page=page)
    log = gradient_log(inventory, PERIOD)
    copies = exact_copies(log)
    units = log.inventory.units
    slots = np.array([copies[u.name] for u in units])
    first = [u for u in range(len(units)) if units[u].kind is not UnitKind.LOG]
    page = Records.make(len(first), unit=first)
    retention = Chains(chain_layout([(u.name, int(u.kind), u.nbytes) for u in units]))
    return Side(book=ExactBook(log), retention=retention, slots=slots, page=page)


def simulate(mode: str, ranks: int, chance: float, iterations: int, seed: int = 0) -> Found:
    """So many iterations of a job."""
    draw = np.random.default_rng(seed)
    alike, others = start(mode), []
    lags, advances, consequences = [], 0, 0.0
    for iteration in range(1, iterations + WARM_UP + 1):
        number = ranks - len(others)
        for side in others:
            is_dropped = bool(draw.random() < chance)
            consequences += not side.on_step_end(iteration, is_dropped) and not is_dropped
        fresh = [alike.split() for _ in range(draw.binomial(number, chance))]
        for side in fresh:
            side.on_step_end(iteration, is_dropped=True)
        consequences += (number - len(fresh)) * (not alike.on_step_end(iteration, is_dropped=False))
        others += fresh
        stable = alike.agreement.stable
        if iteration > WARM_UP:
            lags.append(iteration - stable)
            advances += len(lags) > 1 and stable > iteration - 1 - lags[-2]
        words = reduce(combine_words, [side.reducer.said for side in (alike, *others)])
        for side in (alike, *others):
            side.reducer.heard.append(Reduced(number=iteration - 1, words=tuple(words)))
        if mode == "full":  # what it lacks is of no interest once everybody knows
            others = [side for side in others if iteration - side.lacking < 4]
        else:
            others = [side for side in others if stable <= side.lacking]
    return Found(
        share=advances / (len(lags) - 1),
        lag=float(np.mean(lags)),
        lag_p99=float(np.quantile(lags, 0.99)),
        consequences=consequences / ranks / len(lags),
    )


def reference(ranks: int, chance: float, iterations: int, seed: int = 0) -> Found:
    """Mode ``exact`` by the rule of old: after a gap all ranks begin anew, two iterations later."""
    draw = np.random.default_rng(seed)
    is_gap = draw.random(iterations + WARM_UP + 1) < 1 - (1 - chance) ** ranks
    stable, begins, lags, advances = 0, 0, [], 0
    for iteration in range(1, len(is_gap)):
        known = iteration - 2
        before = stable
        if known > 0 and not is_gap[known] and known >= begins:
            stable = known
        if is_gap[iteration - 1]:
            begins = iteration + 1
        if iteration > WARM_UP:
            lags.append(iteration - stable)
            advances += stable > before
    return Found(
        share=advances / len(lags),
        lag=float(np.mean(lags)),
        lag_p99=float(np.quantile(lags, 0.99)),
        consequences=float("nan"),
    )


def _inventory() -> Inventory:
    """One parameter of as many equal slices as the period has iterations, and a host state."""
    roles = (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ, Role.GRAD)
    regions = tuple(
        Region(
            unit="dense", tensor="w", role=role, dtype="float32", start=0, nbytes=256 * PERIOD, address=(1 + n) << 20
        )
        for n, role in enumerate(roles)
    )
    host = Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=100)
    return Inventory(units=(Unit(name="dense", kind=UnitKind.DENSE, regions=regions), host))


def main() -> None:
    """Simulate all cases and report."""
    args = parser(__doc__ or "").parse_args()
    iterations = QUICK_ITERATIONS if args.quick else ITERATIONS
    results: list[Result] = []
    for chance in CHANCES:
        for ranks in RANKS:
            bound = (1 - chance) ** ranks
            found = {
                "exact, reference": reference(ranks, chance, iterations),
                "exact": simulate("exact", ranks, chance, iterations),
                "full": simulate("full", ranks, chance, iterations),
            }
            for name, each in found.items():
                where = f"{ranks} ranks, {chance:g}, {name}"
                share = f"{where}: advances"
                results += [
                    Result(name=share, value=100 * each.share, unit="% of iterations")
                    if "reference" in name
                    else at_least(share, 100 * each.share, "% of iterations", round(0.9 * 100 * bound, 1)),
                    Result(name=f"{where}: mean lag", value=each.lag, unit="iterations"),
                    Result(name=f"{where}: p99 of lags", value=each.lag_p99, unit="iterations"),
                ]
                if "reference" not in name:
                    text = f"{where}: missing in consequence"
                    results.append(Result(name=text, value=1e6 * each.consequences, unit="of 1e6 snapshots"))
    notes = [
        "The target is 90% of the share of iterations that no rank drops: more no rule can have, where all ranks must "
        "have one iteration.",
        "Of a name: ranks, chance of a drop a rank and iteration, mode. 'missing in consequence': snapshots that are "
        "not there although nothing dropped them.",
        f"{iterations} iterations each; exact with a period of {PERIOD}.",
    ]
    report("drops_at_scale", results, args.json, notes)


if __name__ == "__main__":
    main()
