# SPDX-License-Identifier: Apache-2.0
"""What several unit tests need: training state in NumPy memory, arenas for it, and a network of queues."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from megatron_moetion._C import DevicePool, HostPool
from megatron_moetion.clock import SystemClock
from megatron_moetion.coding import WHOLE, Part
from megatron_moetion.errors import ChannelError
from megatron_moetion.framework import StateAdapter, StepReplayer, TokenCounter, TokenSource
from megatron_moetion.modes.exact import ExactBlueprint
from megatron_moetion.modes.full import FullBlueprint
from megatron_moetion.modes.mode import Blueprint
from megatron_moetion.modes.popularity import PopularityBlueprint
from megatron_moetion.replicate.channel import Channel, Message
from megatron_moetion.schedule.recorder import HostStopwatch, OpenSpan, Recorder
from megatron_moetion.schedule.scheduler import Scheduler, no_drawing
from megatron_moetion.schedule.timeline import Lane
from megatron_moetion.snapshot.device import TIMEOUT_S, DevicePacker, device_pool
from megatron_moetion.snapshot.digest import is_intact
from megatron_moetion.snapshot.engines import Engines
from megatron_moetion.snapshot.packer import Packer
from megatron_moetion.snapshot.plan import BATCH_BYTES, Targets
from megatron_moetion.store.arena import Arena, Memory
from megatron_moetion.store.manifest import Page, Record, Records
from megatron_moetion.store.node import NodeFolder
from megatron_moetion.store.sharedfile import SharedFile, create_arena
from megatron_moetion.store.spec import ArenaIdentity, ArenaSpec
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

CHUNK_BYTES = 4096
T = TypeVar("T")


class ToyState:
    """``StateAdapter`` and ``TokenSource`` over NumPy arrays: one dense unit, experts, token counts, a host state."""

    def __init__(self, num_experts: int = 4, seed: int = 0, elements: int = 1500, frozen: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.arrays: dict[str, npt.NDArray[Any]] = {"dense": rng.normal(size=elements).astype(np.float32)}
        if frozen:
            self.arrays["frozen"] = rng.normal(size=33).astype(np.float32)
        for e in range(num_experts):
            self.arrays[f"expert{e}"] = rng.normal(size=elements // 3).astype(np.float32)
        self.counts = np.zeros(max(num_experts, 1), dtype=np.int64)
        self.num_experts = num_experts
        self.host: dict[str, Any] = {"iteration": 0, "rng": rng.bytes(100)}
        self.resyncs = 0
        self.recalibrated: dict[str, int] = {}

    def inventory(self) -> Inventory:
        dense = "layers.0.dense"
        counts = _region(dense, "counts", self.counts, Role.BUFFER, at_once=True)
        weights = _region(dense, "dense", self.arrays["dense"])
        units = [Unit(name=dense, kind=UnitKind.DENSE, layer=0, regions=(weights, counts))]
        if "frozen" in self.arrays:
            frozen = _region("frozen", "frozen", self.arrays["frozen"], Role.WEIGHT)
            units.append(Unit(name="frozen", kind=UnitKind.FROZEN, regions=(frozen,)))
        for e in range(self.num_experts):
            name = f"layers.0.experts.{e}"
            regions = (_region(name, f"expert{e}", self.arrays[f"expert{e}"]),)
            units.append(Unit(name=name, kind=UnitKind.EXPERT, layer=0, expert=e, regions=regions))
        units.append(Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=1000))
        return Inventory(units=tuple(units))

    def token_counters(self) -> tuple[TokenCounter, ...]:
        return tuple(
            TokenCounter(expert=f"layers.0.experts.{e}", unit="layers.0.dense", tensor="counts", position=e)
            for e in range(self.num_experts)
        )

    def expert_peers(self) -> tuple[int, ...]:
        return ()

    def host_state(self) -> dict[str, Any]:
        return dict(self.host)

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        self.host = dict(state)

    def after_step(self) -> None: ...

    def moved(self) -> str | None:
        return None

    def state_hash(self) -> str:
        return hashlib.blake2b(self.image(), digest_size=16).hexdigest()

    def counts_tokens(self) -> bool:
        return True

    def routed_tokens(self) -> dict[str, int]:
        return {}

    def layer_tokens(self) -> dict[str, dict[str, float]]:
        return {}

    def capacity_problem(self) -> str | None:
        return None

    def recalibrate(self, lost: Mapping[str, int]) -> None:
        self.recalibrated = dict(lost)

    def copy_to_model(self) -> None: ...

    def resync(self) -> None:
        self.resyncs += 1

    def step(self, iteration: int) -> None:
        """One deterministic step: every byte of the state depends on the state before."""
        for number, array in enumerate(self.arrays.values()):
            array *= np.float32(0.99)
            array += np.float32(iteration % 7 + number)
        self.counts += (np.arange(len(self.counts)) + iteration) % 5 + 1
        self.host = {"iteration": iteration, "rng": bytes([iteration % 256]) * 100}

    def image(self) -> bytes:
        """All bytes of the state."""
        arrays = b"".join(a.tobytes() for a in self.arrays.values())
        return arrays + self.counts.tobytes() + repr(sorted(self.host.items())).encode()


def on_device(inventory: Inventory) -> Inventory:
    """The same units, said to be in the memory of the model of a device."""
    units = (replace(u, regions=tuple(replace(r, device="model:0") for r in u.regions)) for u in inventory.units)
    return Inventory(units=tuple(units))


def _region(unit: str, tensor: str, array: npt.NDArray[Any], role: Role = Role.MASTER, at_once: bool = False) -> Region:
    return Region(
        unit=unit, tensor=tensor, role=role, dtype=str(array.dtype), start=0, nbytes=array.nbytes,
        address=array.ctypes.data, at_once=at_once,
    )  # fmt: skip


class WatchedPool:
    """A ``DevicePool`` whose calls are written down; ``keep`` lives as long as it."""

    def __init__(self, pool: DevicePool, calls: list[str], *keep: object) -> None:
        self._pool, self._calls = pool, calls
        self._keep = keep

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._pool, name)

        def call(*arguments: Any, **options: Any) -> Any:
            result = found(*arguments, **options)
            named = {"pack_uploaded": result, "finish": arguments[:1], "order_after": arguments}.get(name, ())
            self._calls.append(f"{name} {named}")
            return result

        return call if callable(found) else found


def identity(**changes: Any) -> ArenaIdentity:
    """An arena's identity with some fields changed."""
    fields: dict[str, Any] = {
        "run_id": "run", "owner": 0, "world_size": 2, "topology": "tp1 pp1", "layout": "layout", "mode": "full",
        "chunk_bytes": CHUNK_BYTES,
    }  # fmt: skip
    return ArenaIdentity(**{**fields, **changes})


