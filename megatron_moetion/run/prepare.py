# SPDX-License-Identifier: Apache-2.0
"""The first steps of a run: claim the node, settle sizes with all ranks."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_moetion.config import MoetionConfig
from megatron_moetion.framework import StateAdapter
from megatron_moetion.modes.mode import Blueprint, Site
from megatron_moetion.observe.journal import Journal
from megatron_moetion.recover.pinning import Pinning
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.replicate.collective import on_all_ranks, require_same
from megatron_moetion.replicate.domains import own_domain
from megatron_moetion.replicate.speed import serve_probes
from megatron_moetion.replicate.witness import NO_WITNESS, Witness
from megatron_moetion.run.host import Host, Probe
from megatron_moetion.run.network import Network
from megatron_moetion.run.running import Prepared
from megatron_moetion.schedule.scheduler import Scheduler
from megatron_moetion.snapshot.codec import require_codec
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.lock import LOCK_WAIT_S, NodeLock
from megatron_moetion.store.node import NodeFolder, restart_count, run_id_of, write_pid
from megatron_moetion.store.spec import ArenaIdentity

_LOCK_SHARE = 0.8
"""Share of the ranks' timeout for each other that a rank waits for the lock on its folder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Claimed:
    """This rank's place on its node, which no other process uses. ``close`` it, or give it to ``settle``."""

    config: MoetionConfig
    """With ``replicas`` as they are, and ``mode`` as it was given."""
    fabric: Fabric
    witness: Witness
    host: Host
    run_id: str
    attempt: int
    local_ranks: int
    """Ranks of this machine."""
    journal: Journal
    probe: Probe
    node: NodeFolder
    domain: str
    """The node's failure domain; see ``own_domain``."""
    lock: NodeLock
    undo: ExitStack
    """Closes all of it, in the right order."""

    def close(self) -> None:
        """Close everything. The folder goes too, where it holds no arena and no other rank uses it."""
        self.undo.close()

    def abandon(self) -> None:
        """The same without waiting for other ranks, in a process that is about to end."""
        self.undo.pop_all()
        self.lock.close()
        self.node.leave()
        self.fabric.abandon()


def prepare(
    *,
    config: MoetionConfig,
    adapter: StateAdapter,
    blueprint: Blueprint,
    fabric: Fabric,
    topology: str,
    scheduler: Scheduler,
    witness: Witness = NO_WITNESS,
    host: Host | None = None,
) -> Prepared:
    """``claim``, then ``settle``."""
    claimed = claim(config=config, fabric=fabric, witness=witness, host=host)
    return settle(claimed, config, adapter=adapter, blueprint=blueprint, topology=topology, scheduler=scheduler)


def claim(*, config: MoetionConfig, fabric: Fabric, witness: Witness = NO_WITNESS, host: Host | None = None) -> Claimed:
    """Claim this rank's node for the run. Collective; takes over ``fabric``.

    Raises ``ConfigError`` for settings that cannot be kept, ``StoreError`` where the store cannot be written or another
    process uses it, ``ChannelError`` on a lost peer: the same on all ranks where its ``shared`` says so. Then nothing
    stays open.
    """
    host = host if host is not None else Host()
    rank = fabric.rank
    attempt = restart_count(host.environment)
    with ExitStack() as undo:
        undo.callback(fabric.close)
        serve_probes(fabric.mesh)

        def open_folder() -> tuple[str, Probe, Journal, NodeFolder, str]:
            if config.coding_nodes:
                require_codec()
            run_id = run_id_of(config, host.environment)
            report = Path(config.report) if config.report and rank == 0 else None
            probe, journal = host.make_probe(config, attempt, rank), Journal(rank, attempt, report, host.clock)
            node = host.open_node(config, run_id, host.environment, fabric.world_size, host.clock)
            undo.callback(node.leave)  # also where another rank has none
            return run_id, probe, journal, node, own_domain(config.failure_domains, host.environment, host.name)

        run_id, probe, journal, node, domain = on_all_ranks(fabric, open_folder)
        replicas = settled_replicas(config.replicas, fabric, node.key)
        lock = _take_lock(fabric, node, config, journal, undo)
        on_all_ranks(fabric, lambda: write_pid(node, rank, attempt))
        return Claimed(
            config=replace(config, replicas=replicas),
            fabric=fabric,
            witness=witness,
            host=host,
            run_id=run_id,
            attempt=attempt,
            local_ranks=int(host.environment.get("LOCAL_WORLD_SIZE", "1")),
            journal=journal,
            probe=probe,
            node=node,
            domain=domain,
            lock=lock,
            undo=undo.pop_all(),
        )


