# SPDX-License-Identifier: Apache-2.0
"""Arenas: one writer, memory allocated at start, and no valid page that refers to bytes that were overwritten."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import socket
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ToyState, find, identity, make_arena, spec_of

from megatron_moetion.errors import CorruptArena, IdentityMismatch, StoreError
from megatron_moetion.store.arena import Arena, first_bytes
from megatron_moetion.store.files import clear
from megatron_moetion.store.hostmemory import HostMemory
from megatron_moetion.store.manifest import NO_SLOT, Branch, Page, Record, decode_page, page_bytes
from megatron_moetion.store.population import Population
from megatron_moetion.store.sharedfile import create_arena, open_arena, peek_arena
from megatron_moetion.store.spec import ArenaSpec

SMALL, LARGE = 64, 8192
SPEC = ArenaSpec(identity=identity(), units=(("small", 1, SMALL), ("large", 1, LARGE)), slots=((SMALL, 4), (LARGE, 2)))
PAGE_STARTS = (4096, 8192)


def create(folder: Path, page: Page | None = None) -> Arena:
    return create_arena(folder / "rank00000.arena", SPEC, page or Page())


def store(arena: Arena, unit: int, iteration: int, fill: int | None = None) -> Record:
    """Fill a slot with a byte that stands for the capture, and commit it."""
    nbytes = SPEC.units[unit][2]
    slot = arena.acquire(nbytes)
    assert slot is not None
    value = iteration % 251 if fill is None else fill
    arena.payload(slot)[:] = value
    record = Record(unit=unit, iteration=iteration, epoch=0, slot=slot, nbytes=nbytes, digest=value)
    arena.add([record])
    return record


def valid_pages(path: Path) -> list[Page]:
    """Both pages as they stand in the file."""
    data = path.read_bytes()
    area = page_bytes(SPEC.num_slots)
    return [p for p in (decode_page(data[s : s + area]) for s in PAGE_STARTS) if p is not None]


def damage(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x40]))


# -- what an arena is -----------------------------------------------------------------------------------------


def test_captures_survive_the_process(tmp_path: Path) -> None:
    first = create(tmp_path, Page(epoch=3, stable=2, branches=(Branch(epoch=3, iteration=2),)))
    records = [store(first, 0, 5), store(first, 1, 5)]
    first.digests(records[1].slot)[:] = [7, 8]
    first.close()
    again = open_arena(tmp_path / "rank00000.arena")
    assert again.spec == SPEC
    assert (again.page.epoch, again.page.stable, again.page.branches) == (3, 2, (Branch(epoch=3, iteration=2),))
    assert list(again.page.records) == records
    assert find(again, 1, 5) == records[1]
    assert find(again, 1, 6) is None
    assert (again.payload(records[1].slot) == 5).all()
    assert again.digests(records[1].slot).tolist() == [7, 8]
    assert again.nbytes == (tmp_path / "rank00000.arena").stat().st_size


def test_memory_is_allocated_when_the_arena_is_made(tmp_path: Path) -> None:
    arena = create(tmp_path)
    assert Path(arena.name).stat().st_blocks * 512 >= arena.nbytes
    assert oct(Path(arena.name).stat().st_mode & 0o777) == "0o600"
    assert [p.name for p in tmp_path.iterdir()] == ["rank00000.arena"]


class Paper:
    """A ``Memory`` that is no file."""

    def __init__(self, spec: ArenaSpec, page: Page) -> None:
        self.name = "paper"
        self.array = np.zeros(spec.nbytes, dtype=np.uint8)
        for start, data in first_bytes(spec, page):
            self.array[start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)
        self.has_file = True
        self.calls: list[str] = []

    def make_file_again(self) -> None:
        self.calls.append("make again")

    def remove(self) -> None:
        self.calls.append("remove")

    def close(self) -> None:
        self.calls.append("close")


def test_an_arena_knows_nothing_of_its_memory() -> None:
    paper = Paper(SPEC, Page(stable=3))
    arena = Arena(paper)
    record = store(arena, 0, 5)
    assert Arena(paper).page.records == (record,)
    paper.has_file = False
    assert not arena.has_file
    arena.make_file_again()
    arena.remove()
    assert paper.calls == ["make again", "remove", "close"]
    assert not arena.memory.size


def test_slots_are_acquired_all_or_none(tmp_path: Path) -> None:
    arena = create(tmp_path)
    large = arena.acquire(LARGE)
    assert large is not None
    assert arena.acquire_all(np.array([SMALL, LARGE, SMALL, LARGE])) is None
    slots = arena.acquire_all(np.array([SMALL, LARGE, SMALL, SMALL, SMALL]))
    assert slots is not None, "the failed attempt took nothing"
    assert [arena.payload(s).nbytes for s in slots.tolist()] == [SMALL, LARGE, SMALL, SMALL, SMALL]
    assert len({*slots.tolist(), large}) == SPEC.num_slots
    assert arena.slot_bytes(slots).tolist() == [SMALL, LARGE, SMALL, SMALL, SMALL]
    assert [v.ctypes.data for v in arena.payloads(slots)] == arena.payload_addresses(slots).tolist()
    assert arena.acquire_all(np.array([], dtype=np.int64)) is not None
    arena.release([NO_SLOT, *slots.tolist()])
    assert arena.acquire_all(np.array([SMALL] * 4)) is not None


def test_slots_are_pooled_by_size(tmp_path: Path) -> None:
    state = ToyState(num_experts=3)
    spec = spec_of(state, copies=2)
    sizes = sorted({u.nbytes for u in state.inventory().units})
    assert [size for size, _ in spec.slots] == sizes
    assert spec.num_slots == 2 * len(spec.units)
    assert ArenaSpec.from_json(spec.to_json()) == spec
    arena = make_arena(tmp_path, state, copies=2)
    spans = sorted(
        (view.ctypes.data, view.ctypes.data + view.nbytes)
        for slot in range(spec.num_slots)
        for view in (arena.payload(slot), arena.digests(slot))
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_a_full_pool_gives_no_slot(tmp_path: Path) -> None:
    arena = create(tmp_path)
    slots = [arena.acquire(SMALL) for _ in range(4)]
    assert len(set(slots)) == 4
    assert arena.acquire(SMALL) is None
    assert arena.acquire(SMALL + 64) is None
    assert arena.acquire(LARGE) is not None
    arena.release([s for s in slots[:1] if s is not None])
    assert arena.acquire(SMALL) == slots[0]


def test_a_capture_of_the_same_unit_and_iteration_is_replaced(tmp_path: Path) -> None:
    arena = create(tmp_path)
    old = store(arena, 0, 5)
    new = store(arena, 0, 5, fill=99)
    assert arena.page.records == (new,)
    assert all(old not in p.records for p in valid_pages(Path(arena.name)))


def test_a_committed_slot_is_dropped_by_an_edit_only(tmp_path: Path) -> None:
    arena = create(tmp_path)
    record = store(arena, 0, 1)
    with pytest.raises(AssertionError, match="holds a whole capture"):
        arena.release([record.slot])
    assert arena.page.records == (record,)


def test_room_in_the_page_for_a_record_in_every_slot(tmp_path: Path) -> None:
    arena = create(tmp_path)
    for unit, count in ((0, 4), (1, 2)):
        for iteration in range(count):
            store(arena, unit, iteration)
    assert len(arena.page.records) == SPEC.num_slots


# -- its file -------------------------------------------------------------------------------------------------


def test_close_lets_go_while_views_are_alive(tmp_path: Path) -> None:
    arena = create(tmp_path)
    view = arena.payload(0)
    arena.close()
    arena.close()
    open_arena(Path(arena.name)).close()
    view[:] = 3
    assert view.tolist() == [3] * SMALL


def test_a_file_that_was_deleted_is_made_again_at_the_same_addresses(tmp_path: Path) -> None:
    arena = create(tmp_path, Page(epoch=2, stable=1))
    record = store(arena, 1, 5)
    address, view = arena.memory.ctypes.data, arena.payload(record.slot)
    assert arena.has_file
    Path(arena.name).unlink()
    assert not arena.has_file
    arena.make_file_again()
    assert arena.has_file
    assert arena.memory.ctypes.data == address
    view[:] = 77  # what an old view writes goes into the new file
    store(arena, 0, 6)
    again = open_arena(Path(arena.name))
    assert again.page == arena.page
    assert (again.payload(record.slot) == 77).all()


def test_another_file_under_the_name_is_noticed(tmp_path: Path) -> None:
    arena = create(tmp_path)
    (tmp_path / "other").write_bytes(b"")
    (tmp_path / "other").rename(Path(arena.name))
    assert not arena.has_file


def test_without_room_a_deleted_file_is_not_made_again_and_the_arena_stays_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = create(tmp_path)
    record = store(arena, 0, 5)
    Path(arena.name).unlink()
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=2, f_frsize=4096))
    with pytest.raises(StoreError, match="this arena needs"):
        arena.make_file_again()
    assert (arena.payload(record.slot) == 5).all()
    assert list(tmp_path.iterdir()) == []


def special(path: Path, kind: str) -> None:
    """Something that is no regular file, or none that can be read."""
    if kind == "folder":
        path.mkdir()
    elif kind == "link to nothing":
        path.symlink_to(path.parent / "nothing")
    elif kind == "link to an arena":
        path.symlink_to(create(path.parent).name)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.close()


SPECIAL = ("folder", "link to nothing", "link to an arena", "pipe", "socket")


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_corrupt_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rank00007.arena"
    special(path, kind)
    for look in (open_arena, peek_arena):
        with pytest.raises(CorruptArena, match=re.escape(str(path))):
            look(path)


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_name_is_cleared_whatever_stands_under_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rank00007.arena"
    special(path, kind)
    before = {p.name for p in tmp_path.iterdir()} - {path.name}
    clear(path)
    assert not path.is_symlink()
    assert not path.exists()
    assert before <= {p.name for p in tmp_path.iterdir()}
    clear(path)


def test_another_users_file_is_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = create(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(CorruptArena, match="belongs to user"):
        open_arena(Path(arena.name))


def test_remove_deletes_the_file(tmp_path: Path) -> None:
    arena = create(tmp_path)
    arena.remove()
    assert not Path(arena.name).exists()


# -- too little memory ----------------------------------------------------------------------------------------


def test_too_little_memory_names_need_and_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=2, f_frsize=4096))
    with pytest.raises(StoreError, match=r"has 0.0 MiB free and this arena needs 0.1 MiB.*--moetion-store"):
        create(tmp_path)
    assert list(tmp_path.iterdir()) == []


class NoMemory(HostMemory):
    """Memory that is short when it is asked for."""

    def populate(self, fd: int, address: int, nbytes: int) -> Population:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_memory_that_runs_out_while_it_is_allocated_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="this arena needs"):
        create_arena(tmp_path / "rank00000.arena", SPEC, Page(), NoMemory())
    assert list(tmp_path.iterdir()) == []


def test_an_arena_with_holes_that_find_no_memory_is_corrupt(tmp_path: Path) -> None:
    path = Path(create(tmp_path).name)
    with pytest.raises(CorruptArena, match=r"rank00000\.arena cannot be mapped: No space left on device"):
        open_arena(path, NoMemory())


def test_an_arena_tells_how_it_got_its_memory(tmp_path: Path) -> None:
    memory = HostMemory(num_threads=2)
    arena = create_arena(tmp_path / "rank00000.arena", SPEC, Page(), memory)
    assert (arena.population.nbytes, arena.population.num_threads) == (arena.nbytes, 2)
    assert open_arena(Path(arena.name), memory).population.num_threads == 2


def test_a_creation_that_was_killed_does_not_keep_its_memory(tmp_path: Path) -> None:
    # SIGKILL while it is populated: the scratch file has its full size and nobody's name. The next creation frees it.
    (tmp_path / "rank00000.99999.tmp").write_bytes(b"left by a dead process")
    create(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["rank00000.arena"]


# -- strangers and damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 10, 31, 300, 4096, 9000, -1])
def test_a_truncated_file_is_corrupt(tmp_path: Path, size: int) -> None:
    path = _closed(tmp_path)
    os.truncate(path, size % path.stat().st_size)
    with pytest.raises(CorruptArena, match="rank00000"):
        open_arena(path)


def rewrite_header(path: Path, magic: bytes = b"MOETION3", **identity_fields: object) -> None:
    """A header that verifies, with other fields."""
    data = bytearray(path.read_bytes())
    document = json.loads(data[32 : 32 + int.from_bytes(data[8:16], "little")])
    document["identity"] |= identity_fields
    body = json.dumps(document, separators=(",", ":")).encode()
    assert 32 + len(body) <= 4096
    digest = hashlib.blake2b(body, digest_size=16).digest()
    data[: 32 + len(body)] = magic + len(body).to_bytes(8, "little") + digest + body
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("magic", "more"), [(b"MOETION1", {}), (b"MOETION9", {"x": 1}), (b"MOETION3", {"new_field": 1})]
)
def test_an_arena_of_another_version_is_a_stranger_and_not_damaged(
    tmp_path: Path, magic: bytes, more: dict[str, object]
) -> None:
    arena = create(tmp_path)
    arena.close()
    rewrite_header(Path(arena.name), magic, **more)
    for look in (open_arena, peek_arena):
        with pytest.raises(IdentityMismatch, match=r"another version.*its format is '.*this version reads 3"):
            look(Path(arena.name))


@pytest.mark.parametrize("field", ["owner", "run_id", "chunk_bytes"])
def test_a_header_with_values_of_another_kind_is_refused(tmp_path: Path, field: str) -> None:
    arena = create(tmp_path)
    arena.close()
    rewrite_header(Path(arena.name), **{field: [1]})
    with pytest.raises(IdentityMismatch):
        open_arena(Path(arena.name))


def test_a_header_that_claims_many_slots_is_corrupt_before_they_are_counted(tmp_path: Path) -> None:
    arena = create(tmp_path)
    huge = ArenaSpec(identity=identity(), units=SPEC.units, slots=((SMALL, 1 << 40), (LARGE, 1))).to_json()
    data = bytearray(Path(arena.name).read_bytes())
    digest = hashlib.blake2b(huge, digest_size=16).digest()
    data[: 32 + len(huge)] = b"MOETION3" + len(huge).to_bytes(8, "little") + digest + huge
    Path(arena.name).write_bytes(data)
    for look in (open_arena, peek_arena):
        with pytest.raises(CorruptArena, match="its header says"):
            look(Path(arena.name))


def test_a_damaged_header_is_corrupt(tmp_path: Path) -> None:
    path = _closed(tmp_path)
    for position in range(32 + len(SPEC.to_json())):
        damage(path, position)
        with pytest.raises(CorruptArena):
            open_arena(path)
        damage(path, position)
    open_arena(path).close()


def test_a_damaged_page_falls_back_and_two_are_corrupt(tmp_path: Path) -> None:
    path = _closed(tmp_path)
    older, current = sorted(valid_pages(path), key=lambda p: p.sequence)
    assert [len(older.records), len(current.records)] == [1, 2]
    damage(path, PAGE_STARTS[current.sequence % 2] + 60)
    arena = open_arena(path)
    assert arena.page == older
    store(arena, 1, 9)
    assert len(valid_pages(path)) == 2
    arena.close()
    for start in PAGE_STARTS:
        damage(path, start + 60)
    with pytest.raises(CorruptArena, match="neither manifest page verifies"):
        open_arena(path)


def _closed(folder: Path) -> Path:
    """An arena with two captures, closed."""
    arena = create(folder)
    store(arena, 0, 1)
    store(arena, 0, 2)
    arena.close()
    return Path(arena.name)


# -- no page refers to bytes that were overwritten ------------------------------------------------------------


def test_a_freed_slot_that_is_overwritten_is_in_no_valid_page(tmp_path: Path) -> None:
    arena = create(tmp_path)
    doomed, kept = store(arena, 1, 1), store(arena, 1, 2)
    arena.edit(lambda page: {"records": (kept,), "stable": 2})
    slot = arena.acquire(LARGE)
    assert slot == doomed.slot
    arena.payload(slot)[:] = 0xEE
    current = arena.page.sequence
    arena.close()
    damage(Path(arena.name), PAGE_STARTS[current % 2] + 60)
    again = open_arena(Path(arena.name))
    assert again.page.sequence == current - 1
    assert again.page.records == (kept,)


def test_a_crash_between_the_two_page_writes_of_an_edit_frees_no_slot(tmp_path: Path) -> None:
    arena = create(tmp_path)
    doomed, kept = store(arena, 1, 1), store(arena, 1, 2)
    _crash_in_edit(arena, (kept,))
    again = open_arena(Path(arena.name))
    assert again.page.records == (kept,)
    assert doomed in min(valid_pages(Path(arena.name)), key=lambda p: p.sequence).records
    assert again.acquire(LARGE) is None, "the older page is valid and refers to this slot"
    again.edit(lambda page: {"stable": 2})
    assert again.acquire(LARGE) == doomed.slot


def _crash_in_edit(arena: Arena, records: Sequence[Record]) -> None:
    """Leave the first page of an edit, and of the second one what it replaces."""
    path, start = Path(arena.name), PAGE_STARTS[arena.page.sequence % 2]
    before = path.read_bytes()[start : start + 4096]
    arena.edit(lambda page: {"records": records})
    arena.close()
    with path.open("r+b") as file:
        file.seek(start)
        file.write(before)


OPERATIONS = st.lists(
    st.sampled_from(("acquire", "acquire", "commit", "commit", "release", "drop", "stable", "reopen", "crash in edit")),
    min_size=20,
    max_size=60,
)


@given(OPERATIONS, st.integers(0, 2**32))
@settings(max_examples=60)
def test_every_valid_page_refers_to_the_bytes_it_was_written_for(operations: list[str], seed: int) -> None:
    choose = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        arena = create(Path(folder))
        pending: list[tuple[int, int]] = []  # unit, slot
        for clock, operation in enumerate(operations):
            records = arena.page.records
            if operation == "acquire":
                unit = choose.randrange(2)
                slot = arena.acquire(SPEC.units[unit][2])
                if slot is not None:
                    assert slot not in {r.slot for p in valid_pages(Path(arena.name)) for r in p.records}
                    assert slot not in {s for _, s in pending}
                    arena.payload(slot)[:] = 0xEE
                    pending.append((unit, slot))
            elif operation == "commit" and pending:
                arena.add([_commit(arena, *pending.pop(), clock)])
            elif operation == "release" and pending:
                arena.release([pending.pop(0)[1]])
            elif operation in ("drop", "crash in edit") and records:
                kept = tuple(r for r in records if choose.random() < 0.5)
                if operation == "drop":
                    arena.edit(lambda page, kept=kept: {"records": kept})
                else:
                    _crash_in_edit(arena, kept)
                    arena, pending = open_arena(Path(arena.name)), []
            elif operation == "stable":
                arena.edit(lambda page, clock=clock: {"stable": clock})
            elif operation == "reopen":
                arena.close()
                arena, pending = open_arena(Path(arena.name)), []
                assert arena.page.records == records
            pages = valid_pages(Path(arena.name))
            assert max(pages, key=lambda p: p.sequence) == arena.page
            for record in (r for page in pages for r in page.records):
                assert (arena.payload(record.slot) == record.digest).all(), f"{operation}: {record} was overwritten"
        arena.close()


def _commit(arena: Arena, unit: int, slot: int, clock: int) -> Record:
    arena.payload(slot)[:] = clock
    return Record(unit=unit, iteration=clock // 3, epoch=0, slot=slot, nbytes=SPEC.units[unit][2], digest=clock)


def test_handing_out_slots_takes_no_search_through_all_of_them(tmp_path: Path) -> None:
    # It happens on the training thread. Counted, not timed: the work for one slot must not grow with their number.
    spec = ArenaSpec(identity=identity(), units=(("u", 1, SMALL),), slots=((SMALL, 600),))
    arena = create_arena(tmp_path / "many.arena", spec, Page())
    lines = 0

    def count(frame: object, event: str, argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return count

    sys.settrace(count)
    try:
        slots = [arena.acquire(SMALL) for _ in range(600)]
    finally:
        sys.settrace(None)
    assert len(set(slots)) == 600
    assert lines < 600 * 60
    assert np.unique([arena.payload(s).ctypes.data for s in slots if s is not None]).size == 600
