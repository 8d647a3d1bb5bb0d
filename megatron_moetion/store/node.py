# SPDX-License-Identifier: Apache-2.0
"""This rank's node: its folder in shared memory, and who is who in the run."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_moetion.clock import Clock
from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError, CorruptArena, StoreError
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.files import clear, open_regular
from megatron_moetion.store.hostmemory import PLAIN, HostMemory
from megatron_moetion.store.lock import NodeLock, alone
from megatron_moetion.store.manifest import Page
from megatron_moetion.store.sharedfile import available_bytes, create_arena, free_bytes, open_arena, peek_arena
from megatron_moetion.store.spec import ArenaSpec

NODE_MARKER = "node.id"
"""In every node's folder: the node's key."""
_KEY_BYTES_MAX = 64
_KEY = re.compile(rb"[!-~]{1,%d}" % _KEY_BYTES_MAX)
_ROOM_LOCK = "room.lock"

_MADE_UP = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d{30,39}")
"""A random UUID, as text or as a number, which is what torch gives a job without a name."""

ROOM_SHARE = 0.9
"""Share of the store's free memory that arenas may take where a run chooses their size."""
RUN_ID_BYTES_MAX = 200
"""File systems take names of up to 255 bytes."""


@dataclass(frozen=True, kw_only=True)
class NodeFolder:
    """The store of one node, real or emulated. ``key`` names the node: equal for ranks that share its memory.

    Arenas stand in it under names (``arena_name``).
    """

    path: Path
    key: str
    position: int
    """Of this rank among the node's, from 0."""
    num_ranks: int
    """Ranks of the node."""
    clock: Clock
    memory: HostMemory = PLAIN
    """How arenas get their memory."""

    def lock(self, wait_s: float, say: Callable[[str], None]) -> NodeLock:
        """See ``NodeLock.take``. A folder that another process removes at this moment is made again."""
        _make_folder(self.path)
        taken = NodeLock.take(self.path, self.position, self.num_ranks, wait_s=wait_s, say=say, clock=self.clock)
        if not taken.has_file:
            self.make_again(taken)
        return taken

    def leave(self) -> None:
        """Remove the folder if it is of no use: it holds no arena, and no process has it locked, this one neither.

        Of a node's processes that end without an arena the last one removes it.
        """
        if self.arenas():
            return
        with suppress(StoreError, OSError):  # it is in use, or another process has just removed it
            whole = NodeLock.take(self.path, 0, 1, wait_s=0, say=lambda text: None, clock=self.clock)
            try:
                if not self.arenas():
                    self.remove()
            finally:
                whole.close()

    def arenas(self) -> list[str]:
        """The names of all arenas that are here, whoever left them, sorted."""
        return sorted(path.name for path in self.path.glob("*.arena"))

    def open_arena(self, name: str) -> Arena:
        """Open an arena for writing. Raises ``CorruptArena``, ``IdentityMismatch``: see ``store/sharedfile.py``."""
        return open_arena(self.path / name, self.memory)

    def create_arena(self, name: str, spec: ArenaSpec, page: Page) -> Arena:
        """Make an arena in the place of whatever stands under the name. ``StoreError`` where memory is short."""
        self.clear_arena(name)
        return create_arena(self.path / name, spec, page, self.memory)

    def peek_arena(self, name: str) -> tuple[ArenaSpec, Page]:
        """Header and current manifest page, also while another process writes. Raises as ``open_arena``."""
        return peek_arena(self.path / name)

    def clear_arena(self, name: str) -> None:
        """Free a name. Other ranks may do so too."""
        clear(self.path / name)

    def describe(self, name: str) -> str:
        """Where an arena stands, for messages."""
        return str(self.path / name)

    def mode_found(self) -> tuple[str, int]:
        """Mode and period of arenas that are here and hold something; "" and 0 without any."""
        for name in self.arenas():
            try:
                spec, page = self.peek_arena(name)
            except StoreError:  # damaged or another's: the survey says so
                continue
            if page.stable >= 0:
                return spec.identity.mode, spec.identity.period
        return "", 0

    def bytes_here(self) -> int:
        """Memory that arenas here take, whoever left them."""
        return sum((self.path / name).lstat().st_size for name in self.arenas())

    def free_bytes(self) -> int:
        """Memory that is left for arenas."""
        return free_bytes(self.path)

    def room_bytes(self) -> int:
        """Memory that arenas of this machine may take as a run starts, whatever of it arenas here have already."""
        return int(ROOM_SHARE * (self.free_bytes() + self.bytes_here()))

    def spare_bytes(self) -> int:
        """Memory that one more arena may take while training runs."""
        return min(self.free_bytes(), available_bytes())

    def deciding(self, wait_s: float) -> AbstractContextManager[None]:
        """While it is entered no other process of the node decides whether there is room. Raises as ``alone``."""
        return alone(self.path / _ROOM_LOCK, wait_s=wait_s, clock=self.clock)

    def remove(self) -> None:
        """Give up the node's folder, and the run's with its last node. What is mapped stays until processes end."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # other nodes' folders
            self.path.parent.rmdir()

    def make_again(self, lock: NodeLock) -> None:
        """Put back what makes the folder this node's, after somebody deleted it. ``StoreError`` where that fails."""
        try:
            _make_folder(self.path)
            (self.path / NODE_MARKER).write_text(self.key)
            lock.renew()
        except OSError as error:
            raise StoreError(f"the store {self.path} cannot be made again: {error.strerror}") from error


