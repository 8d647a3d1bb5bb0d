# SPDX-License-Identifier: Apache-2.0
"""The one orchestrator: says what happens after what, and decides nothing.

Policies are in ``select``, ``recover/plan.py`` and ``replicate/placement.py``; effects in ``snapshot``,
``store`` and ``replicate``.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import (
    ChannelError,
    ConfigError,
    DeviceFault,
    NothingRecoverable,
    ProtectionLost,
    StoreError,
    UnsupportedState,
    shared,
)
from megatron_moetion.framework import StateAdapter, StepNote, StepReplayer, TokenCounter, TokenSource
from megatron_moetion.observe.fault import make_probe, parse_faults
from megatron_moetion.observe.journal import Journal, Phases
from megatron_moetion.recover.plan import NoPlan, RecoveryPlan
from megatron_moetion.recover.recalibration import Recalibration
from megatron_moetion.recover.restore import write_back
from megatron_moetion.recover.rollforward import roll_forward
from megatron_moetion.recover.startup import OpenArenas, Situation, Startup
from megatron_moetion.replicate.agreement import WINDOW, fates, mask_of, newest_common
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.replicate.collective import on_all_ranks
from megatron_moetion.replicate.pipeline import Contents, Pipeline, SnapshotCounts
from megatron_moetion.replicate.protection import Distance, limit_of
from megatron_moetion.replicate.replicator import Replicator
from megatron_moetion.replicate.witness import NO_WITNESS, Past, Witness
from megatron_moetion.schedule.scheduler import TIMELINES, Scheduler
from megatron_moetion.schedule.sizes import Sizes
from megatron_moetion.select.book import ExpertBook, ExpertState, Rules, lost_until, share_lost
from megatron_moetion.select.budget import longer_period
from megatron_moetion.select.rotation import Rotation, remembered_steps
from megatron_moetion.sizing import Sizing
from megatron_moetion.snapshot.host_state import decode, encode
from megatron_moetion.snapshot.packer import HostPool, Packer
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.lock import LOCK_WAIT_S, NodeLock
from megatron_moetion.store.manifest import Page, Record
from megatron_moetion.store.node import NodeFolder, open_node, restart_count, run_id_of, write_pid
from megatron_moetion.store.retention import Retention, Settled, retention_of
from megatron_moetion.store.spec import ArenaIdentity, ArenaSpec
from megatron_moetion.units import UnitKind

_LOCK_SHARE = 0.8
"""Of the time that ranks wait for each other, what a rank waits for the lock on its folder."""
_TRY_AGAIN = 16
"""Snapshots until a store that was deleted, and could not be made again, is tried once more."""
_QUIET_LAG = 64
"""Snapshots that the stable iteration may be behind before rank 0 says so, whatever the reason."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What a recovery did. ``lost_tokens`` and ``plt`` count over all ranks; both are 0 but in mode ``popularity``."""

    iteration: int
    epoch: int
    local_units: int
    fetched_units: int
    seconds: Mapping[str, float]
    lost_tokens: int
    plt: float
    replayed_steps: int
    """Optimizer steps that were taken once more, of this rank's; 0 but in mode ``exact``."""


