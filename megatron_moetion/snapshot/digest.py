# SPDX-License-Identifier: Apache-2.0
"""Digests of many captures at once, and whether captures are what they were. ``reference.py`` has the definition.

A capture lies at an address, its chunks one behind the other. Its chunk digests are one uint64 a chunk; the digests of
several captures lie one behind the other, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from megatron_moetion._C import HostPool
from megatron_moetion.arrays import Bytes, Digests, Flags, Int64s, counted

CALL_BYTES = 4 << 20
"""Verified by one call into a pool, about: the training thread may wait for it."""


def num_chunks_of(sizes: Int64s, chunk_bytes: int) -> Int64s:
    """Chunks of captures of so many bytes."""
    return -(-sizes // chunk_bytes)


def chunk_spans(addresses: Int64s, sizes: Int64s, chunk_bytes: int) -> Int64s:
    """Address and bytes of every chunk of these captures, int64[m, 2]."""
    counts = num_chunks_of(sizes, chunk_bytes)
    offsets = counted(counts) * chunk_bytes
    nbytes = np.minimum(chunk_bytes, np.repeat(sizes, counts) - offsets)
    return np.stack([np.repeat(addresses, counts) + offsets, nbytes], axis=1)


def capture_digests(pool: HostPool, addresses: Int64s, counts: Int64s) -> Digests:
    """The digest of each capture, over its ``counts[n]`` chunk digests at ``addresses[n]``.

    It commits to their number and order.
    """
    found = np.empty(len(counts), dtype=np.uint64)
    pool.digest(np.stack([addresses, 8 * counts], axis=1), found)
    return found


def digest_of(pool: HostPool, data: Bytes) -> int:
    """The digest of these bytes, as of one chunk."""
    found = np.empty(1, dtype=np.uint64)
    pool.digest(np.array([(data.ctypes.data, data.nbytes)], dtype=np.int64), found)
    return int(found[0])


def gather_digests(pool: HostPool, addresses: Int64s, counts: Int64s) -> Digests:
    """Chunk digests from where they are kept, ``counts[n]`` at ``addresses[n]``, one behind the other."""
    found = np.empty(int(counts.sum()), dtype=np.uint64)
    pool.scatter(np.stack([addresses, _places(found, counts), 8 * counts], axis=1))
    return found


def scatter_digests(pool: HostPool, digests: Digests, addresses: Int64s, counts: Int64s) -> None:
    """Inverse of ``gather_digests``."""
    pool.scatter(np.stack([_places(digests, counts), addresses, 8 * counts], axis=1))


def verify(
    pool: HostPool,
    chunk_bytes: int,
    addresses: Int64s,
    sizes: Int64s,
    digests: Digests,
    expected: Digests,
    *,
    call_bytes: int = CALL_BYTES,
) -> Flags:
    """Whether each capture is, byte for byte, what was captured (see the digest's odds in the format); bool[n].

    ``digests`` are the chunk digests of all captures, ``expected`` the digests of the captures. A call into the pool
    takes about ``call_bytes``.
    """
    counts = num_chunks_of(sizes, chunk_bytes)
    spans = chunk_spans(addresses, sizes, chunk_bytes)
    found = np.empty(len(spans), dtype=np.uint64)
    for part in _parts(spans[:, 1], call_bytes):
        pool.digest(spans[part], found[part])
    owners = np.repeat(np.arange(len(sizes)), counts)
    damaged = np.bincount(owners[found != digests], minlength=len(sizes)) > 0
    matches: Flags = ~damaged & (capture_digests(pool, _places(digests, counts), counts) == expected)
    return matches


def is_intact(pool: HostPool, chunk_bytes: int, capture: Bytes, digests: Digests, expected: int) -> bool:
    """As ``verify``, of one capture."""
    address, size = (np.array([n], dtype=np.int64) for n in (capture.ctypes.data, capture.nbytes))
    return bool(verify(pool, chunk_bytes, address, size, digests, np.array([expected], dtype=np.uint64))[0])


def _places(digests: Digests, counts: Int64s) -> Int64s:
    """Where the digests of each capture begin."""
    return digests.ctypes.data + 8 * (np.cumsum(counts) - counts)


def _parts(nbytes: Int64s, call_bytes: int) -> Iterator[slice]:
    """Cut rows of so many bytes into parts of about ``call_bytes``."""
    ends = np.cumsum(nbytes)
    number = (ends - nbytes) // call_bytes
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(nbytes)]
    return (slice(a, b) for a, b in pairwise(cuts) if b > a)
