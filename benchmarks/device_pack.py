# SPDX-License-Identifier: Apache-2.0
"""Does the GPU's pack kernel run at the speed of the memory or of the link?

All ratios are of contenders that take turns within one run on one GPU, medians over the repetitions. Limits (the
device's own copy speed, the link's) are measured in the same run and printed, so that each figure can be read
against them. Without a GPU every figure is null.

    (a) device to device, against a plain copy of the same bytes
    (b) into pinned host memory, against cudaMemcpyAsync
    (c) against what one would write in torch, on an expert inventory
    (d) what the digest costs
    (e) how much a matmul loop slows down while snapshots stream, by the kernel and by the copy engine

Our own work is timed by the pool's events, which stand right around it: the checks that the host makes of its tables
first take milliseconds for a million pieces, and the device is idle meanwhile. Everything else is timed by events
around it. ``--parts`` chooses some: ``--parts e`` is what a trial with another ``CUDA_DEVICE_MAX_CONNECTIONS`` needs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._common import Result, at_least, at_most, median, median_interval, parser, report
from megatron_moetion import _C
from megatron_moetion.snapshot.device import DEFAULT_SMS
from megatron_moetion.snapshot.engines import SAMPLE_BYTES, Sample, crossover_bytes, measure

CHUNK_BYTES = 1 << 20
DEVICE = "cuda:0"
ALL_SMS = 10_000
SEGMENTS = {
    "512 B": 512,
    "4 KiB": 4 << 10,
    "16 KiB": 16 << 10,
    "64 KiB": 64 << 10,
    "1 MiB": 1 << 20,
    "64 MiB": 64 << 20,
}
EXPERTS = (8, 64, 256)
REGION_BYTES = {"16 KiB": 16 << 10, "128 KiB": 128 << 10, "2 MiB": 2 << 20}
CHOICES = 5
WHOLE, QUICK = (1 << 30, 15, 25), (256 << 20, 5, 5)
"""Bytes a repetition, repetitions, blocks of matmuls."""
REGIONS_PER_EXPERT = 6  # two weight matrices, each with fp32 main values and two moments
MATMUL_SIZE = 4096
SMS_SWEEP = (1, 2, 4, 8, 16, 32)
Seconds = npt.NDArray[np.float64]


class Work:
    """Segments of one size in random order from a source tensor to an address, as a pool keeps them."""

    def __init__(self, source: torch.Tensor, target: int, segment_bytes: int, num_sms: int) -> None:
        order = np.random.default_rng(0).permutation(source.numel() // segment_bytes)
        piece_bytes = min(segment_bytes, CHUNK_BYTES)
        starts = (order[:, None] * segment_bytes + np.arange(0, segment_bytes, piece_bytes)).ravel()
        self.pieces = np.empty((starts.size, 3), dtype=np.int64)
        self.pieces[:, 0] = source.data_ptr() + starts
        self.pieces[:, 1] = target + np.arange(starts.size) * piece_bytes
        self.pieces[:, 2] = piece_bytes
        num_chunks, per_chunk = source.numel() // CHUNK_BYTES, CHUNK_BYTES // piece_bytes
        self.chunks = np.empty((num_chunks, 5), dtype=np.int64)
        self.chunks[:, 0] = self.chunks[:, 4] = target + np.arange(num_chunks) * CHUNK_BYTES
        self.chunks[:, 1], self.chunks[:, 3] = CHUNK_BYTES, per_chunk
        self.chunks[:, 2] = np.arange(num_chunks) * per_chunk
        rows = max(len(self.pieces), num_chunks)
        self.pool = _C.DevicePool(DEVICE, rank=0, max_pieces=rows, max_chunks=rows, num_sms=num_sms, timed=True)
        self.pool.upload_pieces(self.pieces)

    def pack(self, stream: int, engine: int | None = None) -> int:
        """Enqueue; returns the ticket."""
        return self.pool.pack_uploaded(self.chunks, stream=stream, copy_engine_bytes=engine)


def device_seconds(
    contenders: Mapping[str, Callable[[int], int | None]], pool: _C.DevicePool, n: int
) -> dict[str, Seconds]:
    """Seconds of each contender on the device, in turn; a contender may return a ticket of ``pool``, which is timed."""
    stream = torch.cuda.Stream()
    names, taken = list(contenders), np.empty((n + 1, len(contenders)))
    torch.cuda.synchronize()
    for repetition in range(n + 1):
        for turn in range(len(names)):
            number = (turn + repetition) % len(names)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(stream):
                begin.record(stream)
                ticket = contenders[names[number]](stream.cuda_stream)
                end.record(stream)
            end.synchronize()
            if ticket is None:
                taken[repetition, number] = begin.elapsed_time(end) / 1e3
            else:
                taken[repetition, number] = seconds_of(pool, ticket)
    return {name: taken[1:, number] for number, name in enumerate(names)}


def seconds_of(pool: _C.DevicePool, ticket: int) -> float:
    """Wait for a ticket and finish it; how long it took on the device."""
    if not pool.wait(ticket, timeout_s=60):
        raise TimeoutError(f"ticket {ticket} is not done after 60 s")
    seconds = pool.device_seconds(ticket)
    pool.finish(ticket)
    return seconds


def wall_seconds(contenders: Mapping[str, Callable[[], None]], n: int) -> dict[str, Seconds]:
    """Seconds of each contender by the host's clock, from the call until all bytes have arrived, in turn."""
    names, taken = list(contenders), np.empty((n + 1, len(contenders)))
    for repetition in range(n + 1):
        for turn in range(len(names)):
            number = (turn + repetition) % len(names)
            torch.cuda.synchronize()
            started = time.perf_counter()
            contenders[names[number]]()
            torch.cuda.synchronize()
            taken[repetition, number] = time.perf_counter() - started
    return {name: taken[1:, number] for number, name in enumerate(names)}


