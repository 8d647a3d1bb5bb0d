# SPDX-License-Identifier: Apache-2.0
"""One rank of a small training job: NumPy state, the real ``Session`` over gloo, real arenas.

Whoever reads its notes (``rank00000.ATTEMPT.jsonl``) can tell from which iteration every part of its state comes. A
step depends on the state of all ranks before it, so that a wrong byte anywhere is in every hash that follows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
import random
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from support import ToyState, _region, blueprint, scheduler
from torch import distributed as dist

from megatron_moetion.arrays import Bytes
from megatron_moetion.clock import SystemClock
from megatron_moetion.config import MoetionConfig, resolved_schedule
from megatron_moetion.errors import ChannelError, MoetionError
from megatron_moetion.framework import StepNote, TokenCounter
from megatron_moetion.modes.exact import ExactBlueprint
from megatron_moetion.observe.fault import make_probe, parse_faults
from megatron_moetion.replicate.addresses import job_store
from megatron_moetion.replicate.fabric import SocketFabric
from megatron_moetion.replicate.frames import PURPOSE
from megatron_moetion.replicate.worker import SystemThreads
from megatron_moetion.run.host import Host, Probe
from megatron_moetion.run.prepare import prepare
from megatron_moetion.run.running import Running
from megatron_moetion.run.starter import Starter
from megatron_moetion.session import Session
from megatron_moetion.snapshot.packer import HostPool, Packer
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

CRASHED = 1
"""Exit code of a rank that lost its peers, as a training loop has it that does not catch torch's errors."""


