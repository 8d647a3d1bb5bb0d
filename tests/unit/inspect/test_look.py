# SPDX-License-Identifier: Apache-2.0
"""A store as seen from outside: whatever lies there, whoever uses it, and while it is written."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from stores import left_by_a_job, living_job
from support import ToyState, capture, make_arena, make_packer

from megatron_moetion.errors import CorruptArena, StoreError
from megatron_moetion.inspect import look
from megatron_moetion.inspect.look import look_at, look_at_arena, node_folders, processes_naming, runs_in
from megatron_moetion.store.lock import holders
from megatron_moetion.store.node import RUN_ID_BYTES_MAX
from megatron_moetion.store.sharedfile import read_arena_file

LOCK = """
import sys, time
from pathlib import Path
from megatron_moetion.clock import SystemClock
from megatron_moetion.store.lock import NodeLock
lock = NodeLock.take(
    Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[2]), wait_s=0, say=print, clock=SystemClock()
)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("store")
    left_by_a_job(found)
    return found


def test_all_processes_that_hold_a_lock_are_found(tmp_path: Path) -> None:
    assert holders(tmp_path) == []
    running = []
    try:
        for position in ("2", "0", "1"):
            command = [sys.executable, "-c", LOCK, str(tmp_path), "3", position]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert running[-1].stdout is not None
            assert running[-1].stdout.readline() == "locked\n"
            assert holders(tmp_path) == sorted(p.pid for p in running)
    finally:
        for process in running:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    assert holders(tmp_path) == []


def test_a_process_that_was_started_with_the_runs_name_is_found() -> None:
    sleep = "import sys; print('up', flush=True); sys.stdin.read()"
    run_id = f"named-{os.getpid()}"
    for words, environment in (
        (["--rdzv-id", run_id], {}),
        ([f"--moetion-run-id={run_id}"], {}),
        ([], {"TORCHELASTIC_RUN_ID": run_id}),
    ):
        with subprocess.Popen(
            [sys.executable, "-c", sleep, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **environment},
        ) as process:  # fmt: skip
            assert process.stdout is not None
            process.stdout.readline()
            assert processes_naming(run_id) == [process.pid]
            assert processes_naming(run_id[:-1]) == []
            process.kill()
    assert processes_naming(run_id) == []


