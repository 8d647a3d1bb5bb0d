# SPDX-License-Identifier: Apache-2.0
"""The node's folder, its key, and the run's name."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import ToyState, spec_of

from megatron_moetion.clock import SystemClock
from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError, CorruptArena, StoreError
from megatron_moetion.store.manifest import Page
from megatron_moetion.store.node import (
    _make_folder,
    is_found_again,
    open_node,
    restart_count,
    run_id_of,
    store_folder,
    write_pid,
)
from megatron_moetion.store.spec import arena_name

CLOCK = SystemClock()
MADE_UP = uuid.UUID("1c1b4a52-0f0e-4c79-8b34-5ad1e0b0a9d7")
FOUR = {"LOCAL_WORLD_SIZE": "4"}


def test_without_a_setting_the_store_is_in_shared_memory_one_folder_a_user() -> None:
    assert store_folder(MoetionConfig()) == Path(f"/dev/shm/moetion-{os.getuid()}")
    assert store_folder(MoetionConfig(store="/tmp/x")) == Path("/tmp/x")


@pytest.mark.parametrize(
    ("flag", "environment", "expected"),
    [
        ("mine", {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "t"}, "mine"),
        ("", {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "t"}, "7"),
        ("", {"SLURM_JOB_ID": "", "TORCHELASTIC_RUN_ID": "t"}, "t"),
    ],
)
def test_the_run_id_is_the_flag_then_the_job_then_torchrun(
    flag: str, environment: dict[str, str], expected: str
) -> None:
    assert run_id_of(MoetionConfig(run_id=flag), environment) == expected


@pytest.mark.parametrize("made_up", [str(MADE_UP), str(MADE_UP.int)])
def test_a_name_that_torchrun_made_up_is_not_found_again(made_up: str) -> None:
    environment = {"TORCHELASTIC_RUN_ID": made_up}
    assert run_id_of(MoetionConfig(), environment) == made_up
    assert not is_found_again(MoetionConfig(), environment)
    assert is_found_again(MoetionConfig(run_id=made_up), environment)
    assert is_found_again(MoetionConfig(), {**environment, "SLURM_JOB_ID": "7"})
    for given in ("my-run", "20261130", "12345678-run"):
        assert is_found_again(MoetionConfig(), {"TORCHELASTIC_RUN_ID": given})


def test_the_last_node_of_a_run_removes_its_folder_too(tmp_path: Path) -> None:
    config = MoetionConfig(store=str(tmp_path), ranks_per_node=2)
    nodes = [open_node(config, "run", {**FOUR, "LOCAL_RANK": str(rank)}, 4, CLOCK) for rank in (0, 2)]
    (nodes[0].path / "rank00000.arena").touch()
    nodes[0].remove()
    assert list((tmp_path / "run").iterdir()) == [nodes[1].path]
    nodes[1].remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("environment", [{}, {"TORCHELASTIC_RUN_ID": "none"}])
def test_a_run_without_a_name_is_asked_for_one(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--moetion-run-id"):
        run_id_of(MoetionConfig(), environment)


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "/etc"])
def test_a_run_id_cannot_leave_the_store(name: str) -> None:
    with pytest.raises(ConfigError, match="names a folder"):
        run_id_of(MoetionConfig(run_id=name), {})


@pytest.mark.parametrize("name", ["x" * 201, "\u00fc" * 101])
@pytest.mark.parametrize("given", ["flag", "job"])
def test_a_run_id_that_is_too_long_for_a_folder_is_what_the_message_names(name: str, given: str) -> None:
    config = MoetionConfig(run_id=name if given == "flag" else "")
    with pytest.raises(ConfigError, match=r"--moetion-run-id has 20[12] bytes .* more than 200: give a shorter one"):
        run_id_of(config, {"SLURM_JOB_ID": name})
    assert run_id_of(MoetionConfig(run_id="x" * 200), {}) == "x" * 200


def test_restarts_are_the_most_that_any_supervisor_knows() -> None:
    assert restart_count({}) == 0
    assert restart_count({"TORCHELASTIC_RESTART_COUNT": "2", "SLURM_RESTART_COUNT": "3"}) == 3
    assert restart_count({"TORCHELASTIC_RESTART_COUNT": "", "SLURM_RESTART_COUNT": "1"}) == 1


def test_ranks_of_a_node_share_a_folder_and_a_key(tmp_path: Path) -> None:
    config = MoetionConfig(store=str(tmp_path), ranks_per_node=2)
    nodes = [open_node(config, "run", {**FOUR, "LOCAL_RANK": str(r)}, 8, CLOCK) for r in range(4)]
    assert (nodes[0].path, nodes[0].key) == (nodes[1].path, nodes[1].key)
    assert [(n.position, n.num_ranks) for n in nodes] == [(0, 2), (1, 2)] * 2
    assert nodes[2].key == nodes[3].key
    assert nodes[0].key != nodes[2].key
    assert nodes[3].path == tmp_path / "run" / "node1"
    assert sorted(p.name for p in nodes[0].path.iterdir()) == ["node.id"]


def test_a_key_dies_with_the_folder(tmp_path: Path) -> None:
    config = MoetionConfig(store=str(tmp_path))
    before = open_node(config, "run", FOUR, 4, CLOCK)
    assert open_node(config, "run", FOUR, 4, CLOCK) == before
    shutil.rmtree(before.path)
    assert open_node(config, "run", FOUR, 4, CLOCK).key != before.key


@pytest.mark.parametrize(("per_node", "world_size"), [(3, 12), (4, 6)])
def test_ranks_that_do_not_split_into_nodes_are_refused(tmp_path: Path, per_node: int, world_size: int) -> None:
    config = MoetionConfig(store=str(tmp_path), ranks_per_node=per_node)
    with pytest.raises(ConfigError, match=f"ranks-per-node {per_node} does not divide the {world_size} ranks"):
        open_node(config, "run", FOUR, world_size, CLOCK)


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"the store .*file.* cannot be written.*--moetion-store"):
        open_node(MoetionConfig(store=str(tmp_path / "file")), "run", FOUR, 4, CLOCK)


@pytest.mark.parametrize("whose", ["run", "run/node0"])
def test_a_folder_of_another_user_is_refused(tmp_path: Path, whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MoetionConfig(store=str(tmp_path))
    open_node(config, "run", FOUR, 4, CLOCK)
    lstat, foreign = Path.lstat, tmp_path / whose

    def status(path: Path) -> object:
        found = lstat(path)
        return SimpleNamespace(st_uid=found.st_uid + (path == foreign), st_mode=found.st_mode)

    monkeypatch.setattr(Path, "lstat", status)
    with pytest.raises(StoreError, match=rf"{foreign} belongs to user \d+.*--moetion-store"):
        open_node(config, "run", FOUR, 4, CLOCK)


def test_a_folder_that_was_deleted_is_made_again_as_the_same_node(tmp_path: Path) -> None:
    config = MoetionConfig(store=str(tmp_path))
    node = open_node(config, "run", FOUR, 4, CLOCK)
    lock = node.lock(1, lambda _: None)
    shutil.rmtree(tmp_path / "run")
    node.make_again(lock)
    assert lock.has_file
    assert open_node(config, "run", FOUR, 4, CLOCK) == node
    lock.close()


def test_a_process_leaves_its_id(tmp_path: Path) -> None:
    config = MoetionConfig(store=str(tmp_path))
    node = open_node(config, "run", FOUR, 4, CLOCK)
    write_pid(node, 3, 1)
    left = json.loads((node.path / "rank00003.pid").read_text())
    assert left == {"pid": os.getpid(), "rank": 3, "attempt": 1}


def test_a_store_that_was_deleted_as_a_rank_starts_is_an_error_with_a_name(tmp_path: Path) -> None:
    """Whoever raises an ``OSError`` here tells the other ranks nothing of what to do."""
    node = open_node(MoetionConfig(store=str(tmp_path)), "run", FOUR, 4, CLOCK)
    shutil.rmtree(node.path)
    with pytest.raises(StoreError, match=r"rank00003.pid cannot be written: No such file"):
        write_pid(node, 3, 1)


def test_arenas_are_made_opened_listed_and_cleared_by_name(tmp_path: Path) -> None:
    node = open_node(MoetionConfig(store=str(tmp_path)), "run", FOUR, 4, CLOCK)
    spec, name = spec_of(ToyState()), arena_name(0)
    assert (node.arenas(), node.bytes_here()) == ([], 0)
    (node.path / name).mkdir()  # somebody's
    node.create_arena(name, spec, Page(stable=3)).close()
    assert node.arenas() == [name]
    assert node.bytes_here() == spec.nbytes
    assert node.peek_arena(name) == (spec, Page(stable=3))
    arena = node.open_arena(name)
    assert arena.page.stable == 3
    assert arena.name == node.describe(name) == str(node.path / name)
    arena.close()
    node.clear_arena(name)
    node.clear_arena(name)
    assert node.arenas() == []
    with pytest.raises(CorruptArena):
        node.open_arena(name)


@pytest.mark.parametrize(("mode", "why"), [(0o777, "has mode 777"), (0o757, "has mode 757")])
def test_a_store_that_others_may_write_to_is_refused(tmp_path: Path, mode: int, why: str) -> None:
    """They could put a folder of their own in the place of a run's."""
    store = tmp_path / "store"
    store.mkdir()
    store.chmod(mode)
    with pytest.raises(StoreError, match=f"{why}: others could"):
        _make_folder(store / "run" / "node0")
    store.chmod(mode | 0o1000)  # as /dev/shm and /tmp are: nobody removes what is another's
    _make_folder(store / "run" / "node0")