@dataclass(frozen=True, kw_only=True)
class Toy:
    """What a test can change about the model and its surroundings. Travels as JSON."""

    world_size: int = 4
    iterations: int = 12
    topology: str = "toy"
    experts: int = 4
    """Of one rank; every second rank shares them."""
    elements: int = 1500
    exact: bool = False
    """State follows from gradients, by steps that can be replayed; some gradients are zero, some steps are skipped."""
    salted: bool = False
    """Steps depend on the attempt: what is done again comes out differently."""
    ballast_bytes: int = 0
    """Frozen state that is never touched, so it takes no memory."""
    file_limit_bytes: int = 0
    """No file of this process may grow beyond it."""
    grown_host: tuple[int, ...] = ()
    """Iterations at which the host state is far larger than at the start."""
    moved: tuple[int, ...] = ()
    """Iterations at which a tensor is said to have moved."""
    slow_pack: tuple[int, ...] = ()
    """Iterations whose copy takes long."""
    slow_send: tuple[int, ...] = ()
    """Iterations whose replication takes long."""
    damaged_payload: tuple[int, ...] = ()
    """Iterations of which a byte is flipped on its way from this rank, once."""
    cut_off_from: int = 0
    """From this iteration on, the network carries no replication from or to this rank; 0: it always does."""
    cut_off_until: int = 1 << 30
    """From this iteration on, it does again."""
    resets: tuple[int, ...] = ()
    """Iterations from which on one connection of replication from this rank is lost, each time one is named."""
    lost_share: float = 0.0
    """Share of this rank's messages of replication that are lost, each with its connection."""
    collective_s: int = 30
    """How long ranks wait for each other in a step."""
    second_fetch: bool = False
    """A kill at "fetch" waits for the second time, when buddies' copies are completed, and until all are there."""
    odd_ranks: tuple[int, ...] = ()
    """The ranks that all of the above concern; none named: all."""
    calm: bool = False
    """Each snapshot is whole before the next step, so what is whole does not depend on the machine's load."""
    step_s: float = 0.005
    orphan_s: int = 0
    """Fork a child that outlives its rank by so long, as a worker of a data loader that hangs."""
    audit: bool = False
    """Note every access to the store and everything that is unpickled."""
    misbehave: bool = False
    """Do both things that the audit is there to find."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Toy:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})

    def concerns(self, rank: int) -> bool:
        return not self.odd_ranks or rank in self.odd_ranks


def tokens_of(rank: int, iteration: int, expert: int) -> int:
    """Tokens that a rank trains one of its experts on; some experts are far more popular than others."""
    return 1 + (expert * expert * 7 + iteration * (expert + 2) + rank) % (3 + 5 * expert)


class Trainee(ToyState):
    """A toy state whose parts say how far they are.

    An expert's captured bytes hold the iteration that they are of (``stamp``) and the tokens that they were trained
    on (``trained``); what a recovery costs can be read from the state alone, as ``counts - trained``.
    """

    def __init__(self, toy: Toy, rank: int, attempt: int = 0) -> None:
        super().__init__(toy.experts, seed=rank, elements=toy.elements, frozen=True)
        self._toy = toy
        self._rank = rank
        self._salt = attempt if toy.salted else 0
        self._iteration = 0
        self.stamps = [np.zeros(40, dtype=np.int64) for _ in range(toy.experts)]
        self.trained = [np.zeros(1, dtype=np.int64) for _ in range(toy.experts)]
        self.host = {"iteration": 0, "rng": bytes(64), "pair": (0, None), "rate": 0.1}
        self.ballast = _untouched(toy.ballast_bytes if toy.concerns(rank) else 0)

    @property
    def group(self) -> int:
        return self._rank % 2

    def name_of(self, expert: int) -> str:
        return f"layers.0.experts.{self.group * self.num_experts + expert}"

    def inventory(self) -> Inventory:
        dense = "layers.0.dense"
        weights = _region(dense, "dense", self.arrays["dense"])
        counts = _region(dense, "counts", self.counts, Role.BUFFER, at_once=True)
        units = [Unit(name=dense, kind=UnitKind.DENSE, layer=0, regions=(weights, counts))]
        frozen = [_region("frozen", "frozen", self.arrays["frozen"], Role.WEIGHT)]
        if self.ballast.nbytes:
            frozen.append(_region("frozen", "ballast", self.ballast, Role.WEIGHT))
        units.append(Unit(name="frozen", kind=UnitKind.FROZEN, regions=tuple(frozen)))
        for e in range(self.num_experts):
            units.append(
                Unit(
                    name=self.name_of(e),
                    kind=UnitKind.EXPERT,
                    layer=0,
                    expert=self.group * self.num_experts + e,
                    regions=self._expert_regions(e),
                )
            )
        units.append(Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=8000))
        return Inventory(units=tuple(units))

    def _expert_regions(self, expert: int) -> tuple[Region, ...]:
        name = self.name_of(expert)
        return (
            _region(name, "weight", self.arrays[f"expert{expert}"]),
            _region(name, "stamp", self.stamps[expert]),
            _region(name, "trained", self.trained[expert]),
        )

    def token_counters(self) -> tuple[TokenCounter, ...]:
        return tuple(
            TokenCounter(expert=self.name_of(e), unit="layers.0.dense", tensor="counts", position=e)
            for e in range(self.num_experts)
        )

    def expert_peers(self) -> tuple[int, ...]:
        return tuple(range(self.group, self._toy.world_size, 2))

    def moved(self) -> str | None:
        return "the tensor 'dense' was replaced" if self.now(self._toy.moved) else None

    def host_state(self) -> dict[str, Any]:
        return {**self.host, **({"log": bytes(90_000)} if self.now(self._toy.grown_host) else {})}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        super().load_host_state(state)
        self._iteration = state["iteration"]

    @property
    def iteration(self) -> int:
        return self._iteration

    def now(self, iterations: Sequence[int]) -> bool:
        return self._iteration in iterations and self._toy.concerns(self._rank)

    def mark(self) -> int:
        """A number that depends on every byte of the state."""
        return zlib.crc32(self.image())

    def image(self) -> bytes:
        return super().image() + b"".join(a.tobytes() for a in (*self.stamps, *self.trained))

    def advance(self, iteration: int, marks: Sequence[int]) -> None:
        """One step, from the marks of all ranks."""
        self._iteration = iteration
        rng = np.random.default_rng([self._rank, iteration, self._salt, *marks])
        for name, array in self.arrays.items():
            if name != "frozen":
                array *= np.float32(0.9)
                array += rng.normal(size=array.shape).astype(np.float32)
        for e in range(self.num_experts):
            tokens = tokens_of(self._rank, iteration, e)
            self.stamps[e][:] = iteration
            self.trained[e] += tokens
            self.counts[e] += tokens
        self.host = {
            "iteration": iteration,
            "rng": rng.bytes(64),
            "pair": (iteration, None),
            "rate": float(rng.random()),
        }

    def hashes(self) -> dict[str, str]:
        """A hash of each unit."""
        parts = {"layers.0.dense": [self.arrays["dense"], self.counts], "frozen": [self.arrays["frozen"]]}
        for e in range(self.num_experts):
            parts[self.name_of(e)] = [self.arrays[f"expert{e}"], self.stamps[e], self.trained[e]]
        found = {name: _hash(b"".join(a.tobytes() for a in arrays)) for name, arrays in parts.items()}
        return {**found, HOST_UNIT: _hash(repr(sorted(self.host.items())).encode())}

    def ages(self) -> dict[str, list[int]]:
        """For each expert the oldest and the newest iteration in it."""
        return {self.name_of(e): [int(s.min()), int(s.max())] for e, s in enumerate(self.stamps)}

    def lost(self) -> int:
        """Tokens that were processed and are not in the experts."""
        return int(sum(int(c) - int(t[0]) for c, t in zip(self.counts, self.trained, strict=True)))


class Descender(Trainee):
    """A trainee in mode ``exact``: momentum descent along gradients that depend on the state of all ranks."""

    def __init__(self, toy: Toy, rank: int, attempt: int = 0) -> None:
        super().__init__(toy, rank, attempt)
        self._moving = [name for name in self.arrays if name != "frozen"]
        self.momenta = {name: np.zeros_like(self.arrays[name]) for name in self._moving}
        self.gradients = {name: np.zeros_like(self.arrays[name]) for name in self._moving}
        self._told: list[tuple[int, float | None]] = []
        self._remembered = 1
        self._steps_taken = 0

    def inventory(self) -> Inventory:
        found = []
        for unit in super().inventory().units:
            name = {r.tensor for r in unit.regions} & {"dense", "weight"}
            if not name:
                found.append(unit)
                continue
            key = "dense" if unit.kind is UnitKind.DENSE else f"expert{(unit.expert or 0) % self.num_experts}"
            roles = {Role.EXP_AVG: self.momenta[key], Role.GRAD: self.gradients[key]}
            extra = tuple(_region(unit.name, *name, a, role, role is Role.GRAD) for role, a in roles.items())
            weights = unit.regions[:1] if unit.kind is UnitKind.EXPERT else unit.regions
            found.append(dataclasses.replace(unit, regions=(*weights, *extra)))
        return Inventory(units=tuple(found))

    def host_state(self) -> dict[str, Any]:
        return {**super().host_state(), "told": self._told[-self._remembered :]}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        super().load_host_state({k: v for k, v in state.items() if k != "told"})

    def image(self) -> bytes:
        return super().image() + b"".join(a.tobytes() for a in self.momenta.values())

    def advance(self, iteration: int, marks: Sequence[int]) -> None:
        self._iteration = iteration
        rng = np.random.default_rng([self._rank, iteration, self._salt, *marks])
        for number, name in enumerate(self._moving):
            gradient = rng.normal(size=self.arrays[name].shape).astype(np.float32)
            self.gradients[name][:] = 0 if number and (iteration // 4 + number) % 3 == 0 else gradient
        skipped = iteration % 7 == 5
        if skipped:
            self.gradients["dense"][:] = np.inf
        self._told.append((iteration, None if skipped else float(rng.random())))
        self._steps_taken += 1
        self._step(self._told[-1][1])
        self.counts += iteration
        self.host = {"iteration": iteration, "rng": rng.bytes(64), "pair": (iteration, None), "rate": 0.5}

    def _step(self, rate: float | None) -> None:
        for name in self._moving if rate is not None else ():
            self.momenta[name] *= np.float32(0.9)
            self.momenta[name] += self.gradients[name]
            self.arrays[name] -= np.float32(rate or 0.0) * self.momenta[name]

    @property
    def bytes_a_step(self) -> int:
        return 64

    def remember(self, steps: int) -> None:
        self._remembered = steps

    def note_step(self, iteration: int, *, stepped: bool = True) -> StepNote:
        taken, self._steps_taken = self._steps_taken, 0
        return StepNote(skipped=self._told[-1][1] is None, problem=None if taken == 1 else f"{taken} steps")

    def begin_replay(self, state: Mapping[str, Any]) -> None:
        self._told = [(i, rate) for i, rate in state["told"]]

    def replay(self, iteration: int) -> bool:
        rate = dict(self._told)[iteration]
        self._step(rate)
        return rate is not None

    def hashes(self) -> dict[str, str]:
        found = super().hashes()
        names = {"layers.0.dense": "dense", **{self.name_of(e): f"expert{e}" for e in range(self.num_experts)}}
        return found | {unit: found[unit] + _hash(self.momenta[name].tobytes()) for unit, name in names.items()}

    def ages(self) -> dict[str, list[int]]:
        return {self.name_of(e): [self._iteration] * 2 for e in range(self.num_experts)}

    def lost(self) -> int:
        return 0


def trainee(toy: Toy, rank: int, attempt: int = 0) -> Trainee:
    return (Descender if toy.exact else Trainee)(toy, rank, attempt)


def _untouched(nbytes: int) -> npt.NDArray[np.uint8]:
    """Address space that no memory stands behind until it is touched."""
    if not nbytes:
        return np.zeros(0, dtype=np.uint8)
    no_reserve = 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=np.uint8)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def uninterrupted(toy: Toy) -> list[dict[int, dict[str, str]]]:
    """For each rank the unit hashes after each iteration of a run that nothing happens to. One process, no runtime."""
    states = [trainee(toy, rank) for rank in range(toy.world_size)]
    found = [{0: s.hashes()} for s in states]
    for iteration in range(1, toy.iterations + 1):
        marks = [s.mark() for s in states]
        for state, hashes in zip(states, found, strict=True):
            state.advance(iteration, marks)
            hashes[iteration] = state.hashes()
    return found


@dataclass
class Notes:
    """What one rank writes down in one attempt; a line is in the file before the rank goes on."""

    path: Path
    attempt: int
    _fd: int = field(init=False)

    def __post_init__(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, event: str, **fields: Any) -> None:
        found = {"event": event, "attempt": self.attempt, "time": time.time(), **fields}
        os.write(self._fd, (json.dumps(found) + "\n").encode())


def main(folder: Path, config: Mapping[str, Any], fields: Any, environment: Mapping[str, str]) -> int:
    """Train to the end on this rank, the toy of these JSON fields; returns the exit code."""
    toy = Toy.from_json(fields)
    rank = int(environment["RANK"])
    attempt = int(environment["ATTEMPT"])
    notes = Notes(folder / f"rank{rank:05d}.{attempt}.jsonl", attempt)
    try:
        store = dist.FileStore(str(folder / f"rendezvous{attempt}"), toy.world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=toy.world_size, timeout=timedelta(seconds=toy.collective_s)
        )
        if toy.audit:
            from store_audit import listen

            listen(Path(config["store"]), notes.write)
        _train(rank, attempt, config, toy, environment, notes)
    except MoetionError as error:
        notes.write("error", kind=type(error).__name__, message=str(error), code=error.exit_code)
        return error.exit_code
    except RuntimeError as error:  # what torch raises in a step whose peers are gone
        notes.write("error", kind=type(error).__name__, message=str(error), code=CRASHED)
        return CRASHED
    return 0


def _train(
    rank: int, attempt: int, config: Mapping[str, Any], toy: Toy, environment: Mapping[str, str], notes: Notes
) -> None:
    if toy.file_limit_bytes and toy.concerns(rank):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (toy.file_limit_bytes, toy.file_limit_bytes))
    settings = MoetionConfig(**config)
    state = trainee(toy, rank, attempt)
    trouble = Trouble(toy if toy.concerns(rank) else Toy(), state)
    timing = scheduler(resolved_schedule(settings.schedule, on_device=False))
    fabric = SocketFabric.connect(
        store=job_store(environment),
        rank=rank,
        world_size=toy.world_size,
        ranks_per_host=int(environment["LOCAL_WORLD_SIZE"]),
        timeout_s=settings.timeout_s,
        in_flight_bytes=settings.in_flight_bytes,
        clock=SystemClock(),
        threads=SystemThreads(),
        interface=environment.get("GLOO_SOCKET_IFNAME", ""),
        cuts=TroubledWire(trouble),
    )
    prepared = prepare(
        config=settings,
        adapter=state,
        blueprint=ExactBlueprint(state) if isinstance(state, Descender) else blueprint(settings.mode, state),
        fabric=fabric,
        topology=toy.topology,
        scheduler=timing,
        host=Host(environment=environment, make_probe=trouble.make_probe, make_packer=trouble.make_packer),
    )
    running, resumed = Starter(prepared).start()
    session = Session(running)
    if toy.orphan_s and toy.concerns(rank):
        notes.write("orphan", pid=_orphan(toy.orphan_s))
    iteration = resumed.iteration if resumed is not None else 0
    found = {"iteration": iteration, "hashes": state.hashes(), "ages": state.ages(), "lost": state.lost()}
    processed = int(state.counts.sum())
    extent = {"epoch": resumed.epoch, "lost_tokens": resumed.lost_tokens, "plt": resumed.plt} if resumed else {}
    counted = {"local": resumed.local_units, "fetched": resumed.fetched_units} if resumed else {}
    counted |= {"replayed": resumed.replayed_steps} if resumed else {}
    notes.write("started", recovered=resumed is not None, processed=processed, **found, **extent, **counted)
    if toy.misbehave:
        misbehave(Path(config["store"]))
    while iteration < toy.iterations:
        iteration += 1
        marks = _gather(state.mark(), toy.world_size)
        time.sleep(toy.step_s)
        session.before_optimizer_step()
        state.advance(iteration, marks)
        if iteration - 1 in toy.slow_pack:  # training goes on at once; the packing thread counts when it comes to it
            running.pipeline.finish()
        notes.write("step", iteration=iteration, hashes=state.hashes(), lost=state.lost(), dropped=_dropped(running))
        session.on_step_end(iteration)
        if toy.calm and iteration not in toy.slow_pack:  # waiting there would make up for the delay
            session.drain()
        notes.write("saved", iteration=iteration, stable=session.stable_iteration, dropped=_dropped(running))
    session.drain()
    dropped = _dropped(running)
    stable = session.stable_iteration
    session.close()
    notes.write("end", iteration=iteration, stable=stable, dropped=dropped, lost=state.lost())
    _gather(0, toy.world_size)  # nobody leaves before all have let go of each other
    dist.destroy_process_group()


def _orphan(seconds: int) -> int:
    """A forked child that holds all that a fork leaves it; its id, once it has come so far.

    It leaves the rank's process group, which ends with an attempt: who asks for it ends it.
    """
    begun, begins = os.pipe()
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)
        os.write(begins, b".")
        time.sleep(seconds)
        os._exit(0)
    os.read(begun, 1)
    for end in (begun, begins):
        os.close(end)
    return pid


def _dropped(running: Running) -> dict[str, int]:
    return {reason: n for reason, n in running.pipeline.counts.dropped.copy().items() if n}


def _gather(mark: int, world_size: int) -> list[int]:
    """Every rank's number, as gradients meet in a real step."""
    parts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(parts, torch.tensor([mark]))
    return [int(p) for p in parts]