def test_the_runs_of_a_store_are_its_folders_with_nodes(store: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").touch()
    (tmp_path / "no-run" / "other").mkdir(parents=True)
    (tmp_path / ".hidden" / "node0").mkdir(parents=True)
    assert runs_in(tmp_path) == []
    assert runs_in(store) == ["tools-run"]
    with pytest.raises(StoreError, match="cannot be read: No such file"):
        runs_in(tmp_path / "missing")


def test_a_run_is_found_by_its_store_its_folder_or_a_node(store: Path, tmp_path: Path) -> None:
    nodes = [store / "tools-run" / f"node{n}" for n in (0, 1)]
    assert node_folders([store], "tools-run") == nodes
    assert node_folders([store / "tools-run"], "tools-run") == nodes
    assert node_folders([nodes[1], nodes[1]], "tools-run") == nodes[1:]
    with pytest.raises(StoreError, match=r"no run 'other' in .*these are: tools-run\. .*--store"):
        node_folders([store], "other")
    with pytest.raises(StoreError, match="no folder"):
        node_folders([tmp_path / "missing"], "tools-run")
    for strange in ("..", "", "a/b", "x" * (RUN_ID_BYTES_MAX + 100)):
        with pytest.raises(StoreError, match="there is no run"):
            node_folders([store], strange)


def test_a_run_may_be_called_as_nodes_are(tmp_path: Path) -> None:
    nodes = left_by_a_job(tmp_path, "node0")
    assert runs_in(tmp_path) == ["node0"]
    assert node_folders([tmp_path], "node0") == nodes


def test_a_node_says_which_ranks_ran_there(store: Path) -> None:
    found = look_at(store / "tools-run" / "node1", "tools-run")
    assert found.ranks == (1,)
    assert found.started_s is not None
    assert found.processes == ()
    assert [a.spec.identity.owner for a in found.arenas if a.spec is not None] == [0, 1]
    assert all(a.page is not None and a.other_page and a.problem is None for a in found.arenas)
    assert found.memory_bytes >= sum(a.nbytes for a in found.arenas)


def test_what_is_no_arena_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    node, _ = left_by_a_job(tmp_path)
    (node / "rank00007.arena").write_bytes(b"MOETION9" + bytes(5000))
    (node / "rank00008.arena").write_bytes(b"nothing of the kind")
    (node / "rank00009.arena").symlink_to(node / "rank00000.arena")
    os.mkfifo(node / "rank00010.arena")
    (node / "rank00003.pid").write_text("[]")
    found = look_at(node, "tools-run")
    sound = [a.path.name for a in found.arenas if a.page is not None]
    assert sound == ["rank00000.arena", "rank00001.arena"]
    problems = {a.path.name: (a.problem, a.foreign) for a in found.arenas if a.problem}
    assert "another version" in str(problems["rank00007.arena"][0])
    assert problems["rank00007.arena"][1]
    assert "not an arena" in str(problems["rank00008.arena"][0])
    assert "cannot be opened" in str(problems["rank00009.arena"][0])
    assert "no regular file" in str(problems["rank00010.arena"][0])
    assert found.ranks == (0,)


def test_files_of_another_user_are_read_and_a_closed_folder_is_named(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = store / "tools-run" / "node0"
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert all(a.page is not None for a in look_at(node, "tools-run").arenas)

    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(look.os, "listdir", refuse)
    found = look_at(node, "tools-run")
    assert found.arenas == ()
    assert "cannot be read: Permission denied" in str(found.problem)


def test_an_arena_is_read_whole_while_it_is_written(tmp_path: Path) -> None:
    state = ToyState()
    arena = make_arena(tmp_path, state, copies=2)
    packer = make_packer(state.inventory())
    path = tmp_path / "rank00000.arena"
    stop = threading.Event()

    def write() -> None:
        iteration = 0
        while not stop.is_set():
            iteration += 1
            capture(packer, arena, iteration)
            arena.edit(lambda page: {"records": (), "stable": page.stable + 1})  # drops, so both pages are written

    def seen() -> int:
        found = look_at_arena(path, living=True)
        assert found is not None
        assert found.problem is None
        assert found.page is not None
        return found.page.sequence

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        try:
            sequences = [seen()]
            while not writer.done() and (len(sequences) < 60 or sequences[-1] < sequences[0] + 100):
                sequences.append(seen())
        finally:
            stop.set()
        writer.result()
    assert sequences == sorted(sequences)


def test_both_pages_caught_in_the_middle_of_a_commit_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_arena(tmp_path, ToyState())
    path = tmp_path / "rank00000.arena"
    torn: list[None] = []

    def read(fd: int, path: Path) -> Any:
        if len(torn) < 3:
            torn.append(None)
            raise CorruptArena("neither manifest page verifies")
        return read_arena_file(fd, path)

    monkeypatch.setattr(look, "read_arena_file", read)
    found = look_at_arena(path, living=True)
    assert found is not None
    assert found.problem is None
    torn.clear()
    found = look_at_arena(path, living=False)
    assert found is not None
    assert found.problem == "neither manifest page verifies"


def test_an_arena_that_has_gone_was_never_there(tmp_path: Path) -> None:
    assert look_at_arena(tmp_path / "rank00000.arena", living=True) is None


def test_a_job_that_trains_is_seen_and_not_disturbed(tmp_path: Path) -> None:
    with living_job(tmp_path) as job:
        nodes = [tmp_path / "tools-run" / f"node{n}" for n in (0, 1)]
        stable = []
        for _ in range(10):
            found = [look_at(node, "tools-run") for node in nodes]
            assert [node.processes for node in found] == [(job.pid,)] * 2
            arenas = [a for node in found for a in node.arenas]
            assert [a.problem for a in arenas] == [None] * 4
            stable.append(max(a.page.stable for a in arenas if a.page is not None))
        assert stable == sorted(stable)
        assert job.poll() is None
    assert look_at(nodes[0], "tools-run").processes == ()