def store_folder(config: MoetionConfig) -> Path:
    """The store's folder on this machine: as set, else in shared memory, one folder a user."""
    return Path(config.store or f"/dev/shm/moetion-{os.getuid()}")


def run_id_of(config: MoetionConfig, environment: Mapping[str, str]) -> str:
    """The run's name: the flag, else the SLURM job, else a real torchrun id; ``ConfigError`` without one."""
    found = _named(config, environment) or _elastic(environment)
    if not found:
        raise ConfigError(
            "this run has no name that a restart would share: give --moetion-run-id (neither SLURM_JOB_ID nor a "
            "torchrun --rdzv-id is set)"
        )
    if len(found.encode()) > RUN_ID_BYTES_MAX:
        raise ConfigError(
            f"--moetion-run-id has {len(found.encode())} bytes ({found[:20]}...); it names a folder, so it must not "
            f"have more than {RUN_ID_BYTES_MAX}: give a shorter one"
        )
    if "/" in found or found.startswith("."):
        raise ConfigError(
            f"--moetion-run-id is {found!r}; it names a folder, so it must not hold / or start with a dot"
        )
    return found


def is_found_again(config: MoetionConfig, environment: Mapping[str, str]) -> bool:
    """Whether another launch of this run would have its name: not where ``torchrun`` has made one up."""
    return bool(_named(config, environment)) or not _MADE_UP.fullmatch(_elastic(environment))


def _named(config: MoetionConfig, environment: Mapping[str, str]) -> str:
    return config.run_id or environment.get("SLURM_JOB_ID", "")


def _elastic(environment: Mapping[str, str]) -> str:
    found = environment.get("TORCHELASTIC_RUN_ID", "none")
    return "" if found == "none" else found


def restart_count(environment: Mapping[str, str]) -> int:
    """How often a supervisor has restarted this process's job, as far as this process can know."""
    return max(int(environment.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def open_node(
    config: MoetionConfig, run_id: str, environment: Mapping[str, str], world_size: int, clock: Clock
) -> NodeFolder:
    """Make this node's folder if it is not there. Raises ``StoreError`` where that cannot be done."""
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    local_size = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    per_node = config.ranks_per_node or local_size
    if world_size % per_node or local_size % per_node:
        raise ConfigError(
            f"--moetion-ranks-per-node {per_node} does not divide the {world_size} ranks of the run and the "
            f"{local_size} of this machine into whole nodes"
        )
    path = store_folder(config) / run_id / f"node{local_rank // per_node}"
    try:
        _make_folder(path)
        probe = path / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
        key = _key(path)
    except OSError as error:
        raise StoreError(
            f"the store {path} cannot be written: {error.strerror}; choose another with --moetion-store"
        ) from error
    return NodeFolder(path=path, key=key, position=local_rank % per_node, num_ranks=per_node, clock=clock)


def _make_folder(path: Path) -> None:
    """The node's folder and the run's above it, for this user alone. ``StoreError`` where either is another user's."""
    store = path.parent.parent
    store.mkdir(parents=True, exist_ok=True, mode=0o755)
    status = store.stat()
    if status.st_uid not in (0, os.geteuid()) or (status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX):
        raise StoreError(
            f"{store} belongs to user {status.st_uid} and has mode {stat.S_IMODE(status.st_mode):o}: others could "
            f"put a folder in the place of this run's. Choose another place with --moetion-store, or take the right to "
            f"write there from others (chmod o-w)"
        )
    for folder in (path.parent, path):
        folder.mkdir(exist_ok=True, mode=0o700)
        status = folder.lstat()
        if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
            raise StoreError(
                f"{folder} belongs to user {status.st_uid}, or is a link, and this process is user {os.geteuid()}: "
                f"state in it would be in strange hands; choose another place with --moetion-store"
            )


def write_pid(node: NodeFolder, rank: int, attempt: int) -> None:
    """Leave this process's id where an operator, or a test, finds it. ``StoreError`` where that fails."""
    scratch = node.path / f".rank{rank:05d}.pid.{os.getpid()}"
    path = node.path / f"rank{rank:05d}.pid"
    try:
        scratch.write_text(json.dumps({"pid": os.getpid(), "rank": rank, "attempt": attempt}))
        try:
            scratch.rename(path)
        except OSError:
            clear(path)
            scratch.rename(path)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error.strerror}. If somebody has deleted the store as this run started, start "
            f"it again; else choose another with --moetion-store"
        ) from error


def _key(path: Path) -> str:
    """A name that lives and dies with the folder's memory, so that a replaced node is a new node."""
    marker = path / NODE_MARKER
    scratch = path / f".node.id.{os.getpid()}"
    scratch.write_text(uuid.uuid4().hex)
    try:
        for _ in range(2):
            with suppress(FileExistsError):
                os.link(scratch, marker)  # atomic: the first rank of the node wins
            try:
                with open(open_regular(marker, os.O_RDONLY), "rb") as found:
                    key = found.read(_KEY_BYTES_MAX + 1)
                if _KEY.fullmatch(key):
                    return key.decode()
            except CorruptArena:
                pass
            clear(marker)  # something else stands under the name
    finally:
        scratch.unlink()
    raise StoreError(f"{marker} is made something else than a file again and again; who does that?")
