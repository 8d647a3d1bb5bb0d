# SPDX-License-Identifier: Apache-2.0
"""Every kernel, on every instruction set at hand, against the reference, bit for bit."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion import _C
from megatron_moetion.snapshot import reference

POISON = 0xA5
MARGIN = 192
SIZES = (0, 1, 7, 8, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 4095, 4096, 4097)
ISAS = _C.available_isas()
Bytes = npt.NDArray[np.uint8]
Table = npt.NDArray[np.int64]


def address(buffer: npt.NDArray[Any]) -> int:
    return int(buffer.ctypes.data)


def aligned(nbytes: int, misalignment: int = 0) -> Bytes:
    """A poisoned buffer whose address is ``misalignment`` past a multiple of 64."""
    raw = np.full(nbytes + 128, POISON, dtype=np.uint8)
    start = (misalignment - address(raw)) % 64
    return raw[start : start + nbytes]


@dataclass
class Case:
    """Chunks of one destination, with margins that must stay poisoned, and their pieces."""

    dst: Bytes
    pieces: Table
    chunks: Table
    keep: list[Bytes]

    def run(self, pool: _C.HostPool) -> tuple[Bytes, npt.NDArray[np.uint64]]:
        self.dst[:] = POISON
        digests = np.full(len(self.chunks), 7, dtype=np.uint64)
        assert pool.pack(self.pieces, self.chunks, digests)
        return self.dst.copy(), digests

    def expected(self) -> tuple[Bytes, npt.NDArray[np.uint64]]:
        self.dst[:] = POISON
        digests = np.zeros(len(self.chunks), dtype=np.uint64)
        reference.pack(self.pieces, self.chunks, digests)
        return self.dst.copy(), digests


def make_case(layout: list[list[tuple[int, int]]], rng: np.random.Generator, misalignment: int = 0) -> Case:
    """``layout``: for each chunk its (gap, nbytes) pairs; a last pair without bytes is a gap at the end."""
    sizes = [sum(gap + nbytes for gap, nbytes in chunk) for chunk in layout]
    dst = aligned(sum(sizes) + MARGIN * (len(sizes) + 1), misalignment)
    pieces: list[tuple[int, ...]] = []
    chunks: list[tuple[int, ...]] = []
    keep, at = [], MARGIN
    for chunk, size in zip(layout, sizes, strict=True):
        chunks.append((address(dst) + at, size, len(pieces), len(chunk)))
        cursor = at
        for gap, nbytes in chunk:
            src = aligned(nbytes, int(rng.integers(64)))
            src[:] = rng.integers(0, 256, nbytes, dtype=np.uint8)
            keep.append(src)
            cursor += gap
            pieces.append((address(src), address(dst) + cursor, nbytes))
            cursor += nbytes
        at += size + MARGIN
    return Case(dst, np.array(pieces, np.int64).reshape(-1, 3), np.array(chunks, np.int64).reshape(-1, 4), keep)


def check(case: Case, pool: _C.HostPool) -> None:
    want_bytes, want_digests = case.expected()
    got_bytes, got_digests = case.run(pool)
    np.testing.assert_array_equal(got_bytes, want_bytes)
    np.testing.assert_array_equal(got_digests, want_digests)


@pytest.fixture(scope="module", params=ISAS)
def pool(request: pytest.FixtureRequest) -> _C.HostPool:
    return _C.HostPool(2, request.param)


def test_every_size_and_alignment(pool: _C.HostPool) -> None:
    rng = np.random.default_rng(1)
    for misalignment in (0, 1, 8, 32, 63):
        check(make_case([[(0, size)] for size in SIZES], rng, misalignment), pool)
        with_gaps = [[(gap, size), (gap, 0)] for size in SIZES for gap in (0, 1, 64, 5000)]
        check(make_case(with_gaps, rng, misalignment), pool)


def test_pieces_that_share_lines_and_words(pool: _C.HostPool) -> None:
    rng = np.random.default_rng(2)
    check(make_case([[(int(g), int(n)) for g, n in rng.integers(0, (4, 20), (400, 2))] for _ in range(5)], rng), pool)
    check(make_case([[(0, 1)] * 1000, [], [(0, 0)] * 3, [(5, 0)]], rng), pool)


def test_chunks_longer_than_one_task(pool: _C.HostPool) -> None:
    """Above 1 MiB stores bypass the caches; above 256 KiB several threads share one chunk."""
    rng = np.random.default_rng(3)
    check(make_case([[(0, 700_001), (63, 900_000), (1, 0)], [(0, 3)], [(0, 262_144)], [(300_000, 1)]], rng), pool)
    check(make_case([[(0, 1_500_007)]], rng, misalignment=8), pool)


@pytest.mark.parametrize("threads", range(1, 9))
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    rng = np.random.default_rng(4)
    check(make_case([[(0, 64 * int(n))] for n in rng.integers(0, 9000, 24)], rng), _C.HostPool(threads))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_generated_layouts(pool: _C.HostPool, data: st.DataObject) -> None:
    pair = st.tuples(st.sampled_from((0, 0, 0, 1, 8, 63, 64, 200)), st.sampled_from(SIZES) | st.integers(0, 700))
    layout = data.draw(st.lists(st.lists(pair, max_size=6), max_size=5))
    seed = data.draw(st.integers(0, 2**32 - 1))
    check(make_case(layout, np.random.default_rng(seed), data.draw(st.sampled_from((0, 0, 1, 8, 16, 63)))), pool)


def test_digest_reads_what_pack_wrote(pool: _C.HostPool) -> None:
    case = make_case([[(0, size)] for size in (*SIZES, 600_003)], np.random.default_rng(5), misalignment=3)
    _, packed = case.run(pool)
    read = np.zeros_like(packed)
    pool.digest(np.ascontiguousarray(case.chunks[:, :2]), read)
    np.testing.assert_array_equal(read, packed)


def test_scatter_brings_the_pieces_back(pool: _C.HostPool) -> None:
    case = make_case([[(3, size)] for size in (*SIZES, 600_003)], np.random.default_rng(6))
    case.run(pool)
    wanted = [src.copy() for src in case.keep]
    for src in case.keep:
        src[:] = POISON
    pool.scatter(np.ascontiguousarray(case.pieces[::-1][:, [1, 0, 2]]))
    for src, want in zip(case.keep, wanted, strict=True):
        np.testing.assert_array_equal(src, want)


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_copy_moves_the_same_bytes(pool: _C.HostPool, streaming: bool) -> None:
    case = make_case([[(0, size)] for size in (*SIZES, 600_003)], np.random.default_rng(7), misalignment=1)
    want, _ = case.run(pool)
    case.dst[:] = POISON
    pool.copy(case.pieces, case.chunks, streaming=streaming)
    np.testing.assert_array_equal(case.dst, want)


def test_prefault_keeps_contents(pool: _C.HostPool) -> None:
    buffer = np.random.default_rng(8).integers(0, 256, 1_000_003, dtype=np.uint8)
    want = buffer.copy()
    pool.prefault(address(buffer) + 1, buffer.size - 1)
    pool.prefault(address(buffer), 0)
    np.testing.assert_array_equal(buffer, want)


def test_nothing_to_do(pool: _C.HostPool) -> None:
    no_digests = np.zeros(0, dtype=np.uint64)
    assert pool.pack(np.zeros((0, 3), np.int64), np.zeros((0, 4), np.int64), no_digests)
    pool.digest(np.zeros((0, 2), np.int64), no_digests)
    pool.scatter(np.zeros((0, 3), np.int64))


def test_cancel_stops_a_pack_and_can_be_cleared(pool: _C.HostPool) -> None:
    case = make_case([[(0, 500_000)]] * 4, np.random.default_rng(9))
    cancel, digests = _C.Cancel(), np.zeros(4, dtype=np.uint64)
    case.dst[:] = POISON
    cancel.set()
    assert cancel.is_set()
    assert not pool.pack(case.pieces, case.chunks, digests, cancel)
    assert (case.dst == POISON).all()
    cancel.clear()
    assert not cancel.is_set()
    assert pool.pack(case.pieces, case.chunks, digests, cancel)


def test_concurrent_callers_take_turns(pool: _C.HostPool) -> None:
    cases = [make_case([[(0, 90_000 + n)]] * 6, np.random.default_rng(n)) for n in range(4)]
    failures: list[BaseException] = []

    def work(case: Case) -> None:
        try:
            for _ in range(10):
                check(case, pool)
        except BaseException as failure:  # carried to the main thread, whatever it is
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("pieces", "chunks", "names"),
    [
        ([(0, 64, 8)], [(64, 64, 0, 1)], r"piece 0: src=0, nbytes=8"),
        ([(8, 64, -1)], [(64, 64, 0, 1)], r"piece 0: src=0x8, nbytes=-1"),
        ([(8, 60, 8)], [(64, 64, 0, 1)], r"piece 0: dst=0x3c, nbytes=8.* 0x40 .*chunk 0"),
        ([(8, 121, 8)], [(64, 64, 0, 1)], r"piece 0: dst=0x79.* 0x80, the end of chunk 0"),
        ([(8, 64, 8), (8, 71, 8)], [(64, 64, 0, 2)], r"piece 1: dst=0x47.* 0x48 \(the end of the piece before\)"),
        ([(8, 64, 2**63 - 2)], [(64, 64, 0, 1)], r"piece 0: src=0x8, nbytes=9223372036854775806"),
        ([], [(64, 64, 0, 1)], r"chunk 0: first_piece=0, num_pieces=1; there are 0 pieces"),
        ([], [(64, 64, 2**63 - 1, 1)], r"chunk 0: first_piece=9223372036854775807"),
        ([], [(0, 64, 0, 0)], r"chunk 0: dst=0, nbytes=64"),
        ([], [(164, 64, 0, 0), (64, 101, 0, 0)], r"chunks 1 and 0 overlap: dst=0x40 \+ nbytes=101 .* dst=0xa4"),
    ],
)
def test_a_bad_table_is_refused_with_row_and_values(
    pieces: list[tuple[int, ...]], chunks: list[tuple[int, ...]], names: str
) -> None:
    with pytest.raises(ValueError, match=names):
        _C.HostPool(1).pack(
            np.array(pieces, np.int64).reshape(-1, 3), np.array(chunks, np.int64), np.zeros(len(chunks), np.uint64)
        )


def test_bad_arrays_are_refused() -> None:
    pool, pieces = _C.HostPool(1), np.zeros((0, 3), np.int64)
    chunks = np.zeros((2, 4), np.int64)
    with pytest.raises(ValueError, match=r"digests holds 1 values .* array of 2"):
        pool.pack(pieces, chunks, np.zeros(1, np.uint64))
    with pytest.raises(ValueError, match=r"chunks .* shape \[n, 4\]"):
        pool.pack(pieces, np.zeros((2, 3), np.int64), np.zeros(2, np.uint64))
    with pytest.raises(ValueError, match="pieces 1 and 0 overlap"):
        pool.scatter(np.array([(64, 132, 8), (64, 128, 8)], np.int64))
    with pytest.raises(TypeError):  # a strided view would have to be copied
        pool.digest(chunks[:, :2], np.zeros(2, np.uint64))
    with pytest.raises(TypeError):
        pool.pack(pieces.astype(np.int32), chunks, np.zeros(2, np.uint64))
    read_only = np.zeros(2, np.uint64)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        pool.pack(pieces, chunks, read_only)


def test_pools_say_what_they_are() -> None:
    assert _C.HostPool(3).isa == ISAS[-1]
    assert _C.HostPool(3).num_threads == 3
    with pytest.raises(ValueError, match="num_threads is 0"):
        _C.HostPool(0)
    with pytest.raises(ValueError, match="isa is 'sse9'; this machine and build offer auto, scalar"):
        _C.HostPool(1, "sse9")


def test_a_forked_child_is_told_and_ends() -> None:
    pool = _C.HostPool(4)
    child = os.fork()
    if child == 0:
        try:
            pool.scatter(np.zeros((0, 3), np.int64))
        except RuntimeError as refusal:
            del pool  # must not wait for threads that the child does not have
            os._exit(0 if "fork" in str(refusal) else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
