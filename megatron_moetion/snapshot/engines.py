# SPDX-License-Identifier: Apache-2.0
"""Which engine moves what: a GPU's copy engine from which size of a run on, measured on this machine.

The copy engine takes no multiprocessor from training, so large runs are its own, also where the pack kernel is a little
faster. The kernel digests their source meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np

from megatron_moetion._C import DeviceError, DevicePool

SIZES_BYTES = tuple(1 << shift for shift in range(16, 23))
"""64 KiB to 4 MiB. Below, a copy engine is bound by its per-copy cost; above, nothing changes any more."""
SAMPLE_BYTES = 256 << 20
"""Moved for each sample: about 5 ms of a PCIe 5 link."""
SAMPLE_MIN_BYTES = 32 << 20
"""Less is not measured: 0.6 ms of a PCIe 5 link, of which launches take a tenth."""
REPEATS = 3
TOLERANCE = 0.25
"""So much slower than the kernel the copy engine may be in runs of a size."""
TOLERANCE_AT_LARGEST = 0.6
"""The same in runs of the largest size: noise of 20% in both times makes equal ones differ by half."""
USUAL_BYTES = 1 << 20
"""The choice where nothing could be measured."""


@dataclass(frozen=True, kw_only=True)
class Engines:
    """The choice, and what it was made from."""

    copy_engine_bytes: int | None
    """Runs of this size and more are moved by the copy engine; None: none are."""
    note: str
    """For a person."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Seconds that each engine took for the same bytes in segments of one size."""

    segment_bytes: int
    nbytes: int
    """In all."""
    kernel_s: float
    copy_engine_s: float


def crossover_bytes(samples: Sequence[Sample]) -> int | None:
    """The smallest size from which on the copy engine is nowhere slower than is tolerated; None where it never is."""
    found = None
    for sample in sorted(samples, key=lambda s: s.segment_bytes, reverse=True):
        tolerance = TOLERANCE_AT_LARGEST if found is None else TOLERANCE
        if sample.copy_engine_s > sample.kernel_s * (1 + tolerance):
            break
        found = sample.segment_bytes
    return found


def chosen(samples: Sequence[Sample], copy_engine: str, num_sms: int) -> Engines:
    """The choice from these samples. ``copy_engine`` is the name of the call that moves runs."""
    limit = crossover_bytes(samples)
    shown = max(samples, key=lambda s: s.segment_bytes)
    rates = (
        f"measured with {shown.nbytes >> 20} MiB in runs of {shown.segment_bytes >> 10} KiB: "
        f"{shown.nbytes / shown.copy_engine_s / 1e9:.1f} GB/s, {num_sms} SMs "
        f"{shown.nbytes / shown.kernel_s / 1e9:.1f} GB/s"
    )
    if limit is None:
        return Engines(copy_engine_bytes=None, note=f"no copy engine ({rates})")
    return Engines(copy_engine_bytes=limit, note=f"{copy_engine} from {limit >> 10} KiB on ({rates})")


def sample_bytes(free_bytes: int) -> int:
    """Bytes of a sample where the device has so much free memory: a quarter of it at most; 0 where that is too few."""
    largest = SIZES_BYTES[-1]
    nbytes = min(SAMPLE_BYTES, free_bytes // 4 // largest * largest)
    return nbytes if nbytes >= SAMPLE_MIN_BYTES else 0


@contextmanager
def scratch(device: str) -> Iterator[tuple[int, int]]:
    """Address and bytes of device memory that may be read until the block ends; 0 bytes where too little is free."""
    import torch

    nbytes = sample_bytes(torch.cuda.mem_get_info(device)[0])
    try:
        memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise DeviceError(str(error)) from error
    torch.cuda.synchronize(device)
    yield memory.data_ptr(), nbytes
    del memory


def measured(
    device: str,
    stream: int,
    pool: DevicePool,
    *,
    timeout_s: float,
    scratch: Callable[[str], AbstractContextManager[tuple[int, int]]] = scratch,
    make_pool: Callable[..., DevicePool] = DevicePool,
) -> Engines:
    """Measure and choose for ``pool``'s device, ``cuda:N``; a model of a device has no copy engine worth measuring.

    Takes about half a second (not yet measured). Where memory or driver do not allow it, the usual choice is made.
    """
    if not device.startswith("cuda"):
        return Engines(copy_engine_bytes=None, note="no copy engine")
    why = "too little free memory"
    try:
        with scratch(device) as (source, nbytes):
            if nbytes:
                samples = measure(
                    device,
                    source=source,
                    nbytes=nbytes,
                    stream=stream,
                    num_sms=pool.num_sms,
                    timeout_s=timeout_s,
                    make_pool=make_pool,
                )
                return chosen(samples, pool.copy_engine, pool.num_sms)
    except DeviceError as error:
        why = str(error)
    note = f"{pool.copy_engine} from {USUAL_BYTES >> 10} KiB on (not measured: {why})"
    return Engines(copy_engine_bytes=USUAL_BYTES, note=note)


def measure(
    device: str,
    *,
    source: int,
    nbytes: int,
    stream: int,
    num_sms: int,
    timeout_s: float = 60.0,
    make_pool: Callable[..., DevicePool] = DevicePool,
) -> tuple[Sample, ...]:
    """Time both engines on the device, digest included, from ``nbytes`` of its memory at ``source`` to pinned memory.

    ``nbytes`` is a multiple of the largest of ``SIZES_BYTES``; as many are pinned meanwhile. Raises ``DeviceError``,
    also where a sample takes longer than ``timeout_s``.
    """
    rows = nbytes // SIZES_BYTES[0]
    pool = make_pool(device, rank=0, max_pieces=rows, max_chunks=rows, num_sms=num_sms, timed=True)
    destination = pool.pinned(nbytes)
    samples = []
    for size in SIZES_BYTES:
        starts = np.arange(0, nbytes, size, dtype=np.int64)[::-1]  # descending: no two are one run
        numbers, sizes = np.arange(len(starts)), np.full(len(starts), size)
        targets = starts + destination.ctypes.data
        pieces = np.stack([starts + source, targets, sizes], axis=1)
        chunks = np.stack([targets, sizes, numbers, np.ones_like(numbers)], axis=1)
        best_s = {}
        for engine in (None, 1):
            seconds = []
            for _ in range(1 + REPEATS):  # the first one warms up
                ticket = pool.pack(pieces, chunks, stream=stream, copy_engine_bytes=engine)
                if not pool.wait(ticket, timeout_s=timeout_s):
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(destination))  # never freed: the device may write there
                    raise DeviceError(f"{nbytes} bytes are not moved after {timeout_s:.0f} s")
                seconds.append(pool.device_seconds(ticket))
                pool.finish(ticket)
            best_s[engine] = min(seconds[1:])
        samples.append(Sample(segment_bytes=size, nbytes=nbytes, kernel_s=best_s[None], copy_engine_s=best_s[1]))
    return tuple(samples)
