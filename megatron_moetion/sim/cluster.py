# SPDX-License-Identifier: Apache-2.0
"""A simulated cluster that trains: nodes, a launcher that restarts the job as ``torchrun`` does, and ranks.

Each rank runs the production code: fabric, ``prepare``, ``Starter``, ``Session``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import distributed as dist

from megatron_moetion.config import MoetionConfig, resolved_schedule
from megatron_moetion.errors import MoetionError
from megatron_moetion.modes.exact import ExactBlueprint
from megatron_moetion.modes.full import FullBlueprint
from megatron_moetion.modes.mode import Blueprint
from megatron_moetion.modes.popularity import PopularityBlueprint
from megatron_moetion.recover.disk import Disk
from megatron_moetion.replicate.connection import NO_CUTS, Cuts
from megatron_moetion.replicate.fabric import SocketFabric
from megatron_moetion.replicate.link import Timing
from megatron_moetion.replicate.witness import StoreWitness
from megatron_moetion.run.host import Host
from megatron_moetion.run.prepare import prepare
from megatron_moetion.run.running import Running
from megatron_moetion.run.starter import Resumed, Starter
from megatron_moetion.schedule.recorder import HostStopwatch
from megatron_moetion.schedule.scheduler import Scheduler, no_drawing
from megatron_moetion.session import Session
from megatron_moetion.sim.device import NAME as DEVICE
from megatron_moetion.sim.device import Device, LazyPool
from megatron_moetion.sim.memory import Machine, SimNode
from megatron_moetion.sim.network import Network, SimKernel
from megatron_moetion.sim.schedule import Killed, Process, Simulator
from megatron_moetion.sim.threads import SimClock, SimEvent, SimThreads
from megatron_moetion.sim.trainee import Descender, Trainee
from megatron_moetion.snapshot.device import DevicePacker
from megatron_moetion.snapshot.packer import HostPool, Packer
from megatron_moetion.store.hostmemory import PLAIN
from megatron_moetion.units import Inventory

RUN_ID = "sim"
CRASHED = 1
"""Exit code of a rank that has lost its peers in a step."""
KILLED = 137
RESTART_S = 0.5
"""An attempt that lasts less long is followed by a pause as long."""
POOL = HostPool(1)
_DEVICE_LIMIT_S = 1.0
"""What a device has not done by then is late."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of a simulated run."""

    ranks: int = 4
    ranks_per_node: int = 1
    replicas: int = 1
    coding_nodes: int = 0
    mode: str = "full"
    schedule: str = "eager"
    iterations: int = 40
    experts: int = 2
    step_s: float = 0.4
    save_every: int = 0
    """Iterations between checkpoints on disk; 0: there are none."""
    domains: int = 0
    """Failure domains that nodes are in; 0: none are known."""
    on_device: bool = False
    """State lies on devices, not in host memory."""

    @property
    def copies_text(self) -> str:
        """What nodes keep of each other, for a person."""
        if not self.coding_nodes:
            return f"{self.replicas} replicas"
        return f"any {self.coding_nodes - self.replicas} of {self.coding_nodes - 1} fragments"

    @property
    def nodes(self) -> int:
        """Machines that the run needs."""
        return self.ranks // self.ranks_per_node


class Watcher:
    """What is told of all that happens: the checker. Each call comes right after the event, in the rank's thread."""

    def started(self, rank: Rank, running: Running, resumed: Resumed | None) -> None:
        """A rank has begun or recovered, and trains from here."""

    def stepped(self, rank: Rank) -> None:
        """A training step has been made."""

    def before_save(self, rank: Rank, session: Session) -> None:
        """``on_step_end`` is about to be called."""

    def saved(self, rank: Rank, session: Session, took_s: float) -> None:
        """``on_step_end`` has returned."""

    def on_disk(self, iteration: int) -> None:
        """A checkpoint on disk is complete."""

    def failed(self, rank: Rank, error: MoetionError) -> None:
        """A rank ends with an error of the runtime."""


@dataclass(eq=False)
class Rank:
    """One rank of one attempt."""

    number: int
    attempt: int
    machine: Machine
    process: Process
    state: Trainee
    kernel: SimKernel
    clock: SimClock
    threads: SimThreads
    slow_pack_s: float = 0.0
    unhealthy: bool = False


@dataclass(frozen=True, kw_only=True)
class Saved:
    """One rank's part of a checkpoint on disk."""

    mark: bytes
    arrays: Mapping[str, bytes]
    counts: tuple[int, ...]