def spec_of(state: ToyState, owner: int = 0, copies: int = 3, **changes: Any) -> ArenaSpec:
    """A spec with ``copies`` slots for each unit of the state."""
    units = state.inventory()
    whose = identity(owner=owner, **{"layout": units.fingerprint, **changes})
    return ArenaSpec.of(whose, units, {u.name: copies for u in units.units})


def make_arena(
    folder: Path, state: ToyState, owner: int = 0, copies: int = 3, part: Part = WHOLE, **changes: Any
) -> Arena:
    """A new arena for a state, named as in a store."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = spec_of(state, owner, copies, **changes).of_part(part)
    return create_arena(folder / spec.name, spec, Page())


def make_packer(
    inventory: Inventory,
    num_threads: int = 1,
    *,
    rank: int = 0,
    batch_bytes: int = BATCH_BYTES,
    timeout_s: float = TIMEOUT_S,
    watch: Callable[[DevicePool], Any] = lambda pool: pool,
    engines: Engines | None = None,
    **options: Any,
) -> Packer:
    """What packs these units; for the pool of a device, if there is one, see ``make_device``."""
    device = make_device(
        inventory,
        CHUNK_BYTES,
        rank=rank,
        batch_bytes=batch_bytes,
        timeout_s=timeout_s,
        watch=watch,
        engines=engines,
        **options,
    )
    return Packer(inventory, CHUNK_BYTES, HostPool(num_threads), device, batch_bytes=batch_bytes)


def make_device(
    inventory: Inventory,
    chunk_bytes: int,
    *,
    rank: int = 0,
    batch_bytes: int = BATCH_BYTES,
    timeout_s: float = TIMEOUT_S,
    watch: Callable[[DevicePool], Any] = lambda pool: pool,
    engines: Engines | None = None,
    **options: Any,
) -> DevicePacker | None:
    """What packs the units of a device; None where there are none.

    ``watch`` may stand before its pool, ``options`` are the pool's: ``fault`` and so on.
    """
    there = [u for u in inventory.units if any(r.device != "cpu" for r in u.regions)]
    if not there:
        return None
    where = there[0].regions[0].device
    pool = device_pool(where, there, chunk_bytes, rank=rank, batch_bytes=batch_bytes, **options)
    return DevicePacker(
        where,
        watch(pool),
        there,
        chunk_bytes=chunk_bytes,
        batch_bytes=batch_bytes,
        timeout_s=timeout_s,
        engines=engines,
    )


def node_folder(path: Path, position: int = 0, num_ranks: int = 1) -> NodeFolder:
    """A node whose folder is there."""
    return NodeFolder(path=path, key=path.name, position=position, num_ranks=num_ranks, clock=SystemClock())


def acquire(arena: Arena, units: Sequence[int]) -> tuple[list[int], Targets]:
    """A free slot for each unit."""
    numbers = np.array(units, dtype=np.int64)
    sizes = arena.unit_bytes[numbers]
    slots = arena.acquire_all(sizes)
    assert slots is not None, "the arena is full"
    return slots.tolist(), Targets.in_slots(numbers, arena.payload_addresses(slots), sizes)


def capture(
    packer: Packer, arena: Arena, iteration: int, units: Sequence[int] | None = None, epoch: int = 0
) -> Records:
    """Pack units (all, where none are named) into free slots and commit them."""
    slots, targets = acquire(arena, range(len(arena.spec.units)) if units is None else units)
    packer.freeze(f"host state of {iteration}".encode())
    digests = packer.pack(targets, lambda: None)
    assert digests is not None
    records = Records.make(
        len(slots),
        unit=targets.units,
        iteration=iteration,
        epoch=epoch,
        slot=slots,
        nbytes=arena.unit_bytes[targets.units],
        digest=digests,
    )
    arena.add(records)
    return records


def find(arena: Arena, unit: int, iteration: int) -> Record | None:
    """The capture of one unit at one iteration, if the arena lists it."""
    return next((r for r in arena.page.records if r.key == (unit, iteration)), None)


def is_whole(arena: Arena, record: Record) -> bool:
    """Whether a capture's bytes are what was captured."""
    payload, digests = arena.payload(record.slot), arena.digests(record.slot)
    return is_intact(POOL, arena.spec.identity.chunk_bytes, payload, digests, record.digest)


