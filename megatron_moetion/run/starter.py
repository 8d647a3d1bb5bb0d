# SPDX-License-Identifier: Apache-2.0
"""From a run whose sizes are settled to one that trains: survey, then recover, load from disk, or begin anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_moetion.errors import NothingRecoverable, StoreError, shared
from megatron_moetion.observe.journal import Phases
from megatron_moetion.recover.disk import Disk, load_from_disk, newest_on_disk
from megatron_moetion.recover.plan import RecoveryPlan
from megatron_moetion.recover.restore import verified
from megatron_moetion.recover.startup import Fetched, Findings, Startup
from megatron_moetion.replicate.collective import on_all_ranks
from megatron_moetion.replicate.pipeline import SnapshotCounts
from megatron_moetion.replicate.witness import Past
from megatron_moetion.run.health import ended_before, watch
from megatron_moetion.run.running import Prepared, Running
from megatron_moetion.select.book import share_lost
from megatron_moetion.snapshot.host_state import decode
from megatron_moetion.units import UnitKind


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """The result of a recovery. ``lost_tokens`` and ``plt`` count over all ranks; both are 0 except in mode
    ``popularity``."""

    iteration: int
    epoch: int
    local_units: int
    fetched_units: int
    seconds: Mapping[str, float]
    lost_tokens: int
    plt: float
    replayed_steps: int
    """Optimizer steps of this rank that were replayed; 0 except in mode ``exact``."""


class Starter:
    """Starts one rank of a run. Call ``start`` once."""

    def __init__(self, prepared: Prepared) -> None:
        self._run = prepared

    def start(self, disk: Disk | None = None) -> tuple[Running, Resumed | None]:
        """Recover the newest state from memory or disk, or begin; then a baseline is stable. Collective.

        The second result is None except after a recovery from memory. Raises ``NothingRecoverable`` rather than start
        from zero by accident; ``ConfigError`` and ``IdentityMismatch`` where settings or arenas do not match;
        ``StoreError``, ``CorruptArena``, ``UnsupportedState`` and ``DeviceFault`` where state cannot be read or held;
        ``ChannelError`` on a lost peer. An error is the same on all ranks where its ``shared`` says so.
        """
        disk = disk if disk is not None else Disk()
        phases = Phases(self._run.host.clock)
        startup = Startup(
            config=self._run.config,
            fabric=self._run.fabric,
            node=self._run.node,
            spec=self._run.mode.spec,
            pool=self._run.pool,
            pinning=self._run.pinning,
            choose=self._run.mode.choose,
            retention=self._run.mode.retention,
            phases=phases,
            probe=self._run.probe,
            clock=self._run.host.clock,
            nonce=self._run.host.nonce(),
        )
        self._run.undo.callback(startup.close)
        findings = startup.survey(self._run.attempt)
        plan = findings.outcome
        if self._run.fabric.rank == 0 and (isinstance(plan, RecoveryPlan) or plan.began):
            self._run.witness.note_baseline()  # before a fault of this attempt can destroy it
        newest = newest_on_disk(self._run.fabric, disk, plan)
        loaded = load_from_disk(self._run.fabric, disk, plan, newest, self._run.journal)
        resumed = None
        if isinstance(plan, RecoveryPlan) and (loaded is None or loaded <= plan.iteration):
            running, resumed = self._recover(startup, findings, plan, phases, newest)
        else:
            running = self._begin(startup, findings, loaded, phases)
        if self._run.fabric.rank == 0:
            self._run.witness.note_baseline()
        self._announce(running, findings)
        for stack in (self._run.undo, self._run.leaving):
            stack.callback(self._run.journal.unshare)
        self._run.journal.share()
        watch(self._run, running)
        return running, resumed

    # -- recovering -----------------------------------------------------------------------------------

    def _recover(
        self, startup: Startup, findings: Findings, plan: RecoveryPlan, phases: Phases, on_disk: int
    ) -> tuple[Running, Resumed]:
        fetched = startup.fetch(findings, plan)
        self._run.probe("restore", -1)
        replayed, state = on_all_ranks(self._run.fabric, lambda: self._restore(fetched, plan, phases))
        startup.commit(fetched)
        self._run.probe("restored", -1)
        self._run.adapter.resync()
        running = self._run.begin(fetched.arenas, findings.placement, plan.iteration, plan.epoch)
        on_all_ranks(self._run.fabric, self._run.freeze)
        mine = self._run.mode.recovered(plan, findings.specs, state, self._run.packer, self._add_up)
        everyone = self._run.fabric.gather({"lost": mine.by_expert, "layers": mine.layers})
        lost: dict[str, int] = {}
        for name, tokens in (item for m in everyone for item in m["lost"].items()):
            lost[name] = lost.get(name, 0) + tokens
        self._run.mode.resume(plan.iteration, lost)
        phases.done("resync")
        started_s = self._run.host.process_start()
        hang = ended_before(self._run.fabric, self._run.node)
        choices = plan.choices[self._run.fabric.rank]
        home = findings.placement.node_of[self._run.fabric.rank]
        resumed = Resumed(
            iteration=plan.iteration,
            epoch=plan.epoch,
            local_units=sum(c.node == home for c in choices),
            fetched_units=sum(c.node != home for c in choices),
            seconds={**(hang.phases(started_s) if hang is not None else {}), **phases.seconds},
            lost_tokens=sum(lost.values()),
            plt=share_lost([m["layers"] for m in everyone]),
            replayed_steps=replayed,
        )
        self._say_recovered(resumed, findings, plan, on_disk, lost)
        return running, resumed

    def _restore(self, fetched: Fetched, plan: RecoveryPlan, phases: Phases) -> tuple[int, Mapping[str, Any]]:
        """Verify every byte once more, then load it; the steps replayed, and the mode's part of the host state."""
        own = fetched.arenas.own
        records = verified(self._run.pool, own, plan.choices[self._run.fabric.rank])
        (host_unit,) = self._run.mode.inventory.of_kind(UnitKind.HOST)
        slot = next(r.slot for r in records if r.unit == host_unit)
        phases.done("verify")
        self._run.pinning.finish(own.memory)
        phases.done("pin")
        state = decode(bytes(own.payload(slot)))
        replayed = self._run.mode.write_back(self._run.packer, own, records, state["adapter"], plan.iteration)
        self._run.adapter.load_host_state(state["adapter"])
        self._run.adapter.copy_to_model()  # while an error is still heard by all: what follows is in training's groups
        phases.done("restore")
        return replayed, state["session"]

    def _add_up(self, counts: Sequence[int]) -> list[int]:
        self._run.fabric.start_sum(counts)
        return self._run.fabric.finish_sum() or []

    def _say_recovered(
        self, resumed: Resumed, findings: Findings, plan: RecoveryPlan, on_disk: int, lost: Mapping[str, int]
    ) -> None:
        if self._run.fabric.rank == 0:
            spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in resumed.seconds.items())
            units = sum(len(c) for c in plan.choices)
            disk = f" (disk holds iteration {on_disk})" if on_disk >= 0 else ""
            replayed = f"{resumed.replayed_steps} optimizer steps replayed; " if resumed.replayed_steps else ""
            self._run.journal.info(
                plan.iteration,
                f"recovered, epoch {plan.epoch}{disk}: "
                f"{units - len(plan.fetches)} units from their own nodes' memory, {len(plan.fetches)} from others; "
                f"{replayed}{resumed.lost_tokens} tokens lost, PLT {resumed.plt:.3%}; "
                f"{spent}",
            )
        self._run.journal.event(
            "recovered",
            iteration=plan.iteration,
            epoch=plan.epoch,
            phases_s=dict(resumed.seconds),
            lost_tokens=resumed.lost_tokens,
            plt=resumed.plt,
            lost_tokens_by_expert=dict(lost),
            replayed_steps=resumed.replayed_steps,
            fetched_units=len(plan.fetches),
            damaged=sum(r.damaged for r in findings.reports),
            process_start=self._run.host.process_start(),
        )

    # -- beginning ------------------------------------------------------------------------------------

    def _begin(self, startup: Startup, findings: Findings, loaded: int | None, phases: Phases) -> Running:
        """Begin a new lineage, from what was loaded from disk (its iteration) or from the initial state (None)."""
        lost = self._lost(findings)
        if lost is not None and loaded is None and not self._run.config.allow_fresh:
            raise shared(
                NothingRecoverable(
                    f"nothing can be recovered: {lost}. There is no persistent checkpoint to fall back to "
                    f"(--load); more --moetion-replicas survive more lost nodes. --moetion-allow-fresh starts from "
                    f"iteration 0"
                )
            )
        iteration = loaded or 0
        phases.done("load")
        arenas = startup.begin(findings)
        phases.done("arenas")
        on_all_ranks(self._run.fabric, lambda: self._run.pinning.finish(arenas.own.memory))
        phases.done("pin")
        if lost is not None:
            self._run.journal.warn_once("fresh", iteration, f"memory holds nothing to recover ({lost}); starting here")
        running = self._run.begin(arenas, findings.placement, iteration, epoch=0)
        pipeline = running.pipeline
        on_all_ranks(self._run.fabric, self._run.freeze)
        pipeline.submit(iteration, self._run.mode.baseline(iteration, self._run.packer))
        pipeline.drain()
        if not all(self._run.fabric.gather(iteration in pipeline.whole)):
            raise StoreError(
                "the first snapshot could not be made whole on every rank: "
                f"{pipeline.ended or dict(pipeline.counts.dropped)}"
            )
        pipeline.counts = SnapshotCounts()  # the baseline is no steady-state snapshot
        for arena in arenas.all():
            arena.edit(lambda page: {"stable": iteration})
        self._run.fabric.gather("baseline")
        phases.done("baseline")
        self._run.journal.event("began", iteration=iteration, phases_s=dict(phases.seconds))
        return running

    def _lost(self, findings: Findings) -> str | None:
        """Why state that this run once had is gone; None where there never was any. Collective."""
        seen = self._run.witness.past() if self._run.fabric.rank == 0 else Past()
        past = Past(**self._run.fabric.gather(asdict(seen))[0])
        # Arenas of which none has had a first baseline show that no step was ever taken.
        is_unknown = findings.restarted and not findings.reports and not past.is_known
        outcome = findings.outcome
        if isinstance(outcome, RecoveryPlan) or not (outcome.began or past.had_baseline or is_unknown):
            return None
        return outcome.reason

    def _announce(self, running: Running, findings: Findings) -> None:
        config, mode, journal, packer = self._run.config, self._run.mode, self._run.journal, self._run.packer
        iteration = running.agreement.stable
        if not packer.is_direct:
            journal.warn_once("pinned", iteration, packer.note)
        if self._run.fabric.rank:
            return
        memory = running.arenas.own.population
        if memory.problem is not None:
            journal.warn_once("numa", iteration, memory.problem)
        pin_s = self._run.pinning.seconds if packer.is_direct and packer.note else None
        pinned = f", pinned {pin_s:.1f} s" if pin_s is not None else ""
        journal.info(iteration, f"arena {memory.nbytes / 2**30:.1f} GiB: {memory}{pinned}")
        journal.event("host_memory", pin_s=pin_s, **asdict(memory))
        if packer.is_direct and packer.note:
            journal.info(iteration, packer.note)
        if mode.note is not None:
            journal.info(iteration, mode.note)
        journal.info(
            iteration,
            f"mode {mode.name}, {running.scheduler.schedule}: a snapshot every {config.interval} iteration(s)"
            f"{mode.describe()}; state {self._run.state_bytes / 2**20:.1f} MiB, "
            f"arenas {sum(a.nbytes for a in running.arenas.all()) / 2**20:.1f} MiB "
            f"on this rank; {findings.placement.num_nodes} node(s), {config.replicas} replica(s); "
            f"store {self._run.node.path}",
        )
        if not config.replicas:
            journal.warn_once("replicas", iteration, "--moetion-replicas 0: nothing survives the loss of a node")
