# SPDX-License-Identifier: Apache-2.0
"""From a new process to open arenas: survey every node, then recover or begin anew.

All methods are collective. What is planned is decided in ``plan.py``; here it is asked for and carried out. All ranks
hear summaries only. Tables of captures and specifications go to the owner, its holders, and whoever has its arenas.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import partial
from typing import Any

from megatron_moetion.clock import Clock
from megatron_moetion.coding import WHOLE, Part
from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ChannelError, ConfigError, IdentityMismatch, shared, understood
from megatron_moetion.observe.journal import Phases
from megatron_moetion.recover.exchange import Meeting, swap
from megatron_moetion.recover.opened import Opened
from megatron_moetion.recover.pinning import Pinning
from megatron_moetion.recover.plan import (
    Choose,
    Keepers,
    Key,
    Leg,
    NoPlan,
    Order,
    Place,
    Reach,
    RecoveryPlan,
    Units,
    copies_of,
    fetches_of,
    held_of,
    keepers_of,
    legs_at,
    no_arena,
    no_plan,
    order_of,
    plan_of,
    what_is_missing,
    with_parts_kept,
)
from megatron_moetion.recover.report import ArenaReport, History, Summary, of_history
from megatron_moetion.recover.restore import Mover
from megatron_moetion.recover.shared import captured_at, common, iterations_of, words_of
from megatron_moetion.recover.survey import share_of, survey_store
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.replicate.collective import on_all_ranks, require_same
from megatron_moetion.replicate.mirror import records_of
from megatron_moetion.replicate.placement import Placement, place
from megatron_moetion.snapshot.codec import require_codec
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import RECORD, Page, Records, in_history
from megatron_moetion.store.node import NodeFolder
from megatron_moetion.store.open import OpenArenas
from megatron_moetion.store.retention import Retention
from megatron_moetion.store.spec import ArenaShape, ArenaSpec, arena_name
from megatron_moetion.store.vetoes import vetoed_in
from megatron_moetion.units import UnitKind

_REASONS_MAX = 3
"""Iterations of which it is said why they cannot be recovered."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of a survey by all ranks. What is not marked as this rank's is equal on all of them."""

    placement: Placement
    summary: Summary
    outcome: RecoveryPlan | NoPlan
    restarted: bool
    reports: tuple[ArenaReport, ...]
    """Of the arenas that this rank has surveyed; those of a dead history are marked as of no use."""
    keepers: Keepers
    copies: Mapping[Place, Records]
    """This rank's own captures that are left, by place."""
    held: Mapping[int, set[int]]
    """Their iterations, by unit; of shared experts those that all shards have."""
    shared: Mapping[str, tuple[int, ...]]
    """By name: the iterations of the experts that this rank shares with others, the newest first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fetched:
    """Arenas that hold all that a plan names for this rank, before anything of it is loaded."""

    arenas: OpenArenas
    leftovers: Mapping[Key, Arena]
    """By owner and part: arenas on this node that are of no use once the recovery is complete."""
    order: Order
    """Of this rank's own captures."""
    captured_at: Mapping[str, int]
    """The iterations that the experts come from which this rank shares with others, by name."""
    mover: Mover


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What every rank says of itself to all others, in some 120 bytes."""

    nodes: Sequence[str]
    domains: Sequence[str]
    """Of its node; "" where another rank of the node says it."""
    shapes: Sequence[ArenaShape]
    experts: Sequence[str]
    """A digest of the names of the experts that the rank shares with others."""


class Startup:
    """One rank's part in starting a run. ``choose``, ``shared`` and ``retention`` are the mode's.

    ``domain``: the failure domain of its node, "" where it is not known.
    """

    def __init__(
        self,
        *,
        config: MoetionConfig,
        fabric: Fabric,
        node: NodeFolder,
        domain: str = "",
        spec: ArenaSpec,
        pool: HostPool,
        pinning: Pinning,
        choose: Choose,
        shared: Sequence[str],
        retention: Callable[[ArenaSpec], Retention],
        phases: Phases,
        probe: Callable[[str, int], None],
        clock: Clock,
        nonce: int,
    ) -> None:
        self._config = config
        self._fabric = fabric
        self._node = node
        self._domain = domain
        self._spec = spec
        self._units: Units = [(name, UnitKind(kind)) for name, kind, _ in spec.units]
        self._pool = pool
        self._pinning = pinning
        self._opened = Opened(node, self._pin)
        self._choose = choose
        self._shared = shared
        self._retention = retention
        self._phases = phases
        self._probe = probe
        self._clock = clock
        self._nonce = nonce

    # -- survey and plan --------------------------------------------------------------------------------

    def survey(self, attempt: int) -> Findings:
        """Survey every node and plan. Raises the errors of ``on_all_ranks``.

        ``ConfigError`` or ``IdentityMismatch`` where ranks or arenas do not fit together, ``StoreError`` where the
        store cannot be read, ``ChannelError`` on a lost peer.
        """
        rank = self._fabric.rank
        nonce, last_attempt = self._require_one_run(attempt)
        facts = self._facts()
        try:
            placement = place(facts.nodes, self._config.replicas, facts.domains, self._config.coding_nodes)
        except ConfigError as error:
            raise shared(error) from None
        mine = share_of(rank, self._node.arenas(), placement.node_of[rank], placement)
        self._probe("survey", -1)
        ours = self._spec.identity
        survey = partial(survey_store, self._opened, mine, ours, facts.shapes, self._pool)
        reports = tuple(on_all_ranks(self._fabric, survey))
        summary = self._sum_up(reports)
        if summary.foreign is not None:
            raise shared(IdentityMismatch(summary.foreign))
        findings = Findings(
            placement=placement,
            summary=summary,
            outcome=no_arena(summary),
            restarted=last_attempt > 0,
            reports=reports,
            keepers={},
            copies={},
            held={},
            shared={},
        )
        if summary.newest is not None:
            findings = self._plan(findings, summary.newest, facts, nonce)
        self._phases.done("survey")
        return findings

    def _require_one_run(self, attempt: int) -> tuple[int, int]:
        """Rank 0's nonce, and the highest attempt; ``ConfigError`` where ranks were started differently."""
        of_all = [f.name for f in fields(self._config) if not f.metadata.get("per_rank")]
        config = {name: getattr(self._config, name) for name in of_all}
        config["trace_dir"] = bool(self._config.trace_dir)  # the folder may differ; hooks on all ranks or on none
        identity = {k: v for k, v in asdict(self._spec.identity).items() if k not in ("owner", "layout")}
        # Ranks that replicate at other iterations, or in other slices, would never agree on anything.
        require_same(self._fabric, {**config, **identity})
        found = self._fabric.reduce([self._nonce, attempt], lambda lower, higher: [lower[0], max(lower[1], higher[1])])
        return int(found[0]), int(found[1])

    def _facts(self) -> _Facts:
        shape = ArenaShape.of(self._spec)
        names = hashlib.blake2b("\n".join(self._shared).encode(), digest_size=8).hexdigest() if self._shared else ""
        domain = "" if self._node.position else self._domain
        rows = self._fabric.gather([self._node.key, domain, shape.layout, shape.slots, shape.experts, names])
        return _Facts(
            nodes=[row[0] for row in rows],
            domains=[row[1] for row in rows],
            shapes=[ArenaShape(layout=row[2], slots=row[3], experts=row[4]) for row in rows],
            experts=[row[5] for row in rows],
        )

    def _sum_up(self, reports: Sequence[ArenaReport]) -> Summary:
        return Summary.from_json(self._fabric.reduce(Summary.of(reports).to_json(), _both_summaries))

    def _plan(self, findings: Findings, newest: History, facts: _Facts, nonce: int) -> Findings:
        """Owners learn from their arenas' keepers what is left of them, and all agree on the iteration."""
        reports = of_history(findings.reports, newest)
        placement, rank = findings.placement, self._fabric.rank
        tables = {
            (r.owner, r.part): r.records.where(in_history(r.records, newest.branches, newest.epoch))
            for r in reports
            if not r.problem
        }
        kept = self._fabric.gather([_key_word(key) for key in sorted(tables)])
        with understood("the arenas that it keeps"):
            keepers = keepers_of((map(_key_of, row) for row in kept), placement)
        placement = with_parts_kept(placement, keepers)
        mine: dict[int, list[Place]] = {}
        for at, keeper in sorted(keepers.get(rank, {}).items()):
            mine.setdefault(keeper, []).append(at)
        outgoing: dict[int, list[Records]] = {}
        for owner, part in sorted(tables):
            outgoing.setdefault(owner, []).append(tables[owner, part])
        here = outgoing.pop(rank, [])
        data = {owner: b"".join(map(packed, found)) for owner, found in outgoing.items()}
        told = swap(self._fabric.channel, data, mine.keys() - {rank})
        arrived = {keeper: unpacked(document) for keeper, document in told.items()} | ({rank: here} if here else {})
        copies = {
            at: records for keeper, places in mine.items() for at, records in zip(places, arrived[keeper], strict=True)
        }
        held = held_of(copies)
        common_iterations = self._meet(held, facts)
        for number, (name, _) in enumerate(self._units):
            if name in common_iterations:
                held[number] = set(common_iterations[name])
        return replace(
            findings,
            placement=placement,
            outcome=self._agree(held, newest, nonce, began=findings.summary.began),
            reports=reports,
            keepers=keepers,
            copies=copies,
            held=held,
            shared=common_iterations,
        )

    def _meet(self, held: Mapping[int, set[int]], facts: _Facts) -> dict[str, tuple[int, ...]]:
        """With the ranks that share this one's experts: the iterations that all their shards have."""
        key = facts.experts[self._fabric.rank]
        if not key:
            return {}
        members = [rank for rank, other in enumerate(facts.experts) if other == key]
        meeting = Meeting(self._fabric, f"captures of experts {key}", members, common, self._config.timeout_s)
        captured = {name: held.get(number, set()) for number, (name, _) in enumerate(self._units)}
        return iterations_of(self._shared, meeting.combine(words_of(self._shared, captured)))

    def _agree(
        self, held: Mapping[int, set[int]], newest: History, nonce: int, *, began: bool
    ) -> RecoveryPlan | NoPlan:
        vetoed = vetoed_in(self._node.path, newest.lineage, newest.epoch)
        mine = Reach.of(self._fabric.rank, self._units, held, self._choose, vetoed)
        reach = Reach.from_json(self._fabric.reduce(mine.to_json(), _both_reaches))
        plan = plan_of(reach, newest, nonce)
        if plan is not None:
            return plan
        wanted = reach.hosts[:_REASONS_MAX]
        missing = what_is_missing(self._fabric.rank, self._units, held, self._choose, wanted)
        return no_plan(reach, self._fabric.reduce(missing, _earlier_first), began=began)

    # -- recover ----------------------------------------------------------------------------------------

    def fetch(self, findings: Findings, plan: RecoveryPlan) -> Fetched:
        """Open the arenas and move the plan's captures into them. Raises the errors of ``on_all_ranks``.

        Nothing that T needs is dropped before it is complete everywhere again: a failure at any moment leaves T
        recoverable. ``ChannelError`` where a capture arrives damaged.
        """
        if not self._fabric.reduce(plan.digest, _same):
            raise AssertionError("ranks made different recovery plans from the same summaries")
        rank, placement = self._fabric.rank, findings.placement
        chosen = self._choose(self._units, findings.held, plan.iteration)
        assert not isinstance(chosen, str), f"rank {rank} said that it reaches iteration {plan.iteration}: {chosen}"
        orders = self._tell(order_of(rank, chosen, findings.copies, placement), findings)
        specs = self._tell_specs(placement, findings.keepers)
        page = Page(epoch=plan.history_epoch, stable=plan.safe, lineage=plan.lineage, branches=plan.branches[:-1])
        kept = {(report.owner, report.part) for report in findings.reports if not report.problem}

        def open_arenas() -> tuple[OpenArenas, dict[Key, Arena]]:
            if orders[rank].is_rebuilt.any():  # also where the run no longer asks for fragments
                require_codec()
            opened = self._open(placement, specs, kept, page)
            self._remove_damaged(findings)
            return opened

        arenas, leftovers = on_all_ranks(self._fabric, open_arenas)
        in_use = {(a.spec.identity.owner, a.spec.part): a for a in arenas.all()}
        opened = {**in_use, **leftovers}
        mover = Mover(
            rank=rank,
            arenas=opened,
            channel=self._fabric.channel,
            pool=self._pool,
            plan=plan,
            orders=orders,
            retentions={owner: self._retention(arena.spec) for (owner, _), arena in opened.items()},
        )
        fetches = [leg for order in orders.values() for leg in fetches_of(order, findings.keepers, placement)]
        copies = [leg for order in orders.values() for leg in copies_of(order, placement)]
        for phase, legs in (("fetch", fetches), ("replicate", copies)):
            on_all_ranks(self._fabric, partial(self._move, mover, legs_at(rank, legs)))
            self._phases.done(phase)
        return Fetched(
            arenas=arenas,
            leftovers=leftovers,
            order=orders[rank],
            captured_at=captured_at(findings.shared, plan.iteration),
            mover=mover,
        )

    def commit(self, fetched: Fetched) -> None:
        """T is loaded on every rank: write the new epoch everywhere before any rank trains on."""
        arenas = fetched.arenas
        in_use = replace(fetched.mover, arenas={(a.spec.identity.owner, a.spec.part): a for a in arenas.all()})
        on_all_ranks(self._fabric, in_use.begin_epoch)
        for arena in fetched.leftovers.values():
            arena.remove()
        self._phases.done("epoch")

    def _tell(self, order: Order, findings: Findings) -> dict[int, Order]:
        """This rank's order to its holders and the keepers of its arenas; the orders that concern it, its own too."""
        rank, placement, keepers = self._fabric.rank, findings.placement, findings.keepers
        concerned = {*placement.holders[rank], *keepers[rank].values()} - {rank}
        kept = {report.owner for report in findings.reports if not report.problem}
        owners = {*placement.owners_held_by(rank), *kept} - {rank}
        data = order.to_bytes()
        told = swap(self._fabric.channel, dict.fromkeys(concerned, data), owners)
        return {rank: order, **{owner: Order.from_bytes(owner, table) for owner, table in told.items()}}

    def _tell_specs(self, placement: Placement, keepers: Keepers) -> dict[int, ArenaSpec]:
        """The specifications of the arenas that are missing here. Others are told that lack this rank's."""
        rank = self._fabric.rank

        def is_missing(owner: int, holder: int) -> bool:
            return Place(placement.node_of[holder], placement.part_at(holder, owner)) not in keepers.get(owner, {})

        told = swap(
            self._fabric.channel,
            dict.fromkeys((h for h in placement.holders[rank] if is_missing(rank, h)), self._spec.to_json()),
            [owner for owner in placement.owners_held_by(rank) if is_missing(owner, rank)],
        )
        return {rank: self._spec, **{owner: ArenaSpec.from_json(data) for owner, data in told.items()}}

    def _move(self, mover: Mover, legs: Sequence[Leg]) -> None:
        mover.make_room(legs)
        self._probe("fetch", -1)
        mover.move(legs)

    # -- begin ------------------------------------------------------------------------------------------

    def begin(self, findings: Findings) -> OpenArenas:
        """New, empty arenas, of a new lineage, for state that was initialised or loaded from disk."""
        placement = findings.placement
        on_all_ranks(self._fabric, lambda: self._clear_node(placement))
        newest = findings.summary.newest
        before = newest.lineage if newest is not None else 0  # a clock may have been ahead then
        lineage = self._fabric.reduce(max(self._clock.unix_ns(), before + 1), max)
        specs = self._tell_specs(placement, {})
        page = Page(lineage=lineage)
        arenas, _ = on_all_ranks(self._fabric, lambda: self._open(placement, specs, set(), page))
        return arenas

    def close(self) -> None:
        """Let go of all arenas that are open and not handed out."""
        self._pinning.drop()
        self._opened.close_all()

    def _pin(self, arena: Arena) -> None:
        """This rank's own arena is registered with its device while the rank goes on."""
        if (arena.spec.identity.owner, arena.spec.part) == (self._fabric.rank, WHOLE):
            self._pinning.begin(arena.memory)

    def _clear_node(self, placement: Placement) -> None:
        """Every rank lets go of earlier arenas and one rank a node removes them: new ones may need their memory."""
        self.close()
        if self._fabric.rank == min(placement.ranks_on(placement.node_of[self._fabric.rank])):
            for name in self._node.arenas():
                self._node.clear_arena(name)

    def _open(
        self, placement: Placement, specs: Mapping[int, ArenaSpec], kept: set[Key], page: Page
    ) -> tuple[OpenArenas, dict[Key, Arena]]:
        """Open the arenas ``kept`` and make those that are missing; leftovers are only read from."""
        rank = self._fabric.rank

        def take(owner: int, part: Part) -> Arena:
            name = arena_name(owner, part)
            if (owner, part) in kept:
                return self._opened.take(name)
            self._opened.close(name)
            return self._node.create_arena(name, specs[owner].of_part(part), page)

        if (rank, WHOLE) not in kept:
            self._pinning.drop()
        own = take(rank, WHOLE)
        self._pin(own)
        parts = {owner: placement.part_at(rank, owner) for owner in placement.owners_held_by(rank)}
        held = {owner: take(owner, part) for owner, part in parts.items()}
        arenas = OpenArenas(own=own, held=held, retention=self._retention(self._spec))
        unused = kept - {(rank, WHOLE), *parts.items()}
        leftovers = {(owner, part): self._opened.take(arena_name(owner, part)) for owner, part in sorted(unused)}
        self._opened.close_all()
        return arenas, leftovers

    def _remove_damaged(self, findings: Findings) -> None:
        """Remove arenas that do not verify at all, except names in use here: their ranks make those anew."""
        placement = findings.placement
        here = placement.ranks_on(placement.node_of[self._fabric.rank])
        held = {(o, placement.part_at(r, o)) for r in here for o in placement.owners_held_by(r)}
        ours = {arena_name(*key) for key in {*((r, WHOLE) for r in here), *held}}
        for report in findings.reports:
            name = report.path.rpartition("/")[2]
            if report.problem and name not in ours:
                self._node.clear_arena(name)


