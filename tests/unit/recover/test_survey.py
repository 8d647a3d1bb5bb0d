# SPDX-License-Identifier: Apache-2.0
"""The survey of real arenas: only what verifies is reported, foreign arenas are flagged, nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support import POOL, ToyState, capture, make_arena, make_packer, node_folder, spec_of

from megatron_moetion.recover.opened import Opened
from megatron_moetion.recover.report import ArenaReport, History, Summary
from megatron_moetion.recover.survey import share_of, survey_store
from megatron_moetion.replicate.placement import place
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Branch
from megatron_moetion.store.spec import ArenaShape, arena_name


def opened(folder: Path, on_open: Callable[[Arena], None] = lambda arena: None) -> Opened:
    return Opened(node_folder(folder), on_open)


def survey_all(here: Opened, state: ToyState, **changes: str) -> list[ArenaReport]:
    shapes = [ArenaShape.of(spec_of(state, owner, **changes)) for owner in range(2)]
    return survey_store(here, here.node.arenas(), spec_of(state, **changes).identity, shapes, POOL)


def survey(path: Path, state: ToyState, **changes: str) -> ArenaReport:
    (found,) = survey_all(opened(path.parent), state, **changes)
    return found


def test_what_is_whole_is_reported(tmp_path: Path) -> None:
    state = ToyState()
    arena = make_arena(tmp_path, state)
    packer = make_packer(state.inventory())
    records = [*capture(packer, arena, 1), *capture(packer, arena, 2)]
    arena.edit(lambda page: {"epoch": 4, "stable": 1, "branches": (Branch(epoch=4, iteration=1),)})
    arena.close()
    found = survey(Path(arena.name), state)
    assert (found.owner, found.damaged, found.problem) == (0, 0, None)
    assert found.history == History(epoch=4, stable=1, branches=(Branch(epoch=4, iteration=1),))
    assert set(found.records) == set(records)
    summary = Summary.of([found])
    assert Summary.from_json(json.loads(json.dumps(summary.to_json()))) == summary


def test_a_damaged_capture_is_not_reported_and_counted(tmp_path: Path) -> None:
    state = ToyState()
    arena = make_arena(tmp_path, state)
    records = capture(make_packer(state.inventory()), arena, 1)
    arena.payload(records[1].slot)[17] ^= 0x01
    arena.digests(records[2].slot)[0] ^= 0x80
    arena.close()
    found = survey(Path(arena.name), state)
    assert found.damaged == 2
    assert set(found.records) == set(records) - {records[1], records[2]}


def test_records_that_point_nowhere_are_damage(tmp_path: Path) -> None:
    state = ToyState()
    arena = make_arena(tmp_path, state)
    good = capture(make_packer(state.inventory()), arena, 1)
    wrong = [
        replace(good[0], iteration=2, unit=99),
        replace(good[0], iteration=3, slot=arena.spec.num_slots + 5),
        replace(good[0], iteration=4, nbytes=good[0].nbytes + 64),
        replace(good[0], iteration=5, slot=good[1].slot),
        replace(good[0], iteration=6, nbytes=1 << 50),
        replace(good[0], iteration=7, nbytes=1 << 63),
        replace(good[0], iteration=8, nbytes=0),
    ]
    arena.edit(lambda page: {"records": (*page.records, *wrong)})
    arena.close()
    found = survey(Path(arena.name), state)
    assert found.damaged == len(wrong)
    assert set(found.records) == set(good)


def test_a_foreign_arena_is_flagged_and_both_sides_are_named(tmp_path: Path) -> None:
    state = ToyState()
    arena = make_arena(tmp_path, state, run_id="theirs")
    arena.edit(lambda page: {"stable": 0})
    arena.close()
    found = survey(Path(arena.name), state, run_id="ours")
    assert found.foreign
    assert "the arena has 'theirs', this run has 'ours'" in found.problem
    assert not found.records


def test_another_ranks_arena_is_held_against_that_rank(tmp_path: Path) -> None:
    """The model of rank 1 changed, and rank 0 happens to look at its arena."""
    arena = make_arena(tmp_path, ToyState(elements=900), owner=1)
    arena.edit(lambda page: {"stable": 0})
    arena.close()
    found = survey(Path(arena.name), ToyState(elements=1500))
    assert found.foreign
    assert "layout" in found.problem


def test_what_never_held_anything_and_is_of_other_settings_is_passed_over(tmp_path: Path) -> None:
    state = ToyState()
    arena = make_arena(tmp_path, state, chunk_bytes=8192)
    arena.close()
    here = opened(tmp_path)
    assert survey_all(here, state) == []
    ours = make_arena(tmp_path, state)
    ours.close()
    assert [r.problem for r in survey_all(here, state)] == [None]


def test_an_arena_under_another_ranks_name_is_passed_over_and_stays(tmp_path: Path) -> None:
    state = ToyState()
    make_arena(tmp_path, state).close()
    (tmp_path / "rank00000.arena").rename(tmp_path / "rank00001.arena")
    here = opened(tmp_path)
    assert survey_all(here, state) == []
    assert here.node.arenas() == ["rank00001.arena"]


def test_a_file_that_is_no_arena_is_a_problem_and_not_foreign(tmp_path: Path) -> None:
    path = tmp_path / "rank00000.arena"
    path.write_bytes(b"\x80\x04not an arena" * 1000)
    found = survey(path, ToyState())
    assert "rank00000.arena" in found.problem
    assert not found.foreign


@pytest.mark.parametrize("kind", ["folder", "link to nothing", "pipe"])
def test_what_is_no_regular_file_is_a_problem_and_not_foreign(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rank00000.arena"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nothing")
    found = survey(path, ToyState())
    assert str(path) in found.problem
    assert not found.foreign


def test_an_arena_of_another_version_is_foreign_also_when_it_holds_nothing(tmp_path: Path) -> None:
    state = ToyState()
    arena = make_arena(tmp_path, state)
    arena.close()
    Path(arena.name).write_bytes(b"MOETION1" + Path(arena.name).read_bytes()[8:])
    found = survey(Path(arena.name), state)
    assert found.foreign
    assert "another version" in found.problem


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_what_is_sound_stays_open_for_whoever_takes_it(tmp_path: Path) -> None:
    state = ToyState()
    make_arena(tmp_path, state).close()
    seen: list[str] = []
    here = opened(tmp_path, lambda arena: seen.append(Path(arena.name).name))
    assert [r.problem for r in survey_all(here, state)] == [None]
    arena = here.take("rank00000.arena")
    assert seen == ["rank00000.arena"], "mapped once"
    here.close_all()
    assert arena.nbytes == arena.memory.nbytes
    arena.close()
    assert not is_mapped(tmp_path)


@pytest.mark.parametrize("problem", ["foreign", "of other settings", "not taken"])
def test_what_is_not_used_is_let_go(tmp_path: Path, problem: str) -> None:
    state = ToyState()
    arena = make_arena(tmp_path, state, run_id="ours" if problem == "not taken" else "theirs")
    if problem == "foreign":
        arena.edit(lambda page: {"stable": 0})
    arena.close()
    del arena
    here = opened(tmp_path)
    found = survey_all(here, state, run_id="ours")
    if problem == "not taken":
        assert is_mapped(tmp_path)
        here.close_all()
    assert [r.foreign for r in found] == {"foreign": [True], "of other settings": [], "not taken": [False]}[problem]
    assert not is_mapped(tmp_path)


@pytest.mark.parametrize("replicas", [0, 1, 2])
def test_each_rank_surveys_what_it_opens_later_and_its_own_arena_first(replicas: int) -> None:
    placement = place(["a", "a", "b", "b", "c", "c"], replicas)
    names = [*(arena_name(owner) for owner in range(6)), "other.arena", "others.arena", "rank00099.arena"]
    for node in range(3):
        shares = {rank: share_of(rank, names, node, placement) for rank in placement.ranks_on(node)}
        assert sorted(name for share in shares.values() for name in share) == sorted(names)
        for rank, share in shares.items():
            assert share[0] == arena_name(rank)
            assert {arena_name(owner) for owner in placement.owners_held_by(rank)} <= set(share)
        assert {sum(not n.startswith("rank0000") for n in share) for share in shares.values()} == {1, 2}
