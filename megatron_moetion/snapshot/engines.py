# SPDX-License-Identifier: Apache-2.0
"""Which engine moves what: from which size on a GPU's copy engine beats the pack kernel, measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_moetion._C import DevicePool

SIZES_BYTES = tuple(1 << shift for shift in range(16, 23))
"""64 KiB to 4 MiB. Below, a copy engine is bound by its per-copy cost; above, nothing changes any more."""
SAMPLE_BYTES = 32 << 20
"""Moved for each sample: a third of a millisecond's worth of a fast link would drown in launch costs."""
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Seconds that each engine took for the same bytes in segments of one size."""

    segment_bytes: int
    kernel_s: float
    copy_engine_s: float


def crossover_bytes(samples: Sequence[Sample]) -> int | None:
    """The smallest size from which on the copy engine is nowhere slower; None where it never is."""
    found = None
    for sample in sorted(samples, key=lambda s: s.segment_bytes, reverse=True):
        if sample.copy_engine_s > sample.kernel_s:
            break
        found = sample.segment_bytes
    return found


def measure(device: str, *, source: int, stream: int, num_sms: int) -> tuple[Sample, ...]:
    """Time both engines, digest included, from ``SAMPLE_BYTES`` of device memory at ``source`` to pinned memory.

    Takes some 50 ms on a GPU and pins ``SAMPLE_BYTES`` meanwhile.
    """
    rows = SAMPLE_BYTES // SIZES_BYTES[0]
    pool = DevicePool(device, rank=0, max_pieces=rows, max_chunks=rows, num_sms=num_sms)
    destination = pool.pinned(SAMPLE_BYTES)
    samples = []
    for size in SIZES_BYTES:
        starts = np.arange(0, SAMPLE_BYTES, size, dtype=np.int64)[::-1]  # descending: no two are one run
        numbers, sizes = np.arange(len(starts)), np.full(len(starts), size)
        targets = starts + destination.ctypes.data
        pieces = np.stack([starts + source, targets, sizes], axis=1)
        chunks = np.stack([targets, sizes, numbers, np.ones_like(numbers)], axis=1)
        best_s = {}
        for engine in (None, 1):
            seconds = []
            for _ in range(1 + REPEATS):  # the first one warms up
                started = time.perf_counter()
                pool.finish(pool.pack(pieces, chunks, stream=stream, copy_engine_bytes=engine))
                seconds.append(time.perf_counter() - started)
            best_s[engine] = min(seconds[1:])
        samples.append(Sample(segment_bytes=size, kernel_s=best_s[None], copy_engine_s=best_s[1]))
    return tuple(samples)
