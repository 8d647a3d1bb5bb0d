# SPDX-License-Identifier: Apache-2.0
"""What the arenas of a run that lie here add up to: which iteration, how many copies of it, how stale. Pure.

A restart asks the same questions with all nodes at hand. Here some may be missing: then it is said which ranks are, and
all that is found is of the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_moetion.recover.plan import (
    Choose,
    Place,
    Reach,
    Units,
    choose_chains,
    choose_newest_experts,
    choose_same_iteration,
    held_of,
    plan_of,
    what_is_missing,
)
from megatron_moetion.recover.report import History
from megatron_moetion.store.manifest import Page, Records, in_history
from megatron_moetion.store.spec import ArenaIdentity, ArenaSpec
from megatron_moetion.units import UnitKind

CHOOSE: Mapping[str, Choose] = {
    "full": choose_same_iteration,
    "popularity": choose_newest_experts,
    "exact": choose_chains,
}
"""By mode, as the modes have it."""
_REASONS_MAX = 3
_STALEST = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Copy:
    """The captures of one rank on one node."""

    node: int
    """Any number, one a node."""
    spec: ArenaSpec
    page: Page
    records: Records
    """Of the page: all, or those whose bytes verify."""

    @classmethod
    def of(cls, node: int, spec: ArenaSpec, page: Page) -> Copy:
        """As the manifest lists it."""
        return cls(node=node, spec=spec, page=page, records=as_listed(spec, page.records))

    @property
    def owner(self) -> int:
        """The rank whose state it is."""
        return self.spec.identity.owner

    @property
    def place(self) -> Place:
        """Where it is, and what of captures it has."""
        return Place(self.node, self.spec.part)

    @property
    def units(self) -> Units:
        """Of the owner."""
        return [(name, UnitKind(kind)) for name, kind, _ in self.spec.units]

    @property
    def hosts(self) -> list[int]:
        """The iterations of its host states, the newest first: those that it was captured at."""
        kinds = np.array([kind for _, kind, _ in self.spec.units], dtype=np.int64)
        hosts = np.flatnonzero(kinds == UnitKind.HOST)
        found: list[int] = self.records.table["iteration"][np.isin(self.records.table["unit"], hosts)].tolist()
        return sorted(set(found), reverse=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class JudgedCopy:
    """A copy, and what it alone is good for."""

    copy: Copy
    problem: str | None
    """Why a recovery would not use it."""
    captured: int
    """Captures that belong to the present history."""
    newest: int
    """Newest iteration that it has the host state of; -1: none."""
    reaches: tuple[int, ...]
    """Iterations of the owner that follow from it alone, the newest first; from a copy of fragments with enough others
    like it."""


@dataclass(frozen=True, kw_only=True)
class RankState:
    """One rank, over all copies that lie here."""

    rank: int
    reaches: tuple[int, ...]
    """Iterations of it that can be put together, the newest first; experts that ranks share have to be whole."""
    complete: int
    """Copies that alone have all that the recovered iteration needs. Of fragments, copies that are worth as much: how
    many nodes may be lost, and one more."""


@dataclass(frozen=True, kw_only=True)
class Expert:
    """An expert as a recovery to an iteration would find it, over all its shards that lie here."""

    name: str
    iteration: int
    staleness: int
    """Iterations since then."""
    tokens_per_iteration: float
    """Estimated from its captures."""

    @property
    def at_risk(self) -> float:
        """Tokens that a fault now would cost it, estimated."""
        return self.staleness * self.tokens_per_iteration


@dataclass(frozen=True, kw_only=True)
class Staleness:
    """Of all experts of mode ``popularity``."""

    experts: int
    longest: int
    """Iterations since the capture of the stalest expert."""
    mean: float
    tokens_at_risk: int
    """Estimated."""
    iterations_at_risk: float
    """The same in iterations: as many tokens as all experts process in so many."""
    stalest: tuple[Expert, ...]
    """A few, by tokens at risk."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """A run as far as it lies here. Without a usable arena ``identity`` is None."""

    identity: ArenaIdentity | None
    history: History
    copies: tuple[JudgedCopy, ...]
    ranks: tuple[RankState, ...]
    """Those of which there is a copy, in order."""
    missing: tuple[int, ...]
    """Ranks of the run without any, or with too few fragments to rebuild anything."""
    newest: int
    """Newest captured iteration of any rank; -1: none."""
    iteration: int
    """To which a restart goes, if nothing better lies elsewhere; of the ranks here where some are missing. -1: none."""
    reason: str | None
    """Why there is none."""
    vetoed: tuple[int, ...]
    """Iterations that some rank has called unhealthy."""
    staleness: Staleness | None
    """Mode ``popularity``: at ``iteration``."""

    @property
    def least_copies(self) -> int:
        """Of the rank that has the fewest complete ones; 0 where nothing can be recovered, or a rank is missing."""
        return 0 if self.missing else min((rank.complete for rank in self.ranks), default=0)


def judge(copies: Sequence[Copy], vetoed: Collection[int] = ()) -> Judgement:
    """What these copies add up to. ``vetoed``: iterations of the newest history that were called unhealthy."""
    if not copies:
        return _nothing(History(), (), "there is no arena that can be read")
    leader = max(copies, key=lambda copy: History.of(copy.page).age)
    identity, newest = leader.spec.identity, History.of(leader.page)
    choose = CHOOSE.get(identity.mode, choose_same_iteration)
    judged = [_judged(copy, leader.spec, newest, choose) for copy in copies]
    usable = _of_some_use([j.copy for j in judged if not j.problem])
    if not usable:
        why = next(j.problem for j in judged if j.copy.spec is leader.spec)
        return _nothing(newest, judged, f"there is no arena that can be used: the newest {why}")
    owners = sorted({copy.owner for copy in usable})
    units = {copy.owner: copy.units for copy in usable}
    held = held_by_owner(usable, identity.mode)
    reaches = {owner: Reach.of(owner, units[owner], held[owner], choose, vetoed) for owner in owners}
    reach = reaches[owners[0]]
    for owner in owners[1:]:
        reach = reach.followed_by(reaches[owner])
    plan = plan_of(reach, newest, nonce=0)
    iteration = plan.iteration if plan is not None else -1
    return Judgement(
        identity=identity,
        history=newest,
        copies=tuple(judged),
        ranks=tuple(
            RankState(rank=owner, reaches=reaches[owner].iterations, complete=_complete(judged, owner, iteration))
            for owner in owners
        ),
        missing=tuple(rank for rank in range(identity.world_size) if rank not in units),
        newest=max((j.newest for j in judged), default=-1),
        iteration=iteration,
        reason=None if plan is not None else _reason(reach, units, held, choose),
        vetoed=tuple(sorted(vetoed)),
        staleness=_staleness(usable, held, iteration) if identity.mode == "popularity" and iteration >= 0 else None,
    )


def _of_some_use(usable: Sequence[Copy]) -> list[Copy]:
    """Without the fragments of ranks of which there are too few for anything; where that is all there is, with them."""
    held = held_by_owner(usable, "")
    found = [copy for copy in usable if copy.spec.part.is_whole or any(held[copy.owner].values())]
    return found or list(usable)


def as_listed(spec: ArenaSpec, records: Records) -> Records:
    """Records of a page, of which it is not known which captures the fragments are of: one iteration has one only."""
    return records if spec.part.is_whole else records.replace(digest=0)


def _nothing(history: History, judged: Sequence[JudgedCopy], reason: str) -> Judgement:
    """Where no arena can be used."""
    return Judgement(
        identity=None, history=history, copies=tuple(judged), ranks=(), missing=(), newest=-1, iteration=-1,
        reason=reason, vetoed=(), staleness=None,
    )  # fmt: skip


def newest_history(copies: Sequence[Copy]) -> History | None:
    """The history that a restart would go on from; None without a copy."""
    return max((History.of(copy.page) for copy in copies), key=lambda history: history.age, default=None)


def _judged(copy: Copy, leader: ArenaSpec, newest: History, choose: Choose) -> JudgedCopy:
    problem = _problem(copy, leader, newest)
    table = copy.records
    records = (
        table.where(in_history(table, newest.branches, newest.epoch))
        if not problem
        else table.where(np.zeros(len(table), dtype=bool))
    )
    copy = replace(copy, records=records)
    hosts = copy.hosts
    reaches: tuple[int, ...] = ()
    if not problem and hosts:
        reaches = Reach.of(copy.owner, copy.units, held_of({Place(copy.node): records}), choose).iterations
    return JudgedCopy(copy=copy, problem=problem, captured=len(records), newest=max(hosts, default=-1), reaches=reaches)


def _problem(copy: Copy, leader: ArenaSpec, newest: History) -> str | None:
    ours, theirs = leader.identity, copy.spec.identity
    differing = [
        f"{name.replace('_', ' ')} {getattr(theirs, name)!r} instead of {getattr(ours, name)!r}"
        for name in ("run_id", "world_size", "topology", "mode", "chunk_bytes", "period")
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if differing:
        return f"is of other settings: {', '.join(differing)}"
    if not History.of(copy.page).goes_on_in(newest):
        return "belongs to a history of this run that did not go on"
    if not any(kind == UnitKind.HOST for _, kind, _ in copy.spec.units):
        return "has no host state among its units"
    return None


def held_by_owner(usable: Sequence[Copy], mode: str) -> dict[int, dict[int, set[int]]]:
    """By owner and unit: iterations. Of an expert that several ranks have shards of, those that all of these have."""
    tables: dict[int, dict[Place, Records]] = {}
    for copy in usable:
        tables.setdefault(copy.owner, {})[copy.place] = copy.records
    held = {owner: held_of(found) for owner, found in tables.items()}
    if mode != "popularity":
        return held
    specs = {copy.owner: copy.spec for copy in usable}
    shards: dict[str, list[tuple[int, int]]] = {}
    for owner, spec in specs.items():
        for number, (name, kind, _) in enumerate(spec.units):
            if kind == UnitKind.EXPERT:
                shards.setdefault(name, []).append((owner, number))
    for members in shards.values():
        common = set.intersection(*(held[owner].get(number, set()) for owner, number in members))
        for owner, number in members:
            held[owner][number] = common
    return held


def _complete(judged: Sequence[JudgedCopy], owner: int, iteration: int) -> int:
    """Never too many: a node that has several of these copies counts once, and so do fragments of several codings."""
    places = {j.copy.place for j in judged if j.copy.owner == owner and iteration in j.reaches}
    whole = {place.node for place in places if place.part.is_whole}
    codings: dict[tuple[int, int], dict[int, set[int]]] = {}
    for node, part in places:
        if not part.is_whole and node not in whole:
            codings.setdefault((part.data, part.parity), {}).setdefault(node, set()).add(part.number)
    return len(whole) + max((_losses(held, data) for (data, _), held in codings.items()), default=0)


def _losses(held: Mapping[int, set[int]], needed: int) -> int:
    """How many nodes have to be lost, at least, before there are not as many different fragments as needed."""
    left = len(set().union(*held.values())) - needed
    lost = 0
    for most in sorted(map(len, held.values()), reverse=True):
        if left < 0:
            break
        left -= most
        lost += 1
    return lost


def _reason(
    reach: Reach, units: Mapping[int, Units], held: Mapping[int, Mapping[int, set[int]]], choose: Choose
) -> str:
    wanted = reach.hosts[:_REASONS_MAX]
    if not wanted:
        return "there is no iteration of which every rank that is here has its host state"
    missing: dict[str, str] = {}
    for owner in units:
        missing = {**what_is_missing(owner, units[owner], held[owner], choose, wanted), **missing}
    return "; ".join(f"iteration {i}: {missing[i]}" for i in sorted(missing, key=int, reverse=True))


def _staleness(usable: Sequence[Copy], held: Mapping[int, Mapping[int, set[int]]], iteration: int) -> Staleness | None:
    """Experts as a recovery to ``iteration`` finds them. Each shard counts the tokens of its own rank: they add up."""
    captures: dict[tuple[int, int], dict[int, int]] = {}
    names: dict[tuple[int, int], str] = {}
    for copy in usable:
        kinds = enumerate(copy.spec.units)
        names.update({(copy.owner, unit): name for unit, (name, kind, _) in kinds if kind == UnitKind.EXPERT})
        columns = (copy.records.table[name].tolist() for name in ("unit", "iteration", "tokens"))
        for unit, at, tokens in zip(*columns, strict=True):
            if at <= iteration:
                captures.setdefault((copy.owner, unit), {})[at] = tokens
    experts: dict[str, Expert] = {}
    for (owner, unit), name in names.items():
        at = max(i for i in held[owner][unit] if i <= iteration)
        before = experts[name].tokens_per_iteration if name in experts else 0.0
        experts[name] = Expert(
            name=name,
            iteration=at,
            staleness=iteration - at,
            tokens_per_iteration=before + _rate(captures[owner, unit]),
        )
    if not experts:
        return None
    at_risk = sum(e.at_risk for e in experts.values())
    rates = sum(e.tokens_per_iteration for e in experts.values())
    stalest = sorted(experts.values(), key=lambda e: (-e.at_risk, -e.staleness, e.name))
    return Staleness(
        experts=len(experts),
        longest=max(e.staleness for e in experts.values()),
        mean=sum(e.staleness for e in experts.values()) / len(experts),
        tokens_at_risk=round(at_risk),
        iterations_at_risk=at_risk / rates if rates else 0.0,
        stalest=tuple(e for e in stalest[:_STALEST] if e.staleness),
    )


def _rate(captures: Mapping[int, int]) -> float:
    """Tokens an iteration between the last two captures, else since the run began."""
    last, *before = sorted(captures, reverse=True)
    if before and captures[last] > captures[before[0]]:
        return (captures[last] - captures[before[0]]) / (last - before[0])
    return captures[last] / last if last > 0 else 0.0
