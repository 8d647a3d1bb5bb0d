# SPDX-License-Identifier: Apache-2.0
"""Which engine is chosen, how fast are snapshots against the link, and on how many multiprocessors do kernels run?

    engines   the choice between copy engine and kernel, repeated: it should be the same each time
    speed     bytes a second into pinned memory, against a plain copy of the same bytes in the same run
    sms       multiprocessors that a kernel ran on, against its limit

``--device model:0`` runs the same code without a GPU; its figures say nothing of one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._common import Result, at_least, at_most, median, parser, report
from megatron_moetion import _C
from megatron_moetion.snapshot import engines
from megatron_moetion.snapshot.device import DEFAULT_SMS

QUESTIONS = ("engines", "speed", "sms")
CHOICES = 5
CHUNK_BYTES = 1 << 20
SPEED_BYTES = 1 << 30
SEGMENTS = {"64 KiB": 64 << 10, "1 MiB": 1 << 20, "64 MiB": 64 << 20}
SPEED_SHARE = 0.9
LIMITS = (1, 2, 4, 8, 16)
"""Multiprocessors that a kernel may use in a census."""
Table = npt.NDArray[np.int64]


class Memory:
    """Bytes of the device and pinned bytes of the host, with a stream. The model's device is this process."""

    def __init__(self, device: str, nbytes: int) -> None:
        self.device, self.nbytes, self.stream = device, nbytes, 0
        self.on_gpu = device.startswith("cuda")
        if self.on_gpu:
            import torch

            self._source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
            self._target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            self._side = torch.cuda.Stream(device)
            self.stream = int(self._side.cuda_stream)
            self.source, self.target = self._source.data_ptr(), self._target.data_ptr()
            torch.cuda.synchronize(device)
        else:
            self._host = (np.zeros(nbytes, np.uint8), np.zeros(nbytes, np.uint8))
            self.source, self.target = (array.ctypes.data for array in self._host)

    def plain_copy_s(self) -> float:
        """Seconds of one plain copy of all bytes to the host."""
        if not self.on_gpu:
            started = time.perf_counter()
            self._host[1][:] = self._host[0]
            return time.perf_counter() - started
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._side):
            begin.record()
            self._target.copy_(self._source, non_blocking=True)
            end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def tables(memory: Memory, segment_bytes: int) -> tuple[Table, Table]:
    """Pieces and chunks that bring segments of one size, in random order, to the host."""
    order = np.random.default_rng(0).permutation(memory.nbytes // segment_bytes)
    piece = min(segment_bytes, CHUNK_BYTES)
    starts = (order[:, None] * segment_bytes + np.arange(0, segment_bytes, piece)).ravel()
    targets = memory.target + np.arange(starts.size, dtype=np.int64) * piece
    pieces = np.stack([starts + memory.source, targets, np.full(starts.size, piece)], axis=1)
    num_chunks, per_chunk = memory.nbytes // CHUNK_BYTES, CHUNK_BYTES // piece
    at = memory.target + np.arange(num_chunks, dtype=np.int64) * CHUNK_BYTES
    first = np.arange(num_chunks) * per_chunk
    chunks = np.stack([at, np.full(num_chunks, CHUNK_BYTES), first, np.full(num_chunks, per_chunk)], axis=1)
    return np.ascontiguousarray(pieces, dtype=np.int64), np.ascontiguousarray(chunks, dtype=np.int64)


@contextmanager
def packed(pool: _C.DevicePool, pieces: Table, chunks: Table, stream: int, engine: int | None) -> Iterator[int]:
    """A ticket whose work is done; it is finished afterwards."""
    ticket = pool.pack(pieces, chunks, stream=stream, copy_engine_bytes=engine)
    try:
        if not pool.wait(ticket, timeout_s=60):
            raise TimeoutError(f"{len(chunks)} chunks are not there after 60 s")
        yield ticket
    finally:
        pool.finish(ticket)


def samples_of(memory: Memory) -> tuple[engines.Sample, ...]:
    """What the choice of an engine is made from."""
    return engines.measure(
        memory.device,
        source=memory.source,
        nbytes=memory.nbytes,
        stream=memory.stream,
        num_sms=DEFAULT_SMS,
        make_pool=_C.DevicePool,
    )


def sampled(device: str) -> Memory:
    """Memory for these samples."""
    return Memory(device, engines.SAMPLE_BYTES if device.startswith("cuda") else engines.SIZES_BYTES[-1])


def choices(device: str, quick: bool) -> list[Result]:
    """The choice, made several times; and what each engine gave in runs of each size, the first time."""
    memory = sampled(device)
    samples = [samples_of(memory) for _ in range(CHOICES)]
    found = [engines.crossover_bytes(each) for each in samples]
    name = "choice {}: copy engine from"
    results = [Result(name=name.format(n), value=size, unit="bytes") for n, size in enumerate(found, 1)]
    name, count = f"different choices in {CHOICES}", len(set(found))
    # A model of a device has no engines whose times would mean anything.
    is_gpu = device.startswith("cuda")
    results.append(at_most(name, count, "", 1) if is_gpu else Result(name=name, value=count, unit=""))
    for sample in samples[0]:
        for name, seconds in (("copy engine", sample.copy_engine_s), ("kernel", sample.kernel_s)):
            label = f"{name}, runs of {sample.segment_bytes >> 10} KiB"
            results.append(Result(name=label, value=sample.nbytes / seconds / 1e9, unit="GB/s"))
    return results


def speeds(device: str, quick: bool) -> list[Result]:
    """Snapshots against a plain copy, in turns, with the engine that a run would take."""
    on_gpu = device.startswith("cuda")
    total = SPEED_BYTES if on_gpu else 64 << 20
    memory, repeats = Memory(device, total), 3 if quick else 7
    engine = engines.crossover_bytes(samples_of(sampled(device)))
    results = []
    links = []
    for label, size in SEGMENTS.items():
        pieces, chunks = tables(memory, size)
        pool = _C.DevicePool(
            device, rank=0, max_pieces=len(pieces), max_chunks=len(chunks), num_sms=DEFAULT_SMS, timed=True
        )
        ours, link = [], []
        for repeat in range(1 + repeats):
            with packed(pool, pieces, chunks, memory.stream, engine) as ticket:
                taken = pool.device_seconds(ticket)
            plain = memory.plain_copy_s()
            if repeat:  # the first one warms up
                ours.append(taken)
                link.append(plain)
        links += link
        ratio, name = median(np.array(link) / np.array(ours)), f"snapshot of segments of {label}"
        results.append(Result(name=name, value=total / median(ours) / 1e9, unit="GB/s"))
        shown = f"{name} / link"
        results.append(
            at_least(shown, ratio, "ratio", SPEED_SHARE) if on_gpu else Result(name=shown, value=ratio, unit="ratio")
        )
    return [Result(name="link: plain copy to pinned memory", value=total / median(links) / 1e9, unit="GB/s"), *results]


def census(device: str, quick: bool) -> list[Result]:
    """Multiprocessors that ran a kernel, for each limit."""
    memory = Memory(device, 64 << 20)
    pieces, chunks = tables(memory, SEGMENTS["64 KiB"])
    results = []
    for limit in LIMITS:
        pool = _C.DevicePool(device, rank=0, max_pieces=len(pieces), max_chunks=len(chunks), num_sms=limit, census=True)
        with packed(pool, pieces, chunks, memory.stream, None) as ticket:
            found = len(pool.multiprocessors(ticket))
        results.append(at_most(f"multiprocessors of a kernel that may use {limit}", found, "", limit))
    return results


ANSWERS: dict[str, Callable[[str, bool], list[Result]]] = {"engines": choices, "speed": speeds, "sms": census}


def main() -> int:
    """Answer the chosen questions, or all."""
    options = parser(__doc__ or "")
    options.add_argument("--device", default="cuda:0", help="cuda:N, or model:0")
    options.add_argument("--only", action="append", choices=QUESTIONS)
    args = options.parse_args()
    results = [result for question in args.only or QUESTIONS for result in ANSWERS[question](args.device, args.quick)]
    report("gpu_link", results, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