class Trouble:
    """What goes wrong on this rank. Its probe, its packer and its connections ask here."""

    def __init__(self, toy: Toy, state: Trainee) -> None:
        self._toy = toy
        self._state = state
        self._fetches = 0
        self._to_damage: list[int] = list(toy.damaged_payload)
        self._damages_next = False
        self._resets = sorted(toy.resets)
        self._draw = random.Random(0)

    def make_probe(self, config: MoetionConfig, attempt: int, rank: int) -> Probe:
        kill = make_probe(parse_faults(config.inject_fault), attempt, rank)

        def probe(point: str, iteration: int) -> None:
            if point == "fetch" and self._toy.second_fetch:
                self._fetches += 1
                if self._fetches == 1:
                    return
                time.sleep(0.1)
            kill(point, iteration)
            if point == "mid-replication":
                self._replicate(iteration)

        return probe

    def make_packer(self, inventory: Inventory, config: MoetionConfig, pool: HostPool, rank: int) -> Packer:
        return TroubledPacker(inventory, config.chunk_bytes, pool, self)

    def pack(self) -> None:
        """Units are about to be packed."""
        if self._state.now(self._toy.slow_pack):
            time.sleep(0.2)

    def is_cut_off(self, iteration: int) -> bool:
        """Whether the network carries no replication while this iteration is trained."""
        return bool(self._toy.cut_off_from) and self._toy.cut_off_from <= iteration < self._toy.cut_off_until

    def passes(self) -> None:
        """Something is about to pass."""
        if self.is_cut_off(self._state.iteration):
            raise ChannelError("the network is gone")

    def sent(self, parts: Sequence[Bytes]) -> Sequence[Bytes]:
        """What is sent in place of these parts."""
        if self._resets and self._state.iteration >= self._resets[0]:
            del self._resets[0]
            raise ChannelError("a reset")
        if self._draw.random() < self._toy.lost_share:
            raise ChannelError("lost on the way")
        if not self._damages_next:
            return parts
        self._damages_next = False
        damaged = parts[-1].copy()
        damaged[-1] ^= 1
        return [*parts[:-1], damaged]

    def _replicate(self, iteration: int) -> None:
        """The captures of that iteration are what is sent next."""
        if iteration in self._toy.slow_send:
            time.sleep(0.1)
        if iteration in self._to_damage:
            self._to_damage.remove(iteration)
            self._damages_next = True


