# SPDX-License-Identifier: Apache-2.0
"""Where every rank's state comes from after a failure. Pure: reports in, a plan or an explanation out.

The plan names the newest iteration T that all ranks can reach, for each unit of each rank the capture to load (in mode
``exact`` also the gradients since then) and the node to load it from. Loading part of a state is never planned.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass

from megatron_moetion.recover.report import ArenaReport
from megatron_moetion.replicate.placement import Placement
from megatron_moetion.store.chains import base_of, log_units
from megatron_moetion.store.manifest import Branch, Record, in_history
from megatron_moetion.units import UnitKind


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What the plan needs to know of one rank: its units as (name, kind), by unit number."""

    rank: int
    units: tuple[tuple[str, UnitKind], ...]


@dataclass(frozen=True, kw_only=True, order=True)
class Choice:
    """One capture to be loaded."""

    unit: int
    iteration: int
    node: int
    """The node that it is read from."""
    digest: int
    tokens: int
    is_zero: bool = False
    """All bytes are zero, and none of them is kept."""


@dataclass(frozen=True, kw_only=True, order=True)
class Transfer:
    """One capture of ``owner`` that travels from rank ``source`` to rank ``target``."""

    owner: int
    unit: int
    iteration: int
    source: int
    target: int


@dataclass(frozen=True, kw_only=True)
class RecoveryPlan:
    """One consistent recovery. Equal on all ranks, which compare ``digest`` before they move a byte."""

    iteration: int
    epoch: int
    """The epoch that begins with this recovery."""
    branches: tuple[Branch, ...]
    """All recoveries of this run, this one included."""
    history_epoch: int
    """Epoch of the history that is recovered from."""
    safe: int
    """Newest iteration known to be whole on all replicas: kept until T is. T may be newer and on its owners only."""
    choices: tuple[tuple[Choice, ...], ...]
    """For each owner, by unit number: one choice a unit, of a ``LOG`` unit one for each iteration that is replayed."""
    fetches: tuple[Transfer, ...]
    """From other nodes to the owners."""
    copies: tuple[Transfer, ...]
    """From owners to buddies that lack a capture, so that redundancy is complete again."""

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class NoPlan:
    """Why nothing can be recovered, for a person."""

    reason: str
    began: bool
    """Whether this run had trained: False only if every arena found was still waiting for its first baseline."""
    last_epoch: int


Available = dict[int, dict[int, dict[int, dict[int, Record]]]]
"""owner -> unit -> iteration -> node -> record"""


def plan_recovery(
    facts: Sequence[RankFacts], reports: Sequence[ArenaReport], placement: Placement, choose: Choose, nonce: int = 0
) -> RecoveryPlan | NoPlan:
    """The newest iteration that every rank can reach, or why there is none. Reads nothing but its arguments.

    ``choose`` is the rule of the mode; ``nonce``: see ``Branch``.
    """
    sound = [r for r in reports if not r.problem]
    if not sound:
        problems = "; ".join(r.problem for r in reports if r.problem) or "no arena of this run was found on any node"
        return NoPlan(reason=problems, began=bool(reports), last_epoch=0)
    newest = max(sound, key=lambda r: (r.epoch, len(r.branches)))
    available = _available(sound, newest.branches, newest.epoch)
    missing: list[str] = []
    for iteration in _candidates(facts, available):
        chosen = choose(facts, available, iteration)
        if isinstance(chosen, str):
            missing.append(f"iteration {iteration}: {chosen}")
            continue
        safe = max(r.stable for r in sound if r.epoch == newest.epoch)
        branch = Branch(epoch=newest.epoch + 1, iteration=iteration, nonce=nonce)
        return _plan(branch, min(iteration, safe), newest, facts, chosen, available, placement)
    without = [f.rank for f in facts if f.rank not in available]
    reason = "; ".join(missing[:3]) or (
        f"no copy of rank(s) {_short(without)} is left on any node"
        if without
        else "there is no iteration of which every rank has its host state"
    )
    began = any(r.stable >= 0 for r in sound) or any(r.problem for r in reports)
    return NoPlan(reason=reason, began=began, last_epoch=newest.epoch)


def custodian(owner: int, node: int, placement: Placement) -> int:
    """The rank that opens ``owner``'s arena on ``node``: the owner, its buddy, else a fixed rank of the node."""
    if placement.node_of[owner] == node:
        return owner
    for holder in placement.holders[owner]:
        if placement.node_of[holder] == node:
            return holder
    ranks = placement.ranks_on(node)
    return ranks[owner % len(ranks)]


def _available(reports: Sequence[ArenaReport], branches: Sequence[Branch], epoch: int) -> Available:
    available: Available = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for report in reports:
        for record in report.captures:
            if in_history(record, branches, epoch):
                available[report.owner][record.unit][record.iteration][report.node] = record
    return available


