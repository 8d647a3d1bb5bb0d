# SPDX-License-Identifier: Apache-2.0
"""From a run whose sizes are settled to one that trains: survey, then recover, load from disk, or begin anew."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import and_
from typing import Any

from megatron_moetion.config import flag_of
from megatron_moetion.errors import NothingRecoverable, StoreError, shared
from megatron_moetion.modes.mode import Losses
from megatron_moetion.observe.journal import Phases
from megatron_moetion.recover.disk import Disk, load_from_disk, newest_on_disk
from megatron_moetion.recover.exchange import Meeting, add
from megatron_moetion.recover.plan import NoPlan, RecoveryPlan
from megatron_moetion.recover.restore import verified
from megatron_moetion.recover.startup import Fetched, Findings, Startup
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.replicate.collective import on_all_ranks
from megatron_moetion.replicate.pipeline import SnapshotCounts
from megatron_moetion.replicate.placement import Placement
from megatron_moetion.replicate.survival import describe, describe_domains
from megatron_moetion.replicate.witness import Past
from megatron_moetion.run.health import ended_before, watch
from megatron_moetion.run.network import look_at_network, say_network
from megatron_moetion.run.running import Prepared, Running
from megatron_moetion.run.saving import Saving, agree_on_saving, make_releases
from megatron_moetion.select.book import share_lost
from megatron_moetion.snapshot.host_state import decode
from megatron_moetion.store.open import OpenArenas
from megatron_moetion.store.sheet import export_problem
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


@dataclass(frozen=True, kw_only=True)
class Total:
    """The cost of a recovery, over all ranks."""

    lost: Mapping[str, int]
    """Tokens by expert."""
    layers: Mapping[str, Sequence[int]]
    """By layer: tokens lost to all faults so far, and tokens routed."""
    local: int
    """Captures that were read on their owners' nodes."""
    fetched: int
    """Captures that came from others."""

    @classmethod
    def of(cls, fabric: Fabric, losses: Losses, local: int, fetched: int) -> Total:
        """From this rank's part. Collective."""
        layers = {layer: list(tokens) for layer, tokens in losses.layers.items()}
        mine = cls(lost=dict(losses.by_expert), layers=layers, local=local, fetched=fetched)
        return cls(**fabric.reduce(asdict(mine), _added))


