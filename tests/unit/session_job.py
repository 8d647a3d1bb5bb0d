# SPDX-License-Identifier: Apache-2.0
"""A whole job of a few ranks in one process, one a node, over the loopback."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ends import AT_END
from fabrics import Faults, loopback_fabrics
from support import ToyState, blueprint, make_device, on_device, scheduler, together

from megatron_moetion.config import MoetionConfig
from megatron_moetion.recover.disk import Disk
from megatron_moetion.replicate.witness import NO_WITNESS, Witness
from megatron_moetion.run.host import Host
from megatron_moetion.run.prepare import prepare
from megatron_moetion.run.running import Prepared, Running
from megatron_moetion.run.starter import Resumed, Starter
from megatron_moetion.session import Session
from megatron_moetion.snapshot.packer import HostPool, Packer
from megatron_moetion.units import Inventory


class Adapter(ToyState):
    """A toy state that knows whose it is."""

    rank = 0
    ranks = 2

    def expert_peers(self) -> tuple[int, ...]:
        return tuple(range(self.ranks))


class OnDevice(Adapter):
    """An adapter whose state lies in the memory of the model of a device."""

    def inventory(self) -> Inventory:
        return on_device(super().inventory())


@dataclass
class Disturbance:
    """What goes wrong on one rank; read by its packer as it is used."""

    pack: Callable[[], bool] | None = None
    """Before units are packed: False cancels, an error is the device's."""
    freeze: Callable[[], object] | None = None
    """Before state is frozen."""


class TroubledPacker(Packer):
    """A packer that is disturbed."""

    disturbance = Disturbance()

    def freeze(self, host_state: bytes) -> None:
        if self.disturbance.freeze is not None:
            self.disturbance.freeze()
        super().freeze(host_state)

    def pack(self, targets: Any, between: Any, *rest: Any) -> list[int] | None:
        if self.disturbance.pack is not None and not self.disturbance.pack():
            return None
        return super().pack(targets, between, *rest)


class Job:
    """One attempt of a job: ranks, one a node, that train in step. ``device``: by rank, options of ``make_device``.

    ``drain_s``: how long a rank waits for the others after each step; None: as for anything.
    """

    def __init__(
        self,
        folder: Path,
        attempt: int = 0,
        elements: int = 1500,
        witness: Witness = NO_WITNESS,
        max_restarts: int = 0,
        elastic_id: str = "none",
        host: Mapping[str, Any] | None = None,
        state: type[ToyState] | None = None,
        device: Mapping[int, Mapping[str, Any]] | None = None,
        drain_s: float | None = None,
        ranks: int = 2,
        **settings: object,
    ) -> None:
        self.network = Faults()
        self.states = [(state or Adapter)(num_experts=4, seed=r, elements=elements) for r in range(ranks)]
        for rank, each in enumerate(self.states):
            if isinstance(each, Adapter):
                each.rank, each.ranks = rank, ranks
        fields = {"store": str(folder), "run_id": "job", "ranks_per_node": 1, "pack_threads": 1, "timeout_s": 10,
                  "chunk_bytes": 4096, "mode": "full", **settings}  # fmt: skip
        self.witness = witness
        self.max_restarts = max_restarts
        self.elastic_id = elastic_id
        self.config = MoetionConfig(**fields)  # type: ignore[arg-type]
        self.disturbances = [Disturbance() for _ in range(ranks)]
        self.fabrics = loopback_fabrics(ranks, timeout_s=self.config.timeout_s, cuts=self.network)
        self._host = host or {}
        self._device = device or {}
        self._drain_s = drain_s if drain_s is not None else float(self.config.timeout_s)
        self.sessions: list[Session] = []
        self.iteration = 0
        self.prepared: list[Prepared] = []
        AT_END.callback(self._end)
        self.prepared = together(*(lambda r=r: self._prepare(r, attempt) for r in range(ranks)))  # type: ignore[misc]

    def _prepare(self, rank: int, attempt: int) -> Prepared:
        ranks = len(self.states)
        environment = {
            "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "TORCHELASTIC_MAX_RESTARTS": str(self.max_restarts), "TORCHELASTIC_RUN_ID": self.elastic_id,
        }  # fmt: skip
        return prepare(
            config=self.config,
            adapter=self.states[rank],
            blueprint=blueprint(self.config.mode, self.states[rank]),
            fabric=self.fabrics[rank],
            topology="toy",
            scheduler=scheduler(),
            witness=self.witness,
            host=Host(environment=environment, make_packer=self._make_packer, link_probe_bytes=1 << 16, **self._host),
        )

    def _make_packer(self, inventory: Inventory, config: MoetionConfig, pool: HostPool, rank: int) -> Packer:
        device = make_device(inventory, config.chunk_bytes, rank=rank, **self._device.get(rank, {}))
        packer = TroubledPacker(inventory, config.chunk_bytes, pool, device)
        packer.disturbance = self.disturbances[rank]
        return packer

    def start_rank(self, rank: int, disk: Disk | None = None) -> tuple[Running, Resumed | None]:
        """One rank's part in a start."""
        return Starter(self.prepared[rank]).start(disk)

    def start(
        self, load: Callable[[], int | None] | None = None, newest: Callable[[], int | None] | None = None
    ) -> list[Resumed | None]:
        disk = Disk(load=load, newest=newest)
        found = together(*(lambda r=r: self.start_rank(r, disk) for r in range(len(self.prepared))))  # type: ignore[misc]
        self.sessions = [Session(replace(running, timeout_s=self._drain_s)) for running, _ in found]
        self.iteration = self.sessions[0].stable_iteration
        return [resumed for _, resumed in found]

    def train(self, steps: int, unhealthy: Collection[int] = ()) -> list[bytes]:
        """The ranks' state after the last step. ``unhealthy``: ranks that do not call these steps healthy."""
        for _ in range(steps):
            self.iteration += 1

            def step(rank: int, iteration: int = self.iteration) -> None:
                session, state = self.sessions[rank], self.states[rank]
                session.before_optimizer_step()
                state.step(iteration)
                session.on_step_end(iteration, healthy=rank not in unhealthy)
                session.drain()  # so that what is whole does not depend on the machine's load

            together(*(lambda r=r: step(r) for r in range(len(self.sessions))))  # type: ignore[misc]
        return [s.image() for s in self.states]

    def crash(self) -> None:
        """The processes end; what they wrote stays."""
        for session in self.sessions:
            session.running.leaving.close()
            session.running.pipeline.close()
            session.running.arenas.close()
        self.fabrics.close()

    def _end(self) -> None:
        """Let go of what is still there, also after a start that failed. Does no harm after ``crash``."""
        self.fabrics.close()
        for session in self.sessions:
            session.abandon()
        for prepared in self.prepared:
            prepared.leaving.close()
            prepared.undo.close()

    def drop(self, rank: int, iterations: set[int]) -> None:
        """That rank's packs are late at these iterations."""
        self.disturbances[rank].pack = lambda: self.iteration not in iterations
