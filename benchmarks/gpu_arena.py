# SPDX-License-Identifier: Apache-2.0
"""How many seconds does a large arena take: made, and pinned for the GPU?

The arena is made as a run makes it, in ``--store``. It has 32 GiB, or less where memory is short; then its size says
so. ``--device model:0`` runs the same code without a GPU, where nothing is pinned.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._common import Result, available_memory_bytes, parser, report
from megatron_moetion import _C
from megatron_moetion.store.hostmemory import HostMemory
from megatron_moetion.store.manifest import Page
from megatron_moetion.store.numa import numa_node
from megatron_moetion.store.sharedfile import create_arena, free_bytes
from megatron_moetion.store.spec import ArenaIdentity, ArenaSpec
from megatron_moetion.units import ALIGNMENT_BYTES, Inventory, Region, Role, Unit, UnitKind

SLOTS = 32
THREADS_MAX = 16
"""That populate the arena; a run has as many, or its share of the cores."""
MEMORY_SHARE = 0.6
"""Of what is free, what the arena may take: a GPU node's memory is its trainer's too."""


def affordable(wanted: int, free: int) -> int:
    """Bytes of an arena of at most ``wanted`` where ``free`` are left; a multiple of ``SLOTS`` MiB."""
    step = SLOTS << 20
    return min(wanted, int(MEMORY_SHARE * free) // step * step)


def spec_of(nbytes: int) -> ArenaSpec:
    """An arena of this many bytes of captures, in equal slots."""
    region = Region(
        unit="all", tensor="all", role=Role.MASTER, dtype="uint8", start=0, nbytes=nbytes // SLOTS,
        address=ALIGNMENT_BYTES,
    )  # fmt: skip
    inventory = Inventory(units=(Unit(name="all", kind=UnitKind.DENSE, regions=(region,)),))
    identity = ArenaIdentity(
        run_id="arena", owner=0, world_size=1, topology="", layout=inventory.fingerprint, mode="full",
        chunk_bytes=1 << 20,
    )  # fmt: skip
    return ArenaSpec.of(identity, inventory, {"all": SLOTS})


def measure(device: str, store: Path, nbytes: int) -> tuple[list[Result], str]:
    """Make, pin, let go; and how the arena got its memory."""
    pool = _C.DevicePool(device, rank=0, max_pieces=1, max_chunks=1)
    memory = HostMemory(num_threads=min(THREADS_MAX, len(os.sched_getaffinity(0))), node=numa_node(pool.pci_bus_id))
    store.mkdir(parents=True)
    try:
        began = time.perf_counter()
        arena = create_arena(store / "rank0.arena", spec_of(nbytes), Page(), memory)
        made = time.perf_counter()
        registration = pool.register(arena.memory.ctypes.data, arena.memory.nbytes)
        pinned = time.perf_counter()
        registration.close()
        closed = time.perf_counter()
        population = arena.population
        del arena
    finally:
        shutil.rmtree(store, ignore_errors=True)
    results = [
        Result(name="arena", value=nbytes / 2**30, unit="GiB"),
        Result(name="made", value=made - began, unit="s"),
        Result(name="made: of it, populated", value=population.seconds, unit="s"),
        Result(name="in huge pages", value=population.huge_bytes / population.nbytes, unit="share"),
        Result(name="pinned", value=pinned - made, unit="s"),
        Result(name="unpinned", value=closed - pinned, unit="s"),
        Result(name="made and pinned", value=nbytes / (pinned - began) / 1e9, unit="GB/s"),
    ]
    return results, str(population)


def main() -> int:
    """Measure and report."""
    options = parser(__doc__ or "")
    options.add_argument("--device", default="cuda:0")
    options.add_argument("--mib", type=int, default=32 << 10, help="size of the arena, if memory allows")
    options.add_argument("--store", type=Path, default=Path("/dev/shm"), help="folder in memory")
    args = options.parse_args()
    wanted = (args.mib << 20) // (8 if args.quick else 1)
    nbytes = affordable(wanted, min(free_bytes(args.store), available_memory_bytes()))
    if not nbytes:
        results = [Result(name="arena", value=None, unit="GiB")]
        report("gpu_arena", results, args.json, [f"{args.store} or memory has no room for {SLOTS} MiB"])
        return 0
    notes = [] if nbytes == wanted else [f"of {wanted / 2**30:g} GiB: no more memory is free"]
    results, how = measure(args.device, args.store / f"moetion-arena-{os.getpid()}", nbytes)
    report("gpu_arena", results, args.json, [*notes, how])
    return 0


if __name__ == "__main__":
    sys.exit(main())