def _added(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    lost, layers = dict(mine["lost"]), dict(mine["layers"])
    for name, tokens in theirs["lost"].items():
        lost[name] = lost.get(name, 0) + tokens
    for name, tokens in theirs["layers"].items():
        layers[name] = add(layers.get(name, (0, 0)), tokens)
    local, fetched = (mine[key] + theirs[key] for key in ("local", "fetched"))
    return {"lost": lost, "layers": layers, "local": local, "fetched": fetched}


def _first(mine: Any, theirs: Any) -> Any:
    return mine


class Starter:
    """Starts one rank of a run. Call ``start`` once."""

    def __init__(self, prepared: Prepared) -> None:
        self._run = prepared
        self._saving: Saving | None = None

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
            domain=self._run.domain,
            spec=self._run.mode.spec,
            pool=self._run.pool,
            pinning=self._run.pinning,
            choose=self._run.mode.choose,
            shared=self._run.mode.shared,
            retention=self._run.mode.retention,
            phases=phases,
            probe=self._run.probe,
            clock=self._run.host.clock,
            nonce=self._run.host.nonce(),
        )
        self._run.undo.callback(startup.close)
        findings = startup.survey(self._run.attempt)
        seen = self._run.network or look_at_network(
            self._run.fabric, findings.placement, self._run.host, self._run.config.timeout_s
        )
        phases.done("network")
        plan = findings.outcome
        if self._run.fabric.rank == 0 and (isinstance(plan, RecoveryPlan) or plan.began):
            self._run.witness.note_baseline()  # before a fault of this attempt can destroy it
        newest = newest_on_disk(self._run.fabric, disk, plan)
        source = self._without_fruitless(plan)
        in_memory = source.iteration if source is not None else None
        loaded = load_from_disk(self._run.fabric, disk, in_memory, newest, self._run.journal)
        if source is None and isinstance(plan, RecoveryPlan) and loaded is None:
            raise self._no_way_on(plan)
        self._saving = agree_on_saving(self._run)
        resumed = None
        if source is not None and (loaded is None or loaded <= source.iteration):
            running, resumed = self._recover(startup, findings, source, phases, newest)
        else:
            running = self._begin(startup, findings, loaded, phases)
        if self._run.fabric.rank == 0:
            self._run.witness.note_baseline()
        self._announce(running, findings)
        if seen is not None and self._run.fabric.rank == 0:
            say_network(self._run.journal, running.agreement.stable, seen, self._run.fabric.address.host)
        for stack in (self._run.undo, self._run.leaving):
            stack.callback(self._run.journal.unshare)
        self._run.journal.share()
        self._warn_of_export(running.agreement.stable)
        watch(self._run, running)
        return running, resumed

    def _without_fruitless(self, plan: RecoveryPlan | NoPlan) -> RecoveryPlan | None:
        """The plan, if there is one that has not been carried out in vain too often."""
        if not isinstance(plan, RecoveryPlan):
            return None
        if not 0 < self._run.config.max_fruitless_recoveries <= plan.fruitless:
            return plan
        if self._run.fabric.rank == 0:
            self._run.journal.warn(
                plan.iteration,
                f"the run has gone on from iteration {plan.iteration}, which memory holds, {plan.fruitless} times "
                f"without getting further: its state may be what makes training fail. It gives way to the checkpoint "
                f"on disk, however old that is",
            )
        return None

    def _no_way_on(self, plan: RecoveryPlan) -> NothingRecoverable:
        return shared(
            NothingRecoverable(
                f"the run has gone on from iteration {plan.iteration}, which memory holds, {plan.fruitless} times "
                f"without getting further, and there is no persistent checkpoint to fall back to (--load). "
                f"{flag_of('moetion_max_fruitless_recoveries')} 0 tries it again. To discard what memory holds, delete "
                f"{self._run.node.path.parent} on every node, or take another --moetion-run-id"
            )
        )

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
        running = self._begin_at(fetched.arenas, findings, plan.iteration, plan.epoch)
        on_all_ranks(self._run.fabric, self._run.freeze)
        peers = self._run.adapter.expert_peers() or (self._run.fabric.rank,)
        meeting = Meeting(self._run.fabric, "tokens of shared experts", peers, add, self._run.config.timeout_s)
        mode, packer = self._run.mode, self._run.packer
        mine = mode.recovered(plan.iteration, fetched.captured_at, state, packer, meeting.combine)
        is_local = fetched.order.is_from(findings.placement.node_of[self._run.fabric.rank])
        num_local, num_fetched = int(is_local.sum()), int((~is_local).sum())
        total = Total.of(self._run.fabric, mine, num_local, num_fetched)
        mode.resume(plan.iteration, total.lost)
        phases.done("resync")
        started_s = self._run.host.process_start()
        hang = ended_before(self._run.fabric, self._run.node)
        resumed = Resumed(
            iteration=plan.iteration,
            epoch=plan.epoch,
            local_units=num_local,
            fetched_units=num_fetched,
            seconds={**(hang.phases(started_s) if hang is not None else {}), **phases.seconds},
            lost_tokens=sum(total.lost.values()),
            plt=share_lost([total.layers]),
            replayed_steps=replayed,
        )
        self._say_recovered(resumed, findings, plan, on_disk, total)
        return running, resumed

    def _restore(self, fetched: Fetched, plan: RecoveryPlan, phases: Phases) -> tuple[int, Mapping[str, Any]]:
        """Verify every byte once more, then load it; the steps replayed, and the mode's part of the host state."""
        own = fetched.arenas.own
        records = verified(self._run.pool, own, fetched.order)
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

    def _say_recovered(
        self, resumed: Resumed, findings: Findings, plan: RecoveryPlan, on_disk: int, total: Total
    ) -> None:
        if self._run.fabric.rank == 0:
            self._say_vetoed(plan)
            spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in resumed.seconds.items())
            disk = f" (disk holds iteration {on_disk})" if on_disk >= 0 else ""
            again = f", recovery {plan.fruitless + 1} in a row from here" if plan.fruitless else ""
            replayed = f"{resumed.replayed_steps} optimizer steps replayed; " if resumed.replayed_steps else ""
            self._run.journal.info(
                plan.iteration,
                f"recovered, epoch {plan.epoch}{again}{disk}: "
                f"{total.local} units from their own nodes' memory, {total.fetched} from others; "
                f"{replayed}{resumed.lost_tokens} tokens lost, PLT {resumed.plt:.3%}; "
                f"{spent}",
            )
        self._run.journal.event(
            "recovered",
            iteration=plan.iteration,
            epoch=plan.epoch,
            fruitless=plan.fruitless,
            phases_s=dict(resumed.seconds),
            lost_tokens=resumed.lost_tokens,
            plt=resumed.plt,
            lost_tokens_by_expert=dict(total.lost),
            replayed_steps=resumed.replayed_steps,
            fetched_units=total.fetched,
            damaged=findings.summary.damaged,
            process_start=self._run.host.process_start(),
        )

    def _say_vetoed(self, plan: RecoveryPlan) -> None:
        if not plan.vetoed:
            return
        if plan.iteration in plan.vetoed:
            text = "training has called this iteration unhealthy, and memory holds none that is not"
        else:
            listed = ", ".join(str(i) for i in plan.vetoed)
            text = f"memory also holds what training has called unhealthy (iteration {listed}), and it is left out"
        self._run.journal.warn(plan.iteration, text)

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
        running = self._begin_at(arenas, findings, iteration, epoch=0)
        pipeline = running.pipeline
        on_all_ranks(self._run.fabric, self._run.freeze)
        pipeline.submit(iteration, self._run.mode.baseline(iteration, self._run.packer))
        pipeline.drain()
        if not self._run.fabric.reduce(iteration in pipeline.whole, and_):
            raise StoreError(
                "the first snapshot could not be made whole on every rank: "
                f"{pipeline.ended or dict(pipeline.counts.dropped)}"
            )
        pipeline.counts = SnapshotCounts()  # the baseline is no steady-state snapshot
        for arena in arenas.all():
            arena.edit(lambda page: {"stable": iteration})
        self._run.fabric.reduce("baseline", _first)  # nobody trains before all have it
        phases.done("baseline")
        self._run.journal.event("began", iteration=iteration, phases_s=dict(phases.seconds))
        return running

    def _begin_at(self, arenas: OpenArenas, findings: Findings, iteration: int, epoch: int) -> Running:
        releases = make_releases(self._run, self._saving, arenas.own, iteration, epoch)
        return self._run.begin(arenas, findings.placement, iteration, epoch, releases)

    def _copies(self) -> str:
        """What other nodes keep, for a person."""
        config = self._run.config
        if not config.coding.is_on:
            return f"{config.replicas} replica(s)"
        return (
            f"{config.coding.holders} other nodes keep a fragment each, any {config.coding.data} of them rebuild it "
            f"({config.replicas} nodes may be lost)"
        )

    def _lost(self, findings: Findings) -> str | None:
        """Why state that this run once had is gone; None where there never was any. Collective."""
        seen = self._run.witness.past() if self._run.fabric.rank == 0 else Past()
        past = Past(**self._run.fabric.reduce(asdict(seen), _first))
        # Arenas of which none has had a first baseline show that no step was ever taken.
        is_unknown = findings.restarted and not findings.summary.found and not past.is_known
        outcome = findings.outcome
        if isinstance(outcome, RecoveryPlan) or not (outcome.began or past.had_baseline or is_unknown):
            return None
        return outcome.reason

    def _warn_of_export(self, iteration: int) -> None:
        """Where the rescue by ``moetion export`` would be refused: now, and not when the job is dead."""
        guide = self._run.adapter.inventory().guide
        if guide and (problem := export_problem(json.loads(guide))) is not None:
            self._run.journal.warn_once(
                "export", iteration, f"moetion export could not turn this run's memory into a checkpoint: {problem}"
            )

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
            f"on this rank; {findings.placement.num_nodes} node(s), {self._copies()}; "
            f"store {self._run.node.path}",
        )
        if not self._run.is_found_again:
            journal.info(
                iteration,
                f"torchrun has made up the run id {self._run.node.path.parent.name}: another launch cannot go on from "
                "this run's memory, which is removed when the run ends well. --moetion-run-id NAME gives it a name",
            )
        if config.replicas:
            self._say_placement(iteration, findings.placement)
        else:
            why = "this run has one node" if findings.placement.num_nodes == 1 else "--moetion-replicas 0"
            text = f"{why}: snapshots survive killed processes, and nothing survives the loss of a node or its memory"
            journal.warn_once("replicas", iteration, text)

    def _say_placement(self, iteration: int, placement: Placement) -> None:
        self._run.journal.info(iteration, describe(placement))
        text, is_warning = describe_domains(placement)
        if is_warning:
            self._run.journal.warn_once("domains", iteration, text)
        elif text:
            self._run.journal.info(iteration, text)
