# SPDX-License-Identifier: Apache-2.0
"""A run as a value: all that a session works with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from megatron_moetion.coding import Coding
from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import DeviceFault
from megatron_moetion.framework import StateAdapter
from megatron_moetion.modes.mode import SnapshotMode
from megatron_moetion.observe.journal import Journal
from megatron_moetion.persist.saver import Releases
from megatron_moetion.recover.pinning import Pinning
from megatron_moetion.replicate.agreement import Agreement, combine_words
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.replicate.holder import Holder
from megatron_moetion.replicate.pipeline import Pipeline
from megatron_moetion.replicate.placement import Placement
from megatron_moetion.replicate.protection import Distance, Protection, limit_of
from megatron_moetion.replicate.replication import Replication
from megatron_moetion.replicate.witness import Witness
from megatron_moetion.run.host import Host, Probe
from megatron_moetion.run.network import Network
from megatron_moetion.run.summary import Summary
from megatron_moetion.run.upkeep import Upkeep
from megatron_moetion.schedule.pace import EvenPace, spread_share
from megatron_moetion.schedule.scheduler import Scheduler
from megatron_moetion.snapshot.host_state import encode
from megatron_moetion.snapshot.packer import HostPool, Packer
from megatron_moetion.store.lock import NodeLock
from megatron_moetion.store.node import NodeFolder, is_found_again
from megatron_moetion.store.open import OpenArenas
from megatron_moetion.store.vetoes import Vetoes
from megatron_moetion.units import UnitKind


def freeze(packer: Packer, adapter: StateAdapter, mode: SnapshotMode) -> None:
    """Copy what changes before the next optimizer step. Raises ``UnsupportedState`` or ``DeviceFault``.

    The keys of the document are part of the snapshot format.
    """
    packer.freeze(encode({"adapter": adapter.host_state(), "session": mode.host_state()}))


@dataclass(frozen=True, kw_only=True, eq=False)
class Running:
    """All that a session runs on, from its baseline or recovery on. ``undo`` closes it, in the right order."""

    mode: SnapshotMode
    adapter: StateAdapter
    fabric: Fabric
    scheduler: Scheduler
    packer: Packer
    arenas: OpenArenas
    pipeline: Pipeline
    agreement: Agreement
    vetoes: Vetoes
    releases: Releases
    protection: Protection
    upkeep: Upkeep
    summary: Summary
    journal: Journal
    probe: Probe
    node_of: tuple[int, ...]
    """Node of each rank, by rank."""
    interval: int
    """Iterations between snapshots."""
    coding: Coding
    """What other nodes keep of snapshots."""
    max_stall_s: float
    timeout_s: float
    save_limit_s: float
    undo: ExitStack
    leaving: ExitStack
    """Stops the threads without waiting for other ranks."""
    forget: Callable[[], None]
    """For the end of a run whose state no other launch could find: has it removed when this process ends."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """One rank of a run whose sizes are settled. Made by ``prepare``; ``close`` it where no session takes it over."""

    config: MoetionConfig
    adapter: StateAdapter
    fabric: Fabric
    scheduler: Scheduler
    witness: Witness
    host: Host
    journal: Journal
    probe: Probe
    node: NodeFolder
    domain: str
    """The node's failure domain; see ``own_domain``."""
    lock: NodeLock
    attempt: int
    mode: SnapshotMode
    pool: HostPool
    packer: Packer
    pinning: Pinning
    network: Network | None
    """What was seen of it before the start; None: nothing yet."""
    undo: ExitStack
    """Closes all of it, in the right order."""
    leaving: ExitStack
    """Stops the threads without waiting for other ranks."""

    def close(self) -> None:
        """Close everything, after a start that failed too. While an exception is being handled: ``abandon``."""
        if sys.exc_info()[0] is not None:
            self.abandon()
        else:
            self.undo.close()

    def abandon(self) -> None:
        """Stop without waiting for other ranks, in a process that is about to end.

        Memory that the threads may still use stays until the process has ended.
        """
        self.undo.pop_all()
        self.leaving.close()
        if not self.node.arenas():  # else the lock stays too
            self.lock.close()
            self.node.leave()
        self.fabric.abandon()

    @property
    def state_bytes(self) -> int:
        """Bytes of a full snapshot of this rank."""
        return sum(u.nbytes for u in self.mode.inventory.units if u.kind is not UnitKind.LOG)

    def freeze(self) -> None:
        """Copy the state that changes before the next optimizer step, and wait until it is there.

        Raises ``UnsupportedState``, and ``DeviceFault`` where the device fails or is late: a start goes on from counts
        that are in the copy.
        """
        freeze(self.packer, self.adapter, self.mode)
        if not self.packer.settle():
            raise DeviceFault("the device is late with the first copy of state that changes between steps")

    def begin(
        self, arenas: OpenArenas, placement: Placement, iteration: int, epoch: int, releases: Releases
    ) -> Running:
        """Start the threads of a run whose stable iteration is ``iteration``; takes over arenas and releases."""
        config, rank = self.config, self.fabric.rank
        pipeline = Pipeline(
            packer=self.packer,
            inventory=self.mode.inventory,
            arenas=arenas,
            replication=self._replication(arenas, placement) if config.replicas else None,
            epoch=epoch,
            probe=self.probe,
            packed=self.scheduler.packed,
            pace=EvenPace(self.host.clock, self.host.threads.event(), spread_share(config.replicas)),
            clock=self.host.clock,
            threads=self.host.threads,
        )
        reducer = self.fabric.reducer("agreement", range(self.fabric.world_size), combine_words)
        for close in (arenas.close, self.packer.close, pipeline.close, releases.close):
            self.undo.callback(close)
        self.leaving.callback(pipeline.abandon, 0.0)
        self.leaving.callback(releases.abandon)
        protection = Protection(
            journal=self.journal,
            rank=rank,
            attempt=self.attempt,
            started=iteration,
            interval=config.interval,
            distance=Distance(limit_of(config.max_unprotected_iterations, self.host.environment)),
        )
        upkeep = Upkeep(
            node=self.node,
            lock=self.lock,
            arenas=arenas,
            packer=self.packer,
            pipeline=pipeline,
            journal=self.journal,
            rank=rank,
            attempt=self.attempt,
        )
        summary = Summary(
            fabric=self.fabric,
            journal=self.journal,
            state_bytes=self.state_bytes,
            hash_interval=config.state_hash_interval,
        )
        return Running(
            mode=self.mode,
            adapter=self.adapter,
            fabric=self.fabric,
            scheduler=self.scheduler,
            packer=self.packer,
            arenas=arenas,
            pipeline=pipeline,
            agreement=Agreement(reducer, iteration),
            releases=releases,
            vetoes=Vetoes(self.node.path, rank, arenas.own.page.lineage, epoch),
            protection=protection,
            upkeep=upkeep,
            summary=summary,
            journal=self.journal,
            probe=self.probe,
            node_of=placement.node_of,
            interval=config.interval,
            coding=config.coding,
            max_stall_s=config.max_stall_ms / 1000,
            timeout_s=config.timeout_s,
            save_limit_s=config.save_limit_s,
            undo=self.undo,
            leaving=self.leaving,
            forget=self._forget,
        )

    @property
    def is_found_again(self) -> bool:
        """Whether another launch would find the state of this run, by its name."""
        return is_found_again(self.config, self.host.environment)

    def _forget(self) -> None:
        """Not at once: what training still does may fail, and its supervisor restart the job."""
        if self.node.position == 0 and not self.is_found_again:
            self.host.at_exit(self.node.remove)

    def _replication(self, arenas: OpenArenas, placement: Placement) -> Replication:
        """This rank's links to its holders, and what serves those that it is a holder of."""
        holder = Holder(
            mesh=self.fabric.mesh,
            arenas=arenas,
            node=self.node,
            pool=self.pool,
            probe=self.probe,
            threads=self.host.threads,
            timeout_s=self.config.timeout_s,
        )
        return Replication(
            mesh=self.fabric.mesh,
            own=arenas.own,
            holder=holder,
            placement=placement,
            pool=self.pool,
            probe=self.probe,
            pacing=self.scheduler,
            patience=self.config.holder_patience,
            timeout_s=self.config.timeout_s,
            clock=self.host.clock,
            threads=self.host.threads,
            timing=self.host.links,
        )