def settle(
    claimed: Claimed,
    config: MoetionConfig,
    *,
    adapter: StateAdapter,
    blueprint: Blueprint,
    topology: str,
    scheduler: Scheduler,
    network: Network | None = None,
) -> Prepared:
    """Settle sizes with all ranks, in the mode of ``config``. Collective; takes over ``claimed``.

    ``config`` is the one of ``claimed``, whose mode may have been chosen since. ``network``: what was seen of it
    meanwhile. Raises as ``claim``, and ``UnsupportedState`` and ``DeviceFault`` for state that cannot be packed. Then
    nothing stays open.
    """
    fabric, host, node, rank = claimed.fabric, claimed.host, claimed.node, claimed.fabric.rank
    config = replace(config, replicas=claimed.config.replicas)
    with claimed.undo.pop_all() as undo:
        site = Site(
            config=config,
            identity=ArenaIdentity(
                run_id=claimed.run_id,
                owner=rank,
                world_size=fabric.world_size,
                topology=topology,
                layout="",
                mode=config.mode,
                chunk_bytes=config.chunk_bytes,
            ),
            inventory=adapter.inventory(),
            node=node,
            local_ranks=claimed.local_ranks,
            fabric=fabric,
            expert_peers=adapter.expert_peers() or (rank,),
            journal=claimed.journal,
        )
        require_same(fabric, {"mode": config.mode})  # what follows is a mode's own, and some of it collective
        facts = fabric.gather(on_all_ranks(fabric, lambda: blueprint.facts(site)))
        mode = on_all_ranks(fabric, lambda: blueprint.build(site, facts))
        pool = HostPool(_pack_threads(config, site.local_ranks))
        packer = on_all_ranks(fabric, lambda: host.make_packer(mode.inventory, config, pool, rank))
        undo.callback(packer.close)
        pinning = Pinning(packer, host.threads, host.clock)
        leaving = ExitStack()
        leaving.callback(pinning.abandon)
        memory = host.host_memory(packer.pci_bus_id, _populating_threads(site.local_ranks))
        return Prepared(
            config=config,
            adapter=adapter,
            fabric=fabric,
            scheduler=scheduler,
            witness=claimed.witness,
            host=host,
            journal=claimed.journal,
            probe=claimed.probe,
            node=replace(node, memory=memory),
            domain=claimed.domain,
            lock=claimed.lock,
            attempt=claimed.attempt,
            mode=mode,
            pool=pool,
            packer=packer,
            pinning=pinning,
            network=network,
            undo=undo.pop_all(),
            leaving=leaving,
        )


def _take_lock(fabric: Fabric, node: NodeFolder, config: MoetionConfig, journal: Journal, undo: ExitStack) -> NodeLock:
    """Make this run the only one in the folders of its nodes, until ``undo``. Collective.

    Rank 0 goes first: of two jobs that start under one name at one moment, one gets all locks and the other none.
    """
    wait_s = min(LOCK_WAIT_S, _LOCK_SHARE * config.timeout_s)

    def lock() -> NodeLock:
        taken = node.lock(wait_s, partial(journal.info, -1))
        undo.callback(taken.close)  # also where another rank gets none
        return taken

    first = on_all_ranks(fabric, lambda: lock() if fabric.rank == 0 else None)
    return on_all_ranks(fabric, lambda: first or lock())


def settled_replicas(given: int, fabric: Fabric, node_key: str) -> int:
    """As given, else 1 where ranks are on several nodes and 0 where all are on one. Collective."""
    is_one_node = fabric.reduce(node_key, lambda mine, theirs: mine if mine == theirs else "") != ""
    return given if given >= 0 else int(not is_one_node)


def _pack_threads(config: MoetionConfig, local_ranks: int) -> int:
    """Threads that pack: as set, else half of this rank's share of the cores, 1 to 8."""
    if config.pack_threads:
        return config.pack_threads
    return max(1, min(8, _share_of_cores(local_ranks) // 2))


def _populating_threads(local_ranks: int) -> int:
    """Threads that populate arenas: this rank's share of the cores, 1 to 16, since nobody trains meanwhile."""
    return max(1, min(16, _share_of_cores(local_ranks)))


def _share_of_cores(local_ranks: int) -> int:
    return len(os.sched_getaffinity(0)) // local_ranks
