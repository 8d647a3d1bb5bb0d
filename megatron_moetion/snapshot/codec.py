# SPDX-License-Identifier: Apache-2.0
"""Captures to fragments and back, a little at a time. ``docs/snapshot_format.md`` has the arithmetic.

The library computes parity rows of short blocks, since each byte of a row depends only on the bytes at its place in the
others. It puts a header before each block, which is the same for all blocks of one size: it is cut off, and put back
where a block is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_moetion.arrays import Bytes, Digests
from megatron_moetion.coding import FRAME_BYTES, Part
from megatron_moetion.errors import ConfigError
from megatron_moetion.snapshot.digest import digest_of, is_intact
from megatron_moetion.snapshot.packer import HostPool

_CODE = "isa_l_rs_cauchy"
"""Of ISA-L's codes the one of which any ``data`` fragments rebuild the rest, whatever their numbers."""
_BLOCK_BYTES_MIN = 1 << 10
_BLOCK_BYTES_MAX = 1 << 16
"""Of a row: stays in the cache."""


def require_codec() -> None:
    """``ConfigError`` where the library is missing."""
    try:
        import pyeclib.ec_iface  # noqa: F401  # an optional extra
    except ImportError as error:
        raise ConfigError(
            f"fragments of snapshots need PyECLib ({error}): pip install 'megatron-moetion[coding]' on all nodes. "
            f"Without --moetion-coding-nodes nodes keep whole copies of each other's snapshots"
        ) from error


class Codec:
    """One code's arithmetic. Used by one thread at a time. ``ConfigError`` where the library is missing."""

    def __init__(self, data: int, parity: int) -> None:
        require_codec()
        from pyeclib.ec_iface import ECDriver

        self._data = data
        self._driver: Any = ECDriver(k=data, m=parity, ec_type=_CODE, chksum_type="none")
        self._headers: dict[int, list[bytes]] = {}
        """By bytes of a block: what the library puts before each fragment."""

    def fragment(self, number: int, capture: Bytes, digest: int, start: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``start`` on of fragment ``number`` of a capture with this digest.

        Both ``start`` and the length of ``out`` are multiples of 64.
        """
        if start < FRAME_BYTES:
            frame = np.zeros(FRAME_BYTES, dtype=np.uint8)
            frame[:8].view("<u8")[0] = digest
            out[: FRAME_BYTES - start] = frame[start:]
            out, start = out[FRAME_BYTES - start :], FRAME_BYTES
        self._row(number, capture, start - FRAME_BYTES, out)

    def restore(self, rows: Mapping[int, Bytes], start: int, capture: Bytes) -> None:
        """Write to a capture what these rows tell of it.

        ``rows``: of ``data`` different fragments, by number, the bytes from ``start`` on of their rows, equally many.
        """
        assert len(rows) == self._data, f"{len(rows)} rows of {self._data}"
        length = len(next(iter(rows.values())))
        missing = []
        for number in range(1, self._data + 1):
            target = self._slice(capture, number, start, length)
            if number in rows:
                target[:] = rows[number][: len(target)]
            elif len(target):
                missing.append(number)
        if not missing:
            return
        for first in range(0, length, _BLOCK_BYTES_MAX):
            size = min(_BLOCK_BYTES_MAX, length - first)
            block = _block_bytes(size)
            headers = self._headers_of(block)
            fragments = [
                headers[number - 1] + row[first : first + size].tobytes() + bytes(block - size)
                for number, row in rows.items()
            ]
            found = np.frombuffer(self._driver.decode(fragments), dtype=np.uint8)
            for number in missing:
                target = self._slice(capture, number, start + first, size)
                target[:] = found[(number - 1) * block :][: len(target)]

    def _row(self, number: int, capture: Bytes, start: int, out: Bytes) -> None:
        if number <= self._data:
            source = self._slice(capture, number, start, len(out))
            out[: len(source)] = source
            out[len(source) :] = 0
            return
        for first in range(0, len(out), _BLOCK_BYTES_MAX):
            size = min(_BLOCK_BYTES_MAX, len(out) - first)
            block = _block_bytes(size)
            rows = np.zeros((self._data, block), dtype=np.uint8)
            for row in range(self._data):
                source = self._slice(capture, row + 1, start + first, size)
                rows[row, : len(source)] = source
            fragment = np.frombuffer(self._driver.encode(rows.tobytes())[number - 1], dtype=np.uint8)
            out[first : first + size] = fragment[len(fragment) - block :][:size]

    def _slice(self, capture: Bytes, number: int, start: int, length: int) -> Bytes:
        """The bytes of a capture in row ``number`` from ``start`` on; fewer than ``length`` where it has ended."""
        row = Part(number=number, data=self._data).row_bytes(len(capture))
        first = (number - 1) * row + start
        return capture[first : min(first + length, number * row)]

    def _headers_of(self, block: int) -> list[bytes]:
        if block not in self._headers:
            fragments = self._driver.encode(bytes(self._data * block))
            self._headers[block] = [fragment[: len(fragment) - block] for fragment in fragments]
        return self._headers[block]


def _block_bytes(size: int) -> int:
    """One of a few sizes, so that few headers are kept."""
    return max(_BLOCK_BYTES_MIN, 1 << (size - 1).bit_length())


def is_sound(pool: HostPool, chunk_bytes: int, part: Part, capture: Bytes, digests: Digests, expected: int) -> bool:
    """Whether the bytes of a capture that its fragment ``part`` is made of are those that were captured.

    ``digests`` are the chunk digests of the capture, ``expected`` its own.
    """
    if digest_of(pool, digests.view(np.uint8)) != expected:
        return False
    first, last = 0, len(digests)
    if part.number <= part.data:
        row = part.row_bytes(len(capture))
        first = (part.number - 1) * row // chunk_bytes
        last = min(last, -(-part.number * row // chunk_bytes))
    if first >= last:
        return True
    some = digests[first:last]
    return is_intact(
        pool, chunk_bytes, capture[first * chunk_bytes : last * chunk_bytes], some, digest_of(pool, some.view(np.uint8))
    )


@dataclass(frozen=True, kw_only=True)
class Span:
    """Bytes of the fragment of one capture, of several that are numbered through."""

    capture: int
    start: int
    nbytes: int


def spans_of(sizes: Sequence[int], step: int, batch_bytes: int) -> list[list[Span]]:
    """Cut fragments of so many bytes into batches of about ``batch_bytes``, and at multiples of ``step`` only."""
    most = max(step, batch_bytes // step * step)
    batches: list[list[Span]] = []
    room = 0
    for number, size in enumerate(sizes):
        for start in range(0, size, most):
            span = Span(capture=number, start=start, nbytes=min(most, size - start))
            if span.nbytes > room:
                batches.append([])
                room = most
            batches[-1].append(span)
            room -= span.nbytes
    return batches
