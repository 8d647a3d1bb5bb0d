# SPDX-License-Identifier: Apache-2.0
"""Arenas for readers: what is read is what is there, and nothing that a reader does reaches the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_moetion.errors import CorruptArena
from megatron_moetion.store.manifest import Page
from megatron_moetion.store.reading import read_only
from megatron_moetion.store.sharedfile import create_arena
from megatron_moetion.store.spec import ArenaIdentity, ArenaSpec

SPEC = ArenaSpec(
    identity=ArenaIdentity(run_id="r", owner=3, world_size=4, topology="t", layout="l", mode="full", chunk_bytes=64),
    units=(("u", 1, 128),),
    slots=((128, 3),),
)


def test_a_reader_sees_what_a_writer_has_committed_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rank00003.arena"
    writer = create_arena(path, SPEC, Page(stable=7))
    writer.payload(0)[:] = 5
    reader = read_only(path)
    assert (reader.spec, reader.page.stable, reader.payload(0).tolist()) == (SPEC, 7, [5] * 128)
    before = path.read_bytes()
    reader.payload(0)[:] = 9
    reader.edit(lambda page: {"stable": 8})
    reader.close()
    assert path.read_bytes() == before
    assert writer.payload(0).tolist() == [5] * 128


@pytest.mark.parametrize("content", [b"", b"no arena"])
def test_what_is_no_arena_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rank00000.arena"
    path.write_bytes(content)
    with pytest.raises(CorruptArena, match="rank00000"):
        read_only(path)
    with pytest.raises(CorruptArena, match="rank00001"):
        read_only(tmp_path / "rank00001.arena")


def test_a_file_is_never_removed_through_a_reader(tmp_path: Path) -> None:
    path = tmp_path / "rank00003.arena"
    create_arena(path, SPEC, Page())
    with pytest.raises(AssertionError, match="only read"):
        read_only(path).remove()
    assert path.exists()
