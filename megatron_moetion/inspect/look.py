# SPDX-License-Identifier: Apache-2.0
"""Stores from outside: what lies in them, and who uses it. Nothing is written, and nobody is waited for.

A run may write at the same moment, start or end. What is gone when it is looked at was never there; a manifest page
counts only if its digest verifies.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_moetion.errors import NOT_OURS, CorruptArena, IdentityMismatch, StoreError
from megatron_moetion.store.files import open_regular
from megatron_moetion.store.lock import describe, holders
from megatron_moetion.store.manifest import Page
from megatron_moetion.store.node import NODE_MARKER
from megatron_moetion.store.sharedfile import read_arena_file
from megatron_moetion.store.spec import ArenaSpec
from megatron_moetion.store.vetoes import vetoed_in

SHARED_MEMORY = Path("/dev/shm")
_NAME_OF_STORES = "moetion-*"
_TRIES = 20
_PAUSE_S = 0.01
"""Between looks at an arena that is being written: both pages may be caught in the middle of a commit."""
_NOTE_BYTES_MAX = 1 << 12
_ONE_START_S = 600.0
"""Ranks of one start write their notes within this time."""
_NAMING_FLAGS = ("--moetion-run-id", "--rdzv-id", "--rdzv_id")
_NAMING_VARIABLE = b"TORCHELASTIC_RUN_ID="


@dataclass(frozen=True, kw_only=True, eq=False)
class ArenaFile:
    """One arena as found. ``spec`` and ``page`` are None where ``problem`` says why."""

    path: Path
    nbytes: int
    """Of the file."""
    spec: ArenaSpec | None = None
    page: Page | None = None
    other_page: bool = False
    """Whether the second manifest page verifies too."""
    problem: str | None = None
    foreign: bool = False
    """Another version of the format wrote it: it may be sound."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NodeFiles:
    """The folder of one node of one run."""

    path: Path
    run_id: str
    """As the folder is named."""
    user: int
    arenas: tuple[ArenaFile, ...]
    processes: tuple[int, ...]
    """Those that use it, see ``holders``."""
    ranks: tuple[int, ...]
    """Ranks that ran here at the last start; none where that is not known."""
    started_s: float | None
    """Unix time of the last start here."""
    memory_bytes: int
    """That all files here take."""
    problem: str | None = None
    """Why the folder cannot be read."""

    def vetoed(self, lineage: int, epoch: int) -> set[int]:
        """See ``vetoed_in``."""
        return vetoed_in(self.path, lineage, epoch)


def default_stores() -> list[Path]:
    """The stores in shared memory, of all users."""
    return sorted(path for path in SHARED_MEMORY.glob(_NAME_OF_STORES) if _is_folder(path))


def runs_in(store: Path) -> list[str]:
    """The names of the runs in a store, sorted. ``StoreError`` where it cannot be read."""
    return sorted(name for name in _names(store) if not name.startswith(".") and _node_folders(store / name))


def closed_in(store: Path) -> list[str]:
    """Of the folders in a store those that cannot be read, each with the reason: runs of other users, most likely."""
    found = []
    for name in _names(store):
        if not name.startswith(".") and _is_folder(store / name):
            try:
                _names(store / name)
            except StoreError as error:
                found.append(str(error))
    return found


def node_folders(places: Iterable[Path], run_id: str) -> list[Path]:
    """The folders of a run's nodes in these places, in order.

    A place is a store, the folder of the run, or the folder of a node, for instance a copy of one. ``StoreError`` where
    a place cannot be read, or the run is in none of them.
    """
    places = list(dict.fromkeys(places))
    found = [folder for place in places for folder in _in_place(place, run_id)]
    if found:
        return list(dict.fromkeys(found))
    for place in places:
        if _is_name(run_id) and _is_folder(place / run_id):
            _names(place / run_id)  # it is there; if it cannot be read, that is what to say
    others = [name for place in places for name in runs_in(place)]
    here = f"; these are: {', '.join(dict.fromkeys(others))}" if others else ""
    looked = ", ".join(map(str, places)) or f"{SHARED_MEMORY}/{_NAME_OF_STORES}"
    raise StoreError(f"there is no run {run_id!r} in {looked}{here}. Another place is given with --store")


def look_at(folder: Path, run_id: str) -> NodeFiles:
    """What lies in the folder of a node. It never fails: what cannot be read is named in the result."""
    processes: list[int] = []
    try:
        user = folder.lstat().st_uid
        names = _names(folder)
        processes = holders(folder)
    except (OSError, StoreError) as error:
        return NodeFiles(
            path=folder, run_id=run_id, user=_owner(folder), arenas=(), processes=(), ranks=(), started_s=None,
            memory_bytes=0, problem=str(error),
        )  # fmt: skip
    arenas = (look_at_arena(folder / name, living=bool(processes)) for name in names if name.endswith(".arena"))
    notes = list(_pid_notes(folder / name for name in names if name.startswith("rank") and name.endswith(".pid")))
    latest = max(notes, default=None)
    return NodeFiles(
        path=folder,
        run_id=run_id,
        user=user,
        arenas=tuple(a for a in arenas if a is not None),
        processes=tuple(processes),
        ranks=tuple(sorted(_of_last_start(notes))),
        started_s=latest[0] if latest is not None else None,
        memory_bytes=sum(_memory(folder / name) for name in names),
    )


