# SPDX-License-Identifier: Apache-2.0
"""Memory of mappings: all there when it is mapped, by several threads, from the node that was asked for."""

from __future__ import annotations

import errno
import mmap
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_moetion.errors import StoreError
from megatron_moetion.store.hostmemory import PLAIN, HostMemory, Kernel, Linux
from megatron_moetion.store.mapping import MappedFile
from megatron_moetion.store.numa import LinuxNuma, NumaCalls, NumaNode
from megatron_moetion.store.population import Population
from megatron_moetion.store.sharedfile import SharedFile

PAGE = mmap.PAGESIZE
NODE = NumaNode(number=1, cpus=frozenset({0}), note="NUMA node 1")
READ, WRITE = 22, 23
"""Advice that populates."""


class Calls(Linux):
    """The real kernel, except for what a test says."""

    def __init__(self, numa: NumaCalls | None = None, refused: int = 0, why: str | None = "no reason") -> None:
        super().__init__()
        self.numa = numa or Nodes()
        self.refused = refused
        self.why = why
        self.left = sys.maxsize
        self.advised: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self.cpus: list[Collection[int]] = []

    def advise(self, address: int, nbytes: int, advice: int) -> None:
        if advice in (READ, WRITE):
            self.threads.add(threading.get_ident())
            if self.refused:
                raise OSError(self.refused, os.strerror(self.refused))
        self.advised.append((advice, nbytes))
        super().advise(address, nbytes, advice)

    def run_on(self, cpus: Collection[int]) -> None:
        self.cpus.append(cpus)
        super().run_on(cpus)

    def left_bytes(self, fd: int) -> int:
        return self.left

    def why_no_huge_pages(self, fd: int) -> str | None:
        return self.why

    def huge_bytes(self, address: int, nbytes: int) -> int:
        return nbytes // 2


class Nodes:
    """A kernel whose pages come from these nodes in turn."""

    def __init__(self, *nodes: int, refused: int = 0, silent: bool = False) -> None:
        self.nodes = nodes or (1,)
        self.refused = refused
        self.silent = silent
        self.preferred: list[tuple[int, int]] = []

    def prefer(self, address: int, nbytes: int, node: int) -> None:
        if self.refused:
            raise OSError(self.refused, os.strerror(self.refused))
        self.preferred.append((nbytes, node))

    def nodes_of(self, addresses: Sequence[int]) -> list[int]:
        if self.silent:
            raise OSError(errno.EPERM, "Operation not permitted")
        return [self.nodes[n % len(self.nodes)] for n in range(len(addresses))]


KERNEL: type[Kernel] = Linux
NUMA: type[NumaCalls] = LinuxNuma


