# SPDX-License-Identifier: Apache-2.0
"""Plans tile: every byte of every region is copied once, into the chunk that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.snapshot.plan import Batch, Chunks, Targets, Template, Templates, batch_of, groups, template
from megatron_moetion.units import Region, Role, Unit, UnitKind

SIZES = st.lists(st.integers(1, 700), min_size=1, max_size=12)
CHUNKS = st.sampled_from((64, 128, 192, 1024, 1 << 20))


def unit(sizes: list[int]) -> Unit:
    regions, address = [], 4096
    for number, nbytes in enumerate(sizes):
        regions.append(
            Region(
                unit="u", tensor=f"t{number}", role=Role.MASTER, dtype="uint8", start=0, nbytes=nbytes, address=address
            )
        )
        address += nbytes + 17
    return Unit(name="u", kind=UnitKind.DENSE, regions=tuple(regions))


def sources_of(plan: Template) -> dict[int, int]:
    """For each byte of the capture that is copied, the address that it comes from."""
    found: dict[int, int] = {}
    for source, offset, nbytes in plan.pieces.tolist():
        for byte in range(nbytes):
            assert offset + byte not in found, "a byte is written twice"
            found[offset + byte] = source + byte
    return found


@given(SIZES, CHUNKS)
def test_a_template_tiles_each_region_exactly(sizes: list[int], chunk_bytes: int) -> None:
    one = unit(sizes)
    expected = {
        offset + byte: region.address + byte
        for region, offset in zip(one.regions, one.offsets, strict=True)
        for byte in range(region.nbytes)
    }
    assert sources_of(template(one, chunk_bytes, {})) == expected


@given(SIZES, CHUNKS)
def test_chunks_tile_the_capture_and_hold_their_pieces(sizes: list[int], chunk_bytes: int) -> None:
    one = unit(sizes)
    plan = template(one, chunk_bytes, {})
    cursor = piece = 0
    for offset, nbytes, first, count in plan.chunks.tolist():
        assert (offset, first) == (cursor, piece)
        assert 0 < nbytes <= chunk_bytes
        assert nbytes == chunk_bytes or offset + nbytes == one.nbytes
        for _, start, length in plan.pieces[first : first + count].tolist():
            assert offset <= start
            assert start + length <= offset + nbytes
        cursor, piece = offset + nbytes, first + count
    assert (cursor, piece) == (one.nbytes, len(plan.pieces)) == (plan.nbytes, len(plan.pieces))


@given(SIZES, CHUNKS, st.data())
def test_staged_regions_come_from_the_stage(sizes: list[int], chunk_bytes: int, data: st.DataObject) -> None:
    one = unit(sizes)
    staged = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    found = sources_of(template(one, chunk_bytes, {r: 10**6 * (r + 1) for r in staged}))
    for number, (region, offset) in enumerate(zip(one.regions, one.offsets, strict=True)):
        first = 10**6 * (number + 1) if number in staged else region.address
        assert [found[offset + b] for b in range(region.nbytes)] == list(range(first, first + region.nbytes))


def test_host_state_is_one_staged_region() -> None:
    host = Unit(name="host", kind=UnitKind.HOST, regions=(), reserved_bytes=1000)
    plan = template(host, 4096, {0: 5000})
    assert plan.pieces.tolist() == [[5000, 0, 1000]]
    assert plan.chunks.tolist() == [[0, 1024, 0, 1]]


def targets_at(units: Sequence[int], addresses: Sequence[int]) -> Targets:
    at = np.array(addresses, dtype=np.int64)
    return Targets(units=np.array(units, dtype=np.int64), addresses=at, digests=at + 500_000)


@given(st.lists(SIZES, min_size=1, max_size=6), st.integers(1, 4000), st.data())
def test_batches_keep_order_and_add_addresses(units: list[list[int]], batch_bytes: int, data: st.DataObject) -> None:
    each = [template(unit(sizes), 256, {}) for sizes in units]
    chosen = data.draw(st.permutations(range(len(units))).map(lambda order: order[: 1 + len(units) // 2]))
    targets = targets_at(chosen, [10**6 * (u + 1) for u in chosen])
    templates = Templates.of(each)
    found = groups(templates, targets, batch_bytes)
    assert [u for group in found for u in group.units.tolist()] == chosen
    for group, following in zip(found, [*found[1:], None], strict=True):
        sizes = [each[u].nbytes for u in group.units.tolist()]
        assert sum(sizes) <= batch_bytes or len(group) == 1
        if following is not None:
            assert sum(sizes) + each[int(following.units[0])].nbytes > batch_bytes, (
                "no batch is smaller than it must be"
            )
        assert group.digests.tolist() == (group.addresses + 500_000).tolist()
        batch = batch_of(templates, group)
        assert batch.nbytes == sum(sizes)
        rows = list(zip(group.units.tolist(), group.addresses.tolist(), strict=True))
        pieces = np.concatenate([each[u].pieces + np.array([0, at, 0]) for u, at in rows])
        assert batch.pieces.tolist() == pieces.tolist()
        chunks = np.concatenate([each[u].chunks[:, [0, 1, 3]] + np.array([at, 0, 0]) for u, at in rows])
        assert batch.chunks[:, [0, 1, 3]].tolist() == chunks.tolist()
        ends = batch.chunks[:, 2] + batch.chunks[:, 3]
        assert ends[-1] == len(batch.pieces)
        assert (batch.chunks[1:, 2] == ends[:-1]).all()
        assert batch.pieces.dtype == batch.chunks.dtype == np.int64


def test_captures_that_overlap_in_the_arena_are_a_bug() -> None:
    templates = Templates.of([template(unit([100]), 256, {})])
    with pytest.raises(AssertionError, match="overlap"):
        batch_of(templates, targets_at((0, 0), (4096, 4160)))
    one = batch_of(templates, targets_at((0,), (4096,)))
    with pytest.raises(AssertionError, match="more bytes"):
        Batch(pieces=one.pieces, chunks=one.chunks, nbytes=50)


def test_no_targets_no_groups() -> None:
    assert groups(Templates.of([]), targets_at((), ()), 100) == []


@given(st.lists(SIZES, min_size=1, max_size=6), st.integers(1, 4000), st.data())
def test_a_device_packs_chunks_in_order_and_their_digests_lie_together(
    units: list[list[int]], batch_bytes: int, data: st.DataObject
) -> None:
    each = [template(unit(sizes), 256, {}) for sizes in units]
    chosen = data.draw(st.permutations(range(len(units))).map(lambda order: order[: 1 + len(units) // 2]))
    templates, targets = Templates.of(each), targets_at(chosen, [10**6 * (u + 1) for u in chosen])
    batches = Chunks.of(templates, targets).batches(batch_bytes)
    found = [row for b in batches for row in zip(b.rows, b.nbytes, b.addresses, b.digests, strict=True)]
    assert found == [
        (int(templates.first_chunk[u]) + n, int(nbytes), 10**6 * (u + 1), 10**6 * (u + 1) + 500_000 + 8 * n)
        for u in chosen
        for n, nbytes in enumerate(each[u].chunks[:, 1])
    ]
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        assert batch.nbytes.sum() <= batch_bytes or len(batch) == 1
        assert following is None or batch.nbytes.sum() + following.nbytes[0] > batch_bytes
        addresses, counts = batch.digest_runs()
        runs = [a + 8 * n for a, count in zip(addresses.tolist(), counts.tolist(), strict=True) for n in range(count)]
        assert runs == batch.digests.tolist()
        assert len(counts) == len({*batch.addresses.tolist()}), "one run a capture"


def test_no_targets_no_batches() -> None:
    assert Chunks.of(Templates.of([]), targets_at((), ())).batches(100) == []