def look_at_arena(path: Path, *, living: bool) -> ArenaFile | None:
    """Header and pages of an arena; None where there is none any more. ``living``: somebody may be writing to it."""
    problem = ""
    for left in range(_TRIES if living else 1, 0, -1):
        nbytes = 0
        try:
            fd = open_regular(path, os.O_RDONLY, of_anyone=True)
            try:
                nbytes = os.fstat(fd).st_size
                spec, pages, page = read_arena_file(fd, path)
            finally:
                os.close(fd)
            return ArenaFile(path=path, nbytes=nbytes, spec=spec, page=page, other_page=None not in pages)
        except IdentityMismatch as error:
            return ArenaFile(path=path, nbytes=nbytes, problem=str(error), foreign=True)
        except (CorruptArena, OSError) as error:
            if not os.path.lexists(path):
                return None
            problem = str(error)
        if left > 1:
            time.sleep(_PAUSE_S)
    return ArenaFile(path=path, nbytes=nbytes, problem=problem)


def processes_naming(run_id: str) -> list[int]:
    """Processes that were started with this run's name, as far as this user may see: launchers, and ranks that start.

    Between two attempts of a job nobody uses its memory, and its launcher is about to. This process and those above it
    do not count.
    """
    ours = set(_ancestors())
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return sorted(pid for pid in pids if pid not in ours and _names_run(pid, run_id.encode()))


def words_of(pid: int) -> str:
    """A process, for a person."""
    return describe(pid) if pid > 0 else "a process of another container"


def users_in_words(pids: Sequence[int]) -> str:
    """Processes that use a run, for a person: ranks are started alike, so one of them is described."""
    others = f" and {len(pids) - 1} more ({', '.join(map(str, pids[1:]))})" if len(pids) > 1 else ""
    return words_of(pids[0]) + others


# -- inside --------------------------------------------------------------------------------------------------------


def _in_place(place: Path, run_id: str) -> list[Path]:
    if not _is_folder(place):
        raise StoreError(f"--store {place} is no folder")
    if any(name.endswith(".arena") for name in _names(place)):
        return [place]
    if _is_name(run_id) and _is_folder(place / run_id):
        return _node_folders(place / run_id)
    return _node_folders(place)


def _is_name(run_id: str) -> bool:
    """Whether a run may be called so."""
    return bool(run_id) and not run_id.startswith(".") and "/" not in run_id


def _node_folders(folder: Path) -> list[Path]:
    """Folders of nodes in a run's folder, by number; none where it is no folder of a run, or cannot be read."""
    try:
        names = [name for name in _names(folder) if name.startswith("node") and name[4:].isdigit()]
    except StoreError:
        return []
    return [folder / name for name in sorted(names, key=lambda name: int(name[4:])) if _is_node(folder / name)]


def _is_node(folder: Path) -> bool:
    try:
        return any(name == NODE_MARKER or name.endswith(".arena") for name in _names(folder))
    except StoreError:  # no folder, or it cannot be read: it is said where it is looked at
        return _is_folder(folder) and not os.access(folder, os.R_OK)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise StoreError(f"{folder} cannot be read: {error.strerror}") from error


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


def _owner(path: Path) -> int:
    try:
        return path.lstat().st_uid
    except OSError:
        return -1


def _memory(path: Path) -> int:
    try:
        status = path.lstat()
    except OSError:
        return 0
    return 512 * status.st_blocks if stat.S_ISREG(status.st_mode) else 0


def _pid_notes(paths: Iterable[Path]) -> Iterator[tuple[float, int, int]]:
    """When each was written (Unix time, s), the attempt and the rank. What is no such note is passed over."""
    for path in paths:
        try:
            with open(open_regular(path, os.O_RDONLY, of_anyone=True)) as note:
                found = json.loads(note.read(_NOTE_BYTES_MAX))
                written = os.fstat(note.fileno()).st_mtime
            yield written, int(found["attempt"]), int(found["rank"])
        except (OSError, StoreError, *NOT_OURS):
            continue


def _of_last_start(notes: Sequence[tuple[float, int, int]]) -> set[int]:
    """Ranks that wrote their notes together with the newest one; earlier starts may have had other ranks here."""
    newest, attempt, _ = max(notes, default=(0.0, 0, 0))
    return {rank for written, of, rank in notes if of == attempt and newest - written <= _ONE_START_S}


def _ancestors() -> Iterator[int]:
    pid = os.getpid()
    while pid > 0:
        yield pid
        try:
            behind_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return
        pid = int(behind_name[1])


def _names_run(pid: int, run_id: bytes) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        with suppress(PermissionError):
            if _NAMING_VARIABLE + run_id in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return True
    except OSError:  # it has ended
        return False
    flags = [flag.encode() for flag in _NAMING_FLAGS]
    return any(word == flag + b"=" + run_id for word in words for flag in flags) or any(
        flag in flags and word == run_id for flag, word in pairwise(words)
    )
