# SPDX-License-Identifier: Apache-2.0
"""Cases for the pack kernels and what they must give, bit for bit; the same for the host, the device's model and a GPU.

A *backend* is a way to run them: it owns memory and calls one pool. Every byte around and between destinations is
poisoned, so that one that is written too much, or not at all, shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_moetion import _C
from megatron_moetion.snapshot import reference

POISON = 0xA5
MARGIN = 192
SIZES = (0, 1, 7, 8, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 512, 513, 4095, 4096, 4097)
Bytes = npt.NDArray[np.uint8]
Table = npt.NDArray[np.int64]
Digests = npt.NDArray[np.uint64]


class Memory(Protocol):
    """Bytes somewhere, at an address with a chosen misalignment."""

    address: int

    def read(self) -> Bytes: ...
    def write(self, content: Bytes) -> None: ...


class HostMemory:
    """Bytes of this process, ``misalignment`` past a multiple of 64, poisoned."""

    def __init__(self, nbytes: int, misalignment: int = 0) -> None:
        raw = np.full(nbytes + 128, POISON, dtype=np.uint8)
        start = (misalignment - raw.ctypes.data) % 64
        self.view = raw[start : start + nbytes]
        self.address = int(self.view.ctypes.data)

    def read(self) -> Bytes:
        return self.view.copy()

    def write(self, content: Bytes) -> None:
        self.view[:] = content


class Backend(Protocol):
    """One implementation of the kernels."""

    def source(self, nbytes: int, misalignment: int) -> Memory: ...
    def destination(self, nbytes: int, misalignment: int) -> Memory: ...
    def pack(self, pieces: Table, chunks: Table) -> Digests: ...
    def scatter(self, pieces: Table) -> None: ...


class HostBackend:
    """``HostPool``, which works at once."""

    def __init__(self, threads: int = 2, isa: str = "auto") -> None:
        self.pool = _C.HostPool(threads, isa)

    def source(self, nbytes: int, misalignment: int) -> Memory:
        return HostMemory(nbytes, misalignment)

    destination = source

    def pack(self, pieces: Table, chunks: Table) -> Digests:
        digests = np.full(len(chunks), 7, dtype=np.uint64)
        assert self.pool.pack(pieces, chunks, digests)
        return digests

    def scatter(self, pieces: Table) -> None:
        self.pool.scatter(pieces)

    def digest(self, spans: Table) -> Digests:
        digests = np.full(len(spans), 7, dtype=np.uint64)
        self.pool.digest(spans, digests)
        return digests


class DeviceBackend:
    """``DevicePool``. The device ``model:0`` has host memory; a GPU's tests override where memory is.

    ``seed`` is the model's.
    """

    def __init__(
        self, device: str = "model:0", copy_engine_bytes: int | None = None, num_sms: int = 4, seed: int = 0
    ) -> None:
        self.pool = _C.DevicePool(device, rank=0, max_pieces=40_000, max_chunks=12_000, num_sms=num_sms, seed=seed)
        self.copy_engine_bytes = copy_engine_bytes
        self.stream = 0

    def source(self, nbytes: int, misalignment: int) -> Memory:
        return HostMemory(nbytes, misalignment)

    def destination(self, nbytes: int, misalignment: int) -> Memory:
        return HostMemory(nbytes, misalignment)

    def pack(self, pieces: Table, chunks: Table) -> Digests:
        ticket = self.pool.pack(pieces, chunks, stream=self.stream, copy_engine_bytes=self.copy_engine_bytes)
        digests = np.full(len(chunks), 7, dtype=np.uint64)
        self.pool.finish(ticket, digests)
        return digests

    def scatter(self, pieces: Table) -> None:
        ticket = self.pool.scatter(pieces, stream=self.stream, copy_engine_bytes=self.copy_engine_bytes)
        self.pool.finish(ticket)


class UploadedBackend(DeviceBackend):
    """The device with uploaded pieces, whose destinations count from a place far from any address."""

    def pack(self, pieces: Table, chunks: Table) -> Digests:
        base = chunks[:, :1].min(initial=1 << 62) - 4096
        self.pool.upload_pieces(pieces - np.array([0, base, 0]) if len(pieces) else pieces)
        rows = np.ascontiguousarray(np.hstack([chunks, chunks[:, :1] - base]))
        ticket = self.pool.pack_uploaded(rows, stream=self.stream, copy_engine_bytes=self.copy_engine_bytes)
        digests = np.full(len(chunks), 7, dtype=np.uint64)
        self.pool.finish(ticket, digests)
        return digests


Layout = Sequence[Sequence[tuple[int, int]]]
"""For each chunk its (gap, nbytes) pairs, in bytes; a last pair without bytes is a gap at the end."""


@dataclass
class Case:
    """Chunks of one destination, with margins between them, and the sources of their pieces."""

    contents: list[Bytes]
    sources: list[Memory]
    dst: Memory
    pieces: Table
    chunks: Table
    dst_bytes: int

    def run(self, backend: Backend) -> tuple[Bytes, Digests]:
        """Everything at the destination, margins included, and the digests."""
        self.dst.write(np.full(self.dst_bytes, POISON, dtype=np.uint8))
        digests = backend.pack(self.pieces, self.chunks)
        return self.dst.read(), digests

    def expected(self) -> tuple[Bytes, Digests]:
        """The same by the reference."""
        found = np.full(self.dst_bytes, POISON, dtype=np.uint8)
        digests = np.zeros(len(self.chunks), dtype=np.uint64)
        for number, (start, nbytes, first, count) in enumerate(self.chunks.tolist()):
            chunk = found[start - self.dst.address : start - self.dst.address + nbytes]
            chunk[:] = 0
            for at, (_, dst, length) in enumerate(self.pieces[first : first + count].tolist(), first):
                chunk[dst - start : dst - start + length] = self.contents[at]
            digests[number] = reference.digest_chunk(chunk)
        return found, digests


def make_case(
    backend: Backend,
    layout: Layout,
    rng: np.random.Generator,
    misalignment: int = 0,
    src_step: int = 1,
) -> Case:
    """Sources lie at random multiples of ``src_step``."""
    sizes = [sum(gap + nbytes for gap, nbytes in chunk) for chunk in layout]
    total = sum(sizes) + MARGIN * (len(sizes) + 1)
    dst = backend.destination(total, misalignment)
    pieces: list[tuple[int, ...]] = []
    chunks: list[tuple[int, ...]] = []
    contents, sources, at = [], [], MARGIN
    for chunk, size in zip(layout, sizes, strict=True):
        chunks.append((dst.address + at, size, len(pieces), len(chunk)))
        cursor = at
        for gap, nbytes in chunk:
            content = rng.integers(0, 256, nbytes, dtype=np.uint8)
            source = backend.source(nbytes, int(rng.integers(64)) // src_step * src_step)
            source.write(content)
            contents.append(content)
            sources.append(source)
            cursor += gap
            pieces.append((source.address, dst.address + cursor, nbytes))
            cursor += nbytes
        at += size + MARGIN
    return Case(
        contents=contents,
        sources=sources,
        dst=dst,
        pieces=np.array(pieces, np.int64).reshape(-1, 3),
        chunks=np.array(chunks, np.int64).reshape(-1, 4),
        dst_bytes=total,
    )


def check(case: Case, backend: Backend) -> None:
    """The backend gives what the reference gives, and touches nothing else."""
    want_bytes, want_digests = case.expected()
    got_bytes, got_digests = case.run(backend)
    np.testing.assert_array_equal(got_bytes, want_bytes)
    np.testing.assert_array_equal(got_digests, want_digests)


# -- the cases, each called by the host's and by the GPU's tests ---------------------------------------------


def every_size_and_alignment(backend: Backend) -> None:
    rng = np.random.default_rng(1)
    for misalignment in (0, 1, 8, 16, 32, 63):
        check(make_case(backend, [[(0, size)] for size in SIZES], rng, misalignment), backend)
        with_gaps = [[(gap, size), (gap, 0)] for size in SIZES for gap in (0, 1, 64, 5000)]
        check(make_case(backend, with_gaps, rng, misalignment), backend)


def each_source_alignment(backend: Backend) -> None:
    rng = np.random.default_rng(12)
    for step in (1, 2, 4, 8, 16, 32):
        check(make_case(backend, [[(0, 5000)] * 3, [(0, 20_001)]], rng, src_step=step), backend)


def pieces_that_share_lines_and_words(backend: Backend) -> None:
    rng = np.random.default_rng(2)
    layout = [[(int(g), int(n)) for g, n in rng.integers(0, (9, 40), (400, 2))] for _ in range(5)]
    check(make_case(backend, layout, rng), backend)
    check(make_case(backend, [[(0, 1)] * 1000, [], [(0, 0)] * 3, [(5, 0)]], rng), backend)


def chunks_longer_than_one_task(backend: Backend) -> None:
    """Above 1 MiB host stores bypass the caches; above 256 KiB several threads share one chunk."""
    rng = np.random.default_rng(3)
    long = [[(0, 700_001), (63, 900_000), (1, 0)], [(0, 3)], [(0, 262_144)], [(300_000, 1)]]
    check(make_case(backend, long, rng), backend)
    check(make_case(backend, [[(0, 1_500_007)]], rng, misalignment=8), backend)


def ten_thousand_segments(backend: Backend) -> None:
    rng = np.random.default_rng(13)
    sizes = rng.integers(0, 700, 10_000)
    layout = [[(int(n) % 3, int(n)) for n in sizes[at : at + 100]] for at in range(0, 10_000, 100)]
    check(make_case(backend, layout, rng), backend)
    check(make_case(backend, [[(0, 15)] for _ in range(10_000)], rng), backend)


def one_gibibyte(backend: Backend) -> None:
    """One segment of 1 GiB + 17 bytes between tiny ones, in chunks of 1 MiB, as a capture would have it."""
    rng = np.random.default_rng(14)
    total, chunk_bytes = (1 << 30) + 17, 1 << 20
    source, content = backend.source(total, 4), np.tile(rng.integers(0, 256, 1_048_583, dtype=np.uint8), 1025)[:total]
    source.write(content)
    dst = backend.destination(total + 2 * MARGIN, 0)
    starts = np.arange(0, total, chunk_bytes, dtype=np.int64)
    sizes = np.minimum(chunk_bytes, total - starts)
    pieces = np.stack([starts + source.address, starts + dst.address + MARGIN, sizes], axis=1)
    numbers = np.arange(len(starts))
    chunks = np.stack([pieces[:, 1], sizes, numbers, np.ones_like(numbers)], axis=1)
    digests = backend.pack(np.ascontiguousarray(pieces), np.ascontiguousarray(chunks))
    found = dst.read()
    assert (found[:MARGIN] == POISON).all()
    assert (found[MARGIN + total :] == POISON).all()
    assert np.array_equal(found[MARGIN : MARGIN + total], content)
    for number in (0, 1, 517, len(starts) - 1):
        part = content[starts[number] : starts[number] + sizes[number]]
        assert digests[number] == reference.digest_chunk(part), number


def digest_reads_what_pack_wrote(backend: HostBackend) -> None:
    sizes = (*SIZES, 600_003)
    case = make_case(backend, [[(0, size)] for size in sizes], np.random.default_rng(5), misalignment=3)
    _, packed = case.run(backend)
    np.testing.assert_array_equal(backend.digest(np.ascontiguousarray(case.chunks[:, :2])), packed)


def scatter_brings_the_pieces_back(backend: Backend) -> None:
    for misalignment in (0, 5):
        sizes = (*SIZES, 600_003)
        rng = np.random.default_rng(6)
        case = make_case(backend, [[(3, size)] for size in sizes], rng, misalignment)
        case.run(backend)
        for source, content in zip(case.sources, case.contents, strict=True):
            source.write(np.full_like(content, POISON))
        backend.scatter(np.ascontiguousarray(case.pieces[::-1][:, [1, 0, 2]]))
        for source, content in zip(case.sources, case.contents, strict=True):
            np.testing.assert_array_equal(source.read(), content)


def damage_on_the_way_shows(backend: HostBackend) -> None:
    """The digest is that of the source: what changes at the destination afterwards does not agree with it."""
    case = make_case(backend, [[(0, 1 << 20)], [(0, 70_000)]], np.random.default_rng(15))
    _, packed = case.run(backend)
    spans = np.ascontiguousarray(case.chunks[:, :2])
    whole = case.dst.read()
    for change in (single_bit, swapped_blocks, shifted_content, zeroed_page):
        damaged = whole.copy()
        change(damaged[MARGIN : MARGIN + (1 << 20)])
        case.dst.write(damaged)
        read = backend.digest(spans)
        assert read[0] != packed[0], change.__name__
        assert read[1] == packed[1]


def single_bit(content: Bytes) -> None:
    content[777_777] ^= 4


def swapped_blocks(content: Bytes) -> None:
    content[4096:4112], content[65_536:65_552] = content[65_536:65_552].copy(), content[4096:4112].copy()


def shifted_content(content: Bytes) -> None:
    content[:] = np.roll(content, 8)


def zeroed_page(content: Bytes) -> None:
    content[8192:12_288] = 0


ALL = (
    every_size_and_alignment,
    each_source_alignment,
    pieces_that_share_lines_and_words,
    chunks_longer_than_one_task,
    ten_thousand_segments,
    scatter_brings_the_pieces_back,
)
ON_HOST = (digest_reads_what_pack_wrote, damage_on_the_way_shows)
