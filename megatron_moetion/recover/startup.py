# SPDX-License-Identifier: Apache-2.0
"""From a new process to open arenas: survey every node, then recover or begin anew.

All methods are collective. The plan itself is made in ``plan.py``; here it is carried out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from megatron_moetion.clock import Clock
from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError, IdentityMismatch, shared
from megatron_moetion.observe.journal import Phases
from megatron_moetion.recover.opened import Opened
from megatron_moetion.recover.pinning import Pinning
from megatron_moetion.recover.plan import Choose, NoPlan, RankFacts, RecoveryPlan, Transfer, custodian, plan_recovery
from megatron_moetion.recover.report import ArenaReport, current_history
from megatron_moetion.recover.restore import Mover
from megatron_moetion.recover.survey import share_of, survey_store
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.replicate.collective import on_all_ranks
from megatron_moetion.replicate.placement import Placement, place
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Page
from megatron_moetion.store.node import NodeFolder
from megatron_moetion.store.open import OpenArenas
from megatron_moetion.store.retention import Retention
from megatron_moetion.store.spec import ArenaSpec, arena_name
from megatron_moetion.units import UnitKind

_OF_ONE_RANK = ("store", "pack_threads", "pack_sms", "max_stall_ms", "report", "trace_dir", "inject_fault",
                "max_unprotected_iterations")  # fmt: skip
"""Settings that may differ between ranks."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of a survey by all ranks; equal on all of them."""

    specs: tuple[ArenaSpec, ...]
    placement: Placement
    reports: tuple[ArenaReport, ...]
    outcome: RecoveryPlan | NoPlan
    restarted: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Fetched:
    """Arenas that hold all that a plan names for this rank, before anything of it is loaded."""

    arenas: OpenArenas
    leftovers: Mapping[int, Arena]
    """By owner: arenas on this node that are of no use once the recovery is complete."""
    mover: Mover


