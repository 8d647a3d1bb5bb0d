# SPDX-License-Identifier: Apache-2.0
"""Digests and verification of many captures in one call are those of one capture after the other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import POOL

from megatron_moetion.snapshot.digest import (
    capture_digests,
    digest_of,
    gather_digests,
    num_chunks_of,
    scatter_digests,
    verify,
)
from megatron_moetion.snapshot.reference import capture_digest, digest_chunk

CHUNK_BYTES = 128
Captures = list[npt.NDArray[np.uint8]]


def captures(sizes: list[int]) -> tuple[Captures, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    draw = np.random.default_rng(len(sizes))
    found = [draw.integers(0, 256, 64 * n, dtype=np.uint8) for n in sizes]
    return (
        found,
        np.array([c.ctypes.data for c in found], dtype=np.int64),
        np.array([c.nbytes for c in found], np.int64),
    )


def chunk_digests(capture: npt.NDArray[np.uint8]) -> list[int]:
    return [digest_chunk(capture[at : at + CHUNK_BYTES]) for at in range(0, len(capture), CHUNK_BYTES)]


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(0, 2**20))
def test_verification_finds_each_damaged_capture(sizes: list[int], at: int) -> None:
    found, addresses, nbytes = captures(sizes)
    each = [chunk_digests(c) for c in found]
    digests = np.array([d for row in each for d in row], dtype=np.uint64)
    expected = np.array([capture_digest(np.array(row, dtype=np.uint64)) for row in each], dtype=np.uint64)
    counts = num_chunks_of(nbytes, CHUNK_BYTES)
    assert counts.tolist() == [len(row) for row in each]
    starts = digests.ctypes.data + 8 * (np.cumsum(counts) - counts)
    assert capture_digests(POOL, starts, counts).tolist() == expected.tolist()
    assert verify(POOL, CHUNK_BYTES, addresses, nbytes, digests, expected).tolist() == [True] * len(sizes)
    if not sizes:
        return
    hit = at % len(sizes)
    intact = [n != hit for n in range(len(sizes))]
    found[hit][at % len(found[hit])] ^= 1
    assert verify(POOL, CHUNK_BYTES, addresses, nbytes, digests, expected).tolist() == intact
    found[hit][at % len(found[hit])] ^= 1
    digests[int(starts[hit] - digests.ctypes.data) // 8] ^= np.uint64(1)
    assert verify(POOL, CHUNK_BYTES, addresses, nbytes, digests, expected).tolist() == intact
    digests[int(starts[hit] - digests.ctypes.data) // 8] ^= np.uint64(1)
    expected[hit] ^= np.uint64(1)
    assert verify(POOL, CHUNK_BYTES, addresses, nbytes, digests, expected).tolist() == intact


def test_verification_takes_the_pool_for_a_bounded_number_of_bytes() -> None:
    """The training thread may wait for it."""

    class Pool:
        def __init__(self) -> None:
            self.calls: list[int] = []

        def digest(self, spans: npt.NDArray[np.int64], digests: npt.NDArray[np.uint64]) -> None:
            self.calls.append(int(spans[:, 1].sum()))
            POOL.digest(spans, digests)

    found, addresses, nbytes = captures([9, 1, 4, 7])
    each = [chunk_digests(c) for c in found]
    digests = np.array([d for row in each for d in row], dtype=np.uint64)
    expected = np.array([capture_digest(np.array(row, dtype=np.uint64)) for row in each], dtype=np.uint64)
    pool = Pool()
    assert verify(pool, CHUNK_BYTES, addresses, nbytes, digests, expected, call_bytes=256).all()  # type: ignore[arg-type]
    assert sum(pool.calls[:-1]) == nbytes.sum()
    assert max(pool.calls) <= 256 + CHUNK_BYTES
    assert pool.calls[-1] == digests.nbytes


def test_digests_are_gathered_from_where_they_are_kept_and_put_there() -> None:
    places = [np.arange(n, dtype=np.uint64) + n for n in (3, 1, 4)]
    addresses = np.array([p.ctypes.data for p in places])
    counts = np.array([3, 1, 4])
    found = gather_digests(POOL, addresses, counts)
    assert found.tolist() == [3, 4, 5, 1, 4, 5, 6, 7]
    scatter_digests(POOL, found + np.uint64(1), addresses, counts)
    assert [p.tolist() for p in places] == [[4, 5, 6], [2], [5, 6, 7, 8]]
    assert gather_digests(POOL, addresses[:0], counts[:0]).tolist() == []


@pytest.mark.parametrize("nbytes", [0, 7, 8, 200, 400_000])
def test_one_digest_is_that_of_one_chunk(nbytes: int) -> None:
    data = np.arange(nbytes).astype(np.uint8)
    assert digest_of(POOL, data) == digest_chunk(data)
