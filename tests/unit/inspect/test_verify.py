# SPDX-License-Identifier: Apache-2.0
"""Every byte of every capture is compared; what the run gives up meanwhile is no damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import ToyState, capture, make_arena, make_packer

from megatron_moetion.inspect import verify as room
from megatron_moetion.inspect.look import ArenaFile, look_at_arena
from megatron_moetion.inspect.verify import Verified, Verifier, whole_copies
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import NO_SLOT, Record


@pytest.fixture
def verifier() -> Iterator[Verifier]:
    found = Verifier(2)
    yield found
    found.close()


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    return filled(tmp_path)


def filled(folder: Path) -> Arena:
    state = ToyState(elements=5000)
    arena = make_arena(folder, state)
    packer = make_packer(state.inventory())
    for iteration in (1, 2):
        capture(packer, arena, iteration)
    return arena


def look(arena: Arena) -> ArenaFile:
    found = look_at_arena(Path(arena.name), living=False)
    assert found is not None
    return found


def verify(verifier: Verifier, arena: Arena) -> Verified:
    found = verifier.verify(look(arena))
    assert found is not None
    return found


def test_all_is_whole(verifier: Verifier, arena: Arena) -> None:
    found = verify(verifier, arena)
    assert list(found.sound) == list(arena.page.records)
    assert (len(found.damaged), found.released) == (0, 0)
    assert found.nbytes == sum(r.nbytes for r in arena.page.records)


def test_pieces_smaller_than_a_capture(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PIECE_BYTES", 1)
    read: list[int] = []
    verifier = Verifier(3, read.append)
    try:
        assert len(verify(verifier, arena).sound) == len(arena.page.records)
        assert sum(read) == sum(r.nbytes for r in arena.page.records)
        assert max(read) == arena.spec.identity.chunk_bytes
        last = arena.payload(arena.page.records[0].slot)
        last[-1] ^= 1
        assert [r.key for r in verify(verifier, arena).damaged] == [arena.page.records[0].key]
    finally:
        verifier.close()


@pytest.mark.parametrize("where", ["first byte", "last byte", "digest", "all zero"])
def test_one_changed_bit_is_found(verifier: Verifier, arena: Arena, where: str) -> None:
    record = arena.page.records[3]
    change: dict[str, Callable[[], None]] = {
        "first byte": lambda: flip(arena.payload(record.slot), 0),
        "last byte": lambda: flip(arena.payload(record.slot), -1),
        "digest": lambda: flip(arena.digests(record.slot).view(np.uint8), 5),
        "all zero": lambda: arena.payload(record.slot).fill(0),
    }
    change[where]()
    found = verify(verifier, arena)
    assert [r.key for r in found.damaged] == [record.key]
    assert len(found.sound) == len(arena.page.records) - 1


def flip(data: np.ndarray, position: int) -> None:
    data[position] ^= 4


@pytest.mark.parametrize(
    "wrong",
    [{"unit": 99}, {"slot": 1000}, {"nbytes": 64}, {"slot": NO_SLOT}, {"digest": 1}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_record_that_fits_nothing_is_damaged(verifier: Verifier, arena: Arena, wrong: dict[str, int]) -> None:
    record = arena.page.records[0]
    changed = Record(**{**vars(record), **wrong})
    arena.edit(lambda page: {"records": (changed, *list(page.records)[1:])})
    assert list(verify(verifier, arena).damaged) == [changed]


def test_a_capture_of_zeros_needs_no_bytes(verifier: Verifier, arena: Arena) -> None:
    zero = Record(unit=0, iteration=3, epoch=0, slot=NO_SLOT, nbytes=0, digest=0)
    arena.add([zero])
    assert zero in list(verify(verifier, arena).sound)


def test_a_file_that_was_cut_short_is_damage_and_no_crash(verifier: Verifier, arena: Arena) -> None:
    file = look(arena)
    path = Path(arena.name)
    arena.close()
    with path.open("r+b") as out:
        out.truncate(file.nbytes - 100_000)
    found = verifier.verify(file)
    assert found is not None
    assert len(found.damaged) > 0
    cut = look_at_arena(path, living=False)
    assert cut is not None
    assert "its header says" in str(cut.problem)


def test_what_is_given_up_while_it_is_read_is_no_damage(verifier: Verifier, arena: Arena) -> None:
    file = look(arena)
    record, *others = arena.page.records
    arena.edit(lambda page: {"records": page.records[1:]})
    arena.payload(record.slot)[:] = 9  # the slot is used again
    found = verifier.verify(file)
    assert found is not None
    assert (found.released, len(found.damaged), len(found.sound)) == (1, 0, len(others))


def test_an_arena_that_is_replaced_while_it_is_read_is_no_damage(
    verifier: Verifier, arena: Arena, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = look(arena)
    arena.payload(arena.page.records[0].slot)[:] = 9
    intact = Verifier._intact

    def and_replace(self: Verifier, *arguments: object) -> object:
        found = intact(self, *arguments)  # type: ignore[arg-type]
        Path(arena.name).unlink(missing_ok=True)
        filled(tmp_path)
        return found

    monkeypatch.setattr(Verifier, "_intact", and_replace)
    found = verifier.verify(file)
    assert found is not None
    assert (found.released, len(found.damaged)) == (1, 0)


def test_an_arena_that_has_gone_is_passed_over(verifier: Verifier, arena: Arena) -> None:
    file = look(arena)
    arena.remove()
    assert verifier.verify(file) is None


def test_another_copy_is_named_only_if_it_is_whole(verifier: Verifier, tmp_path: Path) -> None:
    arenas = [filled(tmp_path / name) for name in ("a", "b", "c")]
    record = arenas[0].page.records[2]
    for arena in arenas[:2]:
        arena.payload(record.slot)[0] ^= 1
    found = [verify(verifier, arena) for arena in arenas]
    assert whole_copies(found[0].damaged[0], arenas[0].spec, found) == [Path(arenas[2].name)]
    other = replace(arenas[0].spec, identity=replace(arenas[0].spec.identity, owner=1))
    assert whole_copies(found[0].damaged[0], other, found) == []