@contextmanager
def file_of(nbytes: int) -> Iterator[int]:
    """An empty file in shared memory of this size."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), nbytes)
        yield file.fileno()


def populated(memory: HostMemory, nbytes: int = 64 * PAGE) -> Population:
    """What populating a file reports; every page of it is there."""
    with file_of(nbytes) as fd:
        found = MappedFile(fd, nbytes, memory).population
        assert os.fstat(fd).st_blocks * 512 >= nbytes
    return found


@pytest.mark.parametrize("nbytes", [1, PAGE, 7 * PAGE + 5, 64 * PAGE])
def test_every_page_is_there_and_contents_stay(nbytes: int) -> None:
    with file_of(nbytes) as fd:
        os.pwrite(fd, b"x", nbytes - 1)
        mapping = MappedFile(fd, nbytes, HostMemory(num_threads=3, part_bytes=2 * PAGE))
        assert os.fstat(fd).st_blocks * 512 >= nbytes
        assert mapping.array()[-1] == ord("x")
        assert not mapping.array()[:-1].any()
    assert mapping.population.nbytes == nbytes


def test_threads_share_the_work_in_parts() -> None:
    kernel = Calls()
    populated(HostMemory(num_threads=2, kernel=kernel, part_bytes=16 * PAGE), 56 * PAGE)
    assert [nbytes for advice, nbytes in kernel.advised if advice == mmap.MADV_HUGEPAGE] == [56 * PAGE]
    assert sorted(n for advice, n in kernel.advised if advice == WRITE) == [8 * PAGE, *[16 * PAGE] * 3]
    assert kernel.advised[0][0] == mmap.MADV_HUGEPAGE, "asked for before the first page is there"
    assert threading.get_ident() not in kernel.threads


def test_memory_that_is_there_is_only_mapped() -> None:
    kernel = Calls()
    with file_of(8 * PAGE) as fd:
        for _ in range(2):
            MappedFile(fd, 8 * PAGE, HostMemory(kernel=kernel))
    assert [advice for advice, _ in kernel.advised if advice != mmap.MADV_HUGEPAGE] == [WRITE, READ]


def test_a_kernel_that_cannot_populate_gets_the_pages_touched() -> None:
    kernel = Calls(refused=errno.EINVAL)
    populated(HostMemory(num_threads=2, kernel=kernel, part_bytes=16 * PAGE))


@pytest.mark.parametrize("refused", [errno.ENOMEM, errno.EAGAIN])
def test_memory_that_is_there_is_as_good_where_the_kernel_does_not_map_it_ahead(refused: int) -> None:
    with file_of(4 * PAGE) as fd:
        MappedFile(fd, 4 * PAGE).array()[:] = 7
        found = MappedFile(fd, 4 * PAGE, HostMemory(kernel=Calls(refused=refused)))
        assert (found.array() == 7).all()
    assert found.population.problem == f"its pages are not mapped ahead: {os.strerror(refused)}"


def test_a_process_that_may_start_no_more_threads_does_the_work_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    kernel = Calls()
    assert populated(HostMemory(num_threads=4, kernel=kernel, part_bytes=16 * PAGE)).problem is None
    assert kernel.threads == {threading.get_ident()}


@pytest.mark.parametrize(("refused", "raised"), [(errno.EFAULT, errno.ENOSPC), (errno.ENOMEM, errno.ENOMEM)])
def test_memory_that_is_short_is_an_error(refused: int, raised: int) -> None:
    with pytest.raises(OSError, match=os.strerror(raised)) as error:
        populated(HostMemory(kernel=Calls(refused=refused)))
    assert error.value.errno == raised


def test_a_file_system_that_puts_off_the_allocation_is_asked_to_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, start, nbytes: asked.append((start, nbytes)))
    with file_of(8 * PAGE) as fd, file_of(8 * PAGE) as lazy:
        mapping = MappedFile(fd, 8 * PAGE)
        assert asked == []
        PLAIN.populate(lazy, mapping.address, 8 * PAGE)
    assert asked == [(0, 8 * PAGE)]


IN_A_SMALL_TMPFS = """
import errno, os, sys
from megatron_moetion.store.hostmemory import HostMemory
from megatron_moetion.store.mapping import MappedFile
fd = os.open(sys.argv[1] + "/file", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 8 << 20)
try:
    MappedFile(fd, 8 << 20, HostMemory(num_threads=2, part_bytes=1 << 20))
except OSError as error:
    assert error.errno == errno.ENOSPC, error
    print("refused")