def _candidates(facts: Sequence[RankFacts], available: Available) -> list[int]:
    """Iterations of which every rank has its host state, newest first."""
    common: set[int] | None = None
    for rank in facts:
        host = next(i for i, (_, kind) in enumerate(rank.units) if kind is UnitKind.HOST)
        found = set(available[rank.rank][host]) if rank.rank in available else set()
        common = found if common is None else common & found
    return sorted(common or (), reverse=True)


Chosen = dict[int, list[tuple[int, int]]]
"""For each rank: unit numbers, in order, and the iterations of their captures."""
Choose = Callable[[Sequence[RankFacts], Available, int], Chosen | str]
"""The captures that lead to an iteration, or the text of which is missing. Each mode has its own rule."""


def choose_same_iteration(facts: Sequence[RankFacts], available: Available, iteration: int) -> Chosen | str:
    """Every unit as it was at T; what never changes may be older (mode ``full``)."""
    return _choose_units(facts, available, iteration, shared=())


def choose_newest_experts(facts: Sequence[RankFacts], available: Available, iteration: int) -> Chosen | str:
    """Experts as they were at the newest iteration up to T that all their shards have; the rest as at T."""
    return _choose_units(facts, available, iteration, shared=(UnitKind.EXPERT,))


def _choose_units(
    facts: Sequence[RankFacts], available: Available, iteration: int, shared: Collection[UnitKind]
) -> Chosen | str:
    shards: dict[str, list[tuple[int, int]]] = defaultdict(list)
    chosen: dict[int, list[int]] = {f.rank: [-1] * len(f.units) for f in facts}
    for rank in facts:
        for number, (name, kind) in enumerate(rank.units):
            if kind in shared:
                shards[name].append((rank.rank, number))
                continue
            found = available[rank.rank][number]
            usable = [i for i in found if i == iteration or (kind is UnitKind.FROZEN and i <= iteration)]
            if not usable:
                return f"unit {name} of rank {rank.rank} has no copy"
            chosen[rank.rank][number] = max(usable)
    for name, places in shards.items():
        common = set.intersection(*(set(available[rank][number]) for rank, number in places))
        usable = [i for i in common if i <= iteration]
        if not usable:
            return f"expert {name} has no iteration that ranks {_short([r for r, _ in places])} all hold"
        for rank_number, number in places:
            chosen[rank_number][number] = max(usable)
    return {rank: list(enumerate(row)) for rank, row in chosen.items()}


def choose_chains(facts: Sequence[RankFacts], available: Available, iteration: int) -> Chosen | str:
    """Of every slice the newest capture from which all gradients to T are there, and these gradients."""
    chosen: Chosen = {}
    for rank in facts:
        row: list[tuple[int, int]] = []
        found = available[rank.rank]
        log_of = log_units(rank.units)
        for number, (name, kind) in enumerate(rank.units):
            if kind is UnitKind.LOG:
                continue
            if number in log_of:
                base = base_of(found[number], found[log_of[number]], iteration)
                if base is None:
                    return f"the captures and gradients of {name} of rank {rank.rank} do not reach it"
                row.extend((log_of[number], i) for i in range(base + 1, iteration + 1))
            elif kind is UnitKind.FROZEN:
                base = max((i for i in found[number] if i <= iteration), default=None)
            else:
                base = iteration if iteration in found[number] else None
            if base is None:
                return f"unit {name} of rank {rank.rank} has no copy"
            row.append((number, base))
        chosen[rank.rank] = sorted(row)
    return chosen


def _plan(
    branch: Branch,
    safe: int,
    newest: ArenaReport,
    facts: Sequence[RankFacts],
    chosen: Chosen,
    available: Available,
    placement: Placement,
) -> RecoveryPlan:
    choices: list[tuple[Choice, ...]] = []
    fetches: list[Transfer] = []
    copies: list[Transfer] = []
    for rank in facts:
        owner, home = rank.rank, placement.node_of[rank.rank]
        row = []
        for unit, at in chosen[owner]:
            nodes = available[owner][unit][at]
            node = home if home in nodes else min(nodes)
            record = nodes[node]
            row.append(
                Choice(
                    unit=unit,
                    iteration=at,
                    node=node,
                    digest=record.digest,
                    tokens=record.tokens,
                    is_zero=record.is_zero,
                )
            )
            move = {"owner": owner, "unit": unit, "iteration": at}
            if node != home:
                fetches.append(Transfer(**move, source=custodian(owner, node, placement), target=owner))
            copies.extend(
                Transfer(**move, source=owner, target=holder)
                for holder in placement.holders[owner]
                if placement.node_of[holder] not in nodes
            )
        choices.append(tuple(row))
    return RecoveryPlan(
        iteration=branch.iteration,
        epoch=branch.epoch,
        branches=(*newest.branches, branch),
        history_epoch=newest.epoch,
        safe=safe,
        choices=tuple(choices),
        fetches=tuple(fetches),
        copies=tuple(copies),
    )


def _short(ranks: Sequence[int]) -> str:
    listed = ", ".join(str(r) for r in ranks[:8])
    return listed + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