@dataclass(eq=False)
class Barrier:
    """Where ranks of an attempt meet in each step, as in a collective call."""

    simulator: Simulator
    ranks: int
    arrived: dict[int, set[int]] = field(default_factory=dict)
    news: SimEvent = field(init=False)
    is_broken: bool = False

    def __post_init__(self) -> None:
        self.news = SimEvent(self.simulator)

    def meet(self, rank: int, step: int) -> None:
        """Return when all have come to this step. ``RuntimeError`` where one has gone."""
        here = self.arrived.setdefault(step, set())
        here.add(rank)
        self.news.set()
        while len(here) < self.ranks:
            if self.is_broken:
                raise RuntimeError("a peer has gone")
            self.news.clear()
            self.news.wait()
        self.arrived.pop(step - 2, None)


class Cluster:
    """A run from its first start to its end, over as many attempts as it takes."""

    def __init__(self, simulator: Simulator, shape: Shape, folder: Path, seed: int, watcher: Watcher) -> None:
        self.simulator = simulator
        self.shape = shape
        self.network = Network(simulator, seed)
        self.watcher = watcher
        self.settings: dict[str, Any] = {}
        """Changes to the run's settings, from the next attempt on."""
        self.cuts: Callable[[Rank], Cuts] = lambda rank: NO_CUTS
        self.probes: Callable[[Rank, str, int], None] = lambda rank, point, iteration: None
        self.in_page: Callable[[Rank], None] = lambda rank: None
        """Told of every page that is half written, by whom."""
        self.disk: dict[int, dict[int, Saved]] = {}
        """Checkpoints on disk: by iteration, the state of each rank. They appear when they are complete."""
        self._saving: dict[tuple[int, int], dict[int, Saved]] = {}
        self.attempt = -1
        self.ranks: list[Rank] = []
        self.barrier = Barrier(simulator, shape.ranks)
        self.ended = SimEvent(simulator)
        self.exit_codes: list[int | None] = []
        self.step_s = shape.step_s
        """How long a training step takes now."""
        self.goal = 1 << 40
        """The iteration at which the run ends."""
        self._seed = seed
        self._folder = folder
        self._machines = 0
        self._places = random.Random(seed ^ 0xD0)
        """Where machines that replace others stand."""
        self._launched_s = -RESTART_S
        self._witness = dist.HashStore()
        self._runs = 0
        self._processes: list[Process] = []
        self.machines = [self.new_machine(node * shape.domains // shape.nodes) for node in range(shape.nodes)]
        """By node of the run: which machine it is."""

    def new_machine(self, domain: int | None = None) -> Machine:
        """An empty one, in this failure domain; None: in any."""
        number = self._machines
        self._machines += 1
        if domain is None:
            domain = self._places.randrange(max(1, self.shape.domains))
        machine = Machine(
            simulator=self.simulator,
            key=f"m{number}",
            number=number,
            folder=self._folder / f"m{number}",
            domain=f"rack{domain}" if self.shape.domains else "",
        )
        machine.make()
        return machine

    def end_after(self, iterations: int) -> None:
        """Let the run end so many iterations from now, and not before the shape's."""
        newest = max((r.state.iteration for r in self.ranks), default=0)
        self.goal = max(self.shape.iterations, newest + iterations)

    def rest(self) -> None:
        """Before ``launch``: an attempt that could not even start is not made again at once."""
        if self.simulator.now_s - self._launched_s < RESTART_S:
            SimClock(self.simulator).sleep(RESTART_S)

    def launch(self) -> list[int | None]:
        """One attempt, from its processes' start to their end; their exit codes."""
        simulator, shape = self.simulator, self.shape
        self._launched_s = simulator.now_s
        self.attempt += 1
        self.barrier = Barrier(simulator, shape.ranks)
        self.ended.clear()
        self.ranks = [self._rank(number) for number in range(shape.ranks)]
        store = dist.HashStore()
        for rank in self.ranks:
            rank.machine.make()
            simulator.spawn(rank.process, "train", lambda rank=rank: self._run(rank, store))  # type: ignore[misc]
        simulator.processes = tuple(r.process for r in self.ranks)
        self._await_end()
        codes = [r.process.exit_code for r in self.ranks]
        self._processes += [r.process for r in self.ranks]
        self.exit_codes += codes
        return codes

    def close(self) -> None:
        """Have all threads end."""
        self.simulator.clear([*self._processes, *(r.process for r in self.ranks)])

    def kill(self, rank: Rank, code: int = KILLED) -> None:
        """End a rank's process; peers in a step find out a moment later."""
        if rank.process.is_dead:
            return
        self.simulator.note(f"end {rank.process.name} {code}")
        self.simulator.kill(rank.process, code)
        barrier = self.barrier

        def tell() -> None:
            barrier.is_broken = True
            barrier.news.set()

        if code:
            self.simulator.at(self.simulator.now_s + 0.05, tell)
        self.ended.set()

    # -- launcher --------------------------------------------------------------------------------------

    def _await_end(self) -> None:
        """As ``torchrun``: once a process has failed the others get a moment, then they are killed too."""
        simulator = self.simulator
        while any(not r.process.is_dead for r in self.ranks):
            if any(r.process.exit_code for r in self.ranks):
                grace_s = simulator.chance.choice((0.0, 0.3, 2.0))
                until_s = simulator.now_s + grace_s
                while simulator.now_s < until_s and any(not r.process.is_dead for r in self.ranks):
                    self.ended.clear()
                    self.ended.wait(until_s - simulator.now_s)
                for rank in self.ranks:
                    self.kill(rank)
            else:
                self.ended.clear()
                self.ended.wait()

    def _rank(self, number: int) -> Rank:
        node = number // self.shape.ranks_per_node
        process = Process(f"{self.attempt}.{number}")
        machine = self.machines[node]
        kind = Descender if self.shape.mode == "exact" else Trainee
        self._runs += 1
        device = Device(self.simulator, process, lambda: rank.slow_pack_s) if self.shape.on_device else None
        rank = Rank(
            number=number,
            attempt=self.attempt,
            machine=machine,
            process=process,
            state=kind(number, self.shape.ranks, self.shape.experts, self.attempt, device),
            kernel=SimKernel(self.network, machine.number, process, self._seed * 7919 + self._runs),
            clock=SimClock(self.simulator, lambda: machine.skew_s),
            threads=SimThreads(self.simulator, process),
        )
        return rank

    # -- a rank ----------------------------------------------------------------------------------------

    def _run(self, rank: Rank, store: dist.Store) -> None:
        code = 0
        try:
            self._train(rank, store)
        except MoetionError as error:
            self.watcher.failed(rank, error)
            code = error.exit_code
        except RuntimeError:  # what a framework raises in a step whose peers are gone
            code = CRASHED
        self.kill(rank, code)

    def config(self) -> MoetionConfig:
        """Settings of this attempt."""
        settings = {
            "mode": self.shape.mode,
            "run_id": RUN_ID,
            "replicas": self.shape.replicas,
            "coding_nodes": self.shape.coding_nodes,
            "ranks_per_node": self.shape.ranks_per_node,
            "chunk_bytes": 4096,
            "pack_threads": 1,
            "schedule": self.shape.schedule,
            "timeout_s": 20,
            "hang_timeout_s": 15,
            "holder_patience": 4,
            "max_fruitless_recoveries": 0,
            "max_unprotected_iterations": 0,
            **({"period": 4} if self.shape.mode == "exact" else {}),
            **({"experts_per_snapshot": 1} if self.shape.mode == "popularity" else {}),
            **self.settings,
        }
        return MoetionConfig(**settings)

    def _train(self, rank: Rank, store: dist.Store) -> None:
        config, shape, state = self.config(), self.shape, rank.state
        fabric = SocketFabric.connect(
            store=store,
            rank=rank.number,
            world_size=shape.ranks,
            ranks_per_host=shape.ranks_per_node,
            timeout_s=config.timeout_s,
            in_flight_bytes=config.in_flight_bytes,
            clock=rank.clock,
            threads=rank.threads,
            kernel=rank.kernel,
            cuts=self.cuts(rank),
        )
        prepared = prepare(
            config=config,
            adapter=state,
            blueprint=_blueprint(shape.mode, state),
            fabric=fabric,
            topology="sim",
            scheduler=Scheduler(
                resolved_schedule(config.schedule, on_device=False),
                HostStopwatch(rank.clock),
                clock=rank.clock,
                condition=rank.threads.condition(),
                eager_slice_bytes=256,
                draw=no_drawing,
                is_waited_for=shape.mode == "exact",
            ),
            witness=StoreWitness(self._witness, RUN_ID, is_first=True),
            host=self._host(rank),
        )
        running, resumed = Starter(prepared).start(self._disk(rank))
        session = Session(running)
        self.watcher.started(rank, running, resumed)
        self._loop(rank, running, session)
        session.close()

    def _loop(self, rank: Rank, running: Running, session: Session) -> None:
        shape, state, simulator = self.shape, rank.state, self.simulator
        while state.iteration < self.goal:
            rank.clock.sleep(self.step_s * 0.9)
            self.barrier.meet(rank.number, state.iteration)
            state.compute()
            session.before_optimizer_step()
            state.advance()
            self.watcher.stepped(rank)
            rank.clock.sleep(self.step_s * 0.1)
            self.watcher.before_save(rank, session)
            began_s = simulator.now_s
            session.on_step_end(state.iteration, healthy=not rank.unhealthy)
            rank.unhealthy = False
            self.watcher.saved(rank, session, simulator.now_s - began_s)
            if shape.save_every and not state.iteration % shape.save_every:
                self._save(rank)
        session.drain()

    def _save(self, rank: Rank) -> None:
        state = rank.state
        state.settle()
        part = self._saving.setdefault((rank.attempt, state.iteration), {})
        part[rank.number] = Saved(
            mark=state.mark,
            arrays={name: array.tobytes() for name, array in state.arrays.items()},
            counts=tuple(state.counts.tolist()),
        )
        if len(part) == self.shape.ranks:
            self.disk[state.iteration] = part
            self.watcher.on_disk(state.iteration)

    def _disk(self, rank: Rank) -> Disk:
        def newest() -> int | None:
            return max(self.disk, default=None)

        def load() -> int | None:
            found = newest()
            if found is not None:
                saved = self.disk[found][rank.number]
                rank.state.load(found, saved.mark, saved.arrays, saved.counts)
            return found

        return Disk(load=load, newest=newest) if self.shape.save_every else Disk()

    def _host(self, rank: Rank) -> Host:
        per_node = self.shape.ranks_per_node
        simulator = self.simulator

        def open_node(
            config: MoetionConfig, run_id: str, environment: Mapping[str, str], world_size: int, clock: Any
        ) -> SimNode:
            return SimNode(
                path=rank.machine.folder,
                key=rank.machine.key,
                position=rank.number % per_node,
                num_ranks=per_node,
                clock=clock,
                memory=PLAIN,
                machine=rank.machine,
                process=rank.process,
                in_page=lambda: self.in_page(rank),
            )

        def make_packer(inventory: Inventory, config: MoetionConfig, pool: HostPool, number: int) -> Packer:
            if rank.state.device is None:
                return SlowPacker(inventory, config.chunk_bytes, pool, rank)
            found = DevicePacker(
                DEVICE,
                cast(Any, LazyPool(rank.state.device, pool)),
                [unit for unit in inventory.units if unit.regions],
                chunk_bytes=config.chunk_bytes,
                batch_bytes=512,
                timeout_s=_DEVICE_LIMIT_S,
            )
            return Packer(inventory, config.chunk_bytes, pool, found, clock=rank.clock)

        def probe(point: str, iteration: int) -> None:
            simulator.check()
            self.probes(rank, point, iteration)

        def end(code: int) -> None:
            self.kill(rank, code)
            raise Killed

        return Host(
            environment={
                "LOCAL_WORLD_SIZE": str(per_node),
                "LOCAL_RANK": str(rank.number % per_node),
                "TORCHELASTIC_RESTART_COUNT": str(rank.attempt),
                **_topology(rank.machine),
            },
            clock=rank.clock,
            threads=rank.threads,
            open_node=open_node,
            make_packer=make_packer,
            host_memory=lambda bus, threads: PLAIN,
            make_probe=lambda config, attempt, number: probe,
            links=Timing(answer_s=20.0),
            link_probe_bytes=1 << 10,
            nonce=lambda: int.from_bytes(rank.kernel.random_bytes(4), "little"),
            process_start=lambda: rank.clock.unix_ns() / 1e9,
            at_exit=lambda call: None,
            end=end,
        )


class SlowPacker(Packer):
    """A packer whose batches take time, now and then too much."""

    def __init__(self, inventory: Inventory, chunk_bytes: int, pool: HostPool, rank: Rank) -> None:
        super().__init__(inventory, chunk_bytes, pool, None, batch_bytes=512)
        self._rank = rank

    def pack(self, targets: Any, between: Any, *rest: Any) -> Any:
        """See ``Packer``."""

        def after_batch() -> None:
            self._rank.clock.sleep(0.0005 + self._rank.slow_pack_s)
            between()

        return super().pack(targets, after_batch, *rest)


def _topology(machine: Machine) -> dict[str, str]:
    """What SLURM tells the ranks of a machine."""
    if not machine.domain:
        return {}
    return {
        "SLURM_TOPOLOGY_ADDR": f"{machine.domain}.{machine.key}",
        "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.node",
    }


def _blueprint(mode: str, state: Trainee) -> Blueprint:
    if isinstance(state, Descender):
        return ExactBlueprint(state)
    found: dict[str, Blueprint] = {"full": FullBlueprint(), "popularity": PopularityBlueprint(state)}
    return found[mode]