def _key_word(key: Key) -> int | list[int]:
    """A key in a message to all ranks: short where it can be."""
    owner, part = key
    return owner if part.is_whole else [owner, *astuple(part)]


def _key_of(word: int | list[int]) -> Key:
    """Inverse of ``_key_word``."""
    return (word, WHOLE) if isinstance(word, int) else (word[0], Part.of(*word[1:]))


def packed(records: Records) -> bytes:
    """A table among several."""
    data: bytes = len(records).to_bytes(8, "little") + records.table.tobytes()
    return data


def unpacked(document: bytes) -> list[Records]:
    """Inverse of ``packed``, of all of them."""
    found, at = [], 0
    while at < len(document):
        nbytes = int.from_bytes(document[at : at + 8], "little") * RECORD.itemsize
        if at + 8 + nbytes > len(document):
            raise ChannelError(f"{len(document)} bytes are no tables of captures; restart to try again")
        found.append(records_of(document[at + 8 : at + 8 + nbytes]))
        at += 8 + nbytes
    return found


def _both_summaries(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    return Summary.from_json(mine).followed_by(Summary.from_json(theirs)).to_json()


def _both_reaches(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    return Reach.from_json(mine).followed_by(Reach.from_json(theirs)).to_json()


def _earlier_first(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {**theirs, **mine}


def _same(mine: str, theirs: str) -> str:
    return mine if mine == theirs else ""
