# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM's names for checkpoints on disk, the file that names the newest, and how a new one comes to be there."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from megatron_moetion.errors import ConfigError

TRACKER = "latest_checkpointed_iteration.txt"
_TRACKER_BYTES_MAX = 64
_NUMBER = re.compile(r"[0-9]{1,18}")
DRAFT, _REPLACED, _TRASH = ".draft", ".replaced", ".removed"


def checkpoint_folder(root: str, iteration: int) -> Path:
    """Megatron-LM's name for the checkpoint of one iteration."""
    return Path(root) / f"iter_{iteration:07d}"


def latest_iteration(root: str) -> int | None:
    """The iteration that the tracker file names, or None without one."""
    tracker = Path(root) / TRACKER
    if not tracker.is_file():
        return None
    with tracker.open("rb") as file:
        text = file.read(_TRACKER_BYTES_MAX).decode(errors="replace").strip()
    if not _NUMBER.fullmatch(text):
        raise ConfigError(f"{tracker} holds {text!r}; it must hold the number of an iteration")
    return int(text)


def write_tracker(root: Path, iteration: int) -> None:
    """Name the newest checkpoint below ``root``, durably: the file is either the old one or the new one."""
    temporary = root / f".{TRACKER}.{os.getpid()}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(str(iteration))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(root / TRACKER)
    make_durable(root)


def publish(folder: Path, root: Path, iteration: int, *, is_newest: bool = True) -> None:
    """Give a complete checkpoint its name, then name it the newest. ``folder`` lies in ``root``, under another name.

    Whoever reads finds what the tracker file names complete. A checkpoint of the same name is replaced; for a moment,
    and after a crash in it until the next ``Draft``, neither of the two is there.
    """
    target = checkpoint_folder(str(root), iteration)
    old = target.with_name(f".{target.name}{_REPLACED}")
    with suppress(FileNotFoundError):
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        with suppress(OSError):
            old.rename(target)
        raise
    make_durable(root)
    if is_newest:
        write_tracker(root, iteration)
    shutil.rmtree(old, ignore_errors=True)


def clear_drafts(root: Path, but: Path | None = None) -> None:
    """Remove what processes that were killed have left; a living one holds a lock on its own folder.

    A checkpoint that was about to be replaced gets its name back. ``but``: a folder that stays in any case.
    """
    for left in root.glob(f".iter_*{DRAFT}"):  # nothing where there is no such folder
        if left != but:
            _remove_unless_held(left)
    for left in root.glob(f".iter_*{_TRASH}"):
        shutil.rmtree(left, ignore_errors=True)
    for left in root.glob(f".iter_*{_REPLACED}"):
        target = root / left.name.removeprefix(".").removesuffix(_REPLACED)
        if target.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(target)


class Draft:
    """A folder below ``root`` in which a checkpoint is written; ``publish`` makes it one, leaving removes it otherwise.

    What processes that were killed have left is removed first: see ``clear_drafts``.
    """

    def __init__(self, root: Path, iteration: int) -> None:
        self._root, self._iteration = root, iteration
        self._descriptor = -1
        name = checkpoint_folder("", iteration).name
        self.folder = root / f".{name}.{secrets.token_hex(4)}{DRAFT}"
        """Exists from entering on."""

    def __enter__(self) -> Draft:
        self._root.mkdir(parents=True, exist_ok=True)
        clear_drafts(self._root)
        self.folder.mkdir()
        self._descriptor = os.open(self.folder, os.O_RDONLY)
        with suppress(OSError):  # not every network file system has locks; there, nobody else gets one either
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._descriptor)

    def publish(self) -> None:
        """See ``publish``."""
        publish(self.folder, self._root, self._iteration)


def make_durable(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_unless_held(folder: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # On some file systems a lock is seen on its own node only: under another name nobody makes it a checkpoint.
            trash = folder.with_name(f"{folder.name}{_TRASH}")
            folder.rename(trash)
            shutil.rmtree(trash)
        finally:
            os.close(descriptor)
