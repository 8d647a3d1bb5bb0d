# SPDX-License-Identifier: Apache-2.0
"""One process for each rank of a node, until it ends: whatever it forked, and however it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import node_folder

from megatron_moetion.clock import SystemClock
from megatron_moetion.errors import StoreError
from megatron_moetion.store.lock import NodeLock, alone
from megatron_moetion.store.mapping import MappedFile
from megatron_moetion.store.node import NODE_MARKER

HOLD = """
import os, sys, time
from pathlib import Path
from megatron_moetion.clock import SystemClock
from megatron_moetion.store.lock import NodeLock
lock = NodeLock.take(
    Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), wait_s=0, say=print, clock=SystemClock()
)
child = 0
if sys.argv[4] == "fork":
    child = os.fork()
    if not child:
        time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


def take(folder: Path, position: int = 0, num_ranks: int = 1, wait_s: float = 0.1) -> NodeLock:
    return NodeLock.take(folder, position, num_ranks, wait_s=wait_s, say=lambda _: None, clock=SystemClock())


class Holder:
    """Another process that holds a lock, and perhaps has forked a child."""

    def __init__(self, folder: Path, position: int = 0, num_ranks: int = 1, *, forks: bool = False) -> None:
        words = [str(folder), str(position), str(num_ranks), "fork" if forks else ""]
        self._process = subprocess.Popen([sys.executable, "-c", HOLD, *words], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.child = int(self._process.stdout.readline())
        self.pid = self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def test_one_process_at_a_time_is_alone(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from megatron_moetion.clock import SystemClock; "
        "from megatron_moetion.store.lock import alone; "
        "lock = alone(Path(sys.argv[1]), wait_s=0, clock=SystemClock()); "
        "lock.__enter__(); print('in', flush=True); time.sleep(60)"
    )
    path = tmp_path / "room.lock"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "in\n"
            with (
                pytest.raises(StoreError, match=f"still locked by process {other.pid}"),
                alone(path, wait_s=0.1, clock=SystemClock()),
            ):
                pass
        finally:
            other.kill()
    for _ in range(2):
        with alone(path, wait_s=10.0, clock=SystemClock()):
            pass


def test_a_second_process_is_refused_in_time_and_told_who_it_is(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    try:
        with pytest.raises(StoreError, match=rf"in use by process {holder.pid} \(.*after 0 s.*--moetion-run-id"):
            take(tmp_path)
    finally:
        holder.kill()


def test_a_lock_ends_with_its_process_although_a_forked_child_lives_on(tmp_path: Path) -> None:
    holder = Holder(tmp_path, forks=True)
    holder.kill()
    try:
        os.kill(holder.child, 0)  # it lives
        take(tmp_path, wait_s=5).close()
    finally:
        os.kill(holder.child, signal.SIGKILL)


def test_it_is_waited_for_and_said(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    said: list[str] = []

    def heard(text: str) -> None:
        said.append(text)
        holder.kill()

    NodeLock.take(tmp_path, 0, 1, wait_s=30, say=heard, clock=SystemClock()).close()
    assert len(said) == 1
    assert f"waiting up to 30 s for process {holder.pid}" in said[0]


def test_the_wait_is_the_clocks(tmp_path: Path) -> None:
    """Nobody sleeps behind the clock's back."""

    class Clock(SystemClock):
        now_s = 0.0

        def monotonic(self) -> float:
            return self.now_s

        def sleep(self, seconds: float) -> None:
            self.now_s += seconds

    holder, clock, said = Holder(tmp_path), Clock(), list[str]()
    try:
        with pytest.raises(StoreError, match="after 200 s"):
            NodeLock.take(tmp_path, 0, 1, wait_s=200, say=said.append, clock=clock)
    finally:
        holder.kill()
    assert clock.now_s == pytest.approx(200, abs=1)
    assert len(said) == 1


def test_ranks_of_a_node_have_a_share_each(tmp_path: Path) -> None:
    other = Holder(tmp_path, 0, 2)
    try:
        take(tmp_path, 1, 2).close()
        with pytest.raises(StoreError):
            take(tmp_path, 0, 2)
    finally:
        other.kill()


def test_the_last_rank_notices_an_attempt_with_more_ranks(tmp_path: Path) -> None:
    other = Holder(tmp_path, 7, 8)
    try:
        take(tmp_path, 0, 4).close()
        with pytest.raises(StoreError, match=f"process {other.pid}"):
            take(tmp_path, 3, 4)
    finally:
        other.kill()


def test_closing_lets_others_in(tmp_path: Path) -> None:
    lock = take(tmp_path)
    lock.close()
    lock.close()
    holder = Holder(tmp_path)
    holder.kill()


def test_a_lock_whose_file_was_deleted_is_renewed(tmp_path: Path) -> None:
    lock = take(tmp_path)
    assert lock.has_file
    lock.path.unlink()
    assert not lock.has_file
    lock.renew()
    assert lock.has_file
    lock.path.unlink()
    holder = Holder(tmp_path)
    try:
        with pytest.raises(StoreError, match=f"was deleted, and process {holder.pid}"):
            lock.renew()
    finally:
        holder.kill()


def test_a_mapping_is_not_inherited_and_goes_with_its_last_array(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(1 << 16))
    fd = os.open(path, os.O_RDWR)
    view = MappedFile(fd, 1 << 16).array()[5:10]
    os.close(fd)
    view[:] = 9
    assert np.frombuffer(path.read_bytes(), dtype=np.uint8)[5:11].tolist() == [9] * 5 + [0]
    assert str(path) in Path("/proc/self/maps").read_text()
    child = os.fork()
    if not child:
        os._exit(str(path) in Path("/proc/self/maps").read_text())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del view
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert not any(os.readlink(f"/proc/self/fd/{n}") == str(path) for n in os.listdir("/proc/self/fd") if n != str(fd))


def test_of_the_processes_that_leave_a_node_without_an_arena_the_last_one_removes_its_folder(tmp_path: Path) -> None:
    node = node_folder(tmp_path / "run" / "node0", position=0, num_ranks=2)
    lock = node.lock(0.1, lambda _: None)
    other = Holder(node.path, 1, 2)
    try:
        lock.close()
        node.leave()
        assert node.path.is_dir(), "another rank is still there"
    finally:
        other.kill()
    (node.path / "rank00000.arena").touch()
    node.leave()
    assert node.arenas(), "somebody may want to recover this"
    node.clear_arena("rank00000.arena")
    node.leave()
    assert list(tmp_path.iterdir()) == []
    node.leave()


def test_a_start_that_meets_the_end_of_an_early_one_has_its_folder(tmp_path: Path) -> None:
    """It knows the folder already when the other process removes it, or waits for the lock of that process."""
    node = node_folder(tmp_path / "run" / "node0")
    node.lock(0.1, lambda _: None).close()
    node.leave()
    node.lock(0.1, lambda _: None).close()
    assert node.path.is_dir()
    other = Holder(node.path)

    class WhileItWaits(SystemClock):
        def sleep(self, seconds: float) -> None:
            shutil.rmtree(node.path, ignore_errors=True)
            other.kill()

    lock = replace(node, clock=WhileItWaits()).lock(20, lambda _: None)
    assert lock.has_file
    assert (node.path / NODE_MARKER).read_text() == node.key
    lock.close()