class Network:
    """Queues between ranks of one process. ``damage(source, target, size)`` may give a byte to flip, or None."""

    def __init__(self, world_size: int, timeout_s: float = 10.0) -> None:
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.damage: Callable[[int, int, int], int | None] = lambda source, target, size: None
        self.dead: set[int] = set()
        self._queues: dict[tuple[int, int], queue.Queue[bytes]] = {
            (a, b): queue.Queue() for a in range(world_size) for b in range(world_size)
        }

    def channel(self, rank: int) -> Channel:
        return _QueueChannel(self, rank)

    def send(self, source: int, target: int, data: bytes) -> None:
        position = self.damage(source, target, len(data))
        if position is not None:
            flipped = bytearray(data)
            flipped[position] ^= 1
            data = bytes(flipped)
        self._queues[(source, target)].put(data)

    def receive(self, source: int, target: int) -> bytes:
        try:
            return self._queues[(source, target)].get(timeout=0.05 if source in self.dead else self.timeout_s)
        except queue.Empty:
            raise ChannelError(f"transfer with rank(s) [{source}] failed: timed out") from None


class _QueueChannel:
    def __init__(self, network: Network, rank: int) -> None:
        self._network = network
        self._rank = rank

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        if self._rank in self._network.dead:
            raise ChannelError(f"rank {self._rank} is cut off")
        for message in sends:
            self._network.send(self._rank, message.peer, message.data.tobytes())
        for message in receives:
            data = np.frombuffer(self._network.receive(message.peer, self._rank), dtype=np.uint8)
            assert data.nbytes == message.data.nbytes, "the two sides' messages do not match"
            message.data[:] = data


def together(*calls: Callable[[], T]) -> list[T]:
    """Run one call a rank, at the same time; their results by rank. The first failure is raised."""
    with ThreadPoolExecutor(len(calls)) as threads:
        futures = [threads.submit(call) for call in calls]
        return [f.result() for f in futures]


def scheduler(schedule: str = "bubble") -> Scheduler:
    """A scheduler on the host's clock that draws nothing."""
    clock = SystemClock()
    return Scheduler(
        schedule,
        HostStopwatch(clock),
        clock=clock,
        condition=threading.Condition(),
        eager_slice_bytes=1 << 20,
        draw=no_drawing,
    )


@contextmanager
def spanning(recorder: Recorder, lane: Lane, sent_bytes: int = 0, received_bytes: int = 0) -> Iterator[OpenSpan]:
    """Record what happens in the block."""
    opened = recorder.begin(lane, sent_bytes, received_bytes)
    try:
        yield opened
    finally:
        recorder.end(opened)


class ManualClock:
    """A ``Clock`` that moves only when somebody sleeps."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def monotonic(self) -> float:
        return self.now_s

    def unix_ns(self) -> int:
        return int(self.now_s * 1e9)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class ManualCondition(threading.Condition):
    """Nobody else runs: a wait ends with its timeout, which passes at once on ``clock``."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self.clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        assert timeout > 0
        self.clock.sleep(timeout)
        return False


def blueprint(mode: str, tokens: TokenSource) -> Blueprint:
    """A mode's, for a state that counts tokens; in mode ``exact`` it replays steps too."""
    if mode == "exact":
        return ExactBlueprint(cast(StepReplayer, tokens))
    found: dict[str, Blueprint] = {"full": FullBlueprint(), "popularity": PopularityBlueprint(tokens)}
    return found[mode]


ADAPTER: type[StateAdapter] = ToyState
TOKENS: type[TokenSource] = ToyState
MEMORY: type[Memory] = SharedFile
"""Type checking holds what stands for the real ones to their protocols."""

POOL = HostPool(1)
"""For tests that verify."""


def no_probe(point: str, iteration: int) -> None:
    """A probe that never kills."""
