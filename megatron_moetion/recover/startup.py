# SPDX-License-Identifier: Apache-2.0
"""From processes that know nothing to open arenas: look at what is there, then recover or begin anew.

All methods are collective. The plan itself is made in ``plan.py``; here it is carried out.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError, IdentityMismatch, shared
from megatron_moetion.observe.journal import Phases
from megatron_moetion.recover.plan import NoPlan, RankFacts, RecoveryPlan, Transfer, custodian, plan_recovery
from megatron_moetion.recover.report import ArenaReport, living
from megatron_moetion.recover.restore import Mover, verified
from megatron_moetion.recover.survey import survey_store
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.replicate.collective import on_all_ranks
from megatron_moetion.replicate.placement import Placement, place
from megatron_moetion.snapshot.packer import HostPool, Packer
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.files import clear
from megatron_moetion.store.manifest import Page, Record
from megatron_moetion.store.node import NodeFolder
from megatron_moetion.store.retention import retention_of
from megatron_moetion.store.spec import ArenaSpec, arena_name
from megatron_moetion.units import UnitKind

_OF_ONE_RANK = ("store", "pack_threads", "pack_sms", "max_stall_ms", "report", "trace_dir", "inject_fault",
                "max_unprotected_iterations")  # fmt: skip
"""Settings that may differ between ranks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenArenas:
    """The arenas that this rank writes while it trains."""

    own: Arena
    held: Mapping[int, Arena]
    """By owner: those that this rank is a buddy of."""

    def all(self) -> list[Arena]:
        """Own first."""
        return [self.own, *self.held.values()]

    def close(self) -> None:
        """Let go of all files; they stay."""
        for arena in self.all():
            arena.close()


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What all ranks found together; equal on all of them."""

    specs: tuple[ArenaSpec, ...]
    placement: Placement
    reports: tuple[ArenaReport, ...]
    outcome: RecoveryPlan | NoPlan
    restarted: bool


class Startup:
    """One rank's part in starting a run."""

    def __init__(
        self,
        *,
        config: MoetionConfig,
        fabric: Fabric,
        node: NodeFolder,
        spec: ArenaSpec,
        pool: HostPool,
        phases: Phases,
        probe: Callable[[str, int], None],
    ) -> None:
        self._config = config
        self._fabric = fabric
        self._node = node
        self._spec = spec
        self._pool = pool
        self._phases = phases
        self._probe = probe

    def look(self, attempt: int) -> Situation:
        """Survey every node and plan. ``ConfigError`` or ``IdentityMismatch`` where ranks do not fit together."""
        rank = self._fabric.rank
        notes = self._fabric.gather(
            {
                "node": self._node.key,
                "attempt": attempt,
                "spec": self._spec.to_json().decode(),
                "settings": {k: v for k, v in asdict(self._config).items() if k not in _OF_ONE_RANK},
                "nonce": secrets.randbits(32),
            }
        )
        specs = tuple(ArenaSpec.from_json(n["spec"].encode()) for n in notes)
        _require_one_run([n["settings"] for n in notes], specs)
        try:
            placement = place([n["node"] for n in notes], self._config.replicas)
        except ConfigError as error:
            raise shared(error) from None
        node = placement.node_of[rank]
        neighbours = placement.ranks_on(node)
        mine = sorted(self._node.path.glob("*.arena"))[neighbours.index(rank) :: len(neighbours)]
        self._probe("survey", -1)
        found = on_all_ranks(
            self._fabric, lambda: [r.to_json() for r in survey_store(mine, node, rank, specs, self._pool)]
        )
        reports = living([ArenaReport.from_json(r) for each in self._fabric.gather(found) for r in each])
        strangers = [r.problem for r in reports if r.stranger]
        if strangers:
            raise shared(IdentityMismatch(strangers[0]))
        facts = [
            RankFacts(rank=r, units=tuple((name, UnitKind(kind)) for name, kind, _ in spec.units))
            for r, spec in enumerate(specs)
        ]
        outcome = plan_recovery(facts, reports, placement, self._config.mode, notes[0]["nonce"])
        self._phases.done("survey")
        return Situation(
            specs=specs,
            placement=placement,
            reports=reports,
            outcome=outcome,
            restarted=max(n["attempt"] for n in notes) > 0,
        )

    def recover(
        self,
        situation: Situation,
        plan: RecoveryPlan,
        packer: Packer,
        load: Callable[[Arena, Sequence[Record], bytes], None],
    ) -> OpenArenas:
        """Carry out the plan; returns the arenas, ready for step T + 1.

        ``load`` puts verified captures into live state; it also gets the host state's bytes.

        Nothing that T needs is freed before it is complete everywhere again, and the new epoch is written on
        every rank before any rank returns: a failure at any moment leaves T recoverable.
        """
        if len(set(self._fabric.gather(plan.digest))) != 1:
            raise AssertionError("ranks made different recovery plans from the same reports")
        rank = self._fabric.rank
        page = Page(
            epoch=plan.history_epoch,
            stable=plan.safe,
            lineage=max(r.lineage for r in situation.reports),
            branches=plan.branches[:-1],
        )
        arenas, leftovers = on_all_ranks(self._fabric, lambda: self._open(situation, page))
        mover = Mover(
            rank=rank,
            arenas={rank: arenas.own, **arenas.held, **leftovers},
            channel=self._fabric.channel,
            pool=self._pool,
            plan=plan,
            retentions={owner: retention_of(spec) for owner, spec in enumerate(situation.specs)},
        )
        for phase, transfers in (("fetch", plan.fetches), ("replicate", plan.copies)):
            on_all_ranks(self._fabric, partial(self._move, mover, transfers))
            self._phases.done(phase)
        self._probe("restore", -1)
        on_all_ranks(self._fabric, lambda: self._load(arenas.own, plan, packer, load))
        self._phases.done("restore")
        in_use = replace(mover, arenas={rank: arenas.own, **arenas.held})
        on_all_ranks(self._fabric, in_use.begin_epoch)
        for arena in leftovers.values():
            arena.remove()
        self._phases.done("epoch")
        self._probe("restored", -1)
        return arenas

    def _move(self, mover: Mover, transfers: Sequence[Transfer]) -> None:
        mover.make_room(transfers)
        self._probe("fetch", -1)
        mover.move(transfers)

    def _load(
        self,
        arena: Arena,
        plan: RecoveryPlan,
        packer: Packer,
        load: Callable[[Arena, Sequence[Record], bytes], None],
    ) -> None:
        host_unit = next(i for i, (_, kind, _) in enumerate(self._spec.units) if kind == UnitKind.HOST)
        packer.adopt(arena.memory)
        records = verified(packer, arena, plan.choices[self._fabric.rank])
        host = next(r for r in records if r.unit == host_unit)
        self._phases.done("verify")
        load(arena, records, bytes(arena.payload(host.slot)))

    def begin(self, situation: Situation) -> OpenArenas:
        """New, empty arenas, of a new lineage, for state that was initialised or loaded from disk."""
        on_all_ranks(self._fabric, lambda: self._clear_node(situation.placement))
        newest = max((r.lineage for r in situation.reports), default=0)  # a clock may have been ahead then
        lineage = max(*self._fabric.gather(time.time_ns()), newest + 1)
        page = Page(lineage=lineage)
        arenas, _ = on_all_ranks(self._fabric, lambda: self._open(replace(situation, reports=()), page))
        return arenas

    def _clear_node(self, placement: Placement) -> None:
        """One rank a node removes what is left of earlier arenas."""
        if self._fabric.rank == min(placement.ranks_on(placement.node_of[self._fabric.rank])):
            for path in self._node.path.glob("*.arena"):
                clear(path)

    def _open(self, situation: Situation, page: Page) -> tuple[OpenArenas, dict[int, Arena]]:
        """Open what the survey found sound and make what is missing; leftovers are only read from."""
        rank, placement = self._fabric.rank, situation.placement
        node = placement.node_of[rank]
        sound = {r.owner for r in situation.reports if r.node == node and not r.problem}

        def take(owner: int) -> Arena:
            path = self._node.path / arena_name(owner)
            if owner in sound:
                return Arena.open(path)
            clear(path)
            return Arena.create(path, situation.specs[owner], page)

        held = {owner: take(owner) for owner in placement.owners_held_by(rank)}
        arenas = OpenArenas(own=take(rank), held=held)
        wanted = {owner for owner in sound if custodian(owner, node, placement) == rank} - {rank, *held}
        leftovers = {owner: Arena.open(self._node.path / arena_name(owner)) for owner in wanted}
        self._remove_damaged(situation.reports, placement, node)
        return arenas, leftovers

    def _remove_damaged(self, reports: Sequence[ArenaReport], placement: Placement, node: int) -> None:
        """Arenas that do not verify at all serve nobody; those under names in use here are made anew by their ranks."""
        ours = {arena_name(o) for r in placement.ranks_on(node) for o in (r, *placement.owners_held_by(r))}
        for report in reports:
            path = Path(report.path)
            if report.problem and report.node == node and path.name not in ours and path.parent == self._node.path:
                clear(path)


def _require_one_run(settings: Sequence[Mapping[str, Any]], specs: Sequence[ArenaSpec]) -> None:
    """Ranks that replicate at other iterations, to other holders or in other slices would wait for each other."""
    sides = [{**s, **asdict(spec.identity)} for s, spec in zip(settings, specs, strict=True)]
    first = sides[0]
    for rank, other in enumerate(sides):
        differing = [k for k in first if k not in ("owner", "layout") and first[k] != other[k]]
        if differing:
            raise shared(
                ConfigError(
                    f"ranks 0 and {rank} were started differently: {differing[0]} is {first[differing[0]]!r} on one "
                    f"and {other[differing[0]]!r} on the other; give all ranks the same settings"
                )
            )
