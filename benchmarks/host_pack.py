# SPDX-License-Identifier: Apache-2.0
"""Does packing with the digest run at the speed of a plain copy?

For each segment size the same bytes are moved by ``HostPool.pack``, by memcpy, and by a copy with streaming
stores (and the same prefetching, so that it differs from pack in the digest alone), with the same threads and
the same split, in turn within one run. The baseline is the copy with the smaller median time; a ratio is the
median over the repetitions of (time of that copy / time of pack). Segments are scattered over the source in
random order.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._common import Result, at_least, last_level_cache_bytes, median, median_interval, parser, report
from megatron_moetion import _C

CHUNK_BYTES = 1 << 20
SEGMENT_SIZES = {"4 KiB": 4 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20, "64 MiB": 64 << 20}
TARGET_FROM_BYTES = 64 << 10
TARGET_RATIO = 0.9


@dataclass(frozen=True, kw_only=True)
class Work:
    """Tables for one segment size over one source and one destination."""

    pieces: npt.NDArray[np.int64]
    chunks: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]

    @property
    def spans(self) -> npt.NDArray[np.int64]:
        """The chunks as (address, nbytes), for verification."""
        return np.ascontiguousarray(self.chunks[:, :2])


def aligned_bytes(nbytes: int) -> npt.NDArray[np.uint8]:
    """Touched memory at a multiple of 64 bytes."""
    raw = np.ones(nbytes + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def make_work(src: npt.NDArray[np.uint8], dst: npt.NDArray[np.uint8], segment_bytes: int) -> Work:
    """Segments in random order; where a segment spans chunks it becomes one piece in each."""
    order = np.random.default_rng(0).permutation(src.size // segment_bytes)
    piece_bytes = min(segment_bytes, CHUNK_BYTES)
    within = np.arange(0, segment_bytes, piece_bytes)
    src_offsets = (order[:, None] * segment_bytes + within).ravel()
    num_chunks, per_chunk = src.size // CHUNK_BYTES, CHUNK_BYTES // piece_bytes
    pieces = np.empty((src_offsets.size, 3), dtype=np.int64)
    pieces[:, 0] = src.ctypes.data + src_offsets
    pieces[:, 1] = dst.ctypes.data + np.arange(src_offsets.size) * piece_bytes
    pieces[:, 2] = piece_bytes
    chunks = np.empty((num_chunks, 4), dtype=np.int64)
    chunks[:, 0] = dst.ctypes.data + np.arange(num_chunks) * CHUNK_BYTES
    chunks[:, 1] = CHUNK_BYTES
    chunks[:, 2] = np.arange(num_chunks) * per_chunk
    chunks[:, 3] = per_chunk
    return Work(pieces=pieces, chunks=chunks, digests=np.zeros(num_chunks, dtype=np.uint64))


def measure(pool: _C.HostPool, work: Work, repetitions: int) -> dict[str, npt.NDArray[np.float64]]:
    """Seconds of each contender in each repetition; who goes first rotates; the first repetition is dropped."""
    spans, read = work.spans, np.zeros_like(work.digests)
    contenders: dict[str, Callable[[], object]] = {
        "pack": lambda: pool.pack(work.pieces, work.chunks, work.digests),
        "memcpy": lambda: pool.copy(work.pieces, work.chunks),
        "streaming": lambda: pool.copy(work.pieces, work.chunks, streaming=True),
        "verify": lambda: pool.digest(spans, read),
    }
    names = list(contenders)
    seconds = np.empty((repetitions + 1, len(names)))
    for repetition in range(repetitions + 1):
        for turn in range(len(names)):
            number = (turn + repetition) % len(names)
            start = time.perf_counter()
            contenders[names[number]]()
            seconds[repetition, number] = time.perf_counter() - start
    if not np.array_equal(read, work.digests):
        raise AssertionError("verification did not read what pack wrote")
    return {name: seconds[1:, number] for number, name in enumerate(names)}


def main() -> None:
    """Measure all sizes on 1 and 2 threads and report."""
    options = parser("Throughput of pack + digest against a plain copy of the same bytes, on the host.")
    options.add_argument("--isa", default="auto", choices=("auto", *_C.available_isas()), help="instruction set")
    args = options.parse_args()
    total_bytes, repetitions = (256 << 20, 9) if args.quick else (1 << 30, 31)
    src, dst = aligned_bytes(total_bytes), aligned_bytes(total_bytes)
    src[:] = np.random.default_rng(1).integers(0, 256, total_bytes, dtype=np.uint8)
    results = []
    for threads in (1, 2):
        pool = _C.HostPool(threads, args.isa)
        for label, segment_bytes in SEGMENT_SIZES.items():
            seconds = measure(pool, make_work(src, dst, segment_bytes), repetitions)
            best_copy = min(seconds["memcpy"], seconds["streaming"], key=median)
            ratios = best_copy / seconds["pack"]
            name = f"{label}, {threads} thread{'s' * (threads > 1)}"
            if segment_bytes >= TARGET_FROM_BYTES:
                results.append(at_least(f"{name}: pack / best copy", median(ratios), "ratio", TARGET_RATIO))
            else:
                results.append(Result(name=f"{name}: pack / best copy", value=median(ratios), unit="ratio"))
            low, high = median_interval(ratios)
            results += [Result(name=f"{name}: 95% interval, low", value=low, unit="ratio")]
            results += [Result(name=f"{name}: 95% interval, high", value=high, unit="ratio")]
            against_memcpy = median(seconds["memcpy"] / seconds["pack"])
            results.append(Result(name=f"{name}: pack / memcpy", value=against_memcpy, unit="ratio"))
            for contender, taken in seconds.items():
                speed = total_bytes / median(taken) / 1e9
                results.append(Result(name=f"{name}: {contender}", value=speed, unit="GB/s"))
    cache = last_level_cache_bytes()
    notes = [
        f"isa {pool.isa}; working set {2 * total_bytes >> 20} MiB (source and destination), "
        f"last-level cache {'unknown' if cache is None else f'{cache >> 20} MiB'}; {repetitions} repetitions",
        "GB/s count the bytes of the segments once; verify reads only",
    ]
    report("host_pack", results, args.json, notes)


if __name__ == "__main__":
    main()