class TroubledPacker(Packer):
    """A packer that may be slow. It packs several batches in a snapshot, so that "mid-pack" is in the middle."""

    def __init__(self, inventory: Inventory, chunk_bytes: int, pool: HostPool, trouble: Trouble) -> None:
        super().__init__(inventory, chunk_bytes, pool, None, batch_bytes=1 << 14)
        self._trouble = trouble

    def pack(self, targets: Any, between: Any, *rest: Any) -> Any:
        self._trouble.pack()
        return super().pack(targets, between, *rest)


class TroubledWire:
    """``Cuts`` of what replication sends and receives."""

    def __init__(self, trouble: Trouble) -> None:
        self._trouble = trouble

    def dialling(self, rank: int, peer: int, purpose: str) -> None:
        if purpose == PURPOSE:
            self._trouble.passes()

    def sending(self, rank: int, peer: int, purpose: str, parts: Sequence[Bytes]) -> Sequence[Bytes]:
        if purpose != PURPOSE:
            return parts
        self._trouble.passes()
        return self._trouble.sent(parts)

    def receiving(self, rank: int, peer: int, purpose: str) -> None:
        if purpose == PURPOSE:
            self._trouble.passes()


def misbehave(store: Path) -> None:
    """What no rank may do: read another node's file, unpickle."""
    import pickle
    from fractions import Fraction

    for path in store.glob("*/node*/node.id"):
        path.read_bytes()
    pickle.loads(pickle.dumps(Fraction(1, 3)))
