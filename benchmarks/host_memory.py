# SPDX-License-Identifier: Apache-2.0
"""How long does an arena's memory take: to be made, and to be mapped again after a restart?

A file of ``--gib`` in ``--folder`` is made and mapped in each way, in turn, each time twice. The second time counts:
memory that a virtual machine has given back, or never had, its host must find first, which takes longer than all
else. A restart maps a file that is there.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._common import Result, median, parser, report
from megatron_moetion.store.hostmemory import HostMemory
from megatron_moetion.store.hugepages import why_not_offered
from megatron_moetion.store.mapping import MappedFile

Way = Callable[[int, int], object]
"""Maps a file (descriptor, bytes) so that every page is there; the result keeps the mapping."""


def allocate_and_map(fd: int, nbytes: int) -> object:
    """One thread in the kernel allocates, then the same one maps."""
    os.posix_fallocate(fd, 0, nbytes)
    return map_populated(fd, nbytes)


def map_populated(fd: int, nbytes: int) -> object:
    """One thread maps."""
    return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def populate(num_threads: int) -> Way:
    """What arenas do."""
    return lambda fd, nbytes: MappedFile(fd, nbytes, HostMemory(num_threads=num_threads))


def allocate_and_populate(num_threads: int) -> Way:
    """One thread allocates, several map."""

    def way(fd: int, nbytes: int) -> object:
        os.posix_fallocate(fd, 0, nbytes)
        return MappedFile(fd, nbytes, HostMemory(num_threads=num_threads))

    return way


def seconds(way: Way, path: Path, nbytes: int, exists: bool) -> float:
    """What one mapping took, of a new file or of one that is there."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, nbytes)
        if exists:
            os.posix_fallocate(fd, 0, nbytes)
            MappedFile(fd, nbytes)
        began = time.perf_counter()
        mapping = way(fd, nbytes)
        took = time.perf_counter() - began
        del mapping
        return took
    finally:
        os.close(fd)
        path.unlink()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--gib", type=float, default=4.0, help="size of the file")
    options.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where the file is made")
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4], help="numbers of threads")
    options.add_argument("--rounds", type=int, default=7, help="how often each way is timed")
    args = options.parse_args()
    nbytes = int((0.5 if args.quick else args.gib) * 2**30)
    many = {n: f"{n} thread{'s' * (n > 1)}" for n in args.threads}
    made: dict[str, Way] = {
        "new: allocate, then map": allocate_and_map,
        **{f"new: allocate, then populate, {text}": allocate_and_populate(n) for n, text in many.items()},
        **{f"new: populate, {text}": populate(n) for n, text in many.items()},
    }
    again: dict[str, Way] = {
        "again: map": map_populated,
        **{f"again: populate, {text}": populate(n) for n, text in many.items()},
    }
    path = args.folder / f"host_memory.{os.getpid()}"
    taken: dict[str, list[float]] = {name: [] for name in (*made, *again)}
    for _ in range(args.rounds):
        for name, way in (*made.items(), *again.items()):
            _, took = (seconds(way, path, nbytes, exists=name in again) for _ in range(2))
            taken[name].append(took)
    with path.open("wb") as file:
        huge = why_not_offered(file.fileno())
    path.unlink()
    results = [Result(name=name, value=nbytes / 2**30 / median(times), unit="GiB/s") for name, times in taken.items()]
    notes = [
        f"{nbytes / 2**30:g} GiB, medians of {args.rounds} rounds",
        f"huge pages: {'offered' if huge is None else f'no, {huge}'}",
    ]
    report("host_memory", results, args.json, notes)


if __name__ == "__main__":
    main()
