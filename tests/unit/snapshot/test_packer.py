# SPDX-License-Identifier: Apache-2.0
"""The packer: into an arena, verified, and back, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import ToyState, acquire, capture, is_whole, make_arena, make_packer

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.snapshot.packer import Packer
from megatron_moetion.snapshot.plan import BATCH_BYTES
from megatron_moetion.store.arena import Arena


def rig(folder: Path, threads: int = 1, batch_bytes: int = BATCH_BYTES) -> tuple[ToyState, Packer, Arena]:
    state = ToyState(elements=3000, frozen=True)
    return state, make_packer(state.inventory(), threads, batch_bytes=batch_bytes), make_arena(folder, state)


@pytest.mark.parametrize("threads", [1, 3])
def test_pack_verify_and_scatter_are_bitwise(tmp_path: Path, threads: int) -> None:
    state, packer, arena = rig(tmp_path, threads)
    before = [a.copy() for a in (*state.arrays.values(), state.counts)]
    records = capture(packer, arena, 1)
    assert all(is_whole(arena, r) for r in records)
    state.step(1)
    for record in records:
        packer.scatter(record.unit, arena.payload(record.slot))
    for old, new in zip(before, (*state.arrays.values(), state.counts), strict=True):
        assert old.tobytes() == new.tobytes()


def test_a_capture_is_its_regions_in_order_with_zeros_between(tmp_path: Path) -> None:
    state, packer, arena = rig(tmp_path)
    for slot in range(arena.spec.num_slots):
        arena.payload(slot)[:] = 0xEE
    dense = capture(packer, arena, 1)[0]
    unit = state.inventory().units[0]
    expected = np.zeros(unit.nbytes, dtype=np.uint8)
    for region, offset, array in zip(unit.regions, unit.offsets, (state.arrays["dense"], state.counts), strict=True):
        expected[offset : offset + region.nbytes] = array.view(np.uint8)
    assert arena.payload(dense.slot).tobytes() == expected.tobytes()


def test_any_flipped_byte_is_caught(tmp_path: Path) -> None:
    _state, packer, arena = rig(tmp_path)
    for record in capture(packer, arena, 1):
        for view in (arena.payload(record.slot), arena.digests(record.slot).view(np.uint8)):
            for position in {0, 1, len(view) // 2, len(view) - 1, *range(0, len(view), 997)}:
                view[position] ^= 0x10
                assert not is_whole(arena, record), f"byte {position}"
                view[position] ^= 0x10
        assert is_whole(arena, record)
        assert not is_whole(arena, replace(record, digest=record.digest ^ 1))


def test_what_cannot_wait_is_taken_at_freeze_time(tmp_path: Path) -> None:
    state, packer, arena = rig(tmp_path)
    state.counts[:] = [10, 20, 30, 40]
    packer.freeze(b"then")
    state.counts[:] = 99
    assert packer.staged(0, 1).view(np.int64).tolist() == [10, 20, 30, 40]
    dense, host = 0, len(arena.spec.units) - 1
    slots, targets = acquire(arena, (dense, host))
    payloads = [arena.payload(s) for s in slots]
    assert packer.pack(targets, lambda: None) is not None
    offset = state.inventory().units[dense].offsets[1]
    assert payloads[0][offset : offset + 32].view(np.int64).tolist() == [10, 20, 30, 40]
    assert payloads[1].tobytes() == b"then".ljust(len(payloads[1]), b"\0")


def test_a_shorter_host_state_leaves_nothing_of_the_longer_one(tmp_path: Path) -> None:
    _state, packer, arena = rig(tmp_path)
    packer.freeze(b"long" * 100)
    host = capture(packer, arena, 7)[-1]
    assert arena.payload(host.slot).tobytes().rstrip(b"\0") == b"host state of 7"


def test_host_state_beyond_its_room_is_refused(tmp_path: Path) -> None:
    _state, packer, _ = rig(tmp_path)
    packer.freeze(b"x" * 1000)
    with pytest.raises(UnsupportedState, match="host state grew to 1001 bytes; 1000 were reserved"):
        packer.freeze(b"x" * 1001)


def test_a_cancelled_pack_returns_none_until_it_is_allowed_again(tmp_path: Path) -> None:
    _state, packer, arena = rig(tmp_path)
    _, targets = acquire(arena, (0,))
    packer.freeze(b"")
    packer.cancel()
    assert packer.pack(targets, lambda: None) is None
    packer.allow()
    assert packer.pack(targets, lambda: None) is not None


def test_between_is_called_after_each_batch(tmp_path: Path) -> None:
    _state, packer, arena = rig(tmp_path, batch_bytes=1)
    calls: list[int] = []
    _, targets = acquire(arena, range(len(arena.spec.units)))
    packer.freeze(b"")
    digests = packer.pack(targets, lambda: calls.append(1))
    assert digests is not None
    assert len(digests) == len(calls) == len(arena.spec.units)


def test_nothing_to_pack(tmp_path: Path) -> None:
    _state, packer, arena = rig(tmp_path)
    _, targets = acquire(arena, ())
    digests = packer.pack(targets, lambda: None)
    assert digests is not None
    assert not len(digests)
