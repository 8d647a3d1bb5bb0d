# SPDX-License-Identifier: Apache-2.0
"""Shared memory of simulated nodes: it outlives processes, and can be lost, deleted, full, torn or damaged."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from megatron_moetion.arrays import Bytes
from megatron_moetion.errors import CorruptArena, StoreError
from megatron_moetion.sim.schedule import Process, Simulator
from megatron_moetion.store.arena import Arena, first_bytes, read_arena
from megatron_moetion.store.lock import NodeLock
from megatron_moetion.store.manifest import Page
from megatron_moetion.store.node import NodeFolder
from megatron_moetion.store.population import Population
from megatron_moetion.store.spec import ArenaSpec, Layout

_POLL_S = 0.05


@dataclass(eq=False)
class File:
    """Bytes under a name."""

    array: Bytes
    users: list[Process] = field(default_factory=list)
    """Processes that have it mapped."""


@dataclass(eq=False)
class Machine:
    """One node's memory. ``folder`` holds what is no arena, in real files. It is replaced when the memory is lost."""

    simulator: Simulator
    key: str
    number: int
    folder: Path
    domain: str = ""
    """Its failure domain."""
    files: dict[str, File] = field(default_factory=dict)
    owners: dict[int, Process] = field(default_factory=dict)
    """By position of a rank on the node: the process that has the lock."""
    is_full: bool = False
    has_lock_file: bool = True
    skew_s: float = 0.0
    """Of its clock."""

    def make(self) -> None:
        """A folder for the small files."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def delete(self) -> None:
        """Somebody deletes the whole store: what is mapped stays mapped, and no restart finds it."""
        self.files.clear()
        self.has_lock_file = False
        shutil.rmtree(self.folder, ignore_errors=True)

    def lose(self) -> None:
        """The machine is gone, and with it all that it held."""
        self.delete()
        self.owners.clear()


class SimMemory:
    """``Memory``: a file of a machine that one process has mapped."""

    def __init__(self, machine: Machine, name: str, file: File, process: Process) -> None:
        self.name = f"{machine.key}/{name}"
        self._machine = machine
        self._file_name = name
        self._file = file
        file.users.append(process)
        process.at_death.append(self._detach)
        self._array: Bytes | None = file.array

    def _detach(self) -> None:
        """The process dies: its threads, which may be in the middle of something, write to no memory that others see.

        A copy is put in the file's place, and the array that the threads have is theirs alone.
        """
        if self._file.array is self._array:
            self._file.array = self._file.array.copy()

    @property
    def array(self) -> Bytes:
        """See ``Memory``."""
        assert self._array is not None, f"{self.name} is closed"
        return self._array

    @property
    def population(self) -> Population:
        """See ``Memory``."""
        nbytes = len(self._file.array)
        return Population(nbytes=nbytes, seconds=0.0, num_threads=1, huge_bytes=0, no_huge=None, numa="", problem=None)

    @property
    def has_file(self) -> bool:
        """See ``Memory``."""
        return self._machine.files.get(self._file_name) is self._file

    def make_file_again(self) -> None:
        """See ``Memory``."""
        self._machine.simulator.check()
        if self._machine.is_full:
            raise StoreError(f"{self.name}: memory is full")
        self._machine.files[self._file_name] = self._file

    def remove(self) -> None:
        """See ``Memory``."""
        self._machine.simulator.check()
        self._machine.files.pop(self._file_name, None)

    def close(self) -> None:
        """See ``Memory``."""
        self._array = None


class SimLock:
    """What stands for ``NodeLock``."""

    def __init__(self, machine: Machine, position: int, process: Process) -> None:
        self.path = machine.folder / "lock"
        self._machine = machine
        self._position = position
        self._process = process
        process.at_death.append(self.close)

    @property
    def has_file(self) -> bool:
        """See ``NodeLock``."""
        return self._machine.has_lock_file

    def renew(self) -> None:
        """See ``NodeLock``."""
        self._machine.owners[self._position] = self._process
        self._machine.has_lock_file = True

    def close(self) -> None:
        """See ``NodeLock``."""
        if self._machine.owners.get(self._position) is self._process:
            del self._machine.owners[self._position]


@dataclass(frozen=True, kw_only=True)
class SimNode(NodeFolder):
    """``NodeFolder`` of a simulated machine, as one process sees it."""

    machine: Machine
    process: Process
    in_page: Callable[[], None] = lambda: None
    """Called while half of a page is written; may raise ``Killed``."""

    def _open(self, name: str, file: File) -> Arena:
        def write(place: Bytes, data: bytes) -> None:
            half = len(data) // 2
            place[:half] = np.frombuffer(data[:half], dtype=np.uint8)
            self.in_page()
            place[half:] = np.frombuffer(data[half:], dtype=np.uint8)

        return Arena(SimMemory(self.machine, name, file, self.process), write)

    def lock(self, wait_s: float, say: Callable[[str], None]) -> NodeLock:
        """See ``NodeFolder``."""
        until_s = self.clock.monotonic() + wait_s
        while self.position in self.machine.owners:
            if self.clock.monotonic() >= until_s:
                raise StoreError(f"{self.machine.key} is still in use")
            self.clock.sleep(_POLL_S)
        self.machine.owners[self.position] = self.process
        self.machine.has_lock_file = True
        return cast(NodeLock, SimLock(self.machine, self.position, self.process))

    def arenas(self) -> list[str]:
        """See ``NodeFolder``."""
        return sorted(self.machine.files)

    def open_arena(self, name: str) -> Arena:
        """See ``NodeFolder``."""
        self.machine.simulator.check()
        file = self.machine.files.get(name)
        if file is None:
            raise CorruptArena(f"{self.describe(name)} cannot be opened: there is none")
        return self._open(name, file)

    def create_arena(self, name: str, spec: ArenaSpec, page: Page) -> Arena:
        """See ``NodeFolder``."""
        self.machine.simulator.check()
        self.clear_arena(name)
        if self.machine.is_full:
            raise StoreError(f"{self.machine.key} has no memory for {spec.nbytes} bytes")
        file = File(array=_aligned(spec.nbytes))
        for start, data in first_bytes(spec, page):
            file.array[start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)
        self.machine.files[name] = file
        return self._open(name, file)

    def peek_arena(self, name: str) -> tuple[ArenaSpec, Page]:
        """See ``NodeFolder``."""
        file = self.machine.files.get(name)
        if file is None:
            raise CorruptArena(f"{self.describe(name)} cannot be opened: there is none")
        spec, _, page = read_arena(lambda a, n: file.array[a : a + n].tobytes(), len(file.array), name)
        return spec, page

    def clear_arena(self, name: str) -> None:
        """See ``NodeFolder``."""
        self.machine.simulator.check()
        self.machine.files.pop(name, None)

    def describe(self, name: str) -> str:
        """See ``NodeFolder``."""
        return f"{self.machine.key}/{name}"

    def bytes_here(self) -> int:
        """See ``NodeFolder``."""
        return sum(len(file.array) for file in self.machine.files.values())

    def free_bytes(self) -> int:
        """See ``NodeFolder``."""
        return 0 if self.machine.is_full else 1 << 40

    def spare_bytes(self) -> int:
        """See ``NodeFolder``."""
        return self.free_bytes()

    def deciding(self, wait_s: float) -> AbstractContextManager[None]:
        """See ``NodeFolder``: its caller has a lock already, and one process a rank is all there is."""

        @contextmanager
        def alone() -> Iterator[None]:
            yield

        return alone()

    def remove(self) -> None:
        """See ``NodeFolder``."""
        self.machine.delete()

    def make_again(self, lock: NodeLock) -> None:
        """See ``NodeFolder``."""
        self.machine.simulator.check()
        if self.machine.is_full:
            raise StoreError(f"the store {self.machine.key} cannot be made again: memory is full")
        self.machine.make()
        lock.renew()


def tear(machine: Machine, name: str, chance: random.Random) -> bool:
    """Leave an arena as a process may leave it that dies while it writes: bytes that no valid page refers to are torn.

    Torn is a part of the manifest page that is not current, and of slots that neither page lists.
    """
    array = machine.files[name].array
    try:
        spec, pages, current = read_arena(lambda a, n: array[a : a + n].tobytes(), len(array), name)
    except StoreError:
        return False
    layout = Layout.of(spec)
    other = 1 - pages.index(current)
    start = layout.page_starts[other]
    cut = chance.randrange(layout.page_area)
    array[start : start + cut] = np.frombuffer(chance.randbytes(cut), dtype=np.uint8)
    listed = {r.slot for page in pages if page is not None for r in page.records}
    for slot in range(spec.num_slots):
        if slot not in listed and chance.random() < 0.5:
            begin, size = int(layout.slot_starts[slot]), int(layout.slot_sizes[slot])
            cut = chance.randrange(size)
            array[begin : begin + cut] = np.frombuffer(chance.randbytes(cut), dtype=np.uint8)
    return True


def flip(machine: Machine, name: str, chance: random.Random) -> None:
    """Flip one bit of an arena: most often one that matters, of a capture that is listed, a page, or the header."""
    array = machine.files[name].array
    spans = [(0, len(array))]
    try:
        spec, _, page = read_arena(lambda a, n: array[a : a + n].tobytes(), len(array), name)
    except StoreError:
        pass
    else:
        layout = Layout.of(spec)
        slots = [r.slot for r in page.records if r.slot < spec.num_slots]
        payloads = [(int(layout.slot_starts[s]), int(layout.slot_sizes[s]) + 8) for s in slots]
        spans += [chance.choice(payloads)] * 12 if payloads else []
        spans += [(start, 1024) for start in layout.page_starts] * 2 + [(0, 512)]
    begin, nbytes = chance.choice(spans)
    array[begin + chance.randrange(nbytes)] ^= 1 << chance.randrange(8)


def _aligned(nbytes: int) -> Bytes:
    """Zeroed, at a multiple of 64 bytes, as mapped memory is."""
    raw = np.zeros(nbytes + 63, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]
