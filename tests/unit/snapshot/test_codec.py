# SPDX-License-Identifier: Apache-2.0
"""Fragments against the arithmetic that ``docs/snapshot_format.md`` describes, computed byte by byte."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from support import POOL

from megatron_moetion.arrays import Bytes
from megatron_moetion.coding import FRAME_BYTES, Part, coding_of
from megatron_moetion.errors import ConfigError
from megatron_moetion.sim.galois import inverse, times
from megatron_moetion.snapshot.codec import Codec, is_sound, spans_of
from megatron_moetion.snapshot.digest import digest_of

CODES = [(2, 1), (3, 1), (2, 2), (5, 2), (4, 3)]
SIZES = [64, 128, 192, 4096, 64 * 37, 3 * (1 << 16) + 64, 1 << 19]


def capture_of(nbytes: int) -> Bytes:
    return np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)


def fragment_of(codec: Codec, part: Part, capture: Bytes, step: int | None = None) -> Bytes:
    """Made in pieces of ``step`` bytes."""
    found = np.full(part.stored_bytes(len(capture)), 0xEE, dtype=np.uint8)
    for start in range(0, len(found), step or len(found)):
        codec.fragment(part.number, capture, 0x1234567890ABCDEF, start, found[start : start + (step or len(found))])
    return found


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize(("data", "parity"), CODES)
def test_any_so_many_fragments_rebuild_a_capture(data: int, parity: int, nbytes: int) -> None:
    codec, capture = Codec(data, parity), capture_of(nbytes)
    parts = [Part(number=n + 1, data=data, parity=parity) for n in range(data + parity)]
    fragments = {part.number: fragment_of(codec, part, capture) for part in parts}
    assert {len(f) for f in fragments.values()} == {parts[0].stored_bytes(nbytes)}
    for chosen in combinations(fragments, data):
        found = np.full(nbytes, 0xEE, dtype=np.uint8)
        rows = {number: fragments[number][FRAME_BYTES:] for number in reversed(chosen)}
        half = len(rows[chosen[0]]) // 128 * 64
        for piece in (slice(0, half), slice(half, None)):
            if len(rows[chosen[0]][piece]):
                codec.restore({n: row[piece] for n, row in rows.items()}, piece.start, found)
        assert np.array_equal(found, capture), chosen


@pytest.mark.parametrize("step", [64, 4096, 3 * 4096])
@pytest.mark.parametrize("number", [1, 3, 4, 5])
def test_a_fragment_is_the_same_in_whatever_pieces_it_is_made(number: int, step: int) -> None:
    codec, capture = Codec(3, 2), capture_of(64 * 1001)
    part = Part(number=number, data=3, parity=2)
    assert np.array_equal(fragment_of(codec, part, capture, step), fragment_of(codec, part, capture))


@pytest.mark.parametrize(("data", "parity"), CODES)
def test_rows_are_as_the_format_says(data: int, parity: int) -> None:
    codec, capture = Codec(data, parity), capture_of(64 * 11)
    row = Part(number=1, data=data, parity=parity).row_bytes(len(capture))
    padded = np.zeros(data * row, dtype=np.uint8)
    padded[: len(capture)] = capture
    rows = padded.reshape(data, row)
    for number in range(1, data + parity + 1):
        found = fragment_of(codec, Part(number=number, data=data, parity=parity), capture)
        assert int(found[:8].view("<u8")[0]) == 0x1234567890ABCDEF
        assert not found[8:FRAME_BYTES].any()
        if number <= data:
            expected = rows[number - 1]
        else:
            factors = [inverse((number - 1) ^ j) for j in range(data)]
            expected = np.array(
                [np.bitwise_xor.reduce([times(f, int(b)) for f, b in zip(factors, column, strict=True)])
                 for column in rows.T], dtype=np.uint8,
            )  # fmt: skip
        assert np.array_equal(found[FRAME_BYTES:], expected)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_damage_of_what_a_fragment_is_made_of_is_found(number: int) -> None:
    capture, part = capture_of(4 * 4096), Part(number=number, data=2, parity=1)
    digests = np.array([digest_of(POOL, capture[at : at + 4096]) for at in range(0, len(capture), 4096)], np.uint64)
    expected = digest_of(POOL, digests.view(np.uint8))
    assert is_sound(POOL, 4096, part, capture, digests, expected)
    assert not is_sound(POOL, 4096, part, capture, digests, expected + 1)
    for place in (100, 3 * 4096 + 100):
        capture[place] ^= 1
        concerns = number == 3 or (place < 2 * 4096) == (number == 1)
        assert is_sound(POOL, 4096, part, capture, digests, expected) is not concerns
        capture[place] ^= 1


def test_spans_cover_all_bytes_at_multiples_of_a_step_in_bounded_batches() -> None:
    sizes = [128, 10_000, 0, 64, 4096, 30_000]
    batches = spans_of(sizes, 4096, 9000)
    assert all(sum(s.nbytes for s in batch) <= 8192 for batch in batches)
    for number, size in enumerate(sizes):
        mine = [s for batch in batches for s in batch if s.capture == number]
        assert [s.start for s in mine] == list(range(0, size, 8192))
        assert sum(s.nbytes for s in mine) == size


@pytest.mark.parametrize(
    ("replicas", "nodes", "share"), [(1, 0, 1.0), (2, 0, 2.0), (2, 4, 1.5), (2, 5, 4 / 3), (3, 8, 1.4)]
)
def test_what_is_kept_elsewhere_and_the_losses_that_it_survives(replicas: int, nodes: int, share: float) -> None:
    coding = coding_of(replicas, nodes)
    assert coding.share == pytest.approx(share)
    assert coding.survives(coding.holders) == replicas
    assert [coding.survives(n) for n in range(coding.data)] == [0] * coding.data
    parts = [coding.part(n) for n in range(coding.holders)]
    assert len(set(parts)) == (coding.holders if nodes else 1)


@pytest.mark.parametrize(("replicas", "nodes"), [(-1, 4), (0, 4), (1, 4), (2, 3), (3, 4), (2, 34)])
def test_fragments_that_save_nothing_or_cannot_be_are_refused(replicas: int, nodes: int) -> None:
    with pytest.raises(ConfigError, match="--moetion-coding-nodes"):
        coding_of(replicas, nodes)
