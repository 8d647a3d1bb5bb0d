# SPDX-License-Identifier: Apache-2.0
"""The kernels' results in NumPy, written to be read and not to be fast. Tests hold every kernel to it bit for bit.

The digest of a chunk of n bytes, read as little-endian 64-bit words, the last one padded with zeros (all
arithmetic modulo 2**64; ``lo`` and ``hi`` are the halves of a word)::

    stir(x) = (hi(x) + (lo(x) << 32)) + lo(x) * hi(x)
    key_i   = stir(stir((2 i + 1) * WEYL))
    a_i     = (lo(w_i) + lo(key_i)) mod 2**32,   b_i = (hi(w_i) + hi(key_i)) mod 2**32
    sum     = over all words:  a_i * b_i  +  ((lo(w_i) + hi(w_i)) << 32)
    digest  = mix(sum + SEED + n * LENGTH)

``mix`` is a bijection, so two contents of one length share a digest only if their sums are equal. What that
takes is written in ``docs/snapshot_format.md``.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

DIGEST_VERSION: Final = 1

_WEYL: Final = 0x9E3779B97F4A7C15
_LENGTH: Final = 0xD6E8FEB86659FD93
_SEED: Final = 0x243F6A8885A308D3
_MIX: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_WORD_MASK: Final = (1 << 64) - 1
_HALF_MASK: Final = np.uint64(0xFFFFFFFF)
_HALF_BITS: Final = np.uint64(32)

Words = npt.NDArray[np.uint64]
Buffer = bytes | bytearray | memoryview | npt.NDArray[Any]


def word_keys(num_words: int) -> Words:
    """The keys of the first ``num_words`` positions of a chunk."""
    positions: Words = (2 * np.arange(num_words, dtype=np.uint64) + np.uint64(1)) * np.uint64(_WEYL)
    return _stir(_stir(positions))


def word_values(words: Words) -> Words:
    """What each word of a chunk adds to the chunk's sum; the words are those at positions 0, 1, 2, ..."""
    keys = word_keys(words.size)
    low = (words + keys) & _HALF_MASK
    high = ((words >> _HALF_BITS) + (keys >> _HALF_BITS)) & _HALF_MASK
    linear = (words & _HALF_MASK) + (words >> _HALF_BITS)
    values: Words = low * high + (linear << _HALF_BITS)
    return values


def finish(total: int, nbytes: int) -> int:
    """The digest of a chunk of ``nbytes`` bytes whose words' values sum to ``total``."""
    x = (total + _SEED + nbytes * _LENGTH) & _WORD_MASK
    for shift, factor in _MIX:
        x = (x ^ (x >> shift)) * factor & _WORD_MASK
    return x ^ (x >> 31)


def digest_chunk(buffer: Buffer) -> int:
    """The 64-bit digest of one chunk's bytes."""
    raw = np.frombuffer(buffer, dtype=np.uint8)
    padded = np.zeros(-(-raw.size // 8) * 8, dtype=np.uint8)
    padded[: raw.size] = raw
    return finish(int(word_values(padded.view("<u8")).sum(dtype=np.uint64)), raw.size)


def capture_digest(chunk_digests: Words) -> int:
    """One digest for a whole capture: over its chunks' digests, so it commits to their count and order."""
    return digest_chunk(np.ascontiguousarray(chunk_digests, dtype="<u8").tobytes())


def _stir(x: Words) -> Words:
    low, high = x & _HALF_MASK, x >> _HALF_BITS
    stirred: Words = ((low << _HALF_BITS) | high) + low * high
    return stirred