class Startup:
    """One rank's part in starting a run. ``choose`` and ``retention`` are the mode's."""

    def __init__(
        self,
        *,
        config: MoetionConfig,
        fabric: Fabric,
        node: NodeFolder,
        spec: ArenaSpec,
        pool: HostPool,
        pinning: Pinning,
        choose: Choose,
        retention: Callable[[ArenaSpec], Retention],
        phases: Phases,
        probe: Callable[[str, int], None],
        clock: Clock,
        nonce: int,
    ) -> None:
        self._config = config
        self._fabric = fabric
        self._node = node
        self._spec = spec
        self._pool = pool
        self._pinning = pinning
        self._opened = Opened(node, self._pin)
        self._choose = choose
        self._retention = retention
        self._phases = phases
        self._probe = probe
        self._clock = clock
        self._nonce = nonce

    def survey(self, attempt: int) -> Findings:
        """Survey every node and plan. Raises the errors of ``on_all_ranks``.

        ``ConfigError`` or ``IdentityMismatch`` where ranks or arenas do not fit together, ``StoreError`` where the
        store cannot be read, ``ChannelError`` on a lost peer.
        """
        rank = self._fabric.rank
        notes = self._fabric.gather(
            {
                "node": self._node.key,
                "attempt": attempt,
                "spec": self._spec.to_json().decode(),
                "settings": {k: v for k, v in asdict(self._config).items() if k not in _OF_ONE_RANK}
                | {"trace_dir": bool(self._config.trace_dir)},  # the folder may differ; hooks on all ranks or on none
                "nonce": self._nonce,
            }
        )
        specs = tuple(ArenaSpec.from_json(n["spec"].encode()) for n in notes)
        _require_one_run([n["settings"] for n in notes], specs)
        try:
            placement = place([n["node"] for n in notes], self._config.replicas)
        except ConfigError as error:
            raise shared(error) from None
        node = placement.node_of[rank]
        mine = share_of(rank, self._node.arenas(), node, placement)
        self._probe("survey", -1)
        found = on_all_ranks(
            self._fabric,
            lambda: [r.to_json() for r in survey_store(self._opened, mine, node, rank, specs, self._pool)],
        )
        reports = current_history([ArenaReport.from_json(r) for each in self._fabric.gather(found) for r in each])
        foreign = [r.problem for r in reports if r.foreign and r.problem]
        if foreign:
            raise shared(IdentityMismatch(foreign[0]))
        facts = [
            RankFacts(rank=r, units=tuple((name, UnitKind(kind)) for name, kind, _ in spec.units))
            for r, spec in enumerate(specs)
        ]
        outcome = plan_recovery(facts, reports, placement, self._choose, notes[0]["nonce"])
        self._phases.done("survey")
        return Findings(
            specs=specs,
            placement=placement,
            reports=reports,
            outcome=outcome,
            restarted=max(n["attempt"] for n in notes) > 0,
        )

    def fetch(self, findings: Findings, plan: RecoveryPlan) -> Fetched:
        """Open the arenas and move the plan's captures into them. Raises the errors of ``on_all_ranks``.

        Nothing that T needs is dropped before it is complete everywhere again: a failure at any moment leaves T
        recoverable. ``ChannelError`` where a capture arrives damaged.
        """
        if len(set(self._fabric.gather(plan.digest))) != 1:
            raise AssertionError("ranks made different recovery plans from the same reports")
        rank = self._fabric.rank
        page = Page(
            epoch=plan.history_epoch,
            stable=plan.safe,
            lineage=max(r.lineage for r in findings.reports),
            branches=plan.branches[:-1],
        )
        arenas, leftovers = on_all_ranks(self._fabric, lambda: self._open(findings, page))
        mover = Mover(
            rank=rank,
            arenas={rank: arenas.own, **arenas.held, **leftovers},
            channel=self._fabric.channel,
            pool=self._pool,
            plan=plan,
            retentions={owner: self._retention(spec) for owner, spec in enumerate(findings.specs)},
        )
        for phase, transfers in (("fetch", plan.fetches), ("replicate", plan.copies)):
            on_all_ranks(self._fabric, partial(self._move, mover, transfers))
            self._phases.done(phase)
        return Fetched(arenas=arenas, leftovers=leftovers, mover=mover)

    def commit(self, fetched: Fetched) -> None:
        """T is loaded on every rank: write the new epoch everywhere before any rank trains on."""
        arenas = fetched.arenas
        in_use = replace(fetched.mover, arenas={self._fabric.rank: arenas.own, **arenas.held})
        on_all_ranks(self._fabric, in_use.begin_epoch)
        for arena in fetched.leftovers.values():
            arena.remove()
        self._phases.done("epoch")

    def _move(self, mover: Mover, transfers: Sequence[Transfer]) -> None:
        mover.make_room(transfers)
        self._probe("fetch", -1)
        mover.move(transfers)

    def begin(self, findings: Findings) -> OpenArenas:
        """New, empty arenas, of a new lineage, for state that was initialised or loaded from disk."""
        on_all_ranks(self._fabric, lambda: self._clear_node(findings.placement))
        newest = max((r.lineage for r in findings.reports), default=0)  # a clock may have been ahead then
        lineage = max(*self._fabric.gather(self._clock.unix_ns()), newest + 1)
        page = Page(lineage=lineage)
        arenas, _ = on_all_ranks(self._fabric, lambda: self._open(replace(findings, reports=()), page))
        return arenas

    def close(self) -> None:
        """Let go of all arenas that are open and not handed out."""
        self._pinning.drop()
        self._opened.close_all()

    def _pin(self, arena: Arena) -> None:
        """This rank's own arena is registered with its device while the rank goes on."""
        if arena.spec.identity.owner == self._fabric.rank:
            self._pinning.begin(arena.memory)

    def _clear_node(self, placement: Placement) -> None:
        """Every rank lets go of earlier arenas and one rank a node removes them: new ones may need their memory."""
        self.close()
        if self._fabric.rank == min(placement.ranks_on(placement.node_of[self._fabric.rank])):
            for name in self._node.arenas():
                self._node.clear_arena(name)

    def _open(self, findings: Findings, page: Page) -> tuple[OpenArenas, dict[int, Arena]]:
        """Open the arenas that the survey found sound and make missing ones; leftovers are only read from."""
        rank, placement = self._fabric.rank, findings.placement
        node = placement.node_of[rank]
        sound = {r.owner for r in findings.reports if r.node == node and not r.problem}

        def take(owner: int) -> Arena:
            name = arena_name(owner)
            if owner in sound:
                return self._opened.take(name)
            self._opened.close(name)
            return self._node.create_arena(name, findings.specs[owner], page)

        if rank not in sound:
            self._pinning.drop()
        own = take(rank)
        self._pin(own)
        held = {owner: take(owner) for owner in placement.owners_held_by(rank)}
        arenas = OpenArenas(own=own, held=held, retention=self._retention(findings.specs[rank]))
        wanted = {owner for owner in sound if custodian(owner, node, placement) == rank} - {rank, *held}
        leftovers = {owner: self._opened.take(arena_name(owner)) for owner in wanted}
        self._opened.close_all()
        self._remove_damaged(findings.reports, placement, node)
        return arenas, leftovers

    def _remove_damaged(self, reports: Sequence[ArenaReport], placement: Placement, node: int) -> None:
        """Remove arenas that do not verify at all, except names in use here: their ranks make those anew."""
        ours = {arena_name(o) for r in placement.ranks_on(node) for o in (r, *placement.owners_held_by(r))}
        for report in reports:
            name = report.path.rpartition("/")[2]
            if report.problem and report.node == node and name not in ours:
                self._node.clear_arena(name)


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