def device_to_device(total: int, n: int) -> list[Result]:
    source = torch.randint(0, 256, (total,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)

    def plain(stream: int) -> None:
        target.copy_(source)

    results = []
    for label, size in SEGMENTS.items():
        work = Work(source, target.data_ptr(), size, ALL_SMS)
        scatter = lambda stream, work=work: work.pool.scatter(work.pieces, stream=stream)
        # below 1 MiB the table that a scatter brings along would count
        contenders = {"pack": work.pack, "copy": plain} | ({"no digest": scatter} if size >= 1 << 20 else {})
        seconds = device_seconds(contenders, work.pool, n)
        ratios = seconds["copy"] / seconds["pack"]
        name = f"(a) device to device, {label}: pack / plain copy"
        target_ratio = 0.85 if size >= 16 << 10 else (0.5 if size == 512 else None)
        if target_ratio is None:
            results.append(Result(name=name, value=median(ratios), unit="ratio"))
        else:
            results.append(at_least(name, median(ratios), "ratio", target_ratio))
        if "no digest" in seconds:
            cost = median(seconds["pack"] / seconds["no digest"]) - 1
            results.append(at_most(f"(d) digest, device to device, {label}: added time", cost, "share", 0.05))
    speed = total / median(seconds["copy"]) / 1e9
    return [*results, Result(name="limit: plain copy on the device", value=speed, unit="GB/s")]


def engine_samples() -> tuple[Sample, ...]:
    """What the choice of the engine is made from at a start, measured anew."""
    source = torch.zeros(SAMPLE_BYTES, dtype=torch.uint8, device=DEVICE)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    return measure(DEVICE, source=source.data_ptr(), nbytes=SAMPLE_BYTES, stream=side.cuda_stream, num_sms=DEFAULT_SMS)


def choice_of_engine() -> list[Result]:
    """The choice is the same at each start, or it was a toss of a coin."""
    name, results, rates = "(b) choice {}: copy engine from this size on (0: never)", [], list[float]()
    for number in range(CHOICES):
        samples = engine_samples()
        rates.append(max(s.kernel_s / s.copy_engine_s for s in samples))
        results.append(Result(name=name.format(number + 1), value=crossover_bytes(samples) or 0, unit="bytes"))
    different = len({r.value for r in results}) - 1
    return [
        *results,
        at_most(f"(b) other choices than the first, of {CHOICES}", different, "choices", 0),
        Result(name="(b) speed of the copy engine / kernel, best size", value=median(rates), unit="ratio"),
    ]


def into_pinned(total: int, n: int, crossover: int | None) -> list[Result]:
    source = torch.randint(0, 256, (total,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty(total, dtype=torch.uint8, pin_memory=True)

    def plain(stream: int) -> None:
        target.copy_(source, non_blocking=True)

    results = []
    for label in ("16 KiB", "64 KiB", "1 MiB", "64 MiB"):
        work = Work(source, target.data_ptr(), SEGMENTS[label], DEFAULT_SMS)
        ours = lambda stream, work=work: work.pack(stream, crossover)
        kernel = lambda stream, work=work: work.pack(stream)
        seconds = device_seconds({"ours": ours, "kernel": kernel, "copy": plain}, work.pool, n)
        name = f"(b) into pinned memory, {label}"
        results.append(
            at_least(f"{name}: pack / cudaMemcpyAsync", median(seconds["copy"] / seconds["ours"]), "ratio", 0.95)
        )
        kernel_ratio = median(seconds["copy"] / seconds["kernel"])
        results.append(Result(name=f"{name}: kernel alone / cudaMemcpyAsync", value=kernel_ratio, unit="ratio"))
    for sms in SMS_SWEEP:
        work = Work(source, target.data_ptr(), SEGMENTS["64 KiB"], sms)
        seconds = device_seconds({"kernel": work.pack, "copy": plain}, work.pool, n)
        ratio = median(seconds["copy"] / seconds["kernel"])
        results.append(Result(name=f"(b) kernel on {sms} SMs, 64 KiB / cudaMemcpyAsync", value=ratio, unit="ratio"))
    speed = total / median(seconds["copy"]) / 1e9
    return [*results, Result(name="limit: cudaMemcpyAsync to pinned memory", value=speed, unit="GB/s")]


def against_torch(n: int, crossover: int | None) -> list[Result]:
    results = []
    for label, nbytes in REGION_BYTES.items():
        for experts in EXPERTS:
            count = experts * REGIONS_PER_EXPERT
            if count * nbytes > 4 << 30:
                continue
            sources = [torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=DEVICE) for _ in range(count)]
            pinned = torch.empty(count * nbytes, dtype=torch.uint8, pin_memory=True)
            seconds = wall_seconds(contenders_in_torch(sources, pinned, crossover), n)
            ours = seconds.pop("ours")
            for name, taken in seconds.items():
                title = f"(c) {experts} experts of 6 x {label}: {name} / ours"
                value = median(taken / ours)
                wanted = name == "loop of copy_" and experts == 256 and label == "16 KiB"
                results.append(
                    at_least(title, value, "ratio", 5) if wanted else Result(name=title, value=value, unit="ratio")
                )
    return results


def contenders_in_torch(
    sources: Sequence[torch.Tensor], pinned: torch.Tensor, crossover: int | None
) -> dict[str, Callable[[], None]]:
    """Ours and three ways to write it in torch, from the same tensors to the same pinned memory."""
    nbytes = sources[0].numel()
    slices = list(pinned.split(nbytes))
    starts = pinned.data_ptr() + np.arange(len(sources), dtype=np.int64) * nbytes
    sizes = np.full(len(sources), nbytes)
    pieces = np.stack([np.array([s.data_ptr() for s in sources]), starts, sizes], axis=1)
    numbers = np.arange(len(sources))
    chunks = np.stack([starts, sizes, numbers, np.ones_like(numbers), starts], axis=1)
    rows = len(sources)
    pool = _C.DevicePool(DEVICE, rank=0, max_pieces=rows, max_chunks=rows, num_sms=DEFAULT_SMS)
    pool.upload_pieces(pieces)
    stream, digests = torch.cuda.Stream(), np.empty(rows, dtype=np.uint64)

    def loop() -> None:
        for target, source in zip(slices, sources, strict=True):
            target.copy_(source, non_blocking=True)

    def cat_and_copy() -> None:
        pinned.copy_(torch.cat(list(sources)), non_blocking=True)

    def ours() -> None:
        pool.finish(pool.pack_uploaded(chunks, stream=stream.cuda_stream, copy_engine_bytes=crossover), digests)

    return {
        "ours": ours,
        "loop of copy_": loop,
        "_foreach_copy_": lambda: torch._foreach_copy_(slices, list(sources), non_blocking=True),
        "cat and copy": cat_and_copy,
    }


def slowdown_of_matmul(total: int, blocks: int, engine: int | None) -> list[Result]:
    """Blocks of matmuls with and without snapshots that stream all the while, in turn.

    With ``engine`` bytes 1 the copy engine moves runs of 64 MiB, else the kernel segments of 64 KiB.
    """
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randint(0, 256, (total,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    work = Work(source, target.data_ptr(), SEGMENTS["64 KiB" if engine is None else "64 MiB"], DEFAULT_SMS)
    side, per_block = torch.cuda.Stream(), 64
    torch.cuda.synchronize()
    taken: dict[bool, list[float]] = {False: [], True: []}
    for block in range(2 * blocks + 2):
        streaming = block % 2 == 1
        tickets = [work.pack(side.cuda_stream, engine) for _ in range(2)] if streaming else []
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(per_block):
            torch.mm(a, b, out=out)
        end.record()
        while not end.query():
            if tickets and work.pool.wait(tickets[0], timeout_s=0):
                work.pool.finish(tickets.pop(0))
                tickets.append(work.pack(side.cuda_stream, engine))
            time.sleep(1e-4)
        for ticket in tickets:
            work.pool.finish(ticket)
        if block >= 2:
            taken[streaming].append(begin.elapsed_time(end) / 1e3)
    ratios = np.array(taken[True]) / np.array(taken[False]) - 1
    flops = 2 * MATMUL_SIZE**3 * per_block / median(taken[False])
    low, high = median_interval(ratios)
    name = f"(e) matmul loop beside snapshots by the {'kernel' if engine is None else 'copy engine'}"
    return [
        at_most(f"{name}: slowdown", median(ratios), "share", 0.01),
        Result(name=f"{name}: 95% interval, low", value=low, unit="share"),
        Result(name=f"{name}: 95% interval, high", value=high, unit="share"),
        Result(name="limit: bf16 matmul alone", value=flops / 1e12, unit="TFLOP/s"),
    ]


def measured(parts: str, total: int, n: int, blocks: int) -> Iterator[Result]:
    """The figures of the chosen parts."""
    if "a" in parts or "d" in parts:
        yield from device_to_device(total, n)
    if "b" in parts:
        yield from choice_of_engine()
    if "b" in parts or "c" in parts:
        crossover = crossover_bytes(engine_samples())
        yield Result(name="copy engine from this size on (0: never)", value=crossover or 0, unit="bytes")
    if "b" in parts:
        yield from into_pinned(total, n, crossover)
    if "c" in parts:
        yield from against_torch(n, crossover)
    if "e" in parts:
        for engine in (None, 1):
            yield from slowdown_of_matmul(total, blocks, engine)


def main() -> None:
    """Measure on one GPU and report; without one, say so in every figure."""
    options = parser("Throughput and side effects of the GPU's pack kernel.")
    options.add_argument("--parts", default="abcde", metavar="LETTERS", help="of (a) to (e) above; default: all")
    args = options.parse_args()
    if not (_C.built_with_cuda() and torch.cuda.is_available()):
        names = (
            "(a) device to device",
            "(b) into pinned memory",
            "(c) against torch",
            "(d) digest",
            "(e) matmul slowdown",
        )
        results = [Result(name=name, value=None, unit="ratio") for name in names]
        report("device_pack", results, args.json, ["no NVIDIA GPU here: nothing was measured"])
        return
    total, n, blocks = QUICK if args.quick else WHOLE
    notes = [
        f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}; {total >> 20} MiB a repetition, {n} repetitions"
    ]
    report("device_pack", list(measured(args.parts, total, n, blocks)), args.json, notes)


if __name__ == "__main__":
    main()
