# SPDX-License-Identifier: Apache-2.0
"""Removing a run from a store, if nobody uses it."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from contextlib import ExitStack
from pathlib import Path

from megatron_moetion.clock import Clock
from megatron_moetion.errors import StoreError
from megatron_moetion.inspect.look import NodeFiles, processes_naming, users_in_words, words_of
from megatron_moetion.store.lock import NodeLock

_ASIDE = ".removed-"
"""Names of runs begin with no dot, so nobody takes such a folder for one."""


def why_not(folder: Path, nodes: list[NodeFiles]) -> str | None:
    """Why a run must stay: who uses it, or whose it is. None where it may go."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is a link"
    if status.st_uid != os.geteuid():
        return f"{folder} belongs to user {status.st_uid}; only that user may remove it with this command"
    users = sorted({pid for node in nodes for pid in node.processes})
    if users:
        return f"it is in use by {users_in_words(users)}"
    named = processes_naming(folder.name)
    if named:
        return f"{words_of(named[0])} was started with its name, and may be about to start it again"
    return None


def remove(folder: Path, clock: Clock) -> None:
    """Remove a run's folder and all that is in it. ``StoreError`` where somebody uses it, or a file cannot be removed.

    The locks of its nodes are held meanwhile, and the folder is moved aside first: a run that starts at this moment
    begins in a new folder, or finds the lock taken.
    """
    with ExitStack() as locks:
        aside = folder.with_name(f"{_ASIDE}{uuid.uuid4().hex}")
        try:
            for node in sorted(folder.iterdir()):
                if node.is_dir() and not node.is_symlink():
                    locks.callback(NodeLock.take(node, 0, 1, wait_s=0, say=lambda text: None, clock=clock).close)
            folder.rename(aside)
        except OSError as error:
            raise StoreError(f"{folder} cannot be removed: {error.strerror}") from error
        _remove_tree(aside)


def remove_leftovers(store: Path) -> None:
    """What removals that were cut short have left of this user's in a store."""
    for left in store.glob(f"{_ASIDE}*"):
        if left.lstat().st_uid == os.geteuid() and not left.is_symlink():
            _remove_tree(left)


def _remove_tree(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:  # another process is at it
        pass
    except OSError as error:
        raise StoreError(f"{error.filename or folder} cannot be removed: {error.strerror}") from error