class Session:
    """In-memory checkpointing of one rank. Made by ``mcore.attach``; call order: ``start``, then one
    ``on_step_end`` an iteration, ``close``. ``before_optimizer_step`` is called by a hook on the optimizer.
    """

    def __init__(
        self,
        *,
        config: MoetionConfig,
        adapter: StateAdapter,
        fabric: Fabric,
        topology: str,
        scheduler: Scheduler,
        replayer: StepReplayer | None = None,
        tokens: TokenSource | None = None,
        environment: Mapping[str, str] = os.environ,
        witness: Witness = NO_WITNESS,
    ) -> None:
        self._config = config
        self._adapter = adapter
        self._fabric = fabric
        self._scheduler = scheduler
        self._attempt = restart_count(environment)
        self._witness = witness
        self._undo = ExitStack()
        self._undo.callback(fabric.close)
        rank = fabric.rank

        def claim() -> tuple[str, Callable[[str, int], None], Journal, NodeFolder]:
            run_id = run_id_of(config, environment)
            probe = make_probe(parse_faults(config.inject_fault), self._attempt, rank)
            journal = Journal(rank, self._attempt, Path(config.report) if config.report and rank == 0 else None)
            return run_id, probe, journal, open_node(config, run_id, environment, fabric.world_size)

        run_id, self._probe, self._journal, self._node = on_all_ranks(fabric, claim)
        self._lock = self._take_lock()
        on_all_ranks(fabric, lambda: write_pid(self._node, rank, self._attempt))
        assert (replayer is not None) == (config.mode == "exact"), (
            "steps can be replayed in mode 'exact' and only there"
        )
        self._replayer = replayer
        assert (tokens is not None) == (config.mode == "popularity"), "tokens count in mode 'popularity' and only there"
        self._tokens = tokens
        counters = tokens.token_counters() if tokens is not None else ()
        self._sizing = Sizing.settle(
            config=config,
            fabric=fabric,
            node=self._node,
            identity=ArenaIdentity(
                run_id=run_id,
                owner=rank,
                world_size=fabric.world_size,
                topology=topology,
                layout="",
                mode=config.mode,
                chunk_bytes=config.chunk_bytes,
            ),
            inventory=adapter.inventory(),
            num_experts=len(counters),
            bytes_a_step=replayer.bytes_a_step if replayer is not None else 0,
            environment=environment,
        )
        self._inventory, self._log = self._sizing.inventory, self._sizing.log
        if replayer is not None and self._log is not None:
            replayer.remember(remembered_steps(len(self._log.groups)))
        self._counters = self._find_counters(counters)
        self._expert_units = [self._inventory.index.get(c.expert) for c in counters]
        limits = self._sizing.limits
        self._sizes = Sizes(limits.fewest, limits.usual)
        self._book = ExpertBook(
            names=[c.expert for c in counters],
            layers=[c.unit for c in counters],
            rules=Rules(
                policy=config.selection,
                reserved=limits.fewest,
                most=limits.most,
                staleness_cap=config.staleness_cap,
                interval=config.interval,
                lost_token_budget=config.lost_token_budget,
            ),
        )
        threads = _pack_threads(config, environment)
        self._pool = HostPool(threads)
        self._packer = on_all_ranks(
            fabric, lambda: Packer(self._inventory, config.chunk_bytes, threads, rank=rank, num_sms=config.pack_sms)
        )
        self._undo.callback(self._packer.close)
        self._open_iterations: set[int] = set()
        self._stable = -1
        self._recent = [-1]
        """Iterations of the last snapshots, the newest first; the same on all ranks."""
        self._degraded = ""
        self._distance = Distance(limit_of(config.max_unprotected_iterations, environment))
        self._lag_said = self._quiet_lag = _QUIET_LAG * config.interval
        self._first_stable = -1
        self._store_is_tried_in = 0
        self._recalibration: Recalibration | None = None
        if tokens is not None:
            self._recalibration = Recalibration(tokens, fabric, self._journal, config.recalibration_iterations)
        self.node_of: tuple[int, ...] = ()
        """Node of each rank, by rank; known after ``start``."""
        self._arenas: OpenArenas | None = None
        self._pipeline: Pipeline | None = None
        self._rotation: Rotation | None = None
        self._replayed = 0
        self._retentions: dict[int, Retention] = {}
        """By owner of an arena."""

    # -- public ---------------------------------------------------------------------------------------

    @property
    def stable_iteration(self) -> int:
        """The newest iteration that manifests call whole on every rank and its replicas; -1 before ``start``.

        It outlives this process: what ranks have only just agreed on does not count before it is written down.
        """
        if self._pipeline is None or self._arenas is None:
            return self._stable
        self._pipeline.wait_until_freed()
        return self._arenas.own.page.stable

    def start(
        self,
        load_persistent: Callable[[], int | None] | None = None,
        newest_persistent: Callable[[], int | None] | None = None,
    ) -> Resumed | None:
        """Recover the newest state from memory or disk, or begin; then make a baseline stable. Collective.

        ``load_persistent`` loads the newest checkpoint on disk and returns its iteration, or None if there is none.
        ``newest_persistent`` returns that iteration without loading anything: where it is newer than what memory holds,
        disk wins. Without it, disk is asked only when memory holds nothing.

        Returns what was recovered from memory, None otherwise. Raises ``NothingRecoverable`` rather than start from
        zero by accident, other ``MoetionError`` for what does not fit together or does not work: the same on all ranks
        where its ``shared`` says so.
        """
        phases = Phases()
        startup = Startup(
            config=self._config,
            fabric=self._fabric,
            node=self._node,
            spec=self._sizing.spec,
            pool=self._pool,
            phases=phases,
            probe=self._probe,
        )
        situation = startup.look(self._attempt)
        plan = situation.outcome
        if self._fabric.rank == 0 and (isinstance(plan, RecoveryPlan) or plan.began):
            self._witness.note_baseline()  # before a fault of this attempt can take what there is
        disk = self._newest_on_disk(newest_persistent, plan)
        loaded = None
        if load_persistent is not None and (isinstance(plan, NoPlan) or disk > plan.iteration):
            loaded = self._load(load_persistent, plan, disk)
        if isinstance(plan, RecoveryPlan) and (loaded is None or loaded <= plan.iteration):
            resumed = self._recover(startup, situation, plan, phases, disk)
        else:
            resumed = None
            self._begin(startup, situation, loaded)
        self.node_of = situation.placement.node_of
        self._first_stable = self._stable
        if self._fabric.rank == 0:
            self._witness.note_baseline()
        self._announce(situation)
        return resumed

    def _take_lock(self) -> NodeLock:
        """Make this run the only one in the folders of its nodes, until ``close``. Collective.

        Rank 0 goes first: of two jobs that start under one name at one moment, one gets all locks and the other none.
        """
        wait_s = min(LOCK_WAIT_S, _LOCK_SHARE * self._config.timeout_s)
        taken: list[NodeLock] = []

        def lock(ranks: range) -> None:
            if self._fabric.rank in ranks:
                taken.append(self._node.lock(wait_s, partial(self._journal.info, -1)))
                self._undo.callback(taken[0].close)  # also where another rank gets none

        for ranks in (range(1), range(1, self._fabric.world_size)):
            on_all_ranks(self._fabric, partial(lock, ranks))
        return taken[0]

    def _newest_on_disk(self, newest_persistent: Callable[[], int | None] | None, plan: RecoveryPlan | NoPlan) -> int:
        """The iteration of the newest checkpoint on disk, -1 without one. Collective.

        ``StoreError`` where some ranks see one that is newer than memory and others do not: taking memory's older state
        would undo work, and loading from disk would fail.
        """
        found = on_all_ranks(self._fabric, newest_persistent) if newest_persistent is not None else None
        seen = [-1 if n is None else n for n in self._fabric.gather(found)]
        newest = max(seen)
        if isinstance(plan, RecoveryPlan) and newest > plan.iteration and len(set(seen)) > 1:
            others = [rank for rank, n in enumerate(seen) if n != newest]
            raise shared(
                StoreError(
                    f"disk has a checkpoint of iteration {newest}, memory one of {plan.iteration}, and "
                    f"{len(others)} ranks ({others[:8]}) see none or an older one: mount the folder of "
                    f"--load there, or leave --load out to go on from memory"
                )
            )
        return newest

    def _load(self, load_persistent: Callable[[], int | None], plan: RecoveryPlan | NoPlan, disk: int) -> int | None:
        """Load from disk; the iteration, or None if there was nothing or less than memory has."""
        is_newer, is_first = isinstance(plan, RecoveryPlan), self._fabric.rank == 0
        if isinstance(plan, RecoveryPlan) and is_first:
            self._journal.info(
                plan.iteration,
                f"memory holds iteration {plan.iteration}, disk {disk}: the newer one is loaded, from disk",
            )
        loaded = on_all_ranks(self._fabric, load_persistent)
        if len(everyone := set(self._fabric.gather(loaded))) > 1:
            iterations = sorted(everyone, key=str)
            raise shared(StoreError(f"ranks loaded different persistent checkpoints: iterations {iterations}"))
        if is_newer and is_first and (loaded is None or loaded < disk):
            self._journal.warn_once(
                "disk",
                disk,
                f"disk should have held iteration {disk} and gave {loaded}; the newer of it and memory is taken",
            )
        return loaded

    def before_optimizer_step(self) -> None:
        """Return once live state may be written; a late snapshot is dropped. Called by the optimizer hook.

        On a GPU what is still to be read is read first: training's stream waits there, and the host does not.
        """
        if self._pipeline is not None:
            self._pipeline.finish_packing(self._config.max_stall_ms / 1000)

    def on_step_end(self, iteration: int) -> None:
        """Take this iteration's snapshot. State must stay as it is until the next optimizer step.

        ``iteration`` counts completed steps and must be the same on all ranks. Whatever draws random numbers or moves
        the position in the data between two steps, an evaluation for instance, comes before it: a resume does not
        repeat it. Does not raise for a failed snapshot, which is dropped, counted and logged once; raises
        ``ProtectionLost`` where snapshots have stopped for good and ``max_unprotected_iterations`` have passed.
        """
        self._scheduler.cut(iteration)
        self._adapter.after_step()
        self._watch(iteration)
        if iteration % self._config.interval or self._degraded:
            return
        pipeline, arenas = self._running()
        packed = pipeline.finish()
        self._keep_store(iteration, pipeline, arenas)
        if self._rotation is not None:
            self._rotation.packed(is_there=packed.is_there, captured=packed.captured, late=packed.late)
            # A dropped snapshot breaks all chains; where replication is too slow for good, none would ever be whole.
            with self._scheduler.urgent():
                pipeline.catch_up(self._config.max_stall_ms / 1000)
        try:
            free = self._learn()
            if self._recalibration is not None:
                self._recalibration.on_step_end(iteration)
            note = self._note_step(iteration)
            unfrozen = self._freeze()
            counts = self._token_counts()
            self._fabric.start_sum(counts)
            self._recent = [iteration, *self._recent][:WINDOW]
            self._fabric.start_agreement(*self._masks(pipeline))
            self._hash_state(iteration)
        except ChannelError as error:
            self._degraded = str(error)
            self._journal.warn_once("agreement", iteration, f"snapshots stop, iteration {self._stable} stays: {error}")
            return
        self._probe("before-select", iteration)
        self._open_iterations.add(iteration)
        if self._sizes.skips_next():
            pipeline.skip(iteration, "budget", free)
            self._report_drops(pipeline, iteration)
            return
        contents = self._select(iteration, counts, note)
        if contents is None:
            pipeline.skip(iteration, "gap", free)
        elif unusable := unfrozen or self._adapter.moved() or note.problem:
            reason = "freeze" if unfrozen else "missed" if note.problem is not None else "moved"
            self._journal.warn_once(
                reason, iteration, f"snapshots are dropped, iteration {self._stable} stays: {unusable}"
            )
            pipeline.skip(iteration, reason, free)
        else:
            pipeline.begin(iteration, contents, self._tokens_of_units(counts), free)
        self._report_drops(pipeline, iteration)

    def scalars(self) -> dict[str, float]:
        """Numbers for a dashboard, this rank's."""
        pipeline, _ = self._running()
        counts = pipeline.counts
        return {
            "moetion/stable-lag-iterations": float(self._recent[0] - self._stable),
            "moetion/snapshot-bytes": counts.bytes_committed / max(counts.committed, 1),
            "moetion/snapshots-dropped": float(sum(counts.dropped.values())),
            "moetion/zero-bytes": counts.zero_bytes / max(counts.committed, 1),
            "moetion/spared-bytes": float(self._rotation.spared_bytes) if self._rotation is not None else 0.0,
            "moetion/captures-left-out": float(sum(counts.left_out.values())),
            "moetion/waited-s": counts.waited_s,
            "moetion/unsaved-tokens-max": float(max(self._book.ledger.unsaved, default=0)),
            "moetion/unsaved-tokens": float(sum(self._book.ledger.unsaved)),
            "moetion/projected-plt": self._book.projected_share,
            "moetion/experts-per-snapshot": float(self._book.num_chosen),
            **self._scheduler.scalars(),
        }

    def experts(self) -> tuple[ExpertState, ...]:
        """What each expert of this rank's layers has at risk and has lost; empty but in mode ``popularity``."""
        return self._book.experts()

    def drain(self) -> None:
        """Wait until every snapshot that was begun is whole or dropped. Bounded by ``timeout_s`` a wait."""
        if self._pipeline is not None:
            self._pipeline.drain()

    def close(self) -> None:
        """Finish what is in pipeline, report, and let go of everything. The arenas stay for the next start.

        While an exception is being handled nobody is waited for: see ``abandon``.
        """
        if sys.exc_info()[0] is not None:
            self.abandon()
            return
        pipeline, self._pipeline = self._pipeline, None
        try:
            if pipeline is not None and self._arenas is not None:
                pipeline.drain()
                self._summarise(pipeline.counts)
        except ChannelError as error:
            self._journal.warn_once("summary", self._recent[0], f"the summary is missing: {error}")
        finally:
            self._arenas = None
            self._undo.close()

    def abandon(self, wait_s: float = 0.0) -> bool:
        """Stop without waiting for other ranks, in a process that is about to end; returns at once.

        ``wait_s`` is for the snapshots under way; the result is whether they were done by then. What the threads may
        still use stays as it is until the process has ended.
        """
        self._undo.pop_all()
        pipeline, self._pipeline, self._arenas = self._pipeline, None, None
        is_done = pipeline.abandon(wait_s) if pipeline is not None else True
        self._fabric.abandon()
        return is_done

    def _summarise(self, counts: SnapshotCounts) -> None:
        totals = self._fabric.gather(
            {
                "committed": counts.committed,
                "bytes": counts.bytes_committed,
                "full": self._state_bytes,
                "dropped": dict(counts.dropped),
                "layers": self._layers(),
            }
        )
        snapshots = min(t["committed"] for t in totals)
        self._journal.event(
            "summary",
            snapshots=snapshots,
            dropped=sum(sum(t["dropped"].values()) for t in totals),
            snapshot_bytes_full=sum(t["full"] for t in totals),
            snapshot_bytes_mean=sum(t["bytes"] / max(t["committed"], 1) for t in totals),
            plt=share_lost([t["layers"] for t in totals]),
            stable=self._stable,
        )

    # -- starting -------------------------------------------------------------------------------------

    def _recover(
        self, startup: Startup, situation: Situation, plan: RecoveryPlan, phases: Phases, disk: int
    ) -> Resumed:
        state: dict[str, Any] = {}

        def load(arena: Arena, records: Sequence[Record], host_state: bytes) -> None:
            state.update(decode(host_state))
            if self._log is None or self._replayer is None:
                write_back(self._packer, arena, records)
                self._adapter.load_host_state(state["adapter"])
                return
            self._replayer.begin_replay(state["adapter"])
            log_of = self._log.log_of
            self._replayed = roll_forward(
                self._packer, arena, records, log_of=log_of, to=plan.iteration, replayer=self._replayer
            )
            bases = {r.unit: r.iteration for r in records if r.unit in log_of}
            slice_of = {log: unit for unit, log in log_of.items()}
            logged = Counter(slice_of[r.unit] for r in records if r.unit in slice_of and not r.is_zero)
            self._rotation = Rotation(self._log, plan.iteration, bases, logged)
            self._adapter.load_host_state(state["adapter"])  # it may refuse, so before anything in memory is changed

        self._arenas = startup.recover(situation, plan, self._packer, load)
        self._adapter.resync()
        self._stable = plan.iteration
        self._recent = [plan.iteration]
        self._fly(self._arenas, situation, plan.epoch)
        lost = self._count_losses(situation, plan, state["session"])
        everyone = self._fabric.gather({"lost": lost, "layers": self._layers()})
        by_expert: dict[str, int] = {}
        for name, tokens in (item for m in everyone for item in m["lost"].items()):
            by_expert[name] = by_expert.get(name, 0) + tokens
        if self._recalibration is not None:
            self._recalibration.begin(plan.iteration, by_expert)
        phases.done("resync")
        choices = plan.choices[self._fabric.rank]
        home = situation.placement.node_of[self._fabric.rank]
        resumed = Resumed(
            iteration=plan.iteration,
            epoch=plan.epoch,
            local_units=sum(c.node == home for c in choices),
            fetched_units=sum(c.node != home for c in choices),
            seconds=phases.seconds,
            lost_tokens=sum(by_expert.values()),
            plt=share_lost([m["layers"] for m in everyone]),
            replayed_steps=self._replayed,
        )
        if self._fabric.rank == 0:
            spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.seconds.items())
            units = sum(len(c) for c in plan.choices)
            on_disk = f" (disk holds iteration {disk})" if disk >= 0 else ""
            replayed = f"{self._replayed} optimizer steps replayed; " if self._log is not None else ""
            self._journal.info(
                plan.iteration,
                f"recovered, epoch {plan.epoch}{on_disk}: "
                f"{units - len(plan.fetches)} units from their own nodes' memory, {len(plan.fetches)} from others; "
                f"{replayed}{resumed.lost_tokens} tokens lost, PLT {resumed.plt:.3%}; "
                f"{spent}",
            )
        self._journal.event(
            "recovered",
            iteration=plan.iteration,
            epoch=plan.epoch,
            phases_s=dict(phases.seconds),
            lost_tokens=resumed.lost_tokens,
            plt=resumed.plt,
            lost_tokens_by_expert=by_expert,
            replayed_steps=self._replayed,
            fetched_units=len(plan.fetches),
            damaged=sum(r.damaged for r in situation.reports),
            process_start=_process_start(),
        )
        return resumed

    def _begin(self, startup: Startup, situation: Situation, loaded: int | None) -> None:
        """Begin a new lineage, from what was loaded from disk (its iteration) or from the initial state (None)."""
        why, past = situation.outcome, self._past()
        # Arenas of which none has had a first baseline show that no step was ever taken.
        unknown = situation.restarted and not situation.reports and not past.is_known
        lost = isinstance(why, NoPlan) and (why.began or past.had_baseline or unknown)
        if isinstance(why, NoPlan) and lost and loaded is None and not self._config.allow_fresh:
            raise shared(
                NothingRecoverable(
                    f"nothing can be recovered: {why.reason}. There is no persistent checkpoint to fall back to "
                    f"(--load); more --moetion-replicas survive more lost nodes. --moetion-allow-fresh starts from "
                    f"iteration 0"
                )
            )
        iteration = loaded or 0
        self._arenas = startup.begin(situation)
        own = self._arenas.own
        on_all_ranks(self._fabric, lambda: self._packer.adopt(own.memory))
        if isinstance(why, NoPlan) and lost:
            self._journal.warn_once(
                "fresh", iteration, f"memory holds nothing to recover ({why.reason}); starting here"
            )
        pipeline = self._fly(self._arenas, situation, epoch=0)
        on_all_ranks(self._fabric, self._freeze_or_raise)
        logs = self._inventory.of_kind(UnitKind.LOG)
        everything = tuple(u for u in range(len(self._inventory.units)) if u not in logs)
        counts = self._token_counts()
        pipeline.begin(iteration, Contents(units=everything), self._tokens_of_units(counts))
        pipeline.drain()
        self._fabric.start_agreement(mask_of(pipeline.whole, [iteration]))
        if newest_common((self._fabric.finish_agreement() or (0,))[0], [iteration]) is None:
            raise StoreError(
                "the first snapshot could not be made whole on every rank: "
                f"{pipeline.broken or dict(pipeline.counts.dropped)}"
            )
        pipeline.counts = SnapshotCounts()  # the baseline is no steady-state snapshot
        self._stable = iteration
        self._recent = [iteration]
        self._book.choose_all(iteration, counts)
        if self._log is not None:
            self._rotation = Rotation(self._log, iteration, dict.fromkeys(self._log.log_of, iteration))
        for arena in self._arenas.all():
            arena.edit(lambda page: {"stable": iteration})
        self._fabric.gather("baseline")

    def _past(self) -> Past:
        """What the witness knows of earlier starts; the same on all ranks."""
        seen = self._witness.past() if self._fabric.rank == 0 else Past()
        return Past(**self._fabric.gather(asdict(seen))[0])

    def _freeze_or_raise(self) -> None:
        if unfrozen := self._freeze():
            raise UnsupportedState(unfrozen)

    def _fly(self, arenas: OpenArenas, situation: Situation, epoch: int) -> Pipeline:
        rank = self._fabric.rank
        replicator = Replicator(
            channel=self._fabric.channel,
            own=arenas.own,
            holders=situation.placement.holders[rank],
            held=arenas.held,
            pool=self._pool,
            epoch=epoch,
            probe=self._probe,
            pacing=self._scheduler,
        )
        self._pipeline = Pipeline(
            packer=self._packer,
            inventory=self._inventory,
            arena=arenas.own,
            replicator=replicator if self._config.replicas else None,
            epoch=epoch,
            probe=self._probe,
            packed=self._scheduler.packed,
        )
        self._undo.callback(arenas.close)
        self._undo.callback(self._packer.close)
        self._undo.callback(self._pipeline.close)
        return self._pipeline

    def _announce(self, situation: Situation) -> None:
        if not self._packer.is_direct:
            self._journal.warn_once("pinned", self._stable, self._packer.note)
        if self._fabric.rank:
            return
        if self._packer.is_direct and self._packer.note:
            self._journal.info(self._stable, self._packer.note)
        if self._sizing.note:
            self._journal.info(self._stable, self._sizing.note)
        _, arenas = self._running()
        nodes = situation.placement.num_nodes
        selection = ""
        if self._log is not None:
            selection = (
                f", 1/{len(self._log.groups)} of the state ({max(self._log.group_bytes) / 2**20:.1f} MiB) and all "
                f"gradients ({self._log.log_bytes / 2**20:.1f} MiB) each"
            )
        if self._config.mode == "popularity":
            most = self._sizing.limits.most
            more = f" (as many as {most} to keep the budget of lost tokens)" if most > self._sizing.limits.usual else ""
            selection = (
                f", {self._sizes.experts_text} of {len(self._counters)} experts each{more}, {self._config.selection}"
            )
        self._journal.info(
            self._stable,
            f"mode {self._config.mode}, {self._config.schedule}: a snapshot every {self._config.interval} iteration(s)"
            f"{selection}; state "
            f"{self._state_bytes / 2**20:.1f} MiB, arenas {sum(a.nbytes for a in arenas.all()) / 2**20:.1f} MiB "
            f"on this rank; {nodes} node(s), {self._config.replicas} replica(s); store {self._node.path}",
        )
        if not self._config.replicas:
            self._journal.warn_once(
                "replicas", self._stable, "--moetion-replicas 0: nothing survives the loss of a node"
            )

    # -- the steady state -----------------------------------------------------------------------------

    def _running(self) -> tuple[Pipeline, OpenArenas]:
        if self._pipeline is None or self._arenas is None:
            raise ConfigError("call start() before on_step_end(), and neither after close()")
        return self._pipeline, self._arenas

    def _watch(self, iteration: int) -> None:
        """Say how far the stable iteration is behind, as that grows; end where it will never catch up."""
        behind = iteration - self._stable
        broken = self._degraded or (self._pipeline.ended if self._pipeline is not None else "")
        if not broken:
            if behind <= self._quiet_lag:
                self._lag_said = self._quiet_lag
            if behind > self._lag_said and self._fabric.rank == 0:
                self._lag_said = 2 * behind
                self._journal.warn(
                    iteration,
                    f"iteration {self._stable} stays, {behind} iterations back: some rank's snapshots are dropped or "
                    f"do not reach their replicas; its lines say why",
                )
            return
        if text := self._distance.worth_saying(behind):
            self._journal.warn(iteration, f"no snapshot is protected since iteration {self._stable}: {text}: {broken}")
        helps = self._attempt == 0 or self._stable > self._first_stable
        if self._distance.is_too_far(behind, helps=helps):
            raise ProtectionLost(
                f"at iteration {iteration} the stable iteration is still {self._stable} and cannot move: {broken}. "
                f"This process ends so that its supervisor restarts the job from iteration {self._stable} "
                f"(--moetion-max-unprotected-iterations)"
            )

    def _keep_store(self, iteration: int, pipeline: Pipeline, arenas: OpenArenas) -> None:
        """Notice that somebody deleted this node's folder or files in it, and put them back. Call it after ``finish``.

        Their memory is still mapped here, but a restart would not find it.
        """
        gone = [a for a in arenas.all() if not a.has_file]
        lock = self._lock
        if not gone and lock.has_file:
            return
        if self._store_is_tried_in:
            self._store_is_tried_in -= 1
            return
        what = f"{len(gone)} of this rank's {len(arenas.all())} arenas" if gone else "the lock"
        said = f"{what} in {self._node.path} were deleted by somebody while training runs"
        pipeline.drain()  # bounded; then no thread uses the arenas
        self._packer.close()
        try:
            self._node.make_again(lock)
            write_pid(self._node, self._fabric.rank, self._attempt)
            for arena in gone:
                arena.make_file_again()
        except (StoreError, OSError) as error:
            self._store_is_tried_in = _TRY_AGAIN
            self._journal.warn(
                iteration,
                f"{said} and cannot be made again: {error}. A restart finds nothing in this node's memory",
            )
        else:
            self._journal.warn(iteration, f"{said}; they were made again, and protect as before")
        try:
            self._packer.adopt(arenas.own.memory)
        except DeviceFault as error:
            self._journal.warn(iteration, f"the arena was made again and could not be pinned: {error}")

    def _learn(self) -> Callable[[], None]:
        """Read what the ranks agreed on one snapshot ago; returns what frees what is then no longer needed."""
        _, arenas = self._running()
        totals = self._fabric.finish_sum()
        agreed = self._fabric.finish_agreement()
        if totals is not None:
            self._book.ledger.update(totals)
        if agreed is None:
            return lambda: None
        mask, votes, whole_mask = agreed
        self._sizes.agree(votes)
        settled = fates(mask, self._recent, self._open_iterations)
        newest = newest_common(mask, self._recent)
        stable = max(self._stable, -1 if newest is None else newest)
        if stable == self._stable and not settled:
            return lambda: None
        self._stable = stable
        self._open_iterations -= settled.keys()
        for iteration, whole in sorted(settled.items()):
            self._book.ledger.settle(iteration, whole)
        if self._rotation is not None:
            self._rotation.settle(stable, settled, fates(whole_mask, self._recent, settled))

        def free() -> None:
            for arena in arenas.all():
                arena.edit(partial(self._forget, arena.spec, settled))

        return free

    def _forget(self, spec: ArenaSpec, settled: Mapping[int, bool], page: Page) -> dict[str, Any]:
        """An arena's page without what recovery no longer needs, now that the fate of these snapshots is known."""
        owner = spec.identity.owner
        if owner not in self._retentions:
            self._retentions[owner] = retention_of(spec)
        fate = self._rotation.settled if self._rotation is not None else Settled(stable=self._stable, whole=settled)
        return {"records": self._retentions[owner].keep(page.records, fate), "stable": self._stable}

    def _masks(self, pipeline: Pipeline) -> tuple[int, int, int]:
        """What this rank has to say: snapshots that can be recovered, its vote, and snapshots that are whole."""
        rounds = pipeline.rounds
        whole = [i for i, is_whole in rounds.items() if is_whole]
        reachable = whole if self._rotation is None else self._rotation.reachable(rounds)
        return (
            mask_of(reachable, self._recent, rounds),
            self._vote(),
            mask_of(whole, self._recent, rounds),
        )

    def _vote(self) -> int:
        """For the largest snapshot that this rank's links afford; says so once where that is not the largest of all."""
        always = sum(self._inventory.units[u].nbytes for u in self._sizing.always)
        carries = self._scheduler.carries(self._config.replicas)
        carried, why = carries.nbytes, carries.why
        if self._log is not None:
            nbytes = always + self._log.log_bytes + max(self._log.group_bytes)
            if nbytes > carried and len(self._recent) > TIMELINES:  # the first ones show little
                advice = longer_period(self._log, carried, 1 + self._config.replicas)
                self._journal.warn_once(
                    "budget", self._recent[0], f"snapshots of {nbytes / 1e6:.1f} MB do not fit ({why}): {advice}"
                )
            return self._sizes.largest
        experts = [self._inventory.units[u].nbytes for u in self._expert_units if u is not None]
        if self._config.mode == "full":
            always, experts = self._inventory.nbytes, []
        votes, smaller = self._sizes.vote(carried, always, sum(experts) / max(len(self._expert_units), 1))
        if smaller:
            self._journal.warn_once("budget", self._recent[0], f"snapshots are made to fit ({smaller} here): {why}")
        return votes

    def _freeze(self) -> str:
        """Copy what cannot wait. Returns why that is not possible, empty if all is well."""
        state = {"adapter": self._adapter.host_state(), "session": self._book.state()}
        try:
            self._packer.freeze(encode(state))
        except (UnsupportedState, DeviceFault) as error:
            return str(error)
        return ""

    def _select(self, iteration: int, counts: list[int], note: StepNote) -> Contents | None:
        """What this snapshot holds; None: there must be none.

        Ranks that share experts choose the same ones, each its shards of them.
        """
        if self._rotation is not None:
            turn = self._rotation.turn(iteration)
            zero = frozenset(turn.logs) if note.skipped else self._packer.zero_logs(turn.logs)
            self._rotation.begin(iteration, turn, zero)
            if turn.is_gap:
                return None
            staged = (*self._sizing.always, *(u for u in turn.logs if u not in zero))
            return Contents(staged=staged, optional=turn.captures, zero=tuple(sorted(zero)))
        if self._config.mode == "full":
            return Contents(units=(*self._sizing.always, *self._inventory.of_kind(UnitKind.EXPERT)))
        chosen = self._book.choose(iteration, counts, self._sizes.now.experts)
        if excess := self._book.past_budget:
            self._journal.warn_once(excess.kind, iteration, excess.text)
        units = (unit for e in chosen if (unit := self._expert_units[e]) is not None)
        return Contents(units=(*self._sizing.always, *units))

    def _note_step(self, iteration: int) -> StepNote:
        """Mode ``exact``: enter the optimizer's step into the log."""
        if self._replayer is None:
            return StepNote()
        note = self._replayer.note_step(iteration)
        before = self._recent[0]
        if iteration != before + 1 and note.problem is None:
            return StepNote(problem=f"after iteration {before} came {iteration}; mode 'exact' needs every one of them")
        return note

    def _hash_state(self, iteration: int) -> None:
        """Now and then: a hash over the state of all ranks, by which runs can be compared."""
        every = self._config.state_hash_interval
        if not every or iteration % every:
            return
        ranks = self._fabric.gather(self._adapter.state_hash())
        whole = hashlib.blake2b("".join(ranks).encode(), digest_size=16).hexdigest()
        if self._fabric.rank == 0:
            self._journal.info(iteration, f"state hash {whole}")
        self._journal.event("state_hash", iteration=iteration, hash=whole)

    def _report_drops(self, pipeline: Pipeline, iteration: int) -> None:
        for reason, count in pipeline.counts.dropped.copy().items():  # other threads add to it
            if count:
                why = ": ".join(filter(None, (reason, pipeline.details.get(reason))))
                self._journal.warn_once(
                    f"drop-{reason}", iteration, f"a snapshot was dropped ({why}); training goes on, counts follow"
                )
        for reason in pipeline.counts.left_out.copy():
            self._journal.warn_once(
                f"left-out-{reason}",
                iteration,
                f"captures were left out ({reason}); the snapshot is whole without them",
            )
        if pipeline.broken:
            self._journal.warn_once(
                "channel", iteration, f"replication stopped, iteration {self._stable} stays: {pipeline.broken}"
            )

    # -- tokens ---------------------------------------------------------------------------------------

    def _find_counters(self, counters: Sequence[TokenCounter]) -> list[tuple[int, int, int]]:
        """For each local expert the unit, region and position of its token count."""
        found: list[tuple[int, int, int]] = []
        for counter in counters:
            unit = self._inventory.index[counter.unit]
            regions = self._inventory.units[unit].regions
            region = next(i for i, r in enumerate(regions) if r.tensor == counter.tensor)
            found.append((unit, region, counter.position))
        return found

    def _token_counts(self) -> list[int]:
        """Tokens processed by each local expert as of the last freeze."""
        return [int(self._packer.staged(u, r).view(np.int64)[position]) for u, r, position in self._counters]

    def _tokens_of_units(self, counts: list[int]) -> dict[int, int]:
        return {u: tokens for u, tokens in zip(self._expert_units, counts, strict=True) if u is not None}

    @property
    def _state_bytes(self) -> int:
        """Bytes of a full snapshot of this rank."""
        logs = self._inventory.of_kind(UnitKind.LOG)
        return self._inventory.nbytes - sum(self._inventory.units[u].nbytes for u in logs)

    def _count_losses(self, situation: Situation, plan: RecoveryPlan, state: Mapping[str, Any]) -> dict[str, int]:
        """After a recovery: the tokens that this rank had trained experts on since the captures they come from.

        By expert, those that lost any. Every rank counts its own tokens, also of experts whose state other ranks hold.
        """
        on_all_ranks(self._fabric, self._freeze_or_raise)
        now = self._token_counts()
        at = {
            spec.units[choice.unit][0]: choice.iteration
            for spec, choices in zip(situation.specs, plan.choices, strict=True)
            for choice in choices
        }
        losses = self._book.losses(state, at, plan.iteration, now)
        totals, lost, before = (self._sum(counts) for counts in (now, losses.lost, lost_until(state)))
        self._book.recover(state, losses, totals=totals, lost=lost, lost_before=before)
        counts = self._tokens is not None and self._tokens.counts_tokens()
        counted = zip(self._book.names, losses.lost, strict=True) if counts else ()
        return {name: tokens for name, tokens in counted if tokens}

    def _layers(self) -> dict[str, tuple[int, int]]:
        """Per MoE layer, tokens lost and routed, for sums over all ranks."""
        if self._tokens is None:
            return {}
        counted = self._tokens.counts_tokens()
        return self._book.layers(self._token_counts(), self._tokens.routed_tokens(), counted=counted)

    def _sum(self, counts: Sequence[int]) -> list[int]:
        """Added up over the ranks that share this rank's experts. Waits."""
        self._fabric.start_sum(counts)
        return self._fabric.finish_sum() or []


def _pack_threads(config: MoetionConfig, environment: Mapping[str, str]) -> int:
    if config.pack_threads:
        return config.pack_threads
    share = len(os.sched_getaffinity(0)) / int(environment.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, int(share / 2)))


def _process_start() -> float:
    """Unix time at which this process was started, to a clock tick; psutil's is up to a second early."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s