"""


def in_a_tmpfs(folder: Path, options: str, script: str) -> str:
    """What a script prints that runs with a tmpfs of its own, which nobody else sees."""
    shell = 'mount -t tmpfs -o "$1" none "$2" || exit 77; exec "$3" -c "$4" "$2"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", shell, "sh", options, str(folder), sys.executable, script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip(f"no mount of its own here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shared_memory_that_is_full_is_an_error_and_no_signal(tmp_path: Path) -> None:
    assert in_a_tmpfs(tmp_path, "size=4m", IN_A_SMALL_TMPFS) == "refused\n"


WITH_HUGE_PAGES = """
import os, sys
from megatron_moetion.store.hostmemory import HostMemory
from megatron_moetion.store.mapping import MappedFile
fd = os.open(sys.argv[1] + "/file", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 8 << 20)
found = MappedFile(fd, 8 << 20, HostMemory(num_threads=2, part_bytes=2 << 20)).population
print(found.no_huge, found.huge_bytes)
"""


def test_huge_pages_that_the_kernel_offers_are_taken_and_counted(tmp_path: Path) -> None:
    no_huge, nbytes = in_a_tmpfs(tmp_path, "size=16m,huge=advise", WITH_HUGE_PAGES).split()
    assert no_huge == "None"
    assert int(nbytes) in range((8 << 20) + 1), "how many come depends on how fragmented memory is"


def test_the_limit_of_a_container_is_an_error_that_names_both_figures(tmp_path: Path) -> None:
    kernel = Calls()
    kernel.left = 3 << 20
    memory = HostMemory(kernel=kernel)
    SharedFile.create(tmp_path / "fits", 3 << 20, (), memory)
    kernel.left = (3 << 20) - 1
    with pytest.raises(StoreError) as refused:
        SharedFile.create(tmp_path / "more", 3 << 20, (), memory)
    limit = "of which the limits of this process's control groups leave 3.0 MiB, and this arena needs 3.0 MiB"
    assert re.search(rf"has [\d,.]+ MiB free, {limit}", str(refused.value))
    assert [path.name for path in tmp_path.iterdir()] == ["fits"], "nothing is left"
    SharedFile.open(tmp_path / "fits", memory)  # it has its memory


# -- NUMA -----------------------------------------------------------------------------------------------------


def test_the_node_is_asked_for_before_the_first_page_and_threads_run_there() -> None:
    nodes = Nodes()
    kernel = Calls(nodes)
    before = os.sched_getaffinity(0)
    found = populated(HostMemory(num_threads=2, kernel=kernel, node=NODE))
    assert nodes.preferred == [(64 * PAGE, 1)]
    assert kernel.cpus
    assert set(kernel.cpus) == {NODE.cpus}
    assert (found.numa, found.problem) == ("NUMA node 1", None)
    assert os.sched_getaffinity(0) == before, "only the threads that populate are moved"


def test_without_a_node_nothing_is_asked() -> None:
    nodes = Nodes()
    kernel = Calls(nodes)
    found = populated(HostMemory(kernel=kernel, node=NumaNode(number=None, note="one NUMA node")))
    assert (nodes.preferred, kernel.cpus) == ([], [])
    assert (found.numa, found.problem) == ("one NUMA node", None)


def test_a_kernel_that_refuses_a_node_is_reported_and_memory_is_there() -> None:
    found = populated(HostMemory(kernel=Calls(Nodes(refused=errno.EPERM)), node=NODE))
    assert found.problem == "the kernel does not let this process choose NUMA node 1: Operation not permitted"
    assert found.numa == "NUMA node 1", "the threads run there"


def test_pages_of_other_nodes_are_reported() -> None:
    assert populated(HostMemory(kernel=Calls(Nodes(1, 0)), node=NODE)).numa == "NUMA node 1 for 50%"


def test_a_kernel_that_does_not_tell_where_pages_are_is_not_believed() -> None:
    assert populated(HostMemory(kernel=Calls(Nodes(silent=True)), node=NODE)).numa == "NUMA node 1 asked for"


def test_cpus_that_are_not_for_this_process_are_passed_over() -> None:
    elsewhere = replace(NODE, cpus=frozenset({100_000}))
    assert populated(HostMemory(kernel=Calls(), node=elsewhere)).problem is None


# -- for a person ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "populated 2.1 s (8 threads; huge pages: yes; NUMA node 1)"),
        ({"num_threads": 1, "numa": ""}, "populated 2.1 s (1 thread; huge pages: yes)"),
        ({"huge_bytes": 1 << 29, "numa": ""}, "populated 2.1 s (8 threads; huge pages: for 50%)"),
        ({"huge_bytes": 0, "numa": ""}, "populated 2.1 s (8 threads; huge pages: for 0%)"),
        (
            {"huge_bytes": 0, "no_huge": "/dev/shm is mounted without huge=advise", "numa": ""},
            "populated 2.1 s (8 threads; huge pages: no, /dev/shm is mounted without huge=advise)",
        ),
    ],
)
def test_a_line_says_how_memory_came(changes: dict[str, object], expected: str) -> None:
    plain = Population(
        nbytes=1 << 30, seconds=2.12, num_threads=8, huge_bytes=1 << 30, no_huge=None, numa="NUMA node 1", problem=None
    )
    assert str(replace(plain, **changes)) == expected  # type: ignore[arg-type]


def test_huge_pages_are_looked_for_where_they_are_offered() -> None:
    assert populated(HostMemory(kernel=Calls(why=None))).huge_bytes == 32 * PAGE
    assert populated(HostMemory(kernel=Calls(why="no tmpfs"))).huge_bytes == 0


# -- another file in the place of one that was deleted --------------------------------------------------------


def test_a_file_is_replaced_under_arrays_that_stay_good() -> None:
    with file_of(8 * PAGE) as fd, file_of(8 * PAGE) as other:
        mapping = MappedFile(fd, 8 * PAGE, HostMemory(num_threads=2, part_bytes=2 * PAGE))
        view = mapping.array()
        view[:] = np.arange(8 * PAGE) % 251
        expected = view.copy()
        mapping.replace(other)
        assert (view == expected).all()
        view[3 * PAGE] = 9
        assert os.pread(other, 1, 3 * PAGE) == b"\x09"
        assert os.pread(fd, 1, 3 * PAGE) != b"\x09"


def test_a_file_that_finds_no_memory_replaces_nothing() -> None:
    kernel = Calls()
    with file_of(8 * PAGE) as fd, file_of(8 * PAGE) as other:
        mapping = MappedFile(fd, 8 * PAGE, HostMemory(kernel=kernel))
        mapping.array()[:] = 7
        kernel.refused = errno.EFAULT
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            mapping.replace(other)
        assert (mapping.array() == 7).all()
        mapping.array()[0] = 8
        assert os.pread(fd, 1, 0) == b"\x08"
